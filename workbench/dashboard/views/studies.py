"""All studies of the runs folder."""

from __future__ import annotations

import streamlit as st

from workbench.dashboard import links
from workbench.dashboard.charts import pareto_figure
from workbench.dashboard.components import damaged_studies, live, no_studies, selected_row
from workbench.dashboard.quantities import default_axes, quantities
from workbench.dashboard.reading import CachedStudy, read_studies
from workbench.dashboard.tables import point_table, study_table
from workbench.records import runs_folder

PREVIEWS = 4


def page() -> None:
    """Every study, and the fronts of the latest."""
    studies, _ = read_studies()
    st.title("Studies", anchor=False)
    st.caption(f"Architecture searches recorded in `{runs_folder().resolve()}`")
    live(listing, running=any(study.is_running for study in studies))


def listing() -> None:
    """The table and the previews."""
    studies, damaged = read_studies()
    damaged_studies(damaged)
    if not studies:
        no_studies()
        return
    row = selected_row(study_table(studies), "studies", {})
    st.caption("Click a row to open its study.")
    if row is not None:
        links.open_study(studies[row].name)
    latest = sorted(studies, key=lambda study: study.changed, reverse=True)[:PREVIEWS]
    for left in range(0, len(latest), 2):
        row_of = latest[left : left + 2]
        for column, study in zip(st.columns(len(row_of)), row_of, strict=True):
            with column.container(border=True):
                preview(study)


def preview(study: CachedStudy) -> None:
    """One study at a glance."""
    st.subheader(study.name, anchor=False)
    if study.data.get("description"):
        st.caption(study.data["description"])
    points = point_table(study)
    if len(points):
        figure = pareto_figure(points, *default_axes(quantities(study)))
        figure.update_layout(height=360)
        st.plotly_chart(figure, key=f"preview-{study.name}")
    if st.button("Open", key=f"open-{study.name}", icon=":material/arrow_forward:"):
        links.open_study(study.name)


page()
