"""What an executor owes the study."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.layout import Layout
from workbench.study_config import StudyConfig

if TYPE_CHECKING:
    from workbench.verdict import Verdict

Heard = Callable[[int, dict[str, Any]], None]  # a trial's number, and what `trial.judge` emits
Ended = tuple[int, "Verdict"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker must know of a study, as JSON data.

    Attributes:
        plugins: version and sources of each plugin that the study uses: a worker that finds others
            judges nothing.
        probed: what the study's process found of backends (`kernels.found`), for workers on its
            machine, which then need not try them all again.
    """

    config: StudyConfig
    device: str
    cache_dir: Path
    plugins: dict[str, str]
    probed: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "device": self.device,
            "cache_dir": str(self.cache_dir),
            "plugins": self.plugins,
            "probed": self.probed,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Job:
        return cls(
            config=StudyConfig.from_dict(data["config"]),
            device=data["device"],
            cache_dir=Path(data["cache_dir"]),
            plugins=data["plugins"],
            probed=data["probed"],
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One trial's dear stages, or what of them is left: what `trial.judge` takes.

    Attributes:
        number: the trial's.
        begun: the figures that an earlier task of this trial found (a Verdict as a dict), if any.
        stop: the training step of the next rung; None trains to the end.
    """

    number: int
    layout: Layout
    folder: Path
    begun: dict[str, Any] | None = None
    stop: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "layout": self.layout.to_dict(),
            "folder": str(self.folder.resolve()),
            "begun": self.begun,
            "stop": self.stop,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Task:
        layout, folder = Layout.from_dict(data["layout"]), Path(data["folder"])
        return cls(**{**data, "layout": layout, "folder": folder})


class Executor(ABC):
    """Judges up to `slots` trials at a time. However badly one ends, it is a Verdict.

    One thread uses it. What it raises concerns the study, and what is in flight then is lost.
    """

    @property
    @abstractmethod
    def slots(self) -> int:
        """How many tasks may be in flight; may change while a study runs (nodes come and go)."""

    @abstractmethod
    def submit(self, task: Task) -> None:
        """Take a task; only while fewer than `slots` are in flight. Does not wait for it.

        Raises:
            WorkbenchError: no trial can be judged at all (a worker cannot start).
        """

    @abstractmethod
    def wait(self, heard: Heard, timeout: float | None = None) -> list[Ended]:
        """Block until a task ends; its trial and verdict, or those of several.

        Args:
            heard: told of progress as it comes, with the number of its trial.
            timeout: seconds; without any end by then the list is empty.

        Raises:
            KeyboardInterrupt: the user stopped the study.
            WorkbenchError: no trial can be judged at all.
        """

    @abstractmethod
    def cancel(self) -> None:
        """Drop all that is in flight; when it returns, none of it works on."""

    @abstractmethod
    def close(self) -> None:
        """`cancel`, and end every process that it started."""
