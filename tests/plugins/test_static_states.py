"""States that a CUDA graph could replay: counting in tensors, they decode as ever."""

from __future__ import annotations

import copy

import pytest
import torch

from workbench import Block, Layout
from workbench.builder import Builder
from workbench.layer import Context

torch.set_num_threads(1)
CASES = {
    "attention": [
        {"position": "rope"},
        {"position": "alibi"},
        {"position": "none", "qk_norm": True},
        {"position": "rope", "sliding_window": 7},
        {"position": "alibi", "sliding_window": 7},
    ],
    "mamba": [{}],
    "mamba2": [{"headdim": 16, "d_state": 16}],
    "bitlinear_mamba": [{}],
    "swiglu": [{}],
}


@pytest.fixture(scope="module")
def builder() -> Builder:
    return Builder.load()


@pytest.mark.parametrize(
    ("name", "config"), [(name, config) for name, configs in CASES.items() for config in configs]
)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("prompt", [3, 12])
@torch.inference_mode()
def test_static_steps_are_steps(builder, name, config, padded, prompt):
    if name == "attention":
        config = {"num_heads": 4, "num_kv_heads": 2, **config}
    layout = Layout(d_model=32, vocab_size=31, blocks=(Block(layer=name, config=config),) * 2)
    model = builder.build(layout, seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(31, (2, prompt + 10), generator=generator)
    mask = torch.ones(2, prompt, dtype=torch.bool)
    mask[1, 0] = False
    context = Context(attention_mask_BT=mask) if padded else Context()
    plain = model.init_state(2, prompt + 10)
    model.prefill(tokens[:, :prompt], plain, context)
    static, before = copy.deepcopy(plain), copy.deepcopy(plain)
    for state in static:
        state.make_static()
    wanted = [model.step(tokens[:, i], plain) for i in range(prompt, prompt + 10)]
    for _ in range(2):
        found = [model.step(tokens[:, i], static) for i in range(prompt, prompt + 10)]
        torch.testing.assert_close(torch.stack(found), torch.stack(wanted), rtol=1e-5, atol=1e-5)
        for state, earlier in zip(static, before, strict=True):
            state.restore(earlier)


def test_a_counter_on_the_host_is_refused():
    import dataclasses

    from workbench.layer import State

    @dataclasses.dataclass
    class Counting(State):
        length: int = 0

    @dataclasses.dataclass
    class Nesting(State):
        inner: Counting

    with pytest.raises(NotImplementedError, match="Counting keeps 'length' on the host"):
        Nesting(Counting()).make_static()
