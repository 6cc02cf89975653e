"""`import workbench` in a notebook: layouts from anywhere, built and described."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import workbench
from workbench.builder import Builder
from workbench.description_text import fold, scaled
from workbench.errors import FieldError, UnknownNameError, WorkbenchError
from workbench.layout import Block, Layout, Named
from workbench.quantizer import num_bytes
from workbench.testing.allocations import Allocations


@pytest.fixture
def hybrid() -> Layout:
    """All kinds of layers, quantized and not, the embeddings not tied."""
    int8 = Named(name="int8")
    return Layout(
        d_model=64,
        vocab_size=100,
        tie_embeddings=False,
        norm="layernorm",
        blocks=(
            Block(layer="mamba", config={"d_state": 8}),
            Block(layer="swiglu", quantizer=int8),
            Block(layer="mamba2", config={"d_state": 16, "headdim": 32}, quantizer=int8),
            Block(layer="swiglu", quantizer=int8),
            Block(layer="attention", config={"num_heads": 4, "num_kv_heads": 2}),
        ),
    )


def test_load_layout_from_everything_that_names_one(hybrid: Layout, tmp_path: Path) -> None:
    resolved = workbench.load_layout(hybrid)
    assert resolved.blocks[1].config["multiple_of"] == 32  # a default, written out
    path = tmp_path / "hybrid.json"
    path.write_text(hybrid.to_json())
    for source in (resolved, hybrid.to_dict(), path, str(path)):
        assert workbench.load_layout(source) == resolved


def test_load_layout_of_a_preset(builder: Builder) -> None:
    layout = workbench.load_layout("mamba-130m")
    assert layout == builder.resolve(builder.presets["mamba-130m"].layout())


def test_a_preset_comes_before_a_folder_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mamba-130m").mkdir()
    monkeypatch.chdir(tmp_path)
    assert workbench.load_layout("mamba-130m").d_model == 768


def write_trial(runs: Path, layout: Layout, plugin_dirs: list[str]) -> None:
    """The records of a study `tiny` with one trial, number 3."""
    folder = runs / "tiny" / "trials" / "00003"
    folder.mkdir(parents=True)
    (folder / "layout.json").write_text(layout.to_json())
    (folder / "trial.json").write_text(json.dumps({"outcome": "complete"}))
    space = {"d_model": 64, "num_layers": 1, "mixers": ["mamba"], "placements": ["uniform"]}
    config = {
        "name": "tiny",
        "objectives": ["parameters"],
        "space": space,
        "data": {"source": "stdlib"},
        "training": {},
        "budget": {"trials": 1},
        "plugin_dirs": plugin_dirs,
    }
    (runs / "tiny" / "study.json").write_text(json.dumps({"name": "tiny", "config": config}))


def test_load_layout_of_a_trial(hybrid: Layout, tmp_path: Path) -> None:
    write_trial(tmp_path, hybrid, [])
    assert workbench.load_layout("tiny:3", runs=tmp_path) == workbench.load_layout(hybrid)
    assert workbench.load_study("tiny", runs=tmp_path).trial(3).layout == hybrid


def test_a_trial_brings_its_studys_plugins(tmp_path: Path) -> None:
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    (plugins / "my_layers.py").write_text(
        "from workbench_mlp.swiglu import SwiGLU\n"
        "import workbench\n\n"
        "@workbench.hookimpl\n"
        "def register_layers(register):\n"
        "    register('my_swiglu', SwiGLU)\n"
    )
    layout = Layout(d_model=64, vocab_size=10, blocks=(Block(layer="my_swiglu"),))
    write_trial(tmp_path, layout, [str(plugins)])
    assert workbench.describe("tiny:3", runs=tmp_path).blocks[0].layer == "my_swiglu"
    with pytest.raises(UnknownNameError, match="unknown layer 'my_swiglu'"):
        workbench.load_layout(layout)
    assert workbench.load_layout(layout, plugin_dirs=[plugins]).blocks[0].layer == "my_swiglu"


def test_an_unknown_name_says_what_is_near_and_what_was_tried() -> None:
    with pytest.raises(WorkbenchError) as error:
        workbench.load_layout("mamba-13m")
    message = str(error.value)
    assert "Did you mean 'mamba-130m'?" in message
    assert "moai-8b" in message
    assert str(Path("mamba-13m").absolute()) in message
    assert "STUDY:NUMBER" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "bad.json: not JSON at line 1"),
        ("[]", "bad.json: layout: expected an object"),
        ('{"d_model": 8, "vocab_size": 8, "blocks": []}', "needs at least one block"),
        (
            '{"d_model": 8, "vocab_size": 8, "blocks": [{"layer": "manba"}]}',
            "Did you mean 'mamba'",
        ),
        (
            '{"d_model": 64, "vocab_size": 8,'
            ' "blocks": [{"layer": "mamba", "config": {"state": 8}}]}',
            "Did you mean 'd_state'",
        ),
    ],
)
def test_a_bad_file_says_where(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(WorkbenchError, match=message):
        workbench.load_layout(path)


@pytest.mark.parametrize(
    "source", ["absent.json", Path("absent"), "absent_study:3", "tiny:4", "tiny:3:4"]
)
def test_what_is_not_there_is_refused(source: str | Path, hybrid: Layout, tmp_path: Path) -> None:
    write_trial(tmp_path, hybrid, [])
    with pytest.raises(WorkbenchError, match=r"absent|trial 4|tiny:3"):
        workbench.load_layout(source, runs=tmp_path)


def test_build_gives_the_seeded_model(hybrid: Layout) -> None:
    first, second = workbench.build(hybrid, seed=1), workbench.build(hybrid, seed=1)
    tokens_BT = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert first(tokens_BT).shape == (2, 3, 100)
    assert torch.equal(first(tokens_BT), second(tokens_BT))
    assert not torch.equal(first(tokens_BT), workbench.build(hybrid, seed=2)(tokens_BT))
    assert workbench.build(hybrid, dtype=torch.bfloat16).embedding.weight.dtype == torch.bfloat16


def test_build_of_a_preset_on_meta_has_its_parameters() -> None:
    model = workbench.build("mamba-130m", device="meta")
    assert model.device.type == "meta"
    assert model.num_parameters == 129_135_360


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(("dtype", "element"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_description_equals_a_built_model(
    hybrid: Layout, dtype: torch.dtype, element: int, batch_size: int
) -> None:
    description = workbench.describe(
        hybrid, context=40, batch_size=batch_size, bytes_per_element=element
    )
    model = workbench.build(hybrid, dtype=dtype)
    states = model.init_state(batch_size, max_length=40)
    total = description.total
    assert total.parameters == description.active_parameters == model.num_parameters
    assert total.state_bytes == sum(state.num_bytes for state in states)
    for row, block, state in zip(description.blocks, model.blocks, states, strict=True):
        assert row.parameters == sum(parameter.numel() for parameter in block.parameters())
        assert row.state_bytes == state.num_bytes
    stored = workbench.build(hybrid, dtype=dtype, quantized=True)
    assert total.weight_bytes == num_bytes(stored) < num_bytes(model)
    for row, block in zip(description.blocks, stored.blocks, strict=True):
        assert row.weight_bytes == num_bytes(block)


@pytest.mark.parametrize("source", ["hybrid", "mamba2-130m", "moai-2b"])
def test_rows_add_up_to_the_total(source: str, hybrid: Layout) -> None:
    description = workbench.describe(hybrid if source == "hybrid" else source, batch_size=2)
    rows = (*description.outside, *description.blocks)
    for field in ("parameters", "decode_flops", "weight_bytes", "state_bytes"):
        total = sum(getattr(row, field) for row in rows)
        assert total == getattr(description.total, field), field
    forward = sum(row.forward_flops for row in rows)
    assert forward == pytest.approx(description.total.forward_flops, rel=1e-12)


def test_attention_costs_more_with_more_context(hybrid: Layout) -> None:
    near, far = (workbench.describe(hybrid, context=context) for context in (64, 4096))
    mamba, *_, attention = zip(near.blocks, far.blocks, strict=True)
    assert mamba[0].decode_flops == mamba[1].decode_flops
    assert mamba[0].state_bytes == mamba[1].state_bytes
    assert attention[0].decode_flops < attention[1].decode_flops
    assert attention[0].state_bytes * 64 == attention[1].state_bytes


def test_to_dict_is_json_with_every_row_and_the_claim_apart() -> None:
    data = json.loads(json.dumps(workbench.describe("moai-2b").to_dict(), allow_nan=False))
    assert data["parameters"] == 1_727_268_864
    assert data["stated (claimed)"]["parameters"] == "~2.1B"
    assert len(data["blocks"]) == 48
    assert data["blocks"][1]["config"]["intermediate_size"] == 5632
    assert data["pattern"] == "M-" * 24
    assert Layout.from_dict(data["layout"]).hash == data["hash"]
    other = {**data["layout"], "norm_eps": 1e-3}
    assert workbench.describe(other).to_dict()["stated (claimed)"] is None


def test_a_layout_that_equals_a_presets_keeps_its_name_and_claim() -> None:
    layout = workbench.load_layout("mamba-130m")
    for source in (layout, layout.to_dict()):
        description = workbench.describe(source)
        assert description.name == "mamba-130m"
        assert description.to_dict() == workbench.describe("mamba-130m").to_dict()
    other = workbench.describe(layout.replace(vocab_size=layout.vocab_size + 1))
    assert (other.name, other.preset) == ("", None)


def test_frame_has_a_row_a_block(hybrid: Layout) -> None:
    frame = workbench.describe(hybrid).frame()
    assert list(frame.index) == [0, 1, 2, 3, 4]
    assert list(frame.layer) == ["mamba", "swiglu", "mamba2", "swiglu", "attention"]
    assert list(frame.quantizer.fillna("")) == ["", "int8", "int8", "int8", ""]
    assert "num_kv_heads=2" in frame.config[4]


def test_text_folds_equal_blocks_and_keeps_the_claim_in_its_own_column() -> None:
    lines = str(workbench.describe("hybrid-slm-1.3b")).splitlines()
    assert lines[0].startswith("hybrid-slm-1.3b (")
    assert lines[1] == "A-A-MMA-MMMMA-MMMA-MMMMA-MMA-A-A-"
    assert any(line.startswith("8–11") and "M mamba" in line for line in lines)
    assert any(line.startswith("total") and "1,206,759,424" in line for line in lines)
    heading = next(index for index, line in enumerate(lines) if "stated (claimed)" in line)
    assert lines[heading + 1].split() == ["parameters", "1,206,759,424", "1.44B"]


def test_text_of_a_layout_claims_nothing(hybrid: Layout) -> None:
    text = str(workbench.describe(hybrid))
    assert text.startswith("layout (")
    assert "stated" not in text
    assert "int8" in text


def test_html_holds_the_table_escaped(hybrid: Layout, tmp_path: Path) -> None:
    path = tmp_path / "<b>.json"
    path.write_text(hybrid.to_json())
    page = workbench.describe(path)._repr_html_()
    assert "<b>" not in page
    assert "&lt;b&gt;.json" in page
    assert page.count("<tr>") == 1 + 5 + 3 + 1
    assert "stated (claimed)" in workbench.describe("mamba-130m")._repr_html_()


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("M", [(0, 1, 1)]),
        ("MMMM", [(0, 1, 4)]),
        ("M-M-M-", [(0, 2, 3)]),
        ("MMA", [(0, 1, 2), (2, 1, 1)]),
        ("MM-MM-MM-MM-", [(0, 3, 4)]),
        ("M-M=M-M=A-M=M-M=" * 4, [(0, 16, 4)]),
    ],
)
def test_fold_examples(text: str, groups: list[tuple[int, int, int]]) -> None:
    assert fold(text) == groups


@pytest.mark.parametrize(
    "text", ["AAMMAMMMAMMA", "ABABBABAAB", "A-A-MMA-MMMMA-MMMA-A-A-", "ABCABD"]
)
def test_fold_loses_nothing(text: str) -> None:
    unfolded = "".join(text[start : start + unit] * count for start, unit, count in fold(text))
    assert unfolded == text


def test_scaled() -> None:
    si = ("", "k", "M")
    assert [scaled(value, 1000, si) for value in (0, 999, 1000, 1.23456e6)] == [
        "–", "999", "1.000 k", "1.235 M",
    ]  # fmt: skip
    assert scaled(5e9, 1000, si) == "5000 M"


@pytest.mark.parametrize(
    ("field", "value"),
    [("context", 0), ("batch_size", -1), ("bytes_per_element", 3)],
)
def test_describe_refuses_arguments_that_make_no_sense(field: str, value: int) -> None:
    with pytest.raises(FieldError) as error:
        workbench.describe("mamba-130m", **{field: value})
    assert error.value.field == field


def test_describing_eight_billion_parameters_allocates_no_tensor() -> None:
    with Allocations() as allocations:
        assert workbench.describe("moai-8b").total.parameters > 8e9
        quantized = workbench.load_layout("moai-8b").to_dict()
        for block in quantized["blocks"]:
            block["quantizer"] = {"name": "int4"}
        assert workbench.describe(quantized).total.weight_bytes < 2 * 8e9
    assert allocations.operations == []


MEMORY = """
import resource, sys, time, tracemalloc
import workbench
from workbench.api import describe
describe("mamba-130m")  # imports and first-use caches
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.process_time()
describe("moai-8b", context=8192)
print(time.process_time() - began)
unit = 1 if sys.platform == "darwin" else 1024
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit)
"""


def test_describing_eight_billion_parameters_is_fast_and_takes_no_memory() -> None:
    result = subprocess.run(
        [sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True
    )
    seconds, grown = map(float, result.stdout.split())
    assert seconds < 2
    assert grown < 50e6
