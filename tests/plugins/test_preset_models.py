"""Presets of published models against transformers' own classes, from the published configurations.

At full size the parameters are counted, without memory. Small copies, which keep all of a model but
its sizes, run with the same weights. Shape suffixes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import workbench
from tests.plugins.small_models import (
    PUBLISHED,
    SMALL,
    VOCABULARY,
    pair,
    small_layout,
    their_model,
    their_small_model,
    with_weights,
)
from workbench.builder import Builder
from workbench.layout import Layout
from workbench.testing.allocations import Allocations

TOLERANCE = 2e-6  # of the largest logit, float32
each_small_model = pytest.mark.parametrize("name", SMALL)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def exact(builder: Builder, name: str) -> int:
    return builder.costs(builder.presets[name].layout(), length=1).total.parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_transformers(builder: Builder, name: str) -> None:
    with torch.device("meta"):
        theirs = their_model(name)
    theirs.tie_weights()
    count = sum(parameter.numel() for parameter in theirs.parameters())
    assert exact(builder, name) == count


@pytest.mark.parametrize("name", [*SMALL, "samba-421m"])
def test_counts_are_those_of_the_built_model(builder: Builder, name: str) -> None:
    model = builder.build(builder.presets[name].layout(), device="meta")
    assert model.num_parameters == exact(builder, name)


@pytest.mark.parametrize(
    ("name", "count", "digits"),
    [
        ("granite-4.0-h-micro", 3_191_396_096, 10),  # in the metadata of its GGUF file
        # As model cards and papers round them.
        ("granite-4.0-h-350m", 340e6, 2),
        ("bamba-9b", 9.78e9, 3),
        ("nemotron-h-8b", 8e9, 1),
        ("tinyllama-1.1b", 1.1e9, 2),
        ("qwen3-0.6b", 0.6e9, 1),
        ("qwen3-1.7b", 1.7e9, 2),
        ("samba-421m", 422e6, 3),  # its name cuts 421.8 off
    ],
)
def test_counts_are_the_published_ones(
    builder: Builder, name: str, count: float, digits: int
) -> None:
    assert float(f"{exact(builder, name):.{digits}g}") == count


def test_samba_is_what_its_repository_says(builder: Builder) -> None:
    """transformers has no such class: the sum is that of its repository's modules, by hand."""
    d, inner, state, dt_rank = 1536, 3072, 16, 96
    mamba = 2 * d * inner + 5 * inner + inner * (dt_rank + 2 * state) + inner * (dt_rank + 1)
    mamba += inner * (state + 1) + inner * d
    attention, mlp, norms = 4 * d * d, 3 * d * 4096, (2 * 12 + 1) * d
    count = 32_000 * d + 6 * (mamba + attention) + 12 * mlp + norms
    assert exact(builder, "samba-421m") == count
    assert builder.presets["samba-421m"].stated_parameters == f"{count // 10**6}M"
    layout = builder.resolve(builder.presets["samba-421m"].layout())
    assert builder.pattern(layout) == "M-A-" * 6
    attentions = [block.config for block in layout.blocks if block.layer == "attention"]
    assert {config["sliding_window"] for config in attentions} == {2048}
    assert {config["num_heads"] for config in attentions} == {12}


def test_published_models_say_where_their_figures_come_from(builder: Builder) -> None:
    for name in [*PUBLISHED, "samba-421m"]:
        preset = builder.presets[name]
        assert any(mark in preset.source for mark in ("arXiv:", "model card", "config"))
        assert preset.stated_parameters


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(
        VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length)
    )


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@each_small_model
def test_small_copies_have_as_many_parameters(name: str) -> None:
    ours, theirs = pair(name)
    assert ours.num_parameters == theirs.num_parameters()


@pytest.mark.parametrize("length", [1, 7, 16, 45])
@each_small_model
@torch.no_grad()
def test_logits_agree(name: str, length: int) -> None:
    ours, theirs = pair(name)
    tokens_BT = tokens(2, length)
    assert relative(ours(tokens_BT), theirs(tokens_BT).logits) < TOLERANCE


@each_small_model
@torch.no_grad()
def test_cached_decoding_agrees(name: str) -> None:
    """Our prefill and steps against the logits of transformers' own cached generation."""
    ours, theirs = pair(name)
    prompt_BT = tokens(3, 19)
    made = theirs.generate(
        prompt_BT,
        attention_mask=torch.ones_like(prompt_BT),
        do_sample=False,
        max_new_tokens=24,
        return_dict_in_generate=True,
        output_logits=True,
    )
    states = ours.init_state(3, 19 + 24)
    logits_BV = ours.prefill(prompt_BT, states)
    for expected_BV, token_B in zip(made.logits, made.sequences[:, 19:].unbind(1), strict=True):
        assert relative(logits_BV, expected_BV) < TOLERANCE
        logits_BV = ours.step(token_B, states)


def changed(layout: Layout, layer: str | None, **values: Any) -> Layout:
    """The layout with other values in every block of one layer type, or outside the blocks."""
    if layer is None:
        return layout.replace(**values)
    assert any(block.layer == layer for block in layout.blocks)
    blocks = (
        dataclasses.replace(block, config=block.config | values) if block.layer == layer else block
        for block in layout.blocks
    )
    return layout.replace(blocks=tuple(blocks))


@pytest.mark.parametrize(
    ("name", "layer", "field", "value"),
    [
        ("bamba-9b", None, "norm_eps", 1e-6),
        ("bamba-9b", "attention", "partial_rotary_factor", 1.0),
        ("bamba-9b", "attention", "rope_theta", 1e6),
        ("bamba-9b", "mamba2", "norm_eps", 1e-6),
        ("nemotron-h-8b", None, "norm_eps", 1e-6),
        ("nemotron-h-8b", "attention", "position", "rope"),
        ("nemotron-h-8b", "mamba2", "grouped_norm", False),
        ("nemotron-h-8b", "mamba2", "norm_eps", 1e-6),
        ("granite-4.0-h-350m", None, "embedding_multiplier", 1.0),
        ("granite-4.0-h-350m", None, "residual_multiplier", 0.22),
        ("granite-4.0-h-350m", None, "logits_scaling", 1.0),
        ("granite-4.0-h-350m", "attention", "scale", None),
        ("granite-4.0-h-350m", "attention", "position", "rope"),
        ("tinyllama-1.1b", None, "norm_eps", 1e-6),
        ("tinyllama-1.1b", "attention", "rope_theta", 1e6),
        ("qwen3-0.6b", None, "norm_eps", 1e-5),
        ("qwen3-0.6b", "attention", "norm_eps", 1e-5),
        ("qwen3-0.6b", "attention", "rope_theta", 1e4),
        ("mamba-130m", None, "norm_eps", 1e-6),
        ("mamba2-130m", None, "norm_eps", 1e-6),
        ("mamba2-130m", "mamba2", "norm_eps", 1e-6),
    ],
)
@torch.no_grad()
def test_the_comparison_sees_a_wrong_value(
    name: str, layer: str | None, field: str, value: Any
) -> None:
    _, theirs = pair(name)
    wrong = with_weights(changed(small_layout(name), layer, **{field: value}), name, theirs)
    tokens_BT = tokens(2, 45)
    assert relative(wrong(tokens_BT), theirs(tokens_BT).logits) > 2 * TOLERANCE


@torch.no_grad()
def test_transformers_clamped_prefill_of_nemotron_h_can_be_said() -> None:
    """From the hub's time_step_min transformers takes a least step size, as the preset notes."""
    name = "nemotron-h-8b"
    least = PUBLISHED[name]["config"]["time_step_min"]
    theirs = their_small_model(name, time_step_min=least)
    for module in theirs.modules():
        if hasattr(module, "dt_bias"):
            module.dt_bias.sub_(8.0)  # steps so small that the limit matters
    layout = small_layout(name)
    expected_BTV = theirs(tokens(2, 45)).logits
    free = with_weights(layout, name, theirs)
    clamped = with_weights(changed(layout, "mamba2", dt_limit_min=least), name, theirs)
    assert relative(clamped(tokens(2, 45)), expected_BTV) < TOLERANCE
    assert relative(free(tokens(2, 45)), expected_BTV) > 2 * TOLERANCE


@pytest.mark.parametrize("name", [*PUBLISHED, "samba-421m"])
def test_describing_allocates_nothing(name: str) -> None:
    with Allocations() as allocations:
        description = workbench.describe(name)
        text = str(description)
    assert allocations.operations == []
    assert f"{description.total.parameters:,}" in text


OWN_TIME = """
import sys, time
import torch  # how long that takes is not the workbench's
began = time.process_time()
from workbench.cli.app import run_app
sys.argv = ["workbench", "describe", sys.argv[1]]
assert run_app() == 0
print(time.process_time() - began)
"""


def test_describing_is_fast() -> None:
    result = subprocess.run(
        [sys.executable, "-c", OWN_TIME, "bamba-9b"], check=True, capture_output=True, text=True
    )
    assert float(result.stdout.splitlines()[-1]) < 2.0
