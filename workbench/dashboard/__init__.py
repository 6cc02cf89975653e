"""The Streamlit dashboard: a read-only view of the records, and an export button.

app.py          the page map
pages/          one file a page: what is where, nothing else
components.py   what pages are made of; the only other module that draws
charts.py       plain data → plotly figure
strips.py       layouts as coloured strips
quantities.py   figures with names, units and directions, for people
reading.py      records, damaged ones set aside
links.py        which study and trial a page shows, and how to get there
"""
