"""One trial: its figures and where they were measured, its curve, its layout, and its export."""

from __future__ import annotations

import streamlit as st

from workbench.dashboard import components, links, tables
from workbench.dashboard.charts import curve_figure
from workbench.dashboard.quantities import quantities
from workbench.dashboard.reading import CachedStudy, curve_of, log_of, read_studies, read_study
from workbench.errors import WorkbenchError
from workbench.records import Trial

CURVE_HEIGHT = 330


def page() -> None:
    """Find the trial, then draw it."""
    studies, damaged = read_studies()
    components.damaged_studies(damaged)
    if not studies:
        st.title("Trial", anchor=False)
        components.no_studies()
        return
    trial = study = None
    try:
        study = links.chosen_study(studies)
        trial = links.chosen_trial(study) if study is not None else None
    except WorkbenchError as error:
        st.title("Trial", anchor=False)
        st.error(str(error))
    if study is None:
        components.choose_study(studies)
    elif trial is None:
        components.choose_trial(study)
    else:
        links.remember(study, trial)
        heading(trial, study)
        number, running = trial.number, trial.outcome == "running"
        components.live(lambda: judged(study.name, number), running=running)
        layout(trial, study)
        hand_over(trial)


def heading(trial: Trial, study: CachedStudy) -> None:
    """Which trial this is, and a way to the others."""
    left, right = st.columns([7, 3], gap="medium", vertical_alignment="center")
    with left:
        st.title(f"{trial.study} : {trial.number}", anchor=False)
    with right:
        components.trial_picker(trial, study)


def judged(name: str, number: int) -> None:
    """What came of it so far."""
    study = read_study(name)
    trial = study.trial(number)
    verdict(trial, study)
    figures(trial, study)
    left, right = st.columns([6, 4], gap="medium")
    with left:
        st.subheader("Training", anchor=False)
        training(trial)
    with right:
        st.subheader("Record", anchor=False)
        record(trial)
    if trial.outcome != "running" and st.session_state.get("was_running") == trial.name:
        del st.session_state["was_running"]
        st.rerun()
    if trial.outcome == "running":
        st.session_state["was_running"] = trial.name


def verdict(trial: Trial, study: CachedStudy) -> None:
    """How it ended and why."""
    on_front = any(other.number == trial.number for other in study.front_trials())
    with st.container(horizontal=True, vertical_alignment="center"):
        components.outcome_badge(trial.outcome)
        if on_front:
            st.badge("Pareto front", icon=":material/diamond:", color="violet")
        if trial.reason:
            st.markdown(trial.reason)
        original = trial.data.get("duplicate_of")
        if original is not None and st.button(f"Open trial {original}"):
            links.open_trial(trial.study, int(original))


def figures(trial: Trial, study: CachedStudy) -> None:
    """What is exact apart from what was measured, with the machine beside it."""
    known = [q for q in quantities(study).values() if q.name in trial.metrics]
    groups = {
        "Exact, from the layout": [q for q in known if q.stage == "static"],
        f"Measured on {components.machine(trial)}": [
            q for q in known if q.stage not in (None, "static")
        ],
        "Recorded": [q for q in known if q.stage is None],
    }
    present = {title: group for title, group in groups.items() if group}
    if not present:
        return
    widths = [len(group) for group in present.values()]
    for column, (title, group) in zip(st.columns(widths), present.items(), strict=True):
        with column:
            st.caption(title)
            components.figure_cards(trial, group, trial.data.get("extras", {}))


def training(trial: Trial) -> None:
    """The training curve."""
    try:
        curve = curve_of(trial)
    except WorkbenchError as error:
        st.error(str(error))
        return
    if curve.empty:
        st.info("This trial was not trained: no step is recorded.", icon=":material/info:")
        return
    figure = curve_figure(curve)
    figure.update_layout(height=CURVE_HEIGHT)
    st.plotly_chart(figure, key="curve")


def record(trial: Trial) -> None:
    """The rest of what its record says."""
    parts = {
        "Parameters": tables.pairs_table(trial.params, "parameter", "value"),
        "Environment": tables.pairs_table(
            tables.environment_facts(trial.environment), "fact", "value"
        ),
        "Stages": tables.pairs_table(
            {
                name: f"{seconds:.2f}"
                for name, seconds in trial.data.get("stage_seconds", {}).items()
            },
            "stage",
            "seconds",
        ),
    }
    if trial.data.get("rungs"):
        parts["Rungs"] = tables.rung_table(trial)
    log = log_of(trial)
    names = [*parts, *(["Log"] if log else [])]
    for name, tab in zip(names, st.tabs(names), strict=True):
        with tab:
            if name == "Log":
                st.code(log, language=None, height=CURVE_HEIGHT)
            elif parts[name].empty:
                st.caption("Nothing recorded.")
            else:
                st.dataframe(parts[name], hide_index=True)


def layout(trial: Trial, study: CachedStudy) -> None:
    """The strip, the blocks, and the layout as a file."""
    st.subheader("Layout", anchor=False)
    try:
        found = trial.layout
    except WorkbenchError as error:
        st.info(str(error), icon=":material/info:")
        return
    components.layout_strip(found, study)
    st.caption(
        f"{len(found.blocks)} blocks from the input up, d_model {found.d_model:,}, "
        f"vocabulary {found.vocab_size:,}, "
        f"{'tied' if found.tie_embeddings else 'untied'} embeddings, {found.norm}, "
        f"hash {found.hash}"
    )
    st.table(tables.block_table(found).set_index("blocks"))


def hand_over(trial: Trial) -> None:
    """Take the trial elsewhere."""
    left, right = st.columns([6, 4], gap="medium")
    try:
        weights, missing = trial.weights, ""
    except WorkbenchError as error:
        weights, missing = None, str(error)
    with left:
        st.subheader("Export", anchor=False)
        if weights is None:
            st.info(missing, icon=":material/info:")
        else:
            components.export_form(trial)
    with right:
        st.subheader("On the command line", anchor=False)
        file = trial.path / "layout.json"
        has_layout = file.exists()
        components.commands(trial, with_layout=has_layout, with_weights=weights is not None)
        if has_layout:
            st.download_button(
                "Layout as JSON",
                file.read_bytes(),
                file_name=f"{trial.study}-{trial.number}.json",
                mime="application/json",
                icon=":material/download:",
            )


page()
