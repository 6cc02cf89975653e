"""Records as pages need them: read once a change, though a page is drawn again at every click."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from workbench import records
from workbench.errors import WorkbenchError
from workbench.records import Study, Trial, runs_folder

if TYPE_CHECKING:
    import pandas as pd

LOG_TAIL = 20_000  # characters of a worker's log that a page shows

# Trial's folder → when its record was written, how long it was, and what it said.
_read: dict[Path, tuple[int, int, Trial]] = {}


class CachedStudy(Study):
    """A study as it was when this object was made; unchanged trials are not read again."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.name = path.name  # what commands call it, also where someone renamed its folder

    @cached_property
    def _trials(self) -> list[Trial]:
        return super().trials()

    def trials(self) -> list[Trial]:
        """Every trial that left a record, by number; see `Study.trials`."""
        return list(self._trials)

    def trial(self, number: int) -> Trial:
        """One trial, a damaged one too; see `Study.trial`."""
        for trial in self._trials:
            if trial.number == number:
                return trial
        return super().trial(number)

    def _trial(self, path: Path) -> Trial:
        found = (path / "trial.json").stat()
        known = _read.get(path)
        if known is None or known[:2] != (found.st_mtime_ns, found.st_size):
            known = (found.st_mtime_ns, found.st_size, super()._trial(path))
            _read[path] = known
        return known[2]

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


def read_studies(runs: Path | None = None) -> tuple[list[CachedStudy], list[str]]:
    """Every readable study of the runs folder by name, and a message for each damaged one."""
    found, damaged = records.read_studies(runs)
    for study in found:
        if not study.objectives:
            damaged.append(f"{study.path / 'study.json'} is damaged: it names no objective")
    return [CachedStudy(study.path) for study in found if study.objectives], damaged


def read_study(name: str, runs: Path | None = None) -> CachedStudy:
    """One study, as it is now.

    Raises:
        WorkbenchError: it cannot be read, or no longer.
    """
    return CachedStudy(runs_folder(runs) / name)


def curve_of(trial: Trial) -> pd.DataFrame:
    """A trial's training curve; see `Trial.curve`.

    Raises:
        WorkbenchError: a line in the middle of `curve.jsonl` is damaged.
    """
    try:
        return trial.curve()
    except ValueError as error:
        raise WorkbenchError(f"{trial.path / 'curve.jsonl'} is damaged: {error}") from None


def log_of(trial: Trial) -> str:
    """The end of what a trial's worker printed; empty if it printed nothing."""
    path = trial.path / "log.txt"
    return path.read_text("utf-8", "replace")[-LOG_TAIL:] if path.exists() else ""
