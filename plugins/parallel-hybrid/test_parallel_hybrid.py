"""What the parallel hybrid promises beside the contract: its split, costs, quantizers, a study.

Shape suffixes: B batch, T tokens, D d_model.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_parallel_hybrid import ParallelHybrid, Split
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from workbench.builder import Builder
from workbench.errors import FieldError
from workbench.layer import PLAIN, Layer
from workbench.layout import Block, Layout, Named
from workbench.quantizer import num_bytes
from workbench.study import run_study
from workbench.study_config import StudyConfig
from workbench_attention.attention import Attention
from workbench_mamba.mamba2 import Mamba2
from workbench_quantizers.groupwise import Int4, Int8

HERE = Path(__file__).parent
D_MODEL = 64
SMALL: dict[str, Any] = {"head_dim": 8, "headdim": 8, "d_state": 8, "chunk_size": 8}
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "normed heads": {"attention_norm": True, "n_groups": 2, "queries_per_kv": 1},
    "gated": {"ssm_norm": False, "ssm_multipliers": (0.5, 1.5, 0.6, 1.2, 0.9)},
}
each_option = pytest.mark.parametrize("option", OPTIONS)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def builder() -> Builder:
    builder = Builder.load([HERE])
    assert not builder.plugins.failures
    return builder


def config(**values: Any) -> Any:
    return ParallelHybrid.Config(**SMALL | values)


def build(settings: Any, d_model: int = D_MODEL) -> ParallelHybrid:
    layer = ParallelHybrid(d_model, settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=d_model**-0.5)
        layer.reset_parameters()
    return layer.eval()


def inputs(batch: int, length: int) -> Tensor:
    return torch.randn(batch, length, D_MODEL, generator=torch.Generator().manual_seed(length))


# The split of the budget


def parameters(settings: Any, d_model: int = 256) -> int:
    return ParallelHybrid.costs(d_model, settings, length=1).parameters


@pytest.mark.parametrize("n_groups", [1, 2])
@each_option
def test_every_share_costs_the_same(option: str, n_groups: int) -> None:
    """To half a unit of SSM heads; and what attention has grows with its share."""
    options = OPTIONS[option] | {"n_groups": n_groups, "d_state": 16}
    step = config(**options, num_kv_heads=1, num_ssm_heads=n_groups)
    two = config(**options, num_kv_heads=1, num_ssm_heads=2 * n_groups)
    unit = parameters(two) - parameters(step)
    splits = []
    for share in (0.01, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.99):
        settings = config(**options, attention_share=share)
        assert abs(parameters(settings) - 6.0 * 256**2) <= unit / 2
        splits.append(Split.of(256, settings))
    kv_heads = [split.kv_heads for split in splits]
    ssm_heads = [split.ssm_heads for split in splits]
    assert kv_heads == sorted(kv_heads)
    assert ssm_heads == sorted(ssm_heads, reverse=True)
    assert len(set(kv_heads)) >= 6
    assert kv_heads[0] == 1
    assert ssm_heads[-1] == n_groups


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_attention_has_its_share(share: float) -> None:
    settings = config(attention_share=share)
    split = Split.of(256, settings)
    attention = Attention.costs(256, settings.attention(split.kv_heads), length=1).parameters
    one = Attention.costs(256, settings.attention(1), length=1).parameters
    assert abs(attention - share * 6.0 * 256**2) <= one / 2


def test_a_budget_too_small_says_what_would_do() -> None:
    with pytest.raises(FieldError, match=r"budget: .* use (\d+\.\d+) or more") as raised:
        ParallelHybrid.check(32, ParallelHybrid.Config(budget=2.0))
    enough = float(str(raised.value).split("use ")[1].split(" or")[0])
    settings = ParallelHybrid.Config(budget=enough)
    ParallelHybrid.check(32, settings)
    assert Split.of(32, settings) == Split(1, 1)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"attention_share": 0.0}, "attention_share"),
        ({"attention_share": 1.0}, "attention_share"),
        ({"budget": 0.0}, "budget"),
        ({"queries_per_kv": 0}, "queries_per_kv"),
        ({"num_kv_heads": 0}, "num_kv_heads"),
        ({"num_ssm_heads": 0}, "num_ssm_heads"),
        ({"num_ssm_heads": 3, "n_groups": 2}, "n_groups"),
        ({"head_dim": 7}, "head_dim"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"d_conv": 5}, "d_conv"),
    ],
)
def test_what_cannot_be_built_is_refused_by_its_field(values: dict[str, Any], field: str) -> None:
    with pytest.raises(FieldError) as raised:
        ParallelHybrid.check(D_MODEL, config(**values))
    assert raised.value.field == field


# Costs


@each_option
@pytest.mark.parametrize("length", [1, 40])
@torch.no_grad()
def test_flops_are_those_that_torch_counts(option: str, length: int) -> None:
    settings = config(**OPTIONS[option])
    layer = build(settings)
    costs = ParallelHybrid.costs(D_MODEL, settings, length=length)
    with FlopCounterMode(display=False) as counter:
        layer(inputs(1, length))
    flops = counter.get_flop_counts()["Global"]
    matrices = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
    counted = sum(flops.get(operation, 0) for operation in matrices)
    heads = layer.attention.heads
    # torch counts every pair of tokens in attention, and no convolution.
    core = 4 * heads.queries * heads.dim * length * (length + 1) // 2
    channels = len(layer.ssm.conv1d.weight)
    assert costs.forward_flops == counted + core + 2 * settings.d_conv * channels * length


def test_the_state_is_both_branches_states() -> None:
    layer = build(config())
    x_BTD, state = inputs(3, 9), layer.init_state(3, 12)
    layer(x_BTD, PLAIN, state)
    names = {"attention.keys_BHLP", "attention.values_BHLP", "ssm.conv_BCW", "ssm.ssm_BHPN"}
    assert state.tensors().keys() == names
    assert state.num_bytes == state.attention.num_bytes + state.ssm.num_bytes
    chosen = state.select(torch.tensor([2, 0]))
    for name, tensor in chosen.tensors().items():
        assert torch.equal(tensor, state.tensors()[name][[2, 0]]), name


# Both branches are the built-in layers


@torch.no_grad()
def test_the_output_is_the_sum_of_the_built_in_layers() -> None:
    layer = build(config())
    settings, split = layer.config, Split.of(D_MODEL, layer.config)
    attention = Attention(D_MODEL, settings.attention(split.kv_heads))
    ssm = Mamba2(D_MODEL, settings.ssm(split.ssm_heads))
    halves = layer.out_proj.weight.split((attention.o_proj.in_features, ssm.inner), 1)
    attention.load_state_dict(layer.attention.state_dict() | {"o_proj.weight": halves[0]})
    ssm.load_state_dict(layer.ssm.state_dict() | {"out_proj.weight": halves[1]})
    x_BTD = inputs(2, 21)
    torch.testing.assert_close(layer(x_BTD), attention(x_BTD) + ssm(x_BTD))


@each_option
def test_it_says_what_both_branches_run_on(option: str) -> None:
    layer = ParallelHybrid(D_MODEL, config(**OPTIONS[option]))
    attention, ssm = (part.backends(torch.bfloat16) for part in (layer.attention, layer.ssm))
    assert layer.backends(torch.bfloat16) == {**attention, **ssm}
    assert attention
    assert ssm


def test_both_output_projections_are_scaled_with_depth(builder: Builder) -> None:
    """The spread of out_proj over that of other linears, on the half of each branch."""
    block = Block(layer="parallel-hybrid", config={"d_state": 16})
    layout = Layout(d_model=256, vocab_size=8, blocks=(block,) * 16)
    layer = builder.build(layout).layers[3]
    width = layer.get_submodule("attention.q_proj").out_features
    weights = layer.state_dict()
    halves = weights["out_proj.weight"].tensor_split((width,), 1)
    for half in halves:
        assert float(half.std()) == pytest.approx(0.02 / math.sqrt(16), rel=0.03)
    assert float(weights["attention.q_proj.weight"].std()) == pytest.approx(0.02, rel=0.03)


# Quantizers


@torch.no_grad()
@pytest.mark.parametrize(("quantizer", "most"), [(Int8, 0.02), (Int4, 0.3)])
@each_option
def test_quantizers_reach_the_linears_of_both_branches(
    option: str, quantizer: type[Int8], most: float
) -> None:
    layer = build(config(**OPTIONS[option]))
    meta = ParallelHybrid(D_MODEL, layer.config, device="meta")
    expected_BTD = layer(inputs(2, 9))
    report = quantizer.quantize(layer, quantizer.Config())
    in_proj = "ssm.in_proj.linear" if option == "gated" else "ssm.in_proj"
    heads = {f"attention.{name}_proj" for name in "qkv"}
    assert report.quantized.keys() == heads | {in_proj, "out_proj"}
    assert num_bytes(layer) < 0.6 * sum(p.numel() * 4 for p in meta.parameters())
    assert quantizer.quantize(meta, quantizer.Config()) == report
    assert num_bytes(meta) == num_bytes(layer)
    error_BTD = layer(inputs(2, 9)) - expected_BTD
    assert 0 < float(error_BTD.norm() / expected_BTD.norm()) < most


def test_what_a_branch_keeps_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The branches' keep_precision holds for the whole, under the names it has there."""
    monkeypatch.setattr(Attention, "keep_precision", {"k_proj": "keys are fragile"})
    monkeypatch.setattr(Mamba2, "keep_precision", {"in_proj": "so are step sizes"})
    spec = importlib.util.spec_from_file_location("kept", HERE / "lm_parallel_hybrid.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "kept", module)
    spec.loader.exec_module(module)
    for multipliers in ((1.0,) * 5, (0.5, 1.5, 0.6, 1.2, 0.9)):
        values = {**SMALL, "ssm_multipliers": multipliers}
        layer: Layer = module.ParallelHybrid(D_MODEL, module.ParallelHybrid.Config(**values))
        report = Int8.quantize(layer, Int8.Config())
        assert report.quantized.keys() == {"attention.q_proj", "attention.v_proj", "out_proj"}
        assert report.kept["attention.k_proj"] == "keys are fragile"


# In a study, and away from the workbench


def test_the_readmes_study_varies_the_share_at_constant_parameters(tmp_path: Path) -> None:
    text = (HERE / "README.md").read_text(encoding="utf-8")
    data = tomllib.loads(text.split("```toml\n")[1].split("```")[0])
    data["plugin_dirs"] = [str(HERE)]
    data["data"]["validation_bytes"] = 1024
    data["training"] = {"tokens": 512, "batch_size": 2, "seq_len": 64}
    data["runtime"] = {"device": "cpu", "executor": "inline", "threads": 1}
    trials = run_study(StudyConfig.from_dict(data), tmp_path).trials()
    complete = [trial for trial in trials if trial.outcome == "complete"]
    shares = {trial.layout.blocks[0].config["attention_share"] for trial in complete}
    assert shares == {0.125, 0.25, 0.5, 0.75}
    sizes = [trial.metrics["parameters"] for trial in complete]
    heads = {"head_dim": 16, "headdim": 16, "d_state": 32, "num_kv_heads": 1}
    one, two = (
        parameters(ParallelHybrid.Config(**heads, num_ssm_heads=number), 128) for number in (1, 2)
    )
    assert max(sizes) - min(sizes) <= 2 * (two - one)  # half an SSM head either way, two blocks
    assert len({trial.metrics["memory_bytes"] for trial in complete}) == 4


RELOAD = """
import sys, torch, transformers
from safetensors.torch import load_file, save_file
for name in ("workbench", "workbench_attention", "workbench_mamba", "workbench_mlp",
             "lm_parallel_hybrid", "lm_falcon_h1"):
    sys.modules[name] = None
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokens = load_file(sys.argv[2])["tokens"]
given = model.generate(tokens[:, :9], attention_mask=torch.ones_like(tokens[:, :9]),
                       do_sample=False, max_new_tokens=8)
save_file({"logits": model(tokens).logits.detach(), "greedy": given}, sys.argv[3])
"""


@pytest.mark.slow
def test_an_exported_model_needs_neither_the_workbench_nor_this_package(tmp_path: Path) -> None:
    builder = Builder.load([HERE])
    mixer = SMALL | {"ssm_multipliers": [0.5, 1.5, 0.6, 1.2, 0.9], "key_multiplier": 0.6}
    blocks = (
        Block(layer="parallel-hybrid", config=mixer, quantizer=Named(name="int8")),
        Block(layer="scaled-swiglu", config={"gate_multiplier": 0.7, "down_multiplier": 1.6}),
    )
    model = builder.build(Layout(d_model=32, vocab_size=61, blocks=blocks), seed=1)
    builder.quantize(model)
    folder, question, answer = tmp_path / "model", tmp_path / "question", tmp_path / "answer"
    builder.exporters["huggingface"].export(
        model, builder, folder, None, {"study": "s", "trial": 0, "metrics": {}, "units": {}}
    )
    assert not list(folder.glob("*falcon*"))
    tokens_BT = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(2))
    save_file({"tokens": tokens_BT}, question)
    done = subprocess.run(
        [sys.executable, "-I", "-c", RELOAD, folder, question, answer],
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = load_file(answer)
    with torch.inference_mode():
        expected = model.eval()(tokens_BT)
        assert float((seen["logits"] - expected).abs().max() / expected.abs().max()) < 1e-5
        states = model.init_state(2, 17)
        greedy = [model.prefill(tokens_BT[:, :9], states).argmax(-1)]
        while len(greedy) < 8:
            greedy.append(model.step(greedy[-1], states).argmax(-1))
    assert seen["greedy"][:, 9:].tolist() == torch.stack(greedy, 1).tolist()
