"""Fixtures of the command line's tests: the command in this process and in one of its own."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch

from workbench.cli.app import run_app

TOYS = Path(__file__).parents[1] / "workbench" / "toy_plugins"
COMMAND = str(Path(sys.executable).with_name("workbench"))

TOY_STUDY = f"""
name = "toys"
description = "Toys that count"
objectives = ["toy_loss", "toy_weights"]
report = ["toy_depth"]
plugin_dirs = ["{TOYS}"]

[space]
d_model = [8, 12, 16]
num_layers = [1, 2]
mixers = ["toy", "other"]
placements = ["alternate"]

[data]
source = "counting"

[training]
tokens = 512
batch_size = 4
seq_len = 16
lr = 0.01

[budget]
trials = 4

[runtime]
device = "cpu"
executor = "inline"
threads = 1
"""

TEXT_STUDY = """
name = "notes"
objectives = ["bits_per_byte"]

[space]
d_model = 16
num_layers = 2
mixers = ["mamba", "attention"]
placements = ["uniform"]
quantizers = ["int8"]

[space.layers.attention]
num_heads = 2
num_kv_heads = 1

[data]
source = "text"
paths = ["{text}"]

[training]
tokens = 2048
batch_size = 4
seq_len = 64

[budget]
trials = 1

[runtime]
device = "cpu"
executor = "inline"
"""


@dataclasses.dataclass(frozen=True)
class Result:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def refused(self) -> str:
        """The message of a user's mistake: it is alone, on standard error, without a traceback."""
        assert self.status == 2, self
        assert self.out == ""
        assert "Traceback" not in self.err
        assert re.findall(r"^Error: ", self.err, flags=re.M) == ["Error: "]
        return self.err


class Cli(Protocol):
    def __call__(self, *arguments: str | Path) -> Result: ...


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_descriptions_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the user's cache folder alone."""
    monkeypatch.setenv("WORKBENCH_CACHE", "")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    """Run a command in this process, in an empty folder, with no width to fit."""
    monkeypatch.chdir(tmp_path)
    for name in ("COLUMNS", "WORKBENCH_RUNS", "WORKBENCH_DISABLE", "WORKBENCH_DEBUG"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str | Path) -> Result:
        capsys.readouterr()
        status = run_app([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Result(status, out, err)

    return run


@pytest.fixture
def toy_study(tmp_path: Path) -> Path:
    """The file of a study that runs in about a second."""
    path = tmp_path / "toys.toml"
    path.write_text(TOY_STUDY)
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with the toy study, finished; not to be written to."""
    return _run(tmp_path_factory.mktemp("finished"), TOY_STUDY)


@pytest.fixture(scope="session")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with a study of one trial on text; not to be written to."""
    folder = tmp_path_factory.mktemp("notes")
    text = folder / "notes.txt"
    text.write_text(
        "".join(f"Das Wörterbuch, Seite {page}: größer – älter.\n" for page in range(400))
    )
    return _run(folder, TEXT_STUDY.replace("{text}", str(text)))


def _run(folder: Path, study: str) -> Path:
    torch.set_num_threads(1)
    path = folder / "study.toml"
    path.write_text(study)
    assert run_app(["run", str(path), "--runs", str(folder / "runs"), "--json"]) == 0
    return folder / "runs"


@pytest.fixture(autouse=True)
def sigint_as_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before


def process(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    return subprocess.run(
        [COMMAND, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
