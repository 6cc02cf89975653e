"""Plugins that misbehave while they are loaded: left out, listed with why, and without effect."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from tests.workbench.plugin_files import builder_of, only_these, write_layer_plugin, write_plugin
from workbench import stray_output
from workbench.builder import Builder
from workbench.discovery import discover
from workbench.errors import UnknownNameError


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A plugin folder with one good plugin; installed ones stay out."""
    write_layer_plugin(tmp_path / "plugins", "good", "idle")
    with only_these():
        yield tmp_path / "plugins"


HOOK = "\n@hookimpl\ndef register_layers(register):\n    register('other', Idle)\n"
PATCH = "import torch\ntorch.nn.functional.softmax = lambda *a, **k: None\n"
SETTING = "import torch\ntorch.set_default_dtype(torch.float64)\n"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (PATCH, "<lambda> (workbench_plugin_bad, line {line})"),
        (SETTING, "torch's default dtype: torch.float32 became torch.float64"),
    ],
    ids=["function", "setting"],
)
@pytest.mark.parametrize("place", ["at import", "in its hook"])
def test_a_plugin_that_patches_torch_is_left_out(
    folder: Path, body: str, words: str, place: str
) -> None:
    softmax = F.softmax
    if place == "in its hook":
        indented = "".join(f"    {line}\n" for line in body.splitlines())
        body = f"{HOOK}{indented}"
    else:
        body += HOOK
    path = write_plugin(folder, "bad", body)
    lines = path.read_text().splitlines()
    words = words.format(line=next((i for i, text in enumerate(lines, 1) if "lambda" in text), 0))
    for _ in range(2):  # the second time its module must not be found loaded, and harmless
        builder = Builder.load([folder])
        assert F.softmax is softmax
        assert torch.get_default_dtype() == torch.float32
        assert list(builder.layers) == ["idle"]
        assert list(builder.plugins.loaded) == ["good"]
        failure = builder.plugins.failures["bad"]
        assert words in failure.reason
        assert "It was put back" in failure.reason
        if "lambda" in words:
            assert "torch.nn.functional.softmax became" in failure.reason
            assert f'File "{path}", line ' in failure.traceback
    with pytest.raises(UnknownNameError, match=r"Plugin 'bad' did not load \(changed what all"):
        builder.layers["other"]


def test_a_plugin_that_patches_another_is_left_out(folder: Path) -> None:
    write_plugin(
        folder,
        "later",
        "import workbench_plugin_good\n"
        "workbench_plugin_good.Idle.forward = lambda self, x, *rest: x + 1\n" + HOOK,
    )
    builder = Builder.load([folder])
    assert list(builder.layers) == ["idle"]
    assert "workbench_plugin_good.Idle.forward became" in builder.plugins.failures["later"].reason
    x_BTD = torch.ones(1, 2, 3)
    assert torch.equal(builder.layers["idle"](3, None).forward(x_BTD), x_BTD)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("sys.exit('bye')", "SystemExit: bye"),
        ("raise BaseException('base')", "BaseException: base"),
        ("raise GeneratorExit", "GeneratorExit: "),
    ],
)
@pytest.mark.parametrize("where", ["import", "hook"])
def test_a_plugin_that_raises_what_nobody_catches(
    folder: Path, line: str, reason: str, where: str
) -> None:
    hook = f"\n@hookimpl\ndef register_layers(register):\n    {line}\n"
    write_plugin(folder, "bad", "import sys\n" + (line if where == "import" else hook))
    builder = Builder.load([folder])
    assert builder.plugins.failures["bad"].reason == reason
    assert list(builder.layers) == ["idle"]


def test_a_missing_package_is_named(folder: Path) -> None:
    write_plugin(folder, "bad", "from a_package_that_is_not_there.inner import thing")
    failure = discover([folder]).failures["bad"]
    assert "needs the package 'a_package_that_is_not_there'" in failure.reason
    assert "perhaps: pip install a_package_that_is_not_there" in failure.reason
    assert "from a_package_that_is_not_there.inner import thing" in failure.traceback


def test_a_missing_module_of_an_installed_package_is_not_its_package(folder: Path) -> None:
    write_plugin(folder, "bad", "import torch.no_such_module")
    failure = discover([folder]).failures["bad"]
    assert "No module named 'torch.no_such_module'" in failure.reason
    assert "pip install" not in failure.reason


PRINTS = """
import os, sys
print("said at import")
sys.stdout.write("written at import\\n")
os.system("echo said by a child")
os.write(1, b"written to the descriptor\\n")
@hookimpl
def register_layers(register):
    print("said in the hook")
    register('other', Idle)
"""


def test_what_a_plugin_prints_goes_to_standard_error(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stray_output, "_named", set())
    write_plugin(folder, "loud", PRINTS)
    print("a result before")
    assert list(Builder.load([folder]).layers) == ["idle", "other"]
    print("a result after")
    said = capfd.readouterr()
    assert said.out == "a result before\na result after\n"
    for words in ("said at import", "written at import", "said by a child", "to the descriptor"):
        assert words in said.err
    assert "said in the hook" in said.err
    assert said.err.count("note: plugin 'loud' prints to standard output") == 1


LOUD_LAYER = """
def loud(where):
    print("said in", where)
class Loud(Idle):
    def __init__(self, d_model, config, **factory):
        loud("constructor")
        super().__init__(d_model, config)
    @classmethod
    def check(cls, d_model, config):
        loud("check")
    @classmethod
    def costs(cls, d_model, config, *, length, bytes_per_element=4):
        loud("costs")
        return Costs()
@hookimpl
def register_layers(register):
    register("loud", Loud)
"""


@pytest.mark.parametrize("more", [["--json"], []], ids=["json", "text"])
def test_a_layer_that_prints_does_not_spoil_results(
    folder: Path, tmp_path: Path, more: list[str]
) -> None:
    write_plugin(folder, "loud", LOUD_LAYER)
    layout = tmp_path / "layout.json"
    layout.write_text('{"d_model": 8, "vocab_size": 8, "blocks": [{"layer": "loud"}]}')
    command = ["describe", str(layout), "--plugin-dir", str(folder), *more]
    script = str(Path(sys.executable).with_name("workbench"))
    done = subprocess.run([script, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "said in" not in done.stdout
    assert "said in check" in done.stderr
    assert "said in costs" in done.stderr
    assert done.stderr.count("note: module workbench_plugin_loud prints") == 1
    if more:
        assert json.loads(done.stdout)["blocks"]


def test_results_go_out_while_standard_output_is_not_theirs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with stray_output.apart("someone"):
        stray_output.results().write("a result\n")
        with stray_output.apart("another"):
            stray_output.results().write("a second\n")
            print("stray")
    said = capsys.readouterr()
    assert said.out == "a result\na second\n"
    assert said.err.endswith("stray\n")


def test_a_plugin_of_one_name_in_two_folders_names_both(folder: Path, tmp_path: Path) -> None:
    second = write_layer_plugin(tmp_path / "more", "good", "idle")
    with pytest.raises(Exception, match="two plugins are called 'good'") as caught:
        Builder.load([folder, tmp_path / "more"])
    assert str(second) in str(caught.value)


def test_a_good_plugin_is_not_suspected(folder: Path) -> None:
    """Optimizers, compilers and lazy imports at import time change torch, but not by a patch."""
    write_plugin(
        folder,
        "busy",
        "import torch, torch._dynamo, torch.fx\n"
        "torch.optim.AdamW([torch.ones(1, requires_grad=True)])\n"
        "torch.manual_seed(3)\n" + HOOK,
    )
    before = torch.get_rng_state()
    builder = builder_of(folder)
    assert builder.plugins.failures == {}
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(torch.fx, types.ModuleType)


def test_standard_output_stays_a_file_for_plugins(capfd: pytest.CaptureFixture[str]) -> None:
    with stray_output.apart("someone"):
        sys.stdout.buffer.write(b"bytes\n")
        sys.stdout.buffer.flush()
        subprocess.run([sys.executable, "-c", "print('child')"], stdout=sys.stdout, check=True)
        assert sys.stdout.encoding
        assert not sys.stdout.isatty()
    said = capfd.readouterr()
    assert said.out == ""
    assert {"bytes", "child"} <= set(said.err.splitlines())
