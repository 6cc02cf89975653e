"""Predicted latencies come from this machine's table, and from nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.plugins.test_metrics import hybrid, measure, subject_of
from workbench.builder import Builder
from workbench.errors import WorkbenchError
from workbench.latency_filling import Filler
from workbench.latency_machine import Load, Machine
from workbench.latency_table import LatencyTable, latency_folder
from workbench.layout import Layout
from workbench.measuring import Timing
from workbench.metric import Subject
from workbench.model import HybridLM
from workbench.testing import MetricContract
from workbench.testing.toys import toy_builder, toy_layout
from workbench_metrics import predicted
from workbench_metrics.config import PredictedDecode, PredictedPrefill


@pytest.fixture(autouse=True)
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("WORKBENCH_RUNS", str(tmp_path))


class Constant:
    """A Timer for which time stands still but for the number of blocks."""

    name = "eager"

    def __call__(self, model: HybridLM, load: Load, *, cold: bool = False) -> Timing:
        seconds = 0.001 * load.length * (1 + len(model.layers))
        return Timing(median=seconds, p10=seconds, p90=seconds, repeats=2)


def fill(folder: Path, builder: Builder, layout: Layout, *loads: Load) -> LatencyTable:
    table = LatencyTable.open(folder, Machine.here("cpu"))
    filler = Filler(table=table, builder=builder, timer=Constant(), rounds=1)
    assert filler.fill([layout], loads).failed == {}
    filler.observe([builder.resolve(layout)], loads, "fit")
    return table


class FromTable(MetricContract):
    """A table of the toys lies in the cache of their data."""

    __test__ = False

    def subject(self, folder: Path) -> Subject:
        loads = [Load(phase=phase, length=9) for phase in ("prefill", "decode")]
        fill(latency_folder(folder), toy_builder(), toy_layout(), *loads)
        return super().subject(folder)


class TestPredictedDecodeMilliseconds(FromTable):
    __test__ = True
    metric = predicted.PredictedDecodeMilliseconds
    configs = (PredictedDecode(context=9),)

    def test_needs_no_more_than_its_stage_has(self, config: Any, tmp_path: Path) -> None:
        """Without data, the table is looked for in the runs folder's cache."""
        fill(
            latency_folder(tmp_path / ".cache"),
            toy_builder(),
            toy_layout(),
            Load(phase=self.metric.phase, length=9),
        )
        super().test_needs_no_more_than_its_stage_has(config, tmp_path)


class TestPredictedPrefillMilliseconds(TestPredictedDecodeMilliseconds):
    metric = predicted.PredictedPrefillMilliseconds
    configs = (PredictedPrefill(length=9),)


def test_predictions_come_from_this_machine_s_table(builder: Builder, tmp_path: Path) -> None:
    layout = hybrid("int8", None)
    table = fill(
        tmp_path / "tables", builder, layout, Load(phase="decode", length=9), Load(phase="prefill")
    )
    subject = subject_of(builder, layout)
    # By hand: the outside and six blocks of 9 ms each, corrected by a whole that agrees.
    figure = measure(builder, "predicted_decode_ms", subject, context=9, table=str(table.path))
    assert figure == pytest.approx(9 * 7, rel=1e-6)
    assert subject.extras == pytest.approx({"overhead_ms": 0, "fitted_to": 1}, abs=1e-3)
    figure = measure(builder, "predicted_prefill_ms", subject, table=str(table.path))
    assert figure == pytest.approx(512 * 7, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "config"), [("decode_ms", {"context": 9, "tokens": 2}), ("prefill_ms", {"length": 9})]
)
def test_a_prediction_stands_beside_what_was_measured(
    builder: Builder, tmp_path: Path, name: str, config: dict[str, int]
) -> None:
    layout = hybrid()
    model = builder.build(layout)

    def measured(**config: int) -> tuple[float, Subject]:
        subject = subject_of(builder, layout, model=model)
        return measure(builder, name, subject, **config), subject

    assert "predicted_ms" not in measured(**config)[1].extras  # there is no table
    loads = [Load(phase="decode", length=9), Load(phase="prefill", length=9)]
    table = fill(latency_folder(tmp_path / ".cache"), builder, layout, *loads)
    figure, subject = measured(**config)
    assert subject.extras["predicted_ms"] == pytest.approx(9 * 7, rel=1e-6)
    assert figure != pytest.approx(9 * 7, rel=0.1)  # a toy's, in milliseconds
    another = {key: value + 1 for key, value in config.items()}
    assert "predicted_ms" not in measured(**another)[1].extras  # no such length is known
    table.path.write_text("{}")
    subject = measured(**config)[1]
    assert "predicted_ms" not in subject.extras
    assert "delete it" in subject.notes["predicted"]


def test_predictions_without_a_table_say_how_to_get_one(builder: Builder, tmp_path: Path) -> None:
    subject = subject_of(builder, hybrid())
    with pytest.raises(WorkbenchError, match="there is no latency table") as error:
        measure(builder, "predicted_decode_ms", subject)
    assert "workbench latency STUDY.toml" in str(error.value)
    table = fill(latency_folder(tmp_path / ".cache"), builder, hybrid(), Load(phase="decode"))
    assert measure(builder, "predicted_decode_ms", subject) == pytest.approx(512 * 7, rel=1e-6)
    for name, config, words in (
        (
            "predicted_decode_ms",
            {"context": 9},
            "lacks 7 of this layout's parts at decode, batch 1",
        ),
        ("predicted_prefill_ms", {}, "prefill, batch 1, length 512"),
        ("predicted_decode_ms", {"dtype": "bfloat16"}, "there is no latency table"),
        ("predicted_decode_ms", {"threads": 9}, "there is no latency table"),
        ("predicted_decode_ms", {"steps": "cuda-graph"}, "there is no latency table"),
        (
            "predicted_decode_ms",
            {"dtype": "bfloat16", "table": str(table.path)},
            "dtype: 'float32' there, 'bfloat16' here",
        ),
        ("predicted_decode_ms", {"table": str(tmp_path / "none.json")}, "cannot read"),
    ):
        with pytest.raises(WorkbenchError) as error:
            measure(builder, name, subject, **config)
        assert words in str(error.value)
    assert subject.extras.keys() == {"overhead_ms", "fitted_to"}
