"""The funnel of a study: how many trials entered each stage, how they left it, what it took.

Computed from records alone. The stages are in the order of their price: `static`, `measured`,
`synthetic`, a `rung` for each of the study's, `trained` (the rest of the training) and `quantized`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from workbench.metric import UNTRAINED
from workbench.records import Study, Trial


@dataclasses.dataclass
class FunnelStage:
    """One stage.

    Attributes:
        name: for people.
        entered: trials that came to it; one that runs again after a fault counts again.
        left: how many of them went no further, by outcome; `running` ones are still in it.
        seconds: that all of them together spent in it.
    """

    name: str
    entered: int = 0
    left: dict[str, int] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    @property
    def passed(self) -> int:
        """Trials that went on to the next stage; of the last one, complete trials."""
        return self.entered - sum(self.left.values())

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "passed": self.passed}


def study_funnel(study: Study) -> list[FunnelStage]:
    """The funnel of a study as its records stand now."""
    shares = study.data.get("config", {}).get("rungs", {}).get("at", ())
    return funnel(study.trials(), set(study.data.get("stages", {}).values()), shares)


def funnel(
    trials: Iterable[Trial], stages: Iterable[str], shares: Sequence[float]
) -> list[FunnelStage]:
    """The funnel of some trials of one study.

    Args:
        stages: those that the study's metrics belong to; only `measured` and `synthetic` may be
            left out.
        shares: of its rungs.
    """
    used = {*stages, "static", "trained", "quantized"}
    rungs = [f"rung {share:.3g}" for share in shares]
    order = [*UNTRAINED, *rungs, "trained", "quantized"]
    found = {name: FunnelStage(name) for name in order if name in used or name in rungs}
    for trial in trials:
        if trial.outcome != "damaged":
            _add(trial.data, found, rungs)
    return list(found.values())


def _add(record: Mapping[str, Any], found: dict[str, FunnelStage], rungs: list[str]) -> None:
    last = _last_stage(record, rungs)
    carried = record.get("carried_rungs", 0)  # of the trial that this one repeats
    skipped = {*UNTRAINED[1:], *rungs[:carried]} if carried else set()
    for name, stage in found.items():
        if name in skipped:
            continue
        stage.entered += 1
        if name == last and record["outcome"] != "complete":
            outcome = record["outcome"]
            stage.left[outcome] = stage.left.get(outcome, 0) + 1
        if name == last:
            break
    for name, seconds in _seconds(record, rungs, last).items():
        if name in found:
            found[name].seconds += seconds


def _last_stage(record: Mapping[str, Any], rungs: list[str]) -> str:
    """The stage that a trial is in, or ended in."""
    spent = record.get("stage_seconds", {})
    stage = record.get("stage")
    if stage is None:
        dear = ("quantized", "trained", "training", *reversed(UNTRAINED))
        stage = next((name for name in dear if name in spent), "static")
    if stage != "training":
        return str(stage)
    passed = len(record.get("rungs", ()))
    if record["outcome"] == "stopped":
        passed -= 1  # the rung that it did not pass
    return rungs[passed] if passed < len(rungs) else "trained"


def _seconds(record: Mapping[str, Any], rungs: list[str], last: str) -> dict[str, float]:
    """Seconds by stage of this trial's own work; what a killed stage took, to that stage."""
    spent = dict(record.get("stage_seconds", {}))
    known = sum(spent.values())
    own = list(enumerate(record.get("rungs", ())))[record.get("carried_rungs", 0) :]
    found = {rungs[index]: float(rung["seconds"]) for index, rung in own}
    paused = sum(found.values())
    found |= {name: spent.get(name, 0.0) for name in (*UNTRAINED, "quantized")}
    whole = sum(spent.get(name, 0.0) for name in ("training", "rungs", "trained"))
    rest = "trained" if last in ("trained", "quantized") else last
    found[rest] = found.get(rest, 0.0) + max(0.0, whole - paused)
    if "stage" in record:
        found[last] = found.get(last, 0.0) + max(0.0, record.get("seconds", 0.0) - known)
    return found
