"""The contract suite; what the two files hold; sharing, quantizers, dtypes; what is refused."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_safetensors_exporter
import pytest
import torch
from lm_safetensors_exporter import FACTS, WEIGHTS, SafetensorsFile, load
from safetensors.torch import load_file, save_file

from workbench.builder import Builder
from workbench.config import NoConfig
from workbench.errors import UnknownNameError, WorkbenchError
from workbench.exporter import ExportReport
from workbench.layout import Block, Layout, Named
from workbench.model import HybridLM
from workbench.testing import ExporterContract
from workbench.testing.toys import ToyMixer, ToyMLP, toy_builder, toy_layout

PLUGIN_FILE = """
from lm_helper_of_a_plugin import SCALE
from workbench.hookspecs import hookimpl
from workbench.testing.toys import ToyMLP

class Scaled(ToyMLP):
    def forward(self, x_BTD, context=None, state=None):
        return SCALE * super().forward(x_BTD)

@hookimpl
def register_layers(register):
    register("scaled", Scaled)
"""


class TestSafetensorsFile(ExporterContract):
    exporter = SafetensorsFile
    configs = (NoConfig(),)


def export(model: HybridLM, builder: Builder, out: Path, **metadata: Any) -> ExportReport:
    return SafetensorsFile.export(model, builder, out, NoConfig(), metadata)


def make(layout: Layout, builder: Builder, **options: Any) -> HybridLM:
    return builder.build(layout, **options).eval()


def assert_same(first: HybridLM, second: HybridLM) -> None:
    tokens_BT = torch.arange(24).view(2, 12) % first.layout.vocab_size
    with torch.no_grad():
        assert torch.equal(first(tokens_BT), second(tokens_BT))


def test_the_files_hold_layout_weights_and_provenance(tmp_path: Path) -> None:
    builder = toy_builder()
    model = make(toy_layout(), builder)
    report = export(model, builder, tmp_path / "out", study="toys", metrics={"accuracy": 0.5})
    assert report.max_difference == 0.0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [FACTS, WEIGHTS]
    facts = json.loads((tmp_path / "out" / FACTS).read_text())
    assert Layout.from_dict(facts["layout"]) == model.layout
    assert facts["layout_hash"] == model.layout.hash
    assert facts["metadata"] == {"study": "toys", "metrics": {"accuracy": 0.5}}
    assert facts["layers"]["toy-mixer"]["module"] == builder.layers.provenance("toy-mixer").module
    assert facts["layers"]["toy-mixer"]["class"] == "ToyMixer"
    assert str(tmp_path) not in json.dumps(facts)
    weights = load_file(tmp_path / "out" / WEIGHTS)
    assert set(weights) == set(model.state_dict()) - {"lm_head.weight"}
    assert sum(tensor.numel() for tensor in weights.values()) == model.num_parameters


@pytest.mark.parametrize("tie", [True, False])
def test_a_tied_head_is_stored_once_and_tied_again(tie: bool, tmp_path: Path) -> None:
    builder = toy_builder()
    model = make(toy_layout().replace(tie_embeddings=tie), builder)
    export(model, builder, tmp_path / "out")
    facts = json.loads((tmp_path / "out" / FACTS).read_text())
    assert facts["tied"] == ({"lm_head.weight": "embedding.weight"} if tie else {})
    loaded = load(tmp_path / "out", toy_builder())
    assert (loaded.lm_head.weight is loaded.embedding.weight) == tie
    assert loaded.num_parameters == model.num_parameters
    assert_same(loaded, model)


class Twins(ToyMixer):
    """Shares one linear among its children, and keeps two views of one buffer."""

    def __init__(self, d_model: int, config: Any, **factory: Any) -> None:
        super().__init__(d_model, config, **factory)
        self.gate_proj = self.in_proj
        whole = torch.ones(2, d_model, **factory)
        self.register_buffer("upper", whole[0])
        self.register_buffer("lower", whole[1])


def test_a_layers_own_sharing_survives(tmp_path: Path) -> None:
    builder = toy_builder()
    builder.layers.add("twins", Twins, builder.layers.provenance("toy-mixer"))
    layout = toy_layout().replace(blocks=(Block(layer="twins"), Block(layer="toy-mlp")))
    model = make(layout, builder)
    assert export(model, builder, tmp_path / "out").max_difference == 0.0
    facts = json.loads((tmp_path / "out" / FACTS).read_text())
    assert len(facts["tied"]) == 3
    loaded = load(tmp_path / "out", builder)
    first = loaded.layers[0]
    assert first.gate_proj.weight is first.in_proj.weight
    assert_same(loaded, model)


class Borrower(ToyMLP):
    """Takes its first linear from the earlier block of its kind."""

    shared = ("up_proj",)

    @classmethod
    def source(cls, d_model: int, blocks: Sequence[Block]) -> int | None:
        return next((i for i, block in enumerate(blocks[:-1]) if block.layer == "borrower"), None)


def test_weights_that_blocks_share_are_stored_once(tmp_path: Path) -> None:
    builder = toy_builder()
    builder.layers.add("borrower", Borrower, builder.layers.provenance("toy-mlp"))
    blocks = (Block(layer="borrower"), Block(layer="toy-mixer"), Block(layer="borrower"))
    model = make(toy_layout().replace(blocks=blocks), builder)
    assert export(model, builder, tmp_path / "out").max_difference == 0.0
    stored = sum(tensor.numel() for tensor in load_file(tmp_path / "out" / WEIGHTS).values())
    assert stored == model.num_parameters
    loaded = load(tmp_path / "out", builder)
    assert loaded.layers[2].up_proj is loaded.layers[0].up_proj
    assert_same(loaded, model)


@pytest.mark.parametrize(
    ("dtype", "given"), [(torch.float32, "as trained"), (torch.bfloat16, "as stored")]
)
def test_quantized_weights_are_stored_packed(
    builder, dtype: torch.dtype, given: str, tmp_path: Path
) -> None:
    quantizer = Named(name="int4", config={"group_size": 32})
    names = ("attention", "swiglu")
    blocks = tuple(Block(layer=name, quantizer=quantizer) for name in names)
    layout = builder.resolve(Layout(d_model=64, vocab_size=96, blocks=blocks))
    model = make(layout, builder, dtype=dtype)
    if given == "as stored":
        builder.quantize(model)
    assert export(model, builder, tmp_path / "out").max_difference == 0.0
    loaded = load(tmp_path / "out", builder)
    assert loaded.embedding.weight.dtype == dtype
    builder.quantize(model)
    assert_same(loaded, model)
    held = sum(tensor.nbytes for tensor in load_file(tmp_path / "out" / WEIGHTS).values())
    costs = builder.costs(layout, length=1, bytes_per_element=dtype.itemsize)
    assert held == costs.weight_bytes
    facts = json.loads((tmp_path / "out" / FACTS).read_text())
    assert facts["quantizers"]["int4"]["package"] == "lm-workbench"


def test_a_layer_from_a_plugin_folder_is_proved_from_its_file(monkeypatch, tmp_path: Path) -> None:
    plugins, helpers = tmp_path / "plugins", tmp_path / "helpers"
    for folder in (plugins, helpers):
        folder.mkdir()
    (plugins / "scaled.py").write_text(PLUGIN_FILE)
    (helpers / "lm_helper_of_a_plugin.py").write_text("SCALE = 3.0\n")
    monkeypatch.syspath_prepend(str(helpers))
    builder = Builder.load([plugins])
    model = make(Layout(d_model=16, vocab_size=32, blocks=(Block(layer="scaled"),)), builder)
    export(model, builder, tmp_path / "out")
    facts = json.loads((tmp_path / "out" / FACTS).read_text())
    assert facts["layers"]["scaled"]["version"].startswith("sha256:")
    assert_same(load(tmp_path / "out", builder), model)
    (helpers / "lm_helper_of_a_plugin.py").write_text("SCALE = 2.0\n")
    with pytest.raises(WorkbenchError, match=r"logits differ by .* so nothing was kept"):
        export(model, builder, tmp_path / "other")
    assert not list(tmp_path.glob("*other*"))


def test_the_process_that_proves_is_told_no_password(monkeypatch, tmp_path: Path) -> None:
    """It imports plugins."""
    told: dict[str, str] = {}
    run = subprocess.run

    def spy(*arguments: Any, **named: Any) -> Any:
        told.update(named.get("env") or os.environ)
        return run(*arguments, **named)

    monkeypatch.setattr(subprocess, "run", spy)
    monkeypatch.setenv("PGPASSWORD", "geheim")
    monkeypatch.setenv("WORKBENCH_STORAGE", "postgresql://me:geheim@host/db")
    builder = toy_builder()
    export(make(toy_layout(), builder), builder, tmp_path / "out")
    assert told["PATH"] == os.environ["PATH"]
    assert not any("geheim" in value for value in told.values())


def test_refusals_leave_nothing_behind(tmp_path: Path) -> None:
    builder = toy_builder()
    model = make(toy_layout(), builder)
    with pytest.raises(WorkbenchError, match="is no plain JSON"):
        export(model, builder, tmp_path / "out", figure=float("nan"))
    model.layers[0].register_buffer("table", torch.ones(3), persistent=False)
    with pytest.raises(WorkbenchError, match=r"blocks\[0\] \(toy-mixer\): buffer 'table'"):
        export(model, builder, tmp_path / "out")
    model = make(toy_layout(), builder)
    with torch.no_grad():
        model.embedding.weight[0] = torch.nan
    with pytest.raises(WorkbenchError, match="differ by nan"):
        export(model, builder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_class_that_no_import_reaches_is_refused(tmp_path: Path) -> None:
    class Local(ToyMixer):
        pass

    builder = toy_builder()
    builder.layers.add("local", Local, builder.layers.provenance("toy-mixer"))
    layout = toy_layout().replace(blocks=(Block(layer="local"),))
    with pytest.raises(WorkbenchError, match="define it at the top level"):
        export(make(layout, builder), builder, tmp_path / "out")


def test_a_full_disk_is_said_and_leaves_nothing(monkeypatch, tmp_path: Path) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lm_safetensors_exporter, "save_file", full)
    builder = toy_builder()
    with pytest.raises(WorkbenchError, match=r"No space left on device. Nothing was kept"):
        export(make(toy_layout(), builder), builder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    builder, out = toy_builder(), tmp_path / "out"
    export(make(toy_layout(), builder), builder, out)
    facts = json.loads((out / FACTS).read_text())
    weights = load_file(out / WEIGHTS)
    with pytest.raises(WorkbenchError, match=r"cannot read .*model\.json"):
        load(tmp_path / "nowhere", builder)
    save_file(
        {name: tensor for name, tensor in weights.items() if "norm" not in name}, out / WEIGHTS
    )
    with pytest.raises(WorkbenchError, match=r"does not fit its model\.json: [\s\S]*norm"):
        load(out, builder)
    (out / WEIGHTS).write_bytes(b"no weights")
    with pytest.raises(WorkbenchError, match=r"does not fit its model\.json"):
        load(out, builder)
    (out / FACTS).write_text(json.dumps({**facts, "format": 2}))
    with pytest.raises(WorkbenchError, match="not of format 1"):
        load(out, builder)
    facts["layout"]["blocks"][0]["layer"] = "unheard-of"
    (out / FACTS).write_text(json.dumps(facts))
    with pytest.raises(UnknownNameError, match="unheard-of"):
        load(out, builder)
