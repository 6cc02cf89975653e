"""What must hold on a CUDA device: the CPU's results, honest timing, a whole trial."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.workbench.conftest import STUDY, make_config
from workbench import Block, Layout
from workbench.builder import Builder
from workbench.layer import Context
from workbench.measuring import decode_time, peak_memory, prefill_time
from workbench.metric import Subject
from workbench.study import run_study
from workbench.trial import load_trained
from workbench_metrics.recall import MultiQueryRecallShare, Recall

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LAYERS = {
    "mamba": {"d_state": 8},
    "mamba2": {"d_state": 16, "headdim": 16, "n_groups": 2},
    "bitlinear_mamba": {"d_state": 8},
    "attention": {"num_heads": 4, "num_kv_heads": 2},
    "swiglu": {},
    "relu2_mlp": {},
    "linear-attention": {},
    "gated-deltanet": {},
    "rwkv7": {},
    "rwkv7-channel-mix": {},
    "parallel-hybrid": {"head_dim": 16, "headdim": 16, "d_state": 16},
    "shared-attention": {"num_heads": 4, "adapter_rank": 8},
    "zamba2": {"num_heads": 4, "adapter_rank": 8, "d_state": 16, "headdim": 16},
    "kv-sharing-attention": {"num_heads": 4, "num_kv_heads": 2},
    "moe": {"num_experts": 4, "intermediate_size": 32},
    "sink-attention": {"num_heads": 4, "num_kv_heads": 2},
}
PACKAGES = sorted(
    path.parent for path in Path(__file__).parents[2].glob("plugins/*/pyproject.toml")
)


@pytest.fixture(scope="module")
def builder():
    return Builder.load(PACKAGES)


@pytest.fixture(autouse=True)
def full_precision():
    """fp32 means fp32: no TF32 in the comparisons."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def relative(found, wanted):
    # A gradient can be exactly zero (A_log's at one token): then the difference itself counts.
    found, wanted = found.detach().cpu(), wanted.detach()
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-4))


def pair(builder, name, **changes):
    # Beneath what reads or shares: a block to read, and another of its kind.
    names = ("attention", name, "swiglu", name)
    blocks = tuple(Block(layer=name, config=LAYERS[name]) for name in names)
    layout = Layout(d_model=64, vocab_size=97, blocks=blocks).replace(**changes)
    here = builder.build(layout, seed=1)
    there = builder.build(layout, device="cuda", seed=1)
    there.load_state_dict(here.state_dict())
    return here, there


# b1.58 rounds activations to 8 bits: a last-bit difference before it can move a whole level.
def tolerance(name):
    return 3e-2 if name == "bitlinear_mamba" else 1e-4


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("length", [1, 7, 65, 300])
def test_outputs_and_gradients_are_the_cpus(builder, name, length):
    here, there = pair(builder, name)
    tokens = torch.randint(97, (2, length), generator=torch.Generator().manual_seed(0))
    wanted = here(tokens)
    found = there(tokens.cuda())
    assert relative(found, wanted) < tolerance(name)
    wanted.logsumexp(-1).sum().backward()
    found.logsumexp(-1).sum().backward()
    gradients = dict(there.named_parameters())
    for key, parameter in here.named_parameters():
        assert relative(gradients[key].grad, parameter.grad) < 10 * tolerance(name), key


@pytest.mark.parametrize("name", LAYERS)
def test_prefill_and_steps_are_the_forward(builder, name):
    _, model = pair(builder, name)
    tokens = torch.randint(97, (2, 40), device="cuda")
    mask = torch.ones(2, 33, dtype=torch.bool, device="cuda")
    mask[1, :5] = False
    states = model.init_state(2, 40)
    with torch.inference_mode():
        whole_mask = torch.ones(2, 40, dtype=torch.bool, device="cuda")
        whole_mask[1, :5] = False
        wanted = model(tokens, Context(attention_mask_BT=whole_mask))
        found = [model.prefill(tokens[:, :33], states, Context(attention_mask_BT=mask))]
        found += [model.step(tokens[:, i], states) for i in range(33, 40)]
    assert relative(torch.stack(found, 1).cpu(), wanted[:, 32:].cpu()) < tolerance(name)


@pytest.mark.parametrize("name", LAYERS)
def test_bfloat16_stays_near(builder, name):
    here, there = pair(builder, name)
    tokens = torch.randint(97, (2, 65), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = there(tokens.cuda())
    assert relative(found.float(), here(tokens)) < 5e-2


def test_timing_and_memory_are_measured(builder):
    _, model = pair(builder, "mamba2")
    model.eval()
    assert 0 < decode_time(model, 2, 32, 8).median < 1
    assert 0 < prefill_time(model, 2, 32).median < 1
    size = 64 * 2**20
    assert peak_memory(lambda: torch.empty(size, dtype=torch.uint8, device="cuda"), "cuda") >= size


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_study_runs_on_the_device(builder, tmp_path, precision):
    config = make_config(
        STUDY,
        objectives=["bits_per_byte", "decode_ms", "memory_bytes"],
        report=[],
        metrics={"decode_ms": {"context": 16}},
        data={"source": "stdlib", "validation_bytes": 2048},
        space={
            "d_model": [64],
            "num_layers": [2],
            "mixers": ["mamba", "mamba2", "attention", "bitlinear_mamba"],
            "placements": ["free"],
            "mlps": ["swiglu"],
            "quantizers": ["none", "int8", "int4"],
        },
        training={"tokens": 4096, "batch_size": 4, "seq_len": 64, "precision": precision},
        budget={"trials": 4},
        runtime={"device": "cuda", "executor": "process"},
    )
    study = run_study(config, tmp_path)
    trials = [trial for trial in study.trials() if trial.outcome != "duplicate"]
    assert [trial.outcome for trial in trials] == ["complete"] * 4, [t.reason for t in trials]
    for trial in trials:
        assert trial.environment["device"] == "cuda"
        assert trial.metrics["bits_per_byte"] < 8
        model = load_trained(builder, trial.layout, trial.weights, "cuda")
        assert torch.isfinite(model(torch.zeros(1, 4, dtype=torch.long, device="cuda"))).all()


def test_recall_tells_attention_from_a_small_state(builder):
    """The training of its own runs on the device, at the defaults."""
    attention = Block(layer="attention", config={"head_dim": 16})
    small = Block(layer="mamba2", config={"headdim": 16, "d_state": 4})
    shares = []
    for blocks in ((small, attention), (small, small)):
        layout = builder.resolve(Layout(d_model=64, vocab_size=256, blocks=blocks))
        subject = Subject(layout=layout, builder=builder, device="cuda")
        shares.append(MultiQueryRecallShare(Recall()).measure(subject))
    assert shares[0] > 0.9
    assert shares[1] < 0.5
