"""What pages are made of: the only module beside the pages that draws."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import streamlit as st

from workbench.dashboard import links, tables
from workbench.dashboard.quantities import Quantity
from workbench.dashboard.reading import CachedStudy
from workbench.dashboard.strips import UNKNOWN, legend_html, palette, strip_html, strip_width
from workbench.description_text import short_pattern
from workbench.errors import WorkbenchError
from workbench.layout import Layout
from workbench.records import OUTCOMES, Trial, runs_folder

REFRESH_SECONDS = 2.0
ROW = 35  # pixels of a row of a data frame
PICKER_GLYPHS = 16  # of a pattern in the trial picker; a longer one has its repeats counted
STRIP_SCALE = 1.3  # a data frame draws images as high as its rows
OUTCOME_COLOURS = {
    "complete": "green",
    "running": "blue",
    "duplicate": "gray",
    "interrupted": "gray",
    "infeasible": "orange",
    "stopped": "violet",
}


def live(draw: Callable[[], None], *, running: bool) -> None:
    """Draw a part of a page; while something runs, draw that part again and again."""
    st.fragment(draw, run_every=REFRESH_SECONDS if running else None)()


def damaged_studies(messages: Sequence[str]) -> None:
    """Name the studies that could not be read, if any."""
    if messages:
        listed = "\n".join(f"- {message}" for message in messages)
        st.warning(f"Left out:\n{listed}", icon=":material/warning:")


def no_studies() -> None:
    """What to do when the runs folder holds nothing."""
    st.info(
        f"No studies in `{runs_folder().resolve()}` yet. Start one, and reload this page:",
        icon=":material/info:",
    )
    st.code("workbench run studies/quickstart.toml", language="bash")


def outcome_badges(outcomes: Mapping[str, int]) -> None:
    """A badge an outcome with its count, in one line."""
    with st.container(horizontal=True, gap="small"):
        for outcome in OUTCOMES:
            if outcome in outcomes:
                outcome_badge(outcome, f"{outcomes[outcome]} {outcome.replace('_', ' ')}")


def outcome_badge(outcome: str, text: str | None = None) -> None:
    """A badge in the outcome's colour that explains itself on hover."""
    st.badge(
        text or outcome.replace("_", " "),
        color=OUTCOME_COLOURS.get(outcome, "red"),
        help=OUTCOMES[outcome],
    )


def layer_colours(study: CachedStudy) -> dict[str, str]:
    """The colours of a study's layer types."""
    return palette(study.layer_names.values(), study.mlps)


def layer_legend(study: CachedStudy, colours: Mapping[str, str]) -> None:
    """Which glyph and colour is which layer type."""
    glyphs = {name: glyph for glyph, name in study.layer_names.items()}
    st.html(legend_html(glyphs, colours))


def layout_strip(layout: Layout, study: CachedStudy) -> None:
    """A layout as a strip that names each block under the pointer."""
    glyphs = {name: glyph for glyph, name in study.layer_names.items()}
    colours = layer_colours(study)
    titles = [f"{index}: {block.layer}" for index, block in enumerate(layout.blocks)]
    fills = [colours.get(block.layer, UNKNOWN) for block in layout.blocks]
    st.html(strip_html(layout.pattern(glyphs), fills, titles))


def selected_row(
    frame: Any, key: str, column_config: Mapping[str, Any], rows_shown: int = 12
) -> int | None:
    """Show a table; the position of the row that the user clicked into, if any."""
    event = st.dataframe(
        frame,
        key=key,
        hide_index=True,
        column_config=dict(column_config),
        placeholder="–",
        on_select="rerun",
        selection_mode=["single-row", "single-cell"],
        height=ROW * (min(len(frame), rows_shown) + 1) + 3,
    )
    selection = event["selection"]
    rows = [*selection["rows"], *(row for row, _ in selection["cells"])]
    return rows[0] if rows and rows[0] < len(frame) else None


def strip_column(patterns: Iterable[str]) -> int:
    """The width in pixels of a column that shows the strips of these patterns whole."""
    widest = max((strip_width(len(pattern)) for pattern in patterns), default=0.0)
    return max(80, round(widest * STRIP_SCALE) + 24)


def metric_columns(headings: Mapping[str, Quantity]) -> dict[str, Any]:
    """How a table shows its metrics: four digits, whole numbers for counts."""
    whole = ("parameters", "FLOPs", "FLOPs/token", "layers")
    return {
        heading: st.column_config.NumberColumn(
            format="localized" if quantity.unit in whole else "%.4g",
            help=_direction(quantity),
        )
        for heading, quantity in headings.items()
    }


def _direction(quantity: Quantity) -> str | None:
    if quantity.direction is None:
        return None
    return f"objective: {quantity.direction}"


def figure_cards(trial: Trial, metrics: Sequence[Quantity], extras: Mapping[str, float]) -> None:
    """A card a metric; objectives are marked, and what was recorded beside it is on hover."""
    with st.container(horizontal=True, gap="small"):
        for quantity in metrics:
            beside = tables.extras_of(quantity.name, extras)
            lines = [_direction(quantity) or "reported beside the objectives"]
            lines += [f"{name}: {value:.4g}" for name, value in beside.items()]
            st.metric(
                f"{'◆ ' if quantity.direction else ''}{quantity.name}",
                quantity.text(trial.metrics[quantity.name]),
                border=True,
                width="content",
                help="  \n".join(lines),
            )


def commands(trial: Trial, *, with_layout: bool, with_weights: bool) -> None:
    """The command lines that do what this page does."""
    runs = runs_folder().resolve()
    lines = [f"workbench show {trial.name}"]
    if with_layout:
        lines.append(f"workbench describe {trial.name}")
    if with_weights:
        lines.append(f"workbench export {trial.name} {shlex.quote(export_folder(trial))}")
    if runs != Path("runs").resolve():
        lines.insert(0, f"export WORKBENCH_RUNS={shlex.quote(str(runs))}")
    st.code("\n".join(lines), language="bash", wrap_lines=True)


def export_folder(trial: Trial) -> str:
    """The folder that an export goes to unless the user names another."""
    return f"exported/{trial.study}-{trial.number}"


def export_form(trial: Trial) -> None:
    """Ask where to, export, and show the report or what went wrong."""
    with st.form("export"):
        folder = st.text_input(
            "New folder for the Hugging Face model",
            export_folder(trial),
            help=f"Relative to {Path.cwd()}, on the machine that serves this page.",
        )
        wanted = st.form_submit_button("Export and prove", icon=":material/ios_share:")
    if not wanted:
        return
    if not folder.strip():
        st.error("Name a new folder to export to.")
        return
    out = Path(folder.strip()).expanduser().resolve()
    from workbench.export import export_trial  # torch, for those who export

    try:
        with st.spinner("Exporting, then reloading in a fresh process to compare logits …"):
            report = export_trial(trial, out)
    except WorkbenchError as error:
        st.error(str(error))
        return
    st.success(
        f"{len(report.files)} files in `{report.path}`. Logits of a fresh process differ by at "
        f"most {report.max_difference:.2g}."
    )
    st.code(
        "from transformers import AutoModelForCausalLM\n"
        f'AutoModelForCausalLM.from_pretrained("{report.path}", trust_remote_code=True)',
        language="python",
    )


def choose_study(studies: Sequence[CachedStudy]) -> None:
    """A button for each study."""
    st.markdown("Choose a study:")
    with st.container(horizontal=True):
        for study in studies:
            if st.button(study.name, key=f"choose-{study.name}"):
                links.open_study(study.name)


def choose_trial(study: CachedStudy) -> None:
    """Ways to a trial of a study."""
    front = study.front_trials()
    st.markdown(
        f"Choose a trial of {study.name}'s Pareto front, or one in the study's table:"
        if front
        else f"Study {study.name} has no complete trial yet; its table lists all that began:"
    )
    with st.container(horizontal=True):
        for trial in front:
            if st.button(f"Trial {trial.number}", key=f"choose-{trial.number}"):
                links.open_trial(study.name, trial.number)
        if st.button(f"Study {study.name}", icon=":material/scatter_plot:"):
            links.open_study(study.name)


def study_picker(study: CachedStudy, studies: Sequence[CachedStudy]) -> None:
    """A way from one study to another."""
    names = [other.name for other in studies]
    if len(names) < 2:
        return
    key = f"pick-study-{study.name}"
    picked = st.selectbox(
        "Study", names, index=names.index(study.name), key=key, label_visibility="collapsed"
    )
    if picked != study.name:
        links.open_study(picked)


def trial_picker(trial: Trial, study: CachedStudy) -> None:
    """A way from one trial to another."""
    labels = {t.number: _label(t) for t in study.trials()}
    numbers = list(labels)
    key = f"pick-trial-{trial.name}"
    picked = st.selectbox(
        "Trial",
        numbers,
        index=numbers.index(trial.number),
        format_func=labels.get,
        key=key,
        label_visibility="collapsed",
    )
    if picked != trial.number:
        links.open_trial(study.name, picked)


def _label(trial: Trial) -> str:
    pattern = short_pattern(trial.pattern, PICKER_GLYPHS)
    return " · ".join(filter(None, (str(trial.number), trial.outcome.replace("_", " "), pattern)))


def machine(trial: Trial) -> str:
    """Where a trial's figures were measured, in words."""
    facts = trial.environment
    versions = facts.get("versions", {})
    threads = f", CPU threads: {facts['threads']}" if "threads" in facts else ""
    device = f"{facts.get('device_name', 'an unrecorded device')} ({facts.get('device', '?')}"
    parts = [f"{device}{threads})"]
    parts += [
        f"{name} {versions[name]}" for name in ("torch", "lm-workbench") if versions.get(name)
    ]
    return ", ".join(parts)
