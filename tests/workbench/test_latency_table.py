"""The table against a clock that knows every layer's price: each is found again, and kept."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.workbench.linked_layers import Publisher, Reader, SharedMLP
from workbench.builder import Builder
from workbench.clocks import ProcessorClock
from workbench.errors import DiskError, FieldError, WorkbenchError
from workbench.latency_filling import Filler, ModelTimer, slope
from workbench.latency_machine import Load, Machine
from workbench.latency_parts import Parts, group, label
from workbench.latency_table import Entry, LatencyTable
from workbench.layout import Block, Layout
from workbench.measuring import Timing, eager
from workbench.model import HybridLM
from workbench.testing.toys import toy_builder

DECODE = Load(phase="decode", batch_size=2, length=8)
PREFILL = Load(phase="prefill", batch_size=1, length=16)
PRICES = {"ToyMixer": 0.5, "ToyMLP": 0.125, "SharedMLP": 0.25, "Publisher": 0.0625, "Reader": 2.0}


class PriceList:
    """A Timer that reads seconds off the model; calls are counted."""

    name = "eager"

    def __init__(self) -> None:
        self.calls: list[tuple[int, Load]] = []
        self.cold: list[bool] = []

    def __call__(self, model: HybridLM, load: Load, *, cold: bool = False) -> Timing:
        assert not model.training
        self.calls.append((len(model.layers), load))
        self.cold.append(cold)
        seconds = self.seconds(model, load)
        return Timing(median=9.0, p10=seconds, p90=9.0, repeats=3)

    def seconds(self, model: HybridLM, load: Load) -> float:
        outside = 0.75 + model.layout.d_model / 256
        blocks = sum(PRICES[type(layer).__name__] * layer.d_model / 32 for layer in model.layers)
        return (outside + blocks) * load.batch_size * load.length


@pytest.fixture
def toys() -> Builder:
    builder = toy_builder()
    for name, layer in (("shared", SharedMLP), ("publisher", Publisher), ("reader", Reader)):
        builder.layers.add(name, layer, builder.layers.provenance("toy-mlp"))
    return builder


def layout_of(*names: str, d_model: int = 32, **changes: Any) -> Layout:
    blocks = tuple(Block(layer=name) for name in names)
    return Layout(d_model=d_model, vocab_size=64, blocks=blocks, **changes)


def filler_of(builder: Builder, table: LatencyTable, **changes: Any) -> Filler:
    return Filler(**{"table": table, "builder": builder, "timer": PriceList(), **changes})


@pytest.fixture
def table() -> LatencyTable:
    return LatencyTable(Machine.here("cpu"))


def seconds_of(table: LatencyTable, builder: Builder, layout: Layout, load: Load) -> list[float]:
    """Of the outside and of each block."""
    parts = Parts(builder)
    found = [table.find(part, load, parts.sources(part)) for part in parts.of(layout)]
    return [entry.seconds for entry in found if entry is not None]


# Parts


def test_equal_blocks_are_one_part_wherever_they_stand(toys: Builder) -> None:
    parts = Parts(toys)
    outside, mixer, mlp, again = parts.of(layout_of("toy-mixer", "toy-mlp", "toy-mixer"))
    assert mixer == again != mlp
    assert [group(part) for part in (outside, mixer, mlp)] == ["outside", "toy-mixer", "toy-mlp"]
    # Left out or written out, a default is the same.
    written = Block(layer="toy-mixer", config={"expand": 1})
    assert parts.of(layout_of("toy-mlp").replace(blocks=(written,)))[1] == mixer
    wide = Block(layer="toy-mixer", config={"expand": 2})
    others = [
        parts.of(layout_of("toy-mlp").replace(blocks=(wide,)))[1],
        parts.of(layout_of("toy-mixer", d_model=64))[1],
        parts.of(layout_of("toy-mixer", norm="layernorm"))[1],
        parts.of(layout_of("toy-mixer", residual_multiplier=0.5))[1],
    ]
    assert len({mixer, *others}) == 5
    assert "expand=2" in label(others[0])


def test_a_block_that_builds_on_another_is_a_part_of_its_own(toys: Builder) -> None:
    _, first, _, second, third = Parts(toys).of(layout_of("shared", "toy-mlp", "shared", "shared"))
    assert first != second == third
    assert label(second).endswith("on shared")
    _, _, reader = Parts(toys).of(layout_of("publisher", "reader"))
    assert label(reader).endswith("on publisher")


# Filling


def test_filling_finds_every_price(toys: Builder, table: LatencyTable) -> None:
    layouts = [layout_of("toy-mixer", "toy-mlp"), layout_of("toy-mlp", d_model=64)]
    filled = filler_of(toys, table).fill(layouts, [DECODE, PREFILL])
    assert filled.failed == {}
    assert filled.measured == len(table.entries) == 2 * 5
    found = seconds_of(table, toys, layouts[0], DECODE)
    assert found == pytest.approx([16 * 0.875, 16 * 0.5, 16 * 0.125])
    found = seconds_of(table, toys, layouts[1], PREFILL)
    assert found == pytest.approx([16 * 1.0, 16 * 0.25])
    assert all(entry.spread == 0 for entry in table.entries.values())


def test_only_what_is_missing_is_measured(toys: Builder, table: LatencyTable) -> None:
    filler = filler_of(toys, table, copies=(1, 3), rounds=2)
    assert filler.fill([layout_of("toy-mixer")], [DECODE]).measured == 2
    timer = filler_of(toys, table, copies=(1, 3), rounds=2)
    assert timer.fill([layout_of("toy-mixer", "toy-mixer")], [DECODE]).measured == 0
    assert timer.timer.calls == []
    assert timer.fill([layout_of("toy-mixer", "toy-mlp")], [DECODE, PREFILL]).measured == 4
    # In turns: all models of a part, then all of them again.
    assert timer.timer.calls == [
        *[(0, PREFILL)] * 2,
        *[(1, PREFILL), (3, PREFILL)] * 2,
        *[(1, DECODE), (3, DECODE)] * 2,
        *[(1, PREFILL), (3, PREFILL)] * 2,
    ]


def test_linked_blocks_are_timed_on_what_they_build_on(toys: Builder, table: LatencyTable) -> None:
    layout = layout_of("publisher", "shared", "reader", "shared", "toy-mlp")
    assert filler_of(toys, table).fill([layout], [DECODE]).failed == {}
    found = seconds_of(table, toys, layout, DECODE)
    assert found[1:] == pytest.approx([16 * p for p in (0.0625, 0.25, 2.0, 0.25, 0.125)])


def test_the_least_disturbed_round_counts(toys: Builder, table: LatencyTable) -> None:
    class Disturbed(PriceList):
        def seconds(self, model: HybridLM, load: Load) -> float:
            factor = (1.0, 3.0, 1.5)[len(self.calls) % 3]
            return factor * super().seconds(model, load)

    filler_of(toys, table, timer=Disturbed()).fill([layout_of("toy-mlp")], [DECODE])
    assert seconds_of(table, toys, layout_of("toy-mlp"), DECODE)[0] == pytest.approx(16 * 0.875)
    outside = next(entry for (part, _), entry in table.entries.items() if group(part) == "outside")
    assert outside.spread == pytest.approx(2.0)


def test_passes_lie_apart_and_the_best_of_all_counts(toys: Builder, table: LatencyTable) -> None:
    class Recovering(PriceList):
        """Disturbed until everything was gone through once."""

        def seconds(self, model: HybridLM, load: Load) -> float:
            return super().seconds(model, load) * (2.0 if len(self.calls) <= 5 else 1.0)

    layout = toys.resolve(layout_of("toy-mlp", "toy-mixer"))
    filler = filler_of(toys, table, timer=Recovering(), rounds=1, passes=2)
    assert filler.fill([layout], [DECODE]).measured == 3
    assert [count for count, _ in filler.timer.calls] == [0, 2, 8, 2, 8] * 2
    expected = [16 * 0.875, 16 * 0.125, 16 * 0.5]
    assert seconds_of(table, toys, layout, DECODE) == pytest.approx(expected)
    filler = filler_of(toys, table, timer=Recovering(), rounds=3, passes=2)
    filler.observe([layout], [DECODE], "fit")
    (seen,) = table.observations
    assert seen.seconds == pytest.approx(16 * 1.5)
    assert seen.spread == pytest.approx(1.0)
    assert len(filler.timer.calls) == 6


def test_what_cannot_be_told_is_named_and_stays_missing(toys: Builder, table: LatencyTable) -> None:
    class Falling(PriceList):
        def seconds(self, model: HybridLM, load: Load) -> float:
            return 10.0 - super().seconds(model, load) / 100

    filled = filler_of(toys, table, timer=Falling()).fill([layout_of("toy-mlp")], [DECODE])
    assert filled.measured == 1  # the outside
    ((what, why),) = filled.failed.items()
    assert "toy-mlp" in what
    assert "decode, batch 2, length 8" in what
    assert "more copies were not slower" in why
    assert len(seconds_of(table, toys, layout_of("toy-mlp"), DECODE)) == 1


def test_parts_are_timed_with_an_empty_cache_and_whole_models_as_they_run(
    toys: Builder, table: LatencyTable
) -> None:
    filler = filler_of(toys, table, timer=(prices := PriceList()))
    filler.fill([layout_of("toy-mixer")], [DECODE, PREFILL])
    assert prices.cold == [True] * len(prices.cold) != []
    parts = len(prices.cold)
    filler.observe([layout_of("toy-mixer")], [DECODE, PREFILL], "fit")
    assert prices.cold[parts:] == [False] * (len(prices.cold) - parts) != []


def test_whole_models_are_observed_once(toys: Builder, table: LatencyTable) -> None:
    layouts = [toys.resolve(layout_of("toy-mlp")), toys.resolve(layout_of("toy-mixer"))]
    filler = filler_of(toys, table, rounds=1)
    filler.observe(layouts[:1], [DECODE, PREFILL], "fit")
    filler.observe(layouts, [DECODE], "check")
    assert [(o.layout, o.load, o.role) for o in table.observations] == [
        (layouts[0], DECODE, "fit"),
        (layouts[0], PREFILL, "fit"),
        (layouts[1], DECODE, "check"),
    ]
    assert [o.seconds for o in table.observations] == [16.0, 16.0, 22.0]


@pytest.mark.parametrize("copies", [(2,), (2, 2), (-1, 2)])
def test_a_slope_needs_two_numbers(toys: Builder, table: LatencyTable, copies: Any) -> None:
    with pytest.raises(FieldError, match="copies: name two different numbers"):
        filler_of(toys, table, copies=copies)


def test_a_timer_fills_only_its_own_table(toys: Builder, table: LatencyTable) -> None:
    with pytest.raises(FieldError, match="'cpu-time' cannot fill a table of 'eager'"):
        filler_of(toys, table, timer=ModelTimer(name="cpu-time", clock=ProcessorClock))


def test_the_slope_is_the_least_squares_one() -> None:
    points = {1: 3.0, 2: 4.5, 5: 10.0, 9: 16.0}
    counts = torch.tensor([[count, 1.0] for count in points], dtype=torch.float64)
    times = torch.tensor([[seconds] for seconds in points.values()], dtype=torch.float64)
    expected = torch.linalg.lstsq(counts, times).solution[0].item()
    assert slope(points) == pytest.approx(expected)


def test_real_clocks_fill_a_table(builder: Builder, tmp_path: Path) -> None:
    """Real layers, a real quantizer, the CPU's clock and a stepper: every entry is there."""
    torch.set_num_threads(1)
    layout = Layout.from_dict(
        {
            "d_model": 32,
            "vocab_size": 64,
            "blocks": [
                {"layer": "mamba", "quantizer": {"name": "int8"}},
                {"layer": "swiglu"},
                {"layer": "attention", "config": {"head_dim": 16}},
            ],
        }
    )
    stepped = []

    def stepper(model: HybridLM, states: Any, batch_size: int) -> Any:
        stepped.append(len(model.layers))
        return eager(model, states, batch_size)

    timer = ModelTimer(
        name="cpu-time", stepper=stepper, min_seconds=0.02, tokens=4, clock=ProcessorClock
    )
    machine = Machine.here("cpu", timer="cpu-time")
    table = LatencyTable.open(tmp_path, machine)
    filler = Filler(table=table, builder=builder, timer=timer, copies=(0, 12), rounds=2)
    filled = filler.fill([layout], [DECODE, PREFILL])
    assert filled.failed == {}
    assert filled.measured == 8
    assert set(stepped) == {0, 12}
    again = LatencyTable.open(tmp_path, machine)
    assert again.entries == table.entries
    assert all(0 < entry.seconds < 1 for entry in again.entries.values())


# Files


@pytest.fixture
def filled(toys: Builder, tmp_path: Path) -> LatencyTable:
    table = LatencyTable.open(tmp_path, Machine.here("cpu"))
    layout = toys.resolve(layout_of("toy-mixer", "toy-mlp", "toy-mixer"))
    filler = filler_of(toys, table, rounds=1)
    filler.fill([layout], [DECODE, PREFILL])
    filler.observe([layout], [DECODE], "fit")
    filler.observe([toys.resolve(layout_of("toy-mlp"))], [DECODE], "check")
    return table


def test_a_table_is_read_as_it_was_written(filled: LatencyTable, tmp_path: Path) -> None:
    assert filled.path is not None
    for again in (LatencyTable.open(tmp_path, filled.machine), LatencyTable.read(filled.path)):
        assert again.machine == filled.machine
        assert again.entries == filled.entries
        assert again.observations == filled.observations
        assert again.to_dict() == filled.to_dict()
    assert [path.name for path in tmp_path.iterdir()] == [filled.path.name]


def test_machines_have_files_of_their_own(tmp_path: Path) -> None:
    here = Machine.here("cpu")
    others = [
        dataclasses.replace(here, device_name="another"),
        dataclasses.replace(here, dtype="bfloat16"),
        dataclasses.replace(here, timer="cuda-graph"),
        dataclasses.replace(here, threads=7),
        dataclasses.replace(here, versions={**here.versions, "torch": "1.0"}),
        dataclasses.replace(here, settings={**here.settings, "ssd": "mamba-ssm"}),
    ]
    assert len({machine.slug for machine in (here, *others)}) == 7
    assert Machine.from_dict(json.loads(json.dumps(here.to_dict()))) == here
    for other in others:
        with pytest.raises(
            WorkbenchError, match=r"there is no latency table of .*run `workbench l"
        ):
            LatencyTable.open(tmp_path, other, must_exist=True)


def test_another_machine_s_figures_are_refused(filled: LatencyTable, tmp_path: Path) -> None:
    assert filled.path is not None
    machine = dataclasses.replace(
        filled.machine,
        device_name="another",
        versions={**filled.machine.versions, "torch": "1.0"},
    )
    filled.path.rename(tmp_path / f"{machine.slug}.json")
    with pytest.raises(WorkbenchError) as error:
        LatencyTable.open(tmp_path, machine)
    message = str(error.value)
    assert f"device_name: {filled.machine.device_name!r} there, 'another' here" in message
    assert f"versions.torch: '{torch.__version__}' there, '1.0' here" in message
    assert "dtype" not in message
    assert "workbench latency" in message


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data.update(schema=0), "is of schema 0, and this workbench reads 1"),
        (lambda data: data.pop("entries"), "is damaged: KeyError"),
        (lambda data: data["entries"][0].update(seconds=-1.0), "-1.0 are no seconds"),
        (lambda data: data["entries"][0].update(phase="both"), "phase: must be"),
        (lambda data: data.update(blocks=[]), "is damaged: IndexError"),
        (lambda data: data["machine"].pop("dtype"), "is damaged: KeyError"),
    ],
)
def test_a_file_that_is_no_table_is_refused(filled: LatencyTable, damage: Any, words: str) -> None:
    assert filled.path is not None
    data = json.loads(filled.path.read_text())
    damage(data)
    filled.path.write_text(json.dumps(data))
    with pytest.raises(WorkbenchError) as error:
        LatencyTable.read(filled.path)
    assert words in str(error.value)
    assert filled.path.name in str(error.value)


def test_a_table_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text("[1]")
    with pytest.raises(WorkbenchError, match="schema None"):
        LatencyTable.read(path)


def test_a_full_disk_leaves_the_old_table(
    filled: LatencyTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert filled.path is not None
    before = filled.path.read_text()

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    filled.observations.clear()
    with pytest.raises(DiskError, match="No space left"):
        filled.save()
    assert filled.path.read_text() == before
    assert [path.name for path in filled.path.parent.iterdir()] == [filled.path.name]


def test_figures_of_other_code_do_not_count(toys: Builder, tmp_path: Path) -> None:
    """A plugin that was edited is measured again; a record is read as it is."""
    parts = Parts(toys)
    layout = toys.resolve(layout_of("toy-mlp"))
    outside, part = parts.of(layout)
    table = LatencyTable(Machine.here("cpu"), tmp_path / "table.json")
    table.put(part, DECODE, Entry(seconds=1.0, spread=0.0, sources="an earlier version"))
    table.put(outside, DECODE, Entry(seconds=1.0, spread=0.0, sources=parts.sources(outside)))
    assert table.find(part, DECODE, parts.sources(part)) is None
    table.save()
    assert table.path is not None
    record = LatencyTable.read(table.path, strict=False)
    assert record.find(part, DECODE, parts.sources(part)) is not None
    assert filler_of(toys, table).fill([layout], [DECODE]).measured == 1
    found = table.find(part, DECODE, parts.sources(part))
    assert found is not None
    assert found.seconds == pytest.approx(16 * 0.125)


@pytest.mark.parametrize("bad", [{"phase": "both"}, {"batch_size": 0}, {"length": -1}])
def test_loads_that_make_no_sense(bad: dict[str, Any]) -> None:
    with pytest.raises(FieldError) as error:
        Load(**{"phase": "decode", **bad})
    assert error.value.field == next(iter(bad))
