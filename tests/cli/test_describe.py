"""`workbench describe`: every preset fast and without weights; every mistake in a layout named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Cli
from workbench.builder import default_builder
from workbench.description_text import short_pattern
from workbench.layout import Layout
from workbench.records import load_study
from workbench.testing.allocations import Allocations


def test_every_preset_without_weights(cli: Cli) -> None:
    presets = default_builder().presets
    assert len(presets) > 15
    for name in presets:
        with Allocations() as allocations:
            data = cli("describe", name, "--json").json
        assert allocations.operations == []
        assert data["parameters"] > 1e6
        assert data["stated (claimed)"]["source"] == presets[name].source
        rows = [*data["outside"], *data["blocks"]]
        assert sum(row["weight_bytes"] for row in rows) == data["weight_bytes"]


@pytest.mark.parametrize("columns", [80, 120])
def test_text_fits_and_holds_the_counts(
    cli: Cli, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for name in ("moai-16b", "hybrid-slm-1.3b", "mamba-glm-small", "mamba-130m"):
        result = cli("describe", name)
        data = cli("describe", name, "--json").json
        assert max(map(len, result.out.splitlines())) <= columns
        text = " ".join(result.out.split())
        for figure in (
            f"{data['parameters']:,}",
            "FLOPs",
            "state",
            "d_state=16",
            "stated (claimed)",
        ):
            assert figure in text


def test_options_reach_the_costs(cli: Cli) -> None:
    near, far = (
        cli("describe", "mamba-glm-tiny", "--json", "--context", length).json
        for length in ("64", "4096")
    )
    assert far["state_bytes"] > near["state_bytes"]
    many = cli("describe", "mamba-glm-tiny", "--json", "--context", "64", "--batch-size", "3").json
    assert many["state_bytes"] == 3 * near["state_bytes"]
    wide = cli("describe", "mamba-glm-tiny", "--json", "--context", "64", "--dtype", "float32").json
    assert wide["weight_bytes"] == 2 * near["weight_bytes"]


def test_a_trial(cli: Cli, finished: Path) -> None:
    trial = load_study("toys", finished).front_trials()[0]
    data = cli("describe", trial.name, "--runs", finished, "--json").json
    assert data["layout"] == trial.layout.to_dict()
    assert data["parameters"] >= trial.metrics["toy_weights"]


def test_a_trial_is_described_as_its_study_counts(cli: Cli, toy_study: Path) -> None:
    text = toy_study.read_text().replace('"toy_depth"', '"toy_depth", "memory_bytes"')
    text += '\n[metrics.memory_bytes]\ncontext = 99\nbatch_size = 3\ndtype = "float32"\n'
    toy_study.write_text(text)
    assert cli("run", toy_study, "--trials", "1").status == 0
    metrics = load_study("toys", "runs").trial(0).metrics
    data = cli("describe", "toys:0", "--json").json
    assert data["weight_bytes"] + data["state_bytes"] == metrics["memory_bytes"]
    assert (data["context"], data["batch_size"], data["bytes_per_element"]) == (99, 3, 4)
    shown = " ".join(cli("describe", "toys:0").out.split())
    assert "Context, batch size and bytes an element as in memory_bytes of study toys." in shown
    shown = " ".join(cli("describe", "toys:0", "--context", "7").out.split())
    assert "Context 7 tokens; state of 3 sequences; 4 bytes an element" in shown
    assert "Batch size and bytes an element as in memory_bytes of study toys." in shown
    options = ("--context", "7", "--batch-size", "1", "--dtype", "bfloat16")
    shown = cli("describe", "toys:0", *options).out
    assert "2 bytes an element" in shown
    assert "of study" not in shown


def test_a_study_without_a_memory_metric_is_described_as_it_trains(
    cli: Cli, finished: Path
) -> None:
    trial = load_study("toys", finished).front_trials()[0].name
    data = cli("describe", trial, "--runs", finished, "--json").json
    assert (data["context"], data["batch_size"], data["bytes_per_element"]) == (2048, 1, 4)
    assert data["conditions_from"] == "Bytes an element as in study toys"
    assert cli("describe", "mamba-130m", "--json").json["conditions_from"] == ""


LAYOUT = {"d_model": 64, "vocab_size": 256, "blocks": [{"layer": "mamba"}, {"layer": "swiglu"}]}


def one(layer: str, /, **config: Any) -> dict[str, Any]:
    return {**LAYOUT, "blocks": [{"layer": layer, "config": config}]}


MISTAKES: dict[str, tuple[Any, str]] = {
    "d_model missing": ({"vocab_size": 8, "blocks": []}, "layout.d_model: is required"),
    "unknown field": ({**LAYOUT, "dmodel": 3}, "field of layout 'dmodel'. Did you mean 'd_model'?"),
    "text for a number": ({**LAYOUT, "d_model": "64"}, "layout.d_model: expected int, got '64'"),
    "fraction": ({**LAYOUT, "d_model": 64.5}, "layout.d_model: expected int"),
    "zero": ({**LAYOUT, "d_model": 0}, "d_model: must be at least 1"),
    "no blocks": ({**LAYOUT, "blocks": []}, "blocks: a layout needs at least one block"),
    "blocks no list": ({**LAYOUT, "blocks": {}}, "layout.blocks: expected list"),
    "block no object": ({**LAYOUT, "blocks": ["mamba"]}, "blocks[0]: expected an object, got str"),
    "unknown layer": (one("mambo"), "unknown layer 'mambo'. Did you mean 'mamba'? Known: att"),
    "no layer": ({**LAYOUT, "blocks": [{"config": {}}]}, "blocks[0].layer: is required"),
    "unknown config": (one("mamba", dstate=3), "blocks[0] (mamba) 'dstate'. Did you mean 'd_sta"),
    "config type": (one("mamba", d_state="x"), "blocks[0] (mamba).d_state: expected int"),
    "negative": (one("mamba", d_state=-1), "blocks[0] (mamba).d_state: must be at least 1"),
    "heads": (one("attention", num_heads=5), "blocks[0] (attention).num_heads: 5 does not divide"),
    "kv heads": (
        one("attention", num_heads=4, num_kv_heads=3),
        "blocks[0] (attention).num_kv_heads: 3 does not divide",
    ),
    "headdim": (one("mamba2", headdim=48), "blocks[0] (mamba2).headdim: 48 does not divide"),
    "groups": (one("mamba2", headdim=32, n_groups=3), "blocks[0] (mamba2).n_groups: 3 does not"),
    "quantizer": (
        {**LAYOUT, "blocks": [{"layer": "mamba", "quantizer": {"name": "int9"}}]},
        "unknown quantizer 'int9'. Did you mean 'int8'?",
    ),
    "quantizer no object": (
        {**LAYOUT, "blocks": [{"layer": "mamba", "quantizer": "int8"}]},
        "blocks[0].quantizer: expected an object",
    ),
    "norm": ({**LAYOUT, "norm": "batch"}, "norm: 'batch' is none of ['rmsnorm', 'layernorm']"),
    "format": ({**LAYOUT, "format": 9}, "layout format 9 cannot be read"),
    "list": ([LAYOUT], "layout: expected an object, got list"),
    "not json": (b'{"d_model": 64,,}', "not JSON at line 1, column 16"),
    "not a number": (b'{"d_model": NaN}', "NaN is no JSON number"),
    "empty file": (b"", "not JSON at line 1, column 1"),
    "not text": (b"\xff\xfe\x00", "cannot read the layout file"),
}


@pytest.mark.parametrize("command", ["describe", "measure"])
@pytest.mark.parametrize(("data", "words"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_in_a_layout_file(
    cli: Cli, tmp_path: Path, command: str, data: Any, words: str
) -> None:
    path = tmp_path / "layout.json"
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    assert words in cli(command, path).refused()


def test_the_layout_of_the_mistakes_is_right(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "layout.json"
    path.write_text(json.dumps(LAYOUT))
    assert Layout.read(path).d_model == 64
    assert cli("describe", path).status == 0


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("mamba-130", "unknown preset 'mamba-130'. Did you mean 'mamba-130m'? Known: "),
        ("absent.json", "No such file"),
        (".", "Is a directory"),
        ("toy:1", "unknown study 'toy'. Did you mean 'toys'?"),
        ("toys:99", "study 'toys' has no trial 99"),
        ("toys", "a trial is written STUDY:NUMBER"),
    ],
)
def test_sources_that_are_not_there(cli: Cli, finished: Path, source: str, words: str) -> None:
    for command in ("describe", "measure"):
        assert words in cli(command, source, "--runs", finished).refused()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--context", "0"], "--context: must be at least 1, got 0"),
        (["--batch-size", "-1"], "--batch-size: must be at least 1"),
        (["--dtype", "float"], "unknown dtype 'float'. Did you mean 'float"),
    ],
)
def test_options_that_make_no_sense(cli: Cli, options: list[str], words: str) -> None:
    assert words in cli("describe", "mamba-130m", *options).refused()


@pytest.mark.parametrize(
    ("pattern", "width", "short"),
    [
        ("M-A-", 4, "M-A-"),
        ("M-" * 12, 20, "(M-)×12"),
        ("M" * 24, 20, "M×24"),
        ("2-2-2-2-A-" * 3, 20, "(2-)×4 A- (2-)×4 A- (2-)×4 A-"),
        ("M-M-M-A-" * 6 + "M-M-", 20, "(M-M-M-A-)×6 (M-)×2"),
        ("ABCDEFGH", 4, "ABCDEFGH"),
    ],
)
def test_long_patterns_count_their_repeats(pattern: str, width: int, short: str) -> None:
    assert short_pattern(pattern, width) == short
