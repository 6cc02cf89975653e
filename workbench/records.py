"""Records: what studies and trials left behind, read-only. All that people look at comes from here.

    runs/<study>/study.json          the study as it was started: its TOML, names and units resolved
    runs/<study>/optuna.db           Optuna's storage (samplers read it; people need not)
    runs/<study>/trials/00007/
        trial.json                   outcome, metrics, parameters, environment, stage times
        layout.json                  the resolved Layout
        curve.jsonl                  a line a recorded step: step, tokens, seconds, loss, lr
        model.safetensors            the weights as trained, before any quantizer
        log.txt                      what the worker printed

Neither torch nor Optuna is imported here; pandas only by the methods that give frames.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import UnknownNameError, WorkbenchError
from workbench.files import read_json
from workbench.layout import Layout
from workbench.pareto import pareto_front

if TYPE_CHECKING:
    import pandas as pd

    from workbench.intervals import ConfirmedTrial

OUTCOMES = {
    "complete": "judged in every stage",
    "duplicate": "the same layout as an earlier trial, whose figures it reuses",
    "stopped": "another trial dominated it at a rung; not trained to the end",
    "infeasible": "violates a constraint or cannot be built; rejected before its dear stages",
    "diverged": "its loss became NaN or infinite",
    "out_of_memory": "needed more memory than there is",
    "timeout": "took longer than budget.trial_timeout",
    "crashed": "its worker process died",
    "error": "a layer, metric or data source raised",
    "interrupted": "stopped by the user or with the whole run; runs again on resume",
    "running": "not finished",
    "damaged": "its record cannot be read",
}
RECORD = {
    "outcome": str,
    "metrics": dict,
    "params": dict,
    "environment": dict,
    "stage_seconds": dict,
    "rungs": list,
}


def runs_folder(runs: str | Path | None = None) -> Path:
    """The folder that holds all studies: the argument, `WORKBENCH_RUNS`, or `./runs`."""
    return Path(runs or os.environ.get("WORKBENCH_RUNS") or "runs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """A metric that a study optimizes, with the unit and direction that its plugin declared."""

    name: str
    unit: str
    direction: str

    @property
    def sign(self) -> float:
        """1 to minimize, -1 to maximize."""
        return 1.0 if self.direction == "minimize" else -1.0


class Trial:
    """One trial's record.

    Attributes:
        study: name of its study.
        number: as Optuna counts, from 0.
        path: its folder.
        data: the content of `trial.json`.

    Raises:
        WorkbenchError: `trial.json` cannot be read or is no trial's record; names the file.
    """

    def __init__(self, study: str, path: Path) -> None:
        self.study = study
        self.path = path
        self.number = int(path.name)
        self.data: dict[str, Any] = _record(path / "trial.json", ("outcome",), RECORD)
        if self.outcome not in OUTCOMES:
            raise _damaged(path / "trial.json", f"no outcome is called {self.outcome!r}")

    @classmethod
    def damaged(cls, study: str, path: Path, reason: str) -> Trial:
        """What stands for a trial whose record cannot be read, so that it hides no other."""
        trial = cls.__new__(cls)
        trial.study, trial.path, trial.number = study, path, int(path.name)
        trial.data = {"number": trial.number, "outcome": "damaged", "reason": reason}
        return trial

    def __repr__(self) -> str:
        return f"<Trial {self.name} {self.outcome} {self.pattern}>"

    @property
    def name(self) -> str:
        """`study:number`, as every command takes it."""
        return f"{self.study}:{self.number}"

    @property
    def outcome(self) -> str:
        """A key of `OUTCOMES`."""
        return str(self.data["outcome"])

    @property
    def reason(self) -> str:
        """Why it ended as it did; empty for a complete trial."""
        return str(self.data.get("reason", ""))

    @property
    def pattern(self) -> str:
        """One glyph a block; empty if no layout came about."""
        return str(self.data.get("pattern", ""))

    @property
    def params(self) -> dict[str, Any]:
        """What the sampler chose."""
        return dict(self.data.get("params", {}))

    @property
    def metrics(self) -> dict[str, float]:
        """Measured figures by metric name, in the metric's unit."""
        return dict(self.data.get("metrics", {}))

    @property
    def environment(self) -> dict[str, Any]:
        """Versions, device and kernels of the process that judged it."""
        return dict(self.data.get("environment", {}))

    @cached_property
    def layout(self) -> Layout:
        """The resolved layout.

        Raises:
            WorkbenchError: the trial never got one (its parameters do not fit together).
        """
        path = self.path / "layout.json"
        if not path.exists():
            raise WorkbenchError(f"trial {self.name} has no layout: {self.reason or self.outcome}")
        return Layout.read(path)

    @property
    def weights(self) -> Path:
        """The trained weights.

        Raises:
            WorkbenchError: there are none; says why and what to do.
        """
        path = self.path / "model.safetensors"
        if path.exists():
            return path
        original = self.data.get("duplicate_of")
        advice = (
            f"take {self.study}:{original}" if original is not None else "take a complete trial"
        )
        raise WorkbenchError(f"trial {self.name} ({self.outcome}) left no weights: {advice}.")

    def curve(self) -> pd.DataFrame:
        """The training curve: step, tokens, seconds, loss (nats a token), lr."""
        import pandas as pd

        path = self.path / "curve.jsonl"
        rows = _json_lines(path) if path.exists() else []
        return pd.DataFrame(rows, columns=["step", "tokens", "seconds", "loss", "lr"])


class Study:
    """One study's records.

    Attributes:
        name: its name.
        path: its folder.
        data: the content of `study.json`.

    Raises:
        WorkbenchError: `study.json` cannot be read or is no study's record; names the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        kinds = {"name": str, "objectives": list, "units": dict, "config": dict}
        self.data: dict[str, Any] = _record(path / "study.json", ("name",), kinds)
        self.name: str = self.data["name"]

    def __repr__(self) -> str:
        return f"<Study {self.name} in {self.path}>"

    @cached_property
    def objectives(self) -> tuple[Objective, ...]:
        """What it optimizes, in the order of its file.

        Raises:
            WorkbenchError: `study.json` does not say; names the file.
        """
        try:
            return tuple(Objective(**item) for item in self.data["objectives"])
        except (KeyError, TypeError) as error:
            raise _damaged(self.path / "study.json", f"objectives: {error}") from None

    @property
    def units(self) -> dict[str, str]:
        """The unit of every metric that its trials record."""
        if "units" not in self.data:
            raise _damaged(self.path / "study.json", "it lacks 'units'")
        return dict(self.data["units"])

    def trials(self) -> list[Trial]:
        """Every trial that left a record, by number.

        One whose record cannot be read has the outcome `damaged`, and its reason names the file.
        """
        paths = sorted((self.path / "trials").glob("*/trial.json"))
        return [self._trial(path.parent) for path in paths if path.parent.name.isdigit()]

    def _trial(self, path: Path) -> Trial:
        try:
            trial = Trial(self.name, path)
            if trial.outcome == "complete":
                for objective in self.objectives:
                    if not isinstance(trial.metrics.get(objective.name), int | float):
                        raise _damaged(path / "trial.json", f"it lacks {objective.name!r}")
        except WorkbenchError as error:
            return Trial.damaged(self.name, path, str(error))
        return trial

    def trial(self, number: int) -> Trial:
        """One trial.

        Raises:
            WorkbenchError: there is no such trial; says which there are.
        """
        path = self.path / "trials" / f"{number:05d}"
        if not (path / "trial.json").exists():
            numbers = [trial.number for trial in self.trials()]
            known = f"0 to {numbers[-1]}" if numbers else "none yet"
            raise WorkbenchError(f"study {self.name!r} has no trial {number}: known are {known}.")
        return Trial(self.name, path)

    def front_trials(self) -> list[Trial]:
        """The complete trials that no other one dominates, by the first objective."""
        complete = [trial for trial in self.trials() if trial.outcome == "complete"]
        points = [
            [objective.sign * trial.metrics[objective.name] for objective in self.objectives]
            for trial in complete
        ]
        front = [complete[index] for index in pareto_front(points)]
        first = self.objectives[0]
        return sorted(front, key=lambda trial: first.sign * trial.metrics[first.name])

    def confirmed(self) -> list[ConfirmedTrial]:
        """The trials that `workbench confirm` trained again, by number, with their intervals."""
        from workbench.intervals import confirmed_trials

        return confirmed_trials(self)

    def frame(self) -> pd.DataFrame:
        """A row a trial, indexed by its number.

        Columns: outcome, the objectives, the other metrics (in the units of `study.units`), what
        the sampler chose as `param.*`, then pattern, reason, seconds and layout hash. Parameters
        that are whole numbers are pandas' `Int64`, missing where a trial has no such parameter.
        """
        return self._frame(self.trials())

    def front(self) -> pd.DataFrame:
        """The rows of `frame()` that are Pareto-optimal, by the first objective."""
        return self._frame(self.front_trials())

    def _frame(self, trials: list[Trial]) -> pd.DataFrame:
        import pandas as pd

        objectives = [objective.name for objective in self.objectives]
        others = [name for trial in trials for name in trial.metrics]
        metrics = list(dict.fromkeys([*objectives, *self.units, *others]))
        params = list(dict.fromkeys(name for trial in trials for name in trial.params))
        columns: dict[str, Any] = {
            "outcome": [trial.outcome for trial in trials],
            **{name: _numbers([t.metrics.get(name) for t in trials]) for name in metrics},
            **{f"param.{name}": _values([t.params.get(name) for t in trials]) for name in params},
            "pattern": [trial.pattern for trial in trials],
            "reason": [trial.reason for trial in trials],
            "seconds": _numbers([trial.data.get("seconds") for trial in trials]),
            "layout": [trial.data.get("layout_hash") for trial in trials],
        }
        numbers = pd.Index([trial.number for trial in trials], name="number", dtype="int64")
        return pd.DataFrame(columns, index=numbers)

    def summary(self) -> dict[str, Any]:
        """JSON facts for listings: name, path, objectives, trials by outcome."""
        outcomes: dict[str, int] = {}
        for trial in self.trials():
            outcomes[trial.outcome] = outcomes.get(trial.outcome, 0) + 1
        return {
            "name": self.name,
            "path": str(self.path),
            "description": self.data.get("description", ""),
            "objectives": [dataclasses.asdict(objective) for objective in self.objectives],
            "trials": sum(outcomes.values()),
            "outcomes": outcomes,
        }


def read_studies(runs: str | Path | None = None) -> tuple[list[Study], list[str]]:
    """Every readable study in the runs folder, by name, and a message for each damaged one."""
    studies: list[Study] = []
    damaged: list[str] = []
    for path in sorted(runs_folder(runs).glob("*/study.json")):
        try:
            study = Study(path.parent)
            _ = study.objectives, study.units  # listings need them
            studies.append(study)
        except WorkbenchError as error:
            damaged.append(str(error))
    return studies, damaged


def list_studies(runs: str | Path | None = None) -> list[Study]:
    """Every readable study in the runs folder, by name."""
    return read_studies(runs)[0]


def load_study(name: str | Path, runs: str | Path | None = None) -> Study:
    """The records of a study, by name (or by the path of its folder).

    Raises:
        UnknownNameError: the runs folder has no such study.
    """
    folder = runs_folder(runs)
    for path in (folder / str(name), Path(name)):
        if (path / "study.json").exists():
            return Study(path)
    known = [study.name for study in list_studies(runs)]
    raise UnknownNameError("study", str(name), known, f"Looked in {folder.resolve()}.")


def load_trial(name: str, runs: str | Path | None = None) -> Trial:
    """The record of a trial named `STUDY:NUMBER`.

    Raises:
        WorkbenchError: malformed, or no such study or trial.
    """
    study, separator, number = name.rpartition(":")
    if not separator or not number.isdigit():
        raise WorkbenchError(f"{name!r} names no trial: write STUDY:NUMBER, such as quickstart:7.")
    return load_study(study, runs).trial(int(number))


def _numbers(values: list[float | None]) -> list[float]:
    """Metrics as floats, NaN where there is none."""
    return [math.nan if value is None else float(value) for value in values]


def _values(values: list[Any]) -> Any:
    """One parameter's values; whole numbers stay whole although trials lack it."""
    import pandas as pd

    if all(type(value) is int for value in values if value is not None):
        return pd.array(values, dtype="Int64")
    return values


def _record(path: Path, required: Iterable[str], kinds: Mapping[str, type]) -> dict[str, Any]:
    """The JSON object in `path`, its known fields of the right kind."""
    data = read_json(path)
    if not isinstance(data, dict):
        raise _damaged(path, f"expected an object, got {type(data).__name__}")
    for name, kind in kinds.items():
        if name in required and name not in data:
            raise _damaged(path, f"it lacks {name!r}")
        if name in data and not isinstance(data[name], kind):
            raise _damaged(path, f"{name!r} is no {kind.__name__}")
    return data


def _damaged(path: Path, what: str) -> WorkbenchError:
    return WorkbenchError(f"{path} is damaged: {what}")


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines of a JSON-lines file; a last line cut off by a crash is left out."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):
                yield json.loads(line)
