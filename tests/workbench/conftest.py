"""Fixtures of the study's tests: toy plugins, a small study, a runs folder."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from workbench.study_config import StudyConfig

TOYS = Path(__file__).parent / "toy_plugins"

STUDY: dict[str, Any] = {
    "name": "toys",
    "objectives": ["toy_loss", "toy_weights"],
    "report": ["toy_depth"],
    "space": {
        "d_model": [8, 12, 16],
        "num_layers": [1, 2],
        "mixers": ["toy", "other"],
        "placements": ["alternate"],
        "layers": {"toy": {"width": "search"}},
    },
    "data": {"source": "counting"},
    "training": {"tokens": 512, "batch_size": 4, "seq_len": 16, "lr": 0.01},
    "budget": {"trials": 4},
    "runtime": {"device": "cpu", "executor": "inline", "threads": 1},
    "plugin_dirs": [str(TOYS)],
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Two threads on two busy cores are slower than one."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def soon_exhausted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up on an exhausted space early: each suggestion costs a tenth of a second."""
    monkeypatch.setattr("workbench.scheduler.MAX_STALE", 30)


@pytest.fixture
def study_data() -> dict[str, Any]:
    """A study over toy layers, as TOML data; judged in well under a second a trial."""
    return copy.deepcopy(STUDY)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """An empty runs folder."""
    return tmp_path / "runs"


def make_config(base: dict[str, Any], /, **changes: Any) -> StudyConfig:
    """The study of `base`, with dotted changes (`**{"budget.trials": 8}`)."""
    data = copy.deepcopy(base)
    for name, value in changes.items():
        *tables, field = name.split(".")
        target = data
        for table in tables:
            target = target.setdefault(table, {})
        target[field] = value
    return StudyConfig.from_dict(data)
