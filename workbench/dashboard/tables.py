"""Records → the tables that pages show, as data frames. No Streamlit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from workbench.dashboard.quantities import Quantity
from workbench.dashboard.strips import data_uri, pattern_svg
from workbench.funnel import study_funnel
from workbench.layout import Layout
from workbench.space_blocks import stored_as

if TYPE_CHECKING:
    import pandas as pd

    from workbench.dashboard.reading import CachedStudy
    from workbench.intervals import ConfirmedTrial
    from workbench.records import Trial

NO_BREAK = "\N{NO-BREAK SPACE}"
QUANTIZER = "quantizer"  # the column of what stores the weights


def study_table(studies: Sequence[CachedStudy]) -> pd.DataFrame:
    """A row a study: its objectives and how many of its trials ended how."""
    import pandas as pd

    rows = []
    for study in studies:
        outcomes = study.summary()["outcomes"]
        others = {name: count for name, count in outcomes.items() if name != "complete"}
        rows.append(
            {
                "study": study.name,
                "objectives": ", ".join(objective.name for objective in study.objectives),
                "on the front": len(study.front_trials()),
                "complete": outcomes.get("complete", 0),
                "other outcomes": counted(others),
            }
        )
    return pd.DataFrame(rows)


def counted(outcomes: Mapping[str, int]) -> str:
    """Counts in words: `2 infeasible, 1 out of memory`."""
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in outcomes.items())


def point_table(study: CachedStudy) -> pd.DataFrame:
    """A row a complete trial, by number: metrics as recorded, `front`, `pattern` and `trial`."""
    frame = study.frame()
    frame = frame[frame["outcome"] == "complete"]
    front = {trial.number for trial in study.front_trials()}
    return frame.assign(front=[number in front for number in frame.index], trial=frame.index)


def trial_table(
    study: CachedStudy,
    trials: Iterable[Trial],
    metrics: Mapping[str, Quantity],
    colours: Mapping[str, str],
) -> tuple[pd.DataFrame, dict[str, Quantity]]:
    """A row a trial, and which columns are metrics.

    Metrics stand in the unit that their heading names. What a trial does not have is missing, and
    columns that no trial has are left out.
    """
    import pandas as pd

    trials = list(trials)
    front = {trial.number for trial in study.front_trials()}
    confirmed = {point.number: point for point in study.confirmed()}
    headings, divisors = {}, {}
    for name, quantity in metrics.items():
        values = [abs(trial.metrics[name]) for trial in trials if name in trial.metrics]
        divisors[name], unit = quantity.scale(max(values, default=0.0))
        headings[quantity.heading(unit)] = quantity
    rows = []
    for trial in trials:
        row: dict[str, Any] = {
            "trial": trial.number,
            "front": "◆" if trial.number in front else "",
            "layout": data_uri(pattern_svg(trial.pattern, study.layer_names, colours))
            if trial.pattern
            else None,
        }
        row["outcome"] = trial.outcome.replace("_", " ")
        row[QUANTIZER] = stored_as(trial.params)
        for heading, quantity in headings.items():
            value = trial.metrics.get(quantity.name)
            row[heading] = None if value is None else value / divisors[quantity.name]
        row |= confirmed_cells(confirmed.get(trial.number), metrics)
        row["seconds"] = trial.data.get("seconds")
        row["reason"] = trial.reason or None
        rows.append(row)
    return pd.DataFrame(rows).dropna(axis="columns", how="all"), headings


def confirmed_cells(
    point: ConfirmedTrial | None, metrics: Mapping[str, Quantity]
) -> dict[str, str | None]:
    """What training with other seeds found: `mean ± half`, and who cannot be ranked against it."""
    if point is None:
        return {}
    cells: dict[str, str | None] = {
        f"{name}, confirmed": found.text(metrics[name].unit)
        for name, found in point.intervals.items()
    }
    return {**cells, "unresolved with": point.unresolved_text or None}


def funnel_table(study: CachedStudy) -> pd.DataFrame:
    """A row a stage: trials that came, went on and left by outcome, and the seconds of all."""
    import pandas as pd

    return pd.DataFrame(
        [
            {
                "stage": stage.name,
                "entered": stage.entered,
                "passed": stage.passed,
                "left": counted(stage.left),
                "seconds": f"{stage.seconds:,.1f}",
            }
            for stage in study_funnel(study)
        ]
    )


def rung_table(trial: Trial) -> pd.DataFrame:
    """A row a rung that the trial reached, with its figures and what was decided."""
    import pandas as pd

    return pd.DataFrame(
        [
            {"step": rung["step"], **rung["metrics"], "decision": rung["decision"]}
            for rung in trial.data.get("rungs", ())
        ]
    )


def block_table(layout: Layout) -> pd.DataFrame:
    """A row for each different block: where it stands, its layer, how it is stored, its Config."""
    import pandas as pd

    places: dict[tuple[str, str, str], list[int]] = {}
    for index, block in enumerate(layout.blocks):
        stored = "as trained"
        if block.quantizer is not None:
            stored = f"{block.quantizer.name} {settings(block.quantizer.config)}".strip()
        places.setdefault((block.layer, stored, settings(block.config)), []).append(index)
    rows = [
        {
            "blocks": ", ".join(map(str, indices)),
            "layer": layer,
            "stored": stored.replace(" ", NO_BREAK),
            "config": config,
        }
        for (layer, stored, config), indices in places.items()
    ]
    return pd.DataFrame(rows)


def settings(config: Mapping[str, Any]) -> str:
    """A Config's values on one line, without those that are left to be derived."""
    return ", ".join(
        f"{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in config.items()
        if value is not None
    )


def pairs_table(pairs: Mapping[str, Any], key: str, value: str) -> pd.DataFrame:
    """Two columns of text."""
    import pandas as pd

    return pd.DataFrame(
        {key: list(pairs), value: ["–" if item is None else str(item) for item in pairs.values()]}
    )


def environment_facts(environment: Mapping[str, Any]) -> dict[str, Any]:
    """An environment's facts on one level, without the packages that were not installed."""
    facts = {name: value for name, value in environment.items() if name != "versions"}
    versions = environment.get("versions", {})
    facts.update({name: version for name, version in versions.items() if version is not None})
    return {name: value for name, value in facts.items() if value is not None}


def extras_of(name: str, extras: Mapping[str, float]) -> dict[str, float]:
    """What a metric recorded beside its own figure, by the part of the name after its own."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): extras[key] for key in extras if key.startswith(prefix)}
