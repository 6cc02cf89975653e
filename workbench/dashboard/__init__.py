"""The Streamlit dashboard: a read-only view of the records, and an export button.

    app.py          the page map
    views/          one file a page: what is where, nothing else
    components.py   what pages are made of; the only other module that draws
    charts.py       plain data → plotly figure
    strips.py       layouts as coloured strips
    tables.py       records → data frames
    quantities.py   metrics with their units, directions and origins
    reading.py      records, read once a change
    links.py        which study and trial a page shows, and how to get there

Nothing here imports torch until somebody exports.
"""
