"""One study: its Pareto front and its trials."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from workbench.dashboard import components, links, tables
from workbench.dashboard.charts import pareto_figure
from workbench.dashboard.quantities import TRIAL, Quantity, default_axes, quantities
from workbench.dashboard.reading import CachedStudy, read_studies, read_study
from workbench.errors import WorkbenchError

FRONT = "Pareto front"
CHART_HEIGHT = 470


def page() -> None:
    """Find the study, then draw it."""
    studies, damaged = read_studies()
    components.damaged_studies(damaged)
    if not studies:
        st.title("Study", anchor=False)
        components.no_studies()
        return
    try:
        study = links.chosen_study(studies)
    except WorkbenchError as error:
        st.title("Study", anchor=False)
        st.error(str(error))
        study = None
    if study is None:
        components.choose_study(studies)
        return
    links.remember(study)
    heading(study, studies)
    chart, side = st.columns([7, 3], gap="medium")
    with side:
        axes = pick_axes(quantities(study))
        components.live(lambda: best(study.name), running=study.is_running)
    with chart:
        components.live(lambda: front(study.name, *axes), running=study.is_running)
    trials(study)
    with st.expander("Funnel: what became of trials, stage by stage"):
        components.live(lambda: funnel(study.name), running=study.is_running)


def heading(study: CachedStudy, studies: Sequence[CachedStudy]) -> None:
    """What the study is, and a way to another one."""
    left, right = st.columns([7, 3], gap="medium", vertical_alignment="center")
    with left:
        st.title(study.name, anchor=False)
        if study.data.get("description"):
            st.caption(study.data["description"])
    with right:
        components.study_picker(study, studies)
    components.live(lambda: status(study.name), running=study.is_running)


def status(name: str) -> None:
    """How many trials ended how, as of now."""
    study = read_study(name)
    outcomes = study.summary()["outcomes"]
    components.outcome_badges(outcomes)
    # What stands outside the live parts (the filter) must hear of a new outcome, or of the end.
    before = st.session_state.get("outcomes")
    st.session_state["outcomes"] = (name, sorted(outcomes))
    if before is not None and before[0] == name and before[1] != sorted(outcomes):
        st.rerun()


def pick_axes(metrics: dict[str, Quantity]) -> tuple[Quantity, Quantity, Quantity | None]:
    """Two metrics to draw against each other and one for the colour."""
    options: dict[str, Quantity | None] = {**metrics, TRIAL.name: TRIAL}
    x, y, colour = default_axes(metrics)

    def pick(label: str, first: str, choices: Sequence[str]) -> str:
        return str(st.selectbox(label, choices, index=list(choices).index(first), key=label))

    names = list(options)
    chosen_y = options[pick("Vertical axis", y.name, names)]
    chosen_x = options[pick("Horizontal axis", x.name, names)]
    none = "–"
    chosen_colour = pick("Colour", colour.name if colour else none, [*names, none])
    assert chosen_x is not None
    assert chosen_y is not None
    return chosen_x, chosen_y, options.get(chosen_colour)


def front(name: str, x: Quantity, y: Quantity, colour: Quantity | None) -> None:
    """The chart; a click on a point opens its trial."""
    study = read_study(name)
    points = tables.point_table(study)
    if points.empty:
        st.info(
            "No trial is complete yet: the Pareto front appears with the first one. "
            "The table below says what became of the others.",
            icon=":material/info:",
        )
        return
    figure = pareto_figure(points, x, y, colour)
    figure.update_layout(height=CHART_HEIGHT)
    key = f"front-{x.name}-{y.name}-{colour.name if colour else ''}"
    event = st.plotly_chart(figure, key=key, on_select="rerun", selection_mode="points")
    for point in event["selection"]["points"]:
        if "customdata" in point:
            links.open_trial(study.name, int(point["customdata"][0]))


def best(name: str) -> None:
    """The best trial in each objective."""
    study = read_study(name)
    complete = [trial for trial in study.trials() if trial.outcome == "complete"]
    for quantity in quantities(study).values():
        if quantity.direction is None or not complete:
            continue
        trial = min(complete, key=lambda t: quantity.sign * t.metrics[quantity.name])
        with st.container(horizontal=True, vertical_alignment="bottom"):
            st.metric(f"Best {quantity.name}", quantity.text(trial.metrics[quantity.name]))
            key = f"best-{quantity.name}"
            if st.button(f"Trial {trial.number}", key=key, icon=":material/arrow_forward:"):
                links.open_trial(study.name, trial.number)


def funnel(name: str) -> None:
    """How many trials entered and left each stage, and what it took."""
    st.table(tables.funnel_table(read_study(name)).set_index("stage"))


def trials(study: CachedStudy) -> None:
    """Which trials to list, and the list."""
    outcomes = study.summary()["outcomes"]
    with st.container(horizontal=True, vertical_alignment="center", gap="medium"):
        st.subheader("Trials", anchor=False, width="content")
        shown = st.pills(
            "Show only",
            [FRONT, *outcomes],
            selection_mode="multi",
            format_func=lambda name: name.replace("_", " "),
            key=f"show-{study.name}",
            label_visibility="collapsed",
            help="What is listed below; everything if nothing is chosen.",
        )
    components.live(lambda: listing(study.name, shown), running=study.is_running)


def listing(name: str, shown: Sequence[str]) -> None:
    """The trial table; a click on a row opens its trial."""
    study = read_study(name)
    front_numbers = {trial.number for trial in study.front_trials()}
    listed = [
        trial
        for trial in study.trials()
        if not shown or trial.outcome in shown or (FRONT in shown and trial.number in front_numbers)
    ]
    if not listed:
        st.info("No trial to list." if shown else "No trial has begun yet.")
        return
    colours = components.layer_colours(study)
    components.layer_legend(study, colours)
    frame, headings = tables.trial_table(study, listed, quantities(study), colours)
    config = {
        "trial": st.column_config.NumberColumn(width=50),
        "front": st.column_config.TextColumn(width=50, help="◆ no other trial dominates it"),
        "layout": st.column_config.ImageColumn(
            width=components.strip_column(trial.pattern for trial in listed),
            alignment="left",
            help="one cell a block, from the input up",
        ),
        "seconds": st.column_config.NumberColumn(format="%.1f"),
        **components.metric_columns(headings),
    }
    row = components.selected_row(frame, f"trials-{'-'.join(shown)}", config)
    st.caption("Click a row here or a point in the chart to open its trial.")
    if row is not None:
        links.open_trial(study.name, listed[row].number)


page()
