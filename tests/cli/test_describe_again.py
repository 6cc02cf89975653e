"""`workbench describe` again: without torch, to the same bytes, and never what is no longer so.

Most processes here are forked from one that has torch at hand, and have imported it once they do.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.prepared import Interpreter
from workbench.description_cache import FOLDER, cache_folder

CODE = """
import sys
from pathlib import Path
from workbench import description_shipped
from workbench.cli.app import run_app
description_shipped.ARCHIVE = Path("nothing is shipped")
status = run_app(sys.argv[1:])
print("imports torch" if "torch" in sys.modules else "no torch", file=sys.stderr)
raise SystemExit(status)
"""
NO_TORCH = """
import sys

class Blocked:
    def find_spec(self, name, *_):
        if name == "torch":
            raise ImportError("torch is not for this process")

sys.meta_path.insert(0, Blocked())
"""
PLUGIN = """
import json
from pathlib import Path

import torch
from lm_sizes import EXPAND
from workbench import Block, Costs, Layer, Layout, Preset, hookimpl

WIDTH = json.loads(Path(__file__).with_name("width.json").read_text())


class Idle(Layer):
    glyph = "i"
    kind = "mlp"

    def forward(self, x_BTD, context=None, state=None):
        return x_BTD

    @classmethod
    def costs(cls, d_model, config, *, length, bytes_per_element=4):
        return Costs(parameters=1000 * EXPAND)


@hookimpl
def register_layers(register):
    register("idle", Idle)


@hookimpl
def register_presets(register):
    layout = Layout(d_model=WIDTH, vocab_size=10, blocks=(Block(layer="idle"),))
    register("idle-lm", Preset(layout=lambda: layout, source="a test"))
"""


@dataclasses.dataclass
class Described:
    """What a process printed, and whether it imported torch."""

    out: str
    err: str

    @property
    def is_new(self) -> bool:
        return self.err.splitlines()[-1] == "imports torch"

    @property
    def parameters(self) -> int:
        _, _, rest = self.out.partition("total")
        return int(rest.split()[1].replace(",", ""))


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that descriptions are kept in."""
    monkeypatch.setenv(FOLDER, str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("COLUMNS", "WORKBENCH_RUNS", "WORKBENCH_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache/descriptions"


Run = Callable[[list[str]], "subprocess.CompletedProcess[str]"]


def really(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command in a new process."""
    return subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    made = Interpreter("-P", ("torch",), hidden=("torch",))
    yield made
    made.close()


@pytest.fixture
def quickly(kept: Path, interpreter: Interpreter) -> Run:
    """Run a command in a process that is forked."""
    return lambda command: interpreter.run(command, os.environ)


def describe(run: Run, *arguments: str | Path) -> Described:
    done = run([sys.executable, "-P", "-c", CODE, "describe", *map(str, arguments)])
    assert done.returncode == 0, done.stderr
    return Described(done.stdout, done.stderr)


def can_do_without_torch(run: Run, name: str) -> bool:
    """Whether a description is found; without one, torch is needed."""
    done = run([sys.executable, "-P", "-c", NO_TORCH + CODE, "describe", name])
    assert done.returncode == 0 or "torch is not for this process" in done.stderr
    return done.returncode == 0


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """The folder of a plugin, of what it imports and of its data."""
    folder = tmp_path / "plugin"
    (folder / "lm_sizes").mkdir(parents=True)
    (folder / "lm_sizes/__init__.py").write_text("from lm_sizes.expand import EXPAND\n")
    (folder / "lm_sizes/expand.py").write_text("EXPAND = 2\n")
    (folder / "width.json").write_text("16")
    (folder / "lm_idle.py").write_text(PLUGIN)
    return folder


def install(folder: Path) -> None:
    """Let it be found as pip's editable installation is: by its entry point."""
    info = folder / "lm_idle-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lm-idle\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[workbench.v1]\nidle = lm_idle\n")


def test_the_second_call_imports_no_torch_and_prints_the_same(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = describe(really, "hybrid-slm-1.3b")
    again = describe(really, "hybrid-slm-1.3b")
    assert (first.is_new, again.is_new) == (True, False)
    assert again.out == first.out
    assert "stated (claimed)" in first.out
    assert len(list(kept.iterdir())) == 1
    data = describe(really, "hybrid-slm-1.3b", "--json")
    assert not data.is_new
    monkeypatch.setenv(FOLDER, "")
    assert data.out == describe(really, "hybrid-slm-1.3b", "--json").out
    assert len(list(kept.iterdir())) == 1


def test_conditions_have_descriptions_of_their_own(kept: Path, quickly: Run) -> None:
    options = ("--context", "77", "--batch-size", "3", "--dtype", "float32")
    first = describe(quickly, "mamba-glm-tiny", *options)
    assert describe(quickly, "mamba-glm-tiny").is_new
    again = describe(quickly, "mamba-glm-tiny", *options)
    assert not again.is_new
    assert again.out == first.out
    assert "Context 77 tokens; state of 3 sequences; 4 bytes an element" in " ".join(
        again.out.split()
    )


@pytest.mark.parametrize("way", ["plugin folder", "distribution"])
def test_a_plugin_that_changes_is_described_as_it_is(
    kept: Path, quickly: Run, plugin: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(plugin))
    arguments: tuple[str | Path, ...] = ("idle-lm",)
    if way == "distribution":
        install(plugin)
    else:
        arguments = ("idle-lm", "--plugin-dir", plugin)
    embedding_and_norms = 16 * 10 + 2 * 16
    assert describe(quickly, *arguments).parameters == 2000 + embedding_and_norms
    assert not describe(quickly, *arguments).is_new
    (plugin / "lm_sizes/expand.py").write_text("EXPAND = 3\n")
    assert describe(quickly, *arguments).parameters == 3000 + embedding_and_norms
    (plugin / "lm_idle.py").write_text(PLUGIN.replace("1000 *", "5000 *"))
    assert describe(quickly, *arguments).parameters == 15_000 + embedding_and_norms
    (plugin / "width.json").write_text("32")
    changed = describe(quickly, *arguments)
    assert changed.parameters == 15_000 + 32 * 10 + 2 * 32
    again = describe(quickly, *arguments)
    assert not again.is_new
    assert again.out == changed.out


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut short": lambda path: path.write_text(path.read_text()[:-100]),
    "empty": lambda path: path.write_text(""),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "another figure": lambda path: path.write_text(path.read_text().replace("1", "2")),
    "JSON alone": lambda path: path.write_text(path.read_text().partition("\n")[2]),
}


def test_a_damaged_entry_is_written_anew(kept: Path, quickly: Run) -> None:
    first = describe(quickly, "mamba-glm-tiny")
    (entry,) = kept.iterdir()
    whole = entry.read_bytes()
    for damage in DAMAGES.values():
        assert can_do_without_torch(quickly, "mamba-glm-tiny")
        damage(entry)
        assert not can_do_without_torch(quickly, "mamba-glm-tiny")
        damaged = entry.read_bytes()
        entry.write_bytes(whole)
    entry.write_bytes(damaged)
    mended = describe(quickly, "mamba-glm-tiny")
    assert mended.is_new
    assert mended.out == first.out
    assert can_do_without_torch(quickly, "mamba-glm-tiny")
    assert list(kept.iterdir()) == [entry]


def test_where_nothing_can_be_written_it_says_so(
    kept: Path, quickly: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    kept_nowhere = tmp_path / "file/cache"
    monkeypatch.setenv(FOLDER, str(kept_nowhere))
    done = describe(quickly, "mamba-glm-tiny")
    assert "stated (claimed)" in done.out
    warning, _ = done.err.splitlines()
    assert warning.startswith(f"warning: cannot make the folder {kept_nowhere}")
    assert f"{FOLDER} names another folder" in warning
    monkeypatch.setenv(FOLDER, "")
    silent = describe(quickly, "mamba-glm-tiny")
    assert silent.err == "imports torch\n"
    assert silent.out == done.out


MOODS = {
    "prints": ("print('hello')\n", "hello"),
    "does not load": ("import a_module_that_nobody_has\n", ""),
    "changes while it is loaded": ("import os\nos.utime(__file__)\n", ""),
}


@pytest.mark.parametrize(("source", "says"), MOODS.values(), ids=MOODS.keys())
def test_nothing_is_kept_beside_a_plugin_that(
    kept: Path, quickly: Run, tmp_path: Path, source: str, says: str
) -> None:
    (tmp_path / "moody.py").write_text(source)
    assert says in describe(quickly, "mamba-glm-tiny", "--plugin-dir", tmp_path).err
    assert not kept.exists()


def test_writers_at_once_leave_one_whole_entry(kept: Path, quickly: Run) -> None:
    command = [sys.executable, "-P", "-c", CODE, "describe", "mamba-glm-tiny"]
    # Variables are named, because readline leaves COLUMNS to children of this process.
    options = {"env": os.environ, "stdout": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen(command, **options) for _ in range(3)]
    outs = [writer.communicate()[0] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    again = describe(quickly, "mamba-glm-tiny")
    assert not again.is_new
    assert outs == [again.out] * 3
    assert len(list(kept.iterdir())) == 1


def test_the_folder_is_the_users_unless_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv(FOLDER, str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv(FOLDER)
    assert cache_folder() == tmp_path / "xdg/lm-workbench"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == tmp_path / ".cache/lm-workbench"
    monkeypatch.setenv(FOLDER, "")
    assert cache_folder() is None
