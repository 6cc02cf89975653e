"""What an executor owes the study."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from workbench.layout import Layout
from workbench.study_config import StudyConfig
from workbench.trial import Emit
from workbench.verdict import Verdict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker must know of a study, as JSON data.

    Attributes:
        plugins: version and sources of each plugin that the study uses: a worker that finds others
            judges nothing.
    """

    config: StudyConfig
    device: str
    cache_dir: Path
    plugins: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "device": self.device,
            "cache_dir": str(self.cache_dir),
            "plugins": self.plugins,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Job:
        return cls(
            config=StudyConfig.from_dict(data["config"]),
            device=data["device"],
            cache_dir=Path(data["cache_dir"]),
            plugins=data["plugins"],
        )


class Executor(ABC):
    """Judges one trial at a time. A trial's end, however bad, is a Verdict, never an exception."""

    @abstractmethod
    def judge(self, layout: Layout, folder: Path, emit: Emit) -> Verdict:
        """Run the stages that need a model; blocks.

        Raises:
            KeyboardInterrupt: the user stopped the study; no work goes on.
            WorkbenchError: no trial can be judged at all (the worker cannot start).
        """

    @abstractmethod
    def close(self) -> None:
        """End every process that it started."""
