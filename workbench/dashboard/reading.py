"""Records as pages need them: one damaged file is set aside and named, and hides no other."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import WorkbenchError
from workbench.files import read_json
from workbench.records import OUTCOMES, Study, Trial, runs_folder

if TYPE_CHECKING:
    import pandas as pd

LOG_TAIL = 20_000  # characters of a worker's log that a page shows


class ReadableTrial(Trial):
    """A trial whose record has the shape that pages rely on.

    Raises:
        WorkbenchError: `trial.json` is not JSON or not a trial's record; names the file.
    """

    def __init__(self, study: str, path: Path) -> None:
        super().__init__(study, path)
        file = path / "trial.json"
        _require(self.data, {"outcome": str}, file)
        if self.outcome not in OUTCOMES:
            raise WorkbenchError(f"{file} is damaged: no outcome is called {self.outcome!r}")
        optional = {"metrics": dict, "params": dict, "environment": dict, "stage_seconds": dict}
        present = {name: kind for name, kind in optional.items() if name in self.data}
        _require(self.data, present, file)

    def curve(self) -> pd.DataFrame:
        """The training curve, as `Trial.curve`.

        Raises:
            WorkbenchError: a line in the middle of `curve.jsonl` is damaged.
        """
        try:
            return super().curve()
        except ValueError as error:
            raise WorkbenchError(f"{self.path / 'curve.jsonl'} is damaged: {error}") from None

    @property
    def log(self) -> str:
        """The end of what its worker printed; empty if it printed nothing."""
        path = self.path / "log.txt"
        return path.read_text("utf-8", "replace")[-LOG_TAIL:] if path.exists() else ""


class ReadableStudy(Study):
    """A study without its damaged trial records.

    Attributes:
        damaged: a message for every record that could not be read.

    Raises:
        WorkbenchError: `study.json` is not JSON or not a study's record; names the file.
    """

    def __init__(self, path: Path) -> None:
        file = path / "study.json"
        _require(read_json(file), {"name": str, "objectives": list, "units": dict}, file)
        super().__init__(path)
        self.name = path.name  # what commands call it, also where someone renamed its folder
        try:
            objectives = self.objectives
        except TypeError as error:
            raise WorkbenchError(f"{file} is damaged: {error}") from None
        if not objectives:
            raise WorkbenchError(f"{file} is damaged: it names no objective")
        self.damaged: list[str] = []
        self._trials: list[ReadableTrial] = []
        for folder in sorted((path / "trials").glob("[0-9]*[0-9]")):
            try:
                self._trials += map(self._with_objectives, _trial_in(self.name, folder))
            except WorkbenchError as error:
                self.damaged.append(str(error))

    def trials(self) -> list[Trial]:
        """Every trial whose record can be read, by number."""
        return list(self._trials)

    def trial(self, number: int) -> ReadableTrial:
        """One trial; see `Study.trial`."""
        return self._with_objectives(ReadableTrial(self.name, super().trial(number).path))

    def _with_objectives(self, trial: ReadableTrial) -> ReadableTrial:
        """The trial, if it has what a complete one must have to be on a front."""
        if trial.outcome == "complete":
            objectives = {objective.name: (int, float) for objective in self.objectives}
            _require(trial.metrics, objectives, trial.path / "trial.json")
        return trial

    @property
    def is_running(self) -> bool:
        """Whether a trial's record says that it is not finished."""
        return any(trial.outcome == "running" for trial in self._trials)

    @property
    def changed(self) -> float:
        """When its last trial began, in seconds since 1970."""
        trials = self.path / "trials"
        return (trials if trials.is_dir() else self.path / "study.json").stat().st_mtime

    @cached_property
    def layer_names(self) -> dict[str, str]:
        """Glyph → layer name, as far as the layouts of its trials tell."""
        names: dict[str, str] = {}
        for trial in self._trials:
            if set(trial.pattern) <= names.keys():
                continue
            try:
                blocks = trial.layout.blocks
            except WorkbenchError:
                continue  # its own page says why; another trial has the same glyphs
            names.update(zip(trial.pattern, (block.layer for block in blocks), strict=False))
        return names

    @property
    def mlps(self) -> set[str]:
        """Names of the layers that its search space offers as MLPs."""
        return set(self.data.get("config", {}).get("space", {}).get("mlps", ()))


def read_studies(runs: Path | None = None) -> tuple[list[ReadableStudy], list[str]]:
    """Every readable study of the runs folder by name, and a message for each damaged one."""
    studies, damaged = [], []
    for path in sorted(runs_folder(runs).glob("*/study.json")):
        try:
            studies.append(ReadableStudy(path.parent))
        except WorkbenchError as error:
            damaged.append(str(error))
    return studies, damaged


def read_study(name: str, runs: Path | None = None) -> ReadableStudy:
    """One study, as it is now.

    Raises:
        WorkbenchError: it cannot be read, or no longer.
    """
    return ReadableStudy(runs_folder(runs) / name)


def _trial_in(study: str, folder: Path) -> list[ReadableTrial]:
    """The trial in a folder; none if it left no record yet."""
    try:
        found = (folder / "trial.json").stat()
    except FileNotFoundError:
        return []
    return [_cached_trial(study, folder, found.st_mtime_ns, found.st_size)]


@lru_cache(maxsize=20_000)
def _cached_trial(study: str, folder: Path, mtime_ns: int, size: int) -> ReadableTrial:
    # A page is drawn again at every click, and most records never change.
    return ReadableTrial(study, folder)


def _require(data: Any, fields: Mapping[str, type | tuple[type, ...]], file: Path) -> None:
    if not isinstance(data, dict):
        raise WorkbenchError(f"{file} is damaged: expected an object, got {type(data).__name__}")
    for name, kind in fields.items():
        if not isinstance(data.get(name), kind):
            raise WorkbenchError(f"{file} is damaged: its field {name!r} is missing or malformed")
