"""`workbench check-plugin`: what it finds, where it points, what it advises, how it ends."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from tests.workbench.testing.planting import edited

BEGIN = "        length, past ="
BRANCH = "        x_BTD = x_BTD * (2 if x_BTD.sum().item() > 1e9 else 1)\n"
RAISE = "        if bytes_per_element == 2:\n            raise RuntimeError('planted')\n"
FAULTS = (
    ("u_BTD = context.mask_padding(u_BTD)", "pass"),
    ("forward_flops=2 * (", "forward_flops=("),
    (BEGIN, BRANCH + BEGIN),
    ("        linears, taps =", RAISE + "        linears, taps ="),
)
QUICK = "causality or padding or flops or state_bytes or test_compiles"


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """A plugin file with a layer of four faults."""
    path = tmp_path / "layers" / "faulty.py"
    path.parent.mkdir()
    path.write_text(edited("layer", *FAULTS), encoding="utf-8")
    return path


def line_of(path: Path, text: str) -> int:
    """The number of the one line that holds the text."""
    (number,) = [i for i, line in enumerate(path.read_text().splitlines(), 1) if text in line]
    return number


@pytest.mark.usefixtures("own_interpreters")
def test_each_failure_says_what_where_and_how_to_mend(cli: Cli, faulty: Path) -> None:
    result = cli("check-plugin", faulty, "--only", QUICK)
    assert result.status == 1
    assert result.err == ""
    rows = {line[12:40].strip(): line[40:].split() for line in result.out.splitlines()}
    assert rows["causality"][0] == "passed"
    assert rows["left padding leaks nothing"][0] == "FAILED"
    failures = result.out.partition("layer good: ")[2]
    assert "left padding leaks nothing [defaults-1] FAILED" in failures
    assert "  must hold: Outputs, gradients and further steps are those of the row" in failures
    assert f"look at:   {faulty}:{line_of(faulty, 'def forward(')}" in failures
    assert "mend:      Use `context.attention_mask_BT`" in failures
    assert "found:     forward_flops says 204,800, but torch counts 393,216" in failures
    assert f"look at:   {faulty}:{line_of(faulty, 'def costs(') - 1}" in failures
    assert "mend:      Recount `costs()`" in failures
    # The line that raised, and the one at which the graph breaks.
    assert "found:     RuntimeError: planted" in failures
    assert f"look at:   {faulty}:{line_of(faulty, 'planted')}" in failures
    assert "found:     torch.compile breaks the graph: " in failures
    assert f"look at:   {faulty}:{line_of(faulty, '.item()')}" in failures
    assert result.out.splitlines()[-1].startswith("faulty: ")


def test_json_holds_every_check(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "good.py"
    path.write_text(edited("placement"))
    result = cli("check-plugin", path, "--json")
    assert result.status == 0
    report = result.json
    assert (report["package"], report["plugins"]) == ("good", ["good"])
    assert (report["failed"], report["skipped"]) == (0, 0)
    assert report["passed"] == len(report["checks"])
    # The defaults and both ends of the range: configs are derived.
    cases = {c["case"] for c in report["checks"] if c["check"] == "is_pure"}
    assert cases == {
        "most=mamba,last=attention",
        "most=mamba,last=attention,every=2",
        "most=mamba,last=attention,every=6",
    }
    for check in report["checks"]:
        assert check["thing"] == "placement good"
        assert check["outcome"] == "passed"
        assert check["seconds"] >= 0


def test_a_plugin_that_does_not_load_is_a_failure(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text('"""Broken."""\n\nimport no_such_package\n')
    result = cli("check-plugin", path)
    assert result.status == 1
    assert "plugin broken: loads FAILED" in result.out
    assert "No module named 'no_such_package'" in result.out
    assert f"look at:   {path}:3" in result.out


def test_a_plugin_that_ends_the_process_is_a_failure_and_no_fault_of_ours(
    cli: Cli, tmp_path: Path
) -> None:
    path = tmp_path / "leaves.py"
    path.write_text('"""Leaves."""\n\nimport os\n\nos._exit(3)\n')
    result = cli("check-plugin", path)
    assert (result.status, result.err) == (1, "")
    assert "plugin leaves: loads FAILED" in result.out
    assert "found:     the process ended with status 3 while it was loaded" in result.out
    assert f"look at:   {path}:5\n" in result.out
    assert result.out.splitlines()[-1].startswith("leaves: 0 checks passed, 1 failed, 0 skipped in")


def test_a_fault_in_source_is_told_once_with_what_mends_it(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "sourced.py"
    source = "    @classmethod\n    def source(cls, d_model, blocks):\n        return len(None)\n\n"
    path.write_text(
        edited(
            "layer",
            ("    @classmethod\n    def costs(", f"{source}    @classmethod\n    def costs("),
        )
    )
    result = cli("check-plugin", path, "--only", "source or causality or class_attributes")
    assert result.status == 1
    (finding,) = result.out.partition("layer good: ")[2].split("\n\n")[:-1]
    assert finding.startswith("source names an earlier block [defaults] FAILED\n")
    assert "found:     TypeError: object of type 'NoneType' has no len()" in finding
    assert f"look at:   {path}:{line_of(path, 'len(None)')}\n" in finding
    assert "mend:      Return the index of a block before the last one, or None" in finding
    assert finding.endswith("  also with: width=2\n  also in:   causality")


def test_checks_that_are_not_run_are_named_with_the_reason(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "leaves.py"
    path.write_text(edited("layer", (BEGIN, f"        __import__('os')._exit(0)\n{BEGIN}")))
    result = cli("check-plugin", path, "--only", "causality or costs_count_parameters")
    assert result.status == 1
    reason = "not run: another config of the check ended the process or hung"
    assert f"layer good: {reason} (causality)\n" in result.out
    assert "found:     the process ended with status 0 during this check" in result.out
    assert "leaves: 2 checks passed, 1 failed, 1 skipped in" in result.out.splitlines()[-1]


def test_a_plugin_that_patches_torch_is_told_so(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "patches.py"
    patch = "def mine(x):\n    return x\n\n\nF.gelu = mine\n\n\n@dataclasses.dataclass\nclass Last"
    path.write_text(edited("layer", ("@dataclasses.dataclass\nclass Last", patch)))
    check = cli("check-plugin", path, "--json").json["checks"][0]
    assert check["check"] == "loads"
    assert "torch.nn.functional.gelu became mine" in check["message"]
    assert (check["file"], check["line"]) == (str(path), line_of(path, "def mine"))


def test_a_config_that_nobody_can_derive_is_said_to_be_unchecked(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "needy.py"
    path.write_text(edited("data", ("symbols: int = 32", "symbols: int")))
    result = cli("check-plugin", path)
    assert result.status == 0
    assert "data source good was not checked" in result.out
    assert "symbols: has neither a default nor a search range" in result.out
    assert "--tests" in result.out


def test_the_suite_of_the_authors_tests_goes_first(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "needy.py"
    path.write_text(edited("data", ("symbols: int = 32", "symbols: int")))
    test = tmp_path / "elsewhere" / "test_needy.py"
    test.parent.mkdir()
    test.write_text(
        "from needy import Good\n\nfrom workbench.testing import DataSourceContract\n\n\n"
        "class TestMine(DataSourceContract):\n"
        "    source = Good\n    configs = (Good.Config(symbols=9),)\n\n\n"
        "def test_of_something_else():\n    raise AssertionError\n"
    )
    only = ("--only", "source and good and not parts")
    report = cli("check-plugin", path, "--tests", test, *only, "--json").json
    assert {check["thing"] for check in report["checks"]} == {"data source good"}
    assert {check["case"] for check in report["checks"]} == {"symbols=9"}
    assert report["failed"] == report["skipped"] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such"], "unknown package or plugin 'no-such'"),
        (["mambo"], "Did you mean 'mamba'?"),
        (["missing.py"], "missing.py: no such file"),
        (["mamba", "--timeout", "0"], "--timeout: 0 s are no time for a check: 120 are"),
        (["mamba", "--timeout", "nan"], "--timeout: nan s are no time"),
        (["mlp", "--only", "no_such_check"], "--only: 'no_such_check' selects no check"),
        (["mlp", "--only", "causalty"], "see them all. Checks of such names: causality."),
        (["mlp", "--only", "costs and"], "--only: 'costs and': a name is missing after 'and'."),
    ],
)
def test_mistakes_are_refused(cli: Cli, arguments: list[str], words: str) -> None:
    assert words in cli("check-plugin", *arguments).refused()


def test_without_pytest_it_says_what_to_install(
    cli: Cli, faulty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib.util import find_spec

    def without(name: str) -> object:
        return None if name == "pytest" else find_spec(name)

    monkeypatch.setattr("workbench.testing.checking.importlib.util.find_spec", without)
    assert "pip install 'lm-workbench[testing]'" in cli("check-plugin", faulty).refused()


def test_a_built_in_plugin_passes(cli: Cli) -> None:
    report = cli("check-plugin", "lm-workbench", "--only", "preset and mamba-130m", "--json").json
    assert report["failed"] == 0
    assert {check["check"] for check in report["checks"]} >= {"resolves", "counts_without_weights"}


def test_a_file_that_is_checked_is_found_by_its_own_tests(cli: Cli, tmp_path: Path) -> None:
    """The folder of a plugin file is on the path, as it is when pytest runs beside it."""
    (tmp_path / "good.py").write_text(edited("metric"))
    (tmp_path / "test_good.py").write_text(
        "from good import Good\n\nfrom workbench.testing import MetricContract\n\n\n"
        "class TestGood(MetricContract):\n    metric = Good\n    configs = (Good.Config(),)\n"
    )
    assert str(tmp_path) not in sys.path
    report = json.loads(cli("check-plugin", tmp_path / "good.py", "--json").out)
    assert (report["passed"], report["failed"]) == (5, 0)
