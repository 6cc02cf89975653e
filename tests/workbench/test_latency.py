"""Predictions against a clock whose prices are known, and against a recorded table."""

from __future__ import annotations

import dataclasses
import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workbench.test_latency_table import DECODE, PREFILL, PriceList, filler_of, layout_of
from tests.workbench.test_latency_table import toys as toys  # a fixture
from workbench.builder import Builder
from workbench.errors import FieldError, UnknownNameError
from workbench.latency import LatencyModel
from workbench.latency_drawing import RandomSuggester, draw_layouts
from workbench.latency_evaluation import evaluate
from workbench.latency_filling import Filler
from workbench.latency_fit import Correction, fit, non_negative_least_squares
from workbench.latency_machine import PHASES, Load, Machine
from workbench.latency_table import LatencyTable
from workbench.layout import Block, Layout, Named
from workbench.model import HybridLM
from workbench.rank_correlation import kendall_tau
from workbench.roofline import Ceilings, Roofline
from workbench.space import Space, SpaceConfig

RECORDED = Path(__file__).with_name("latency_recorded.json")
RECORDED_ON_H200 = Path(__file__).with_name("latency_recorded_h200.json")
NAMES = ("toy-mixer", "toy-mlp", "shared")


def some_layouts(builder: Builder, count: int, seed: int = 0) -> list[Layout]:
    dice = random.Random(seed)
    found: dict[str, Layout] = {}
    while len(found) < count:
        names = dice.choices(NAMES, k=dice.randint(1, 9))
        layout = builder.resolve(layout_of(*names, d_model=dice.choice([32, 64])))
        found[layout.hash] = layout
    return list(found.values())


def filled_by(timer: PriceList, builder: Builder, layouts: list[Layout]) -> LatencyTable:
    table = LatencyTable(Machine.here("cpu"))
    filler = Filler(table=table, builder=builder, timer=timer, rounds=1)
    assert filler.fill(layouts, [DECODE, PREFILL]).failed == {}
    return table


class Whole(PriceList):
    """Whole models cost other than their layers': 3 s more, mixers half as much again."""

    def seconds(self, model: HybridLM, load: Load) -> float:
        mixers = sum(
            0.5 * layer.d_model / 32 for layer in model.layers if type(layer).__name__ == "ToyMixer"
        )
        return 3.0 + super().seconds(model, load) + 0.5 * mixers * load.batch_size * load.length


# Sums


def test_a_prediction_is_the_sum_of_the_parts(toys: Builder) -> None:
    layouts, timer = some_layouts(toys, 30), PriceList()
    model = LatencyModel(filled_by(timer, toys, layouts), toys)
    for layout, load in itertools.product(layouts, (DECODE, PREFILL)):
        found = model.predict(layout, load.phase, load.batch_size, load.length)
        assert found.missing == ()
        assert found.lower_bound is None
        assert found.seconds == pytest.approx(timer.seconds(toys.build(layout), load))


def test_what_the_table_lacks_is_named_and_nothing_is_made_up(toys: Builder) -> None:
    table = filled_by(PriceList(), toys, [layout_of("toy-mlp")])
    model = LatencyModel(table, toys)
    layout = layout_of("toy-mixer", "toy-mlp", "toy-mixer")
    for _ in range(2):
        found = model.predict(layout, "decode", 2, 8)
        assert found.seconds is None
        assert found.missing == ("toy-mixer(expand=1), d_model 32",)
    assert len(model.predict(layout, "decode", 2, 9).missing) == 3
    # The same model, once the table has what it lacked.
    filler_of(toys, table).fill([layout], [DECODE])
    assert model.predict(layout, "decode", 2, 8).missing == ()
    assert model.predict(layout, "decode", 2, 8).seconds == pytest.approx(16 * (0.875 + 1.125))


def test_layouts_need_not_be_resolved(toys: Builder) -> None:
    model = LatencyModel(filled_by(PriceList(), toys, [layout_of("toy-mixer")]), toys)
    spelt = Block(layer="toy-mixer", config={"expand": 1})
    seconds = {
        model.predict(layout, "decode", 2, 8).seconds
        for layout in (layout_of("toy-mixer"), layout_of("toy-mlp").replace(blocks=(spelt,)))
    }
    assert len(seconds) == 1
    wrong = layout_of("toy-mlp").replace(blocks=(Block(layer="toy-mixer", config={"size": 1}),))
    with pytest.raises(UnknownNameError):
        model.predict(wrong, "decode", 2, 8)
    with pytest.raises(FieldError, match="batch_size"):
        model.predict(layout_of("toy-mixer"), "decode", 0, 8)


def test_quantized_blocks_are_parts_of_their_own(builder: Builder) -> None:
    blocks = [
        Block(layer="swiglu", config=config, quantizer=quantizer)
        for config in ({}, {"intermediate_size": 96})
        for quantizer in (None, Named(name="int8"), Named(name="int8", config={"group_size": 32}))
    ]
    table = LatencyTable(Machine.here("cpu"))
    layouts = [Layout(d_model=64, vocab_size=64, blocks=(block,)) for block in blocks]

    class Bytes(PriceList):
        def seconds(self, model: HybridLM, load: Load) -> float:
            tensors = {id(t): t for t in model.state_dict().values()}.values()
            return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))

    Filler(table=table, builder=builder, timer=Bytes(), rounds=1).fill(layouts, [DECODE])
    model = LatencyModel(table, builder)
    seconds = [model.predict(layout, "decode", 2, 8).seconds for layout in layouts]
    assert len(set(seconds)) == 6
    assert None not in seconds


def test_the_lower_bound_is_the_roofline_s(toys: Builder) -> None:
    limits = Ceilings(machine=Machine.here("cpu"), bandwidth=1e9, rate=1e10, cache_bytes=0)
    line = Roofline(toys, limits)
    layouts = some_layouts(toys, 10)
    assert any(block.layer == "shared" for layout in layouts for block in layout.blocks)
    model = LatencyModel(LatencyTable(Machine.here("cpu")), toys, line)
    for layout, load in itertools.product(layouts, (DECODE, PREFILL)):
        expected = line.bound(layout, load.phase, load.batch_size, load.length).seconds
        found = model.predict(layout, load.phase, load.batch_size, load.length)
        assert found.lower_bound == pytest.approx(expected)


# Corrections


def test_a_correction_finds_what_whole_models_add(toys: Builder) -> None:
    layouts = some_layouts(toys, 60)
    table = filled_by(PriceList(), toys, layouts)
    filler = Filler(table=table, builder=toys, timer=Whole(), rounds=1)
    filler.observe(layouts[:40], [DECODE, PREFILL], "fit")
    filler.observe(layouts[40:], [DECODE, PREFILL], "check")
    plain, fitted = LatencyModel(table, toys), LatencyModel.fitted(table, toys)
    for phase in PHASES:
        correction = fitted.corrections[phase]
        assert correction.observations == 40
        assert correction.overhead == pytest.approx(3.0, rel=0.1)
        assert correction.scales["toy-mixer"] == pytest.approx(1.5, rel=0.05)
        assert correction.scales["toy-mlp"] == pytest.approx(1.0, rel=0.1)
    seen = fitted.observations("check")
    for before, after in zip(evaluate(plain, seen), evaluate(fitted, seen), strict=True):
        assert before.mape > 0.1
        assert after.mape < 0.02
        assert len(after.rows) == 20
        assert after.kendall_tau is not None
        assert after.kendall_tau > 0.98


def test_nothing_measured_whole_is_no_correction(toys: Builder) -> None:
    table = filled_by(PriceList(), toys, some_layouts(toys, 3))
    model = LatencyModel.fitted(table, toys)
    assert model.corrections == {phase: Correction() for phase in PHASES}
    assert Correction().scale("anything") == 1.0
    assert evaluate(model, []) == []


def test_few_models_move_scales_little_and_layers_unseen_not(toys: Builder) -> None:
    row = ({"outside": 1.0, "toy-mlp": 1.0}, 3.0)  # twice what the sum says of the block
    one, many = fit([row]), fit([row] * 200)
    # Overhead and scale explain one row alike well: the prior on the scale decides.
    assert one.overhead + one.scales["toy-mlp"] == pytest.approx(2.0, abs=0.2)
    assert many.overhead + many.scales["toy-mlp"] == pytest.approx(2.0, abs=0.01)
    assert one.scale("toy-mixer") == 1.0


def test_observations_that_lack_a_part_or_their_code_do_not_count(toys: Builder) -> None:
    layouts = some_layouts(toys, 4)
    table = filled_by(PriceList(), toys, layouts[:3])
    Filler(table=table, builder=toys, timer=PriceList(), rounds=1).observe(layouts, [DECODE], "fit")
    stranger = layout_of("toy-mixer", "toy-mixer").replace(blocks=(Block(layer="gone"),))
    first = table.observations[0]
    table.observations += [
        dataclasses.replace(first, layout=stranger),
        dataclasses.replace(first, sources="an earlier version"),
    ]
    model = LatencyModel.fitted(table, toys)
    known = [
        layout for layout in layouts if model.predict(layout, "decode", 2, 8).seconds is not None
    ]
    assert model.corrections["decode"].observations == len(known) < 6
    assert model.corrections["prefill"].observations == 0


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6))
def test_no_other_point_above_zero_fits_better(seed: int) -> None:
    """The conditions of Karush, Kuhn and Tucker, which only the optimum meets."""
    dice = np.random.default_rng(seed)
    rows, columns = int(dice.integers(3, 20)), int(dice.integers(1, 6))
    matrix = dice.normal(size=(rows, columns)) + dice.uniform(-1, 1)
    target = dice.normal(size=rows)
    x = non_negative_least_squares(matrix, target)
    gradient = matrix.T @ (matrix @ x - target)
    scale = np.abs(matrix.T @ target).max() + 1
    assert (x >= 0).all()
    assert (gradient >= -1e-5 * scale).all()
    assert np.abs(gradient[x > 0]).max(initial=0.0) <= 1e-5 * scale


def test_an_empty_column_gets_nothing() -> None:
    matrix = np.array([[1.0, 0.0], [2.0, 0.0]])
    assert non_negative_least_squares(matrix, np.array([2.0, 4.0])) == pytest.approx([2.0, 0.0])


@pytest.mark.parametrize(
    ("first", "second", "tau"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4], [1, 2, 4, 3], 4 / 6),
        ([1, 2, 2, 3], [1, 2, 3, 3], 4 / 5),  # tau-b: 4 pairs agree, a tie on each side
        ([1], [1], None),
        ([2, 2, 2], [1, 2, 3], None),
    ],
)
def test_kendall_s_tau(first: list[float], second: list[float], tau: float | None) -> None:
    assert kendall_tau(first, second) == (None if tau is None else pytest.approx(tau))


# A recorded table: `python benchmarks/latency_model.py --cpu-time --record …`


@pytest.fixture(scope="module")
def recorded() -> LatencyTable:
    return LatencyTable.read(RECORDED, strict=False)


def test_the_record_gives_the_same_model_in_any_order(
    recorded: LatencyTable, builder: Builder
) -> None:
    first = LatencyModel.fitted(recorded, builder)
    shuffled = LatencyTable.read(RECORDED, strict=False)
    random.Random(0).shuffle(shuffled.observations)
    second = LatencyModel.fitted(shuffled, builder)
    for phase in PHASES:
        one, two = first.corrections[phase], second.corrections[phase]
        assert one.observations == two.observations > 10
        assert dict(one.scales) == pytest.approx(dict(two.scales), rel=1e-6)
        assert one.overhead == pytest.approx(two.overhead, rel=1e-6, abs=1e-12)
    again = LatencyModel.fitted(recorded, builder)
    assert again.corrections == first.corrections


def test_the_record_s_errors_are_what_they_are_computed_by_hand(
    recorded: LatencyTable, builder: Builder
) -> None:
    model = LatencyModel.fitted(recorded, builder)
    seen = model.observations("check")
    evaluations = evaluate(model, seen)
    assert [evaluation.load.phase for evaluation in evaluations] == ["decode", "prefill"]
    for evaluation in evaluations:
        pairs = {o.layout.hash: o.seconds for o in seen if o.load == evaluation.load}
        assert {row.layout_hash: row.measured for row in evaluation.rows} == pairs
        measured = np.array([row.measured for row in evaluation.rows])
        predicted = np.array([row.predicted for row in evaluation.rows])
        errors = predicted / measured - 1
        assert evaluation.mape == pytest.approx(np.abs(errors).mean())
        assert abs(evaluation.worst.error) == pytest.approx(np.abs(errors).max())
        # Tau-b: layouts of the same blocks in another order are predicted alike.
        signs = [np.sign(np.subtract.outer(x, x)) for x in (measured, predicted)]
        ordered = [np.abs(sign).sum() for sign in signs]
        tau = (signs[0] * signs[1]).sum() / np.sqrt(ordered[0] * ordered[1])
        assert evaluation.kendall_tau == pytest.approx(tau)


def test_the_record_s_sums_rank_layouts_that_were_not_fitted_to(
    recorded: LatencyTable, builder: Builder
) -> None:
    """Of what was once measured: that the method works, not how fast this machine is."""
    model = LatencyModel.fitted(recorded, builder)
    fitted = {o.layout.hash for o in model.observations("fit")}
    for evaluation in evaluate(model, model.observations("check")):
        assert not fitted & {row.layout_hash for row in evaluation.rows}
        assert evaluation.unknown == 0
        assert evaluation.kendall_tau is not None
        assert evaluation.kendall_tau > 0.8
        assert evaluation.mape < 0.15


def test_the_record_of_a_gpu_is_predicted_to_a_few_percent(builder: Builder) -> None:
    """Steps and prefills replayed as CUDA graphs, of batches of 1 and 64."""
    table = LatencyTable.read(RECORDED_ON_H200, strict=False)
    model = LatencyModel.fitted(table, builder)
    evaluations = evaluate(model, model.observations("check"))
    loads = {(one.load.phase, one.load.batch_size) for one in evaluations}
    assert loads == {("decode", 1), ("decode", 64), ("prefill", 1), ("prefill", 64)}
    fitted = {o.layout.hash for o in model.observations("fit")}
    for evaluation in evaluations:
        assert not fitted & {row.layout_hash for row in evaluation.rows}
        assert len(evaluation.rows) >= 20
        assert evaluation.kendall_tau is not None
        assert evaluation.kendall_tau >= 0.95
        assert evaluation.mape <= 0.05


# Drawing


def space_of(builder: Builder, **changes: Any) -> Space:
    config = {
        "d_model": [32, 64],
        "num_layers": {"low": 1, "high": 4},
        "mixers": ("mamba", "attention"),
        "placements": ("free", "uniform"),
        "layers": {"attention": {"head_dim": [16, 32]}},
        "quantizers": ("none", "int8"),
        **changes,
    }
    return Space(SpaceConfig(**config), builder, 64)


def test_drawn_layouts_are_different_resolved_and_repeat(builder: Builder) -> None:
    drawn = draw_layouts(space_of(builder), 40, seed=1)
    assert len({layout.hash for layout in drawn}) == len(drawn) == 40
    assert drawn == draw_layouts(space_of(builder), 40, seed=1)
    assert drawn != draw_layouts(space_of(builder), 40, seed=2)
    assert drawn[:10] == draw_layouts(space_of(builder), 10, seed=1)
    assert all(builder.resolve(layout) == layout for layout in drawn)
    assert {layout.d_model for layout in drawn} == {32, 64}
    assert {len(layout.blocks) for layout in drawn} == {1, 2, 3, 4}


def test_a_small_space_is_drawn_whole_and_what_cannot_be_built_is_left_out(
    builder: Builder,
) -> None:
    changes = {"placements": ("uniform",), "num_layers": 1, "quantizers": ("none",)}
    small = space_of(builder, **changes, mixers=("attention",))
    assert len(draw_layouts(small, 50)) == 4
    odd = {"attention": {"head_dim": [16, 24]}}  # 24 divides neither width
    some = space_of(builder, **changes, mixers=("attention",), layers=odd)
    assert {layout.blocks[0].config["head_dim"] for layout in draw_layouts(some, 50)} == {16}


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6))
def test_suggestions_stay_in_their_ranges(seed: int) -> None:
    suggester = RandomSuggester(random.Random(seed))
    assert suggester.suggest_int("a", 3, 11, step=4, log=False) in (3, 7, 11)
    assert 2 <= suggester.suggest_int("a", 2, 9, step=1, log=True) <= 9
    assert 0.5 <= suggester.suggest_float("a", 0.5, 2.0, step=None, log=True) <= 2.0
    assert 0.5 <= suggester.suggest_float("a", 0.5, 2.0, step=None, log=False) <= 2.0
    stepped = suggester.suggest_float("a", 0.1, 0.5, step=0.2, log=False)
    assert min(abs(stepped - value) for value in (0.1, 0.3, 0.5)) < 1e-9
    assert suggester.suggest_categorical("a", ["x", None]) in ("x", None)
