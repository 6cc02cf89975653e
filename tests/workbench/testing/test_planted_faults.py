"""Faults planted in good things of every other kind: each is found by the check that is there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.workbench.testing.planting import Edit, plant
from tests.workbench.testing.running import failure, suite_tests
from workbench.guard import Guard
from workbench.testing import (
    DataSourceContract,
    ExporterContract,
    LayerContract,
    MetricContract,
    PlacementContract,
    PresetContract,
    QuantizerContract,
)
from workbench.testing.advice import advice_of

SUITES: dict[str, tuple[type, dict[str, Any]]] = {
    "placement": (PlacementContract, {"most": "mamba", "last": "attention"}),
    "quantizer": (QuantizerContract, {}),
    "metric": (MetricContract, {}),
    "data": (DataSourceContract, {}),
    "exporter": (ExporterContract, {}),
}
PLACE = "for index in range(num_layers)"
TOTAL = "return (costs.embedding + costs.head) / costs.total.parameters"
COSTS = "costs = subject.builder.costs(subject.layout, length=1)"
INT8 = "(weight_OI / scale_O1).round().to(torch.int8)"
SEED = "2 * (self.seed * 1_000_003 + step)"
OUT_EXISTS = "        if out.exists():\n"
PROVE = "difference = _difference(model, builder, out)"

FAULTS: dict[str, dict[str, tuple[str, tuple[Edit, ...]]]] = {
    "placement": {
        "one too few": (
            "places_only_what_is_offered",
            ((PLACE, "for index in range(num_layers - 1)"),),
        ),
        "a list": (
            "places_only_what_is_offered",
            (("return tuple(\n", "return list(\n"),),
        ),
        "what nobody offers": (
            "places_only_what_is_offered",
            (("else config.most", 'else "retnet"'),),
        ),
        "refuses without a field": (
            "places_only_what_is_offered",
            (
                (
                    "return tuple(\n",
                    "if num_layers < config.every:\n"
                    '            raise FieldError("depth", "too small")\n'
                    "        return tuple(\n",
                ),
            ),
        ),
        "draws": (
            "is_pure",
            (
                (
                    "return tuple(\n",
                    "import random\n\n"
                    "        config = dataclasses.replace(config, every=random.randint(1, 9))\n"
                    "        return tuple(\n",
                ),
            ),
        ),
        "changes what is offered": (
            "is_pure",
            (("return tuple(\n", "getattr(mixers, 'sort', list)()\n        return tuple(\n"),),
        ),
        "offers the impossible": (
            "search_ranges",
            (("Range(2, 6)", "Range(0, 6)"), ("if self.every < 1:", "if False:")),
        ),
        "no reference": (
            "class_attributes",
            (('reference = "name the paper or the model here"', 'reference = ""'),),
        ),
    },
    "quantizer": {
        "estimates bytes": (
            "bytes_are_counted_not_estimated",
            (("+ module.scale_O1.nbytes", ""),),
        ),
        "stores int32": ("bytes_are_counted_not_estimated", ((INT8, INT8.replace("8", "32")),)),
        "reads values on meta": (
            "meta_device_counts_the_same",
            (
                (
                    "scale_O1 = weight_OI.abs()",
                    "_ = weight_OI.max().item()\n        scale_O1 = weight_OI.abs()",
                ),
            ),
        ),
        "halves the scale": ("outputs_stay_close", (("/ 127\n", "/ 254\n"),)),
        "answers in float32": (
            "outputs_stay_close",
            (
                (
                    "F.linear(x, self.weight.to(x.dtype), self.bias)",
                    "F.linear(x, self.weight, self.bias).bfloat16()",
                ),
            ),
        ),
        "ignores keep_precision": (
            "every_linear_is_accounted_for",
            (("if reason := _kept(layer, name):", 'if reason := "":'),),
        ),
        "keeps in silence": (
            "every_linear_is_accounted_for",
            (("kept[name] = reason\n", "pass\n"),),
        ),
        "reports nothing again": (
            "is_idempotent",
            (("if isinstance(module, RowwiseLinear):", "if module is not found:"),),
        ),
        "a scale that is not saved": (
            "save_and_load",
            (
                (
                    'self.register_buffer("scale_O1", scale_O1)',
                    'self.register_buffer("scale_O1", scale_O1, persistent=False)',
                ),
            ),
        ),
    },
    "metric": {
        "no unit": ("class_attributes", (('unit = "of 1"', 'unit = ""'),)),
        "NaN": ("gives_a_figure", ((TOTAL, 'return float("nan")'),)),
        "a tensor": (
            "gives_a_figure",
            ((TOTAL, "import torch\n\n        return torch.tensor(0.5)"),),
        ),
        "differs each time": (
            "gives_a_figure",
            ((TOTAL, "import time\n\n        return time.perf_counter()"),),
        ),
        "a static one that needs a model": (
            "needs_no_more_than_its_stage_has",
            ((TOTAL, "return float(subject.built.num_parameters)"),),
        ),
        "invents a figure": (
            "needs_no_more_than_its_stage_has",
            (('stage = "static"', 'stage = "trained"'),),
        ),
        "leaves gradients off": (
            "leaves_the_model_alone",
            ((COSTS, f"import torch\n\n        torch.set_grad_enabled(False)\n        {COSTS}"),),
        ),
        "leaves eval mode": (
            "leaves_the_model_alone",
            ((COSTS, f"_ = subject.model and subject.model.eval()\n        {COSTS}"),),
        ),
    },
    "data": {
        "a token too many": (
            "batches_are_tokens",
            (("int(self.config.symbols) + 1", "self.config.symbols"),),
        ),
        "int32": (
            "batches_are_tokens",
            (("dim=1)[:, : length + 1]", "dim=1)[:, : length + 1].int()"),),
        ),
        "no loss": (
            "batches_are_tokens",
            (("targets_BT[:, :half] = IGNORE", "targets_BT[:] = IGNORE"),),
        ),
        "draws anew": ("is_deterministic", (("shape, generator=generator", "shape"),)),
        "keeps its place": (
            "is_deterministic",
            (
                (
                    f"return self._batch({SEED}",
                    "self.place = getattr(self, 'place', 0) + 1\n"
                    f"        return self._batch({SEED} + 10 * self.place",
                ),
            ),
        ),
        "ignores the step": ("steps_and_seeds_differ", ((SEED, "2 * self.seed"),)),
        "ignores the seed": ("steps_and_seeds_differ", ((SEED, "2 * step"),)),
        "trains on what it judges by": ("parts_are_disjoint", ((SEED, "self.seed * 1000 + step"),)),
        "says nothing of itself": (
            "describe_is_plain_data",
            (
                (
                    'return {"symbols": self.config.symbols, "validation_rows": '
                    "self.config.validation_rows}",
                    "return {}",
                ),
            ),
        ),
        "encodes what it has not": (
            "text_goes_both_ways",
            (
                (
                    "    def describe(self)",
                    "    def encode(self, text):\n        return [0]\n\n    def describe(self)",
                ),
            ),
        ),
        "bytes of a half": (
            "num_bytes",
            (("targets_BT=targets_BT)\n", "targets_BT=targets_BT, num_bytes=7.0)\n"),),
        ),
    },
    "exporter": {
        "writes over what is there": (
            "refuses_what_is_there",
            ((OUT_EXISTS, "        if False:\n"), ("mkdir(parents=True)", "mkdir(exist_ok=True)")),
        ),
        "empties the folder": (
            "refuses_what_is_there",
            (
                (
                    OUT_EXISTS,
                    f"        for path in out.glob('*'):\n            path.unlink()\n{OUT_EXISTS}",
                ),
            ),
        ),
        "proves nothing": ("proof_is_honest", ((PROVE, "difference = 0.0"),)),
        "lists what is not there": (
            "writes_and_proves",
            (('FILES = ("layout.json", ', 'FILES = ("config.json", '),),
        ),
        "loses the provenance": (
            "writes_and_proves",
            (("json.dumps(metadata, ", "json.dumps({}, "),),
        ),
        "scales what it exports": (
            "writes_and_proves",
            ((PROVE, f"model.norm_f.weight.data.mul_(2)\n        {PROVE}"),),
        ),
        "leaves training mode": (
            "writes_and_proves",
            ((PROVE, f"{PROVE}\n        model.train()"),),
        ),
    },
}
CASES = [(kind, fault) for kind, faults in FAULTS.items() for fault in faults]


def found(folder: Path, kind: str, check: str, edits: tuple[Edit, ...]) -> str:
    """How the check fails on the thing with these edits; "" if it does not."""
    suite, values = SUITES[kind]
    thing = plant(folder, kind, *edits).Good
    attributes = {suite.under_test: thing, "configs": (thing.Config(**values),)}  # type: ignore[attr-defined]
    return failure(suite, f"test_{check}", folder / "run", **attributes)


@pytest.fixture(autouse=True)
def contained() -> Iterator[None]:
    """A fault that changes a global must not reach the next test."""
    guard = Guard()
    yield
    guard.restore()


@pytest.mark.parametrize("kind", SUITES)
def test_the_good_thing_passes(kind: str, tmp_path: Path) -> None:
    for number, check in enumerate(sorted(suite_tests(SUITES[kind][0]))):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert found(folder, kind, check.removeprefix("test_"), ()) == "", check


@pytest.mark.parametrize(("kind", "fault"), CASES, ids=[f"{k}-{f}" for k, f in CASES])
def test_each_fault_is_found_by_its_check(kind: str, fault: str, tmp_path: Path) -> None:
    check, edits = FAULTS[kind][fault]
    assert found(tmp_path, kind, check, edits) != ""


@pytest.mark.parametrize(
    "suite",
    [*(suite for suite, _ in SUITES.values()), LayerContract, PresetContract],
    ids=lambda s: s.__name__,
)
def test_every_check_says_what_must_hold_and_what_to_mend(suite: type) -> None:
    for name in suite_tests(suite):
        advice = advice_of(getattr(suite, name))
        assert advice.holds.endswith("."), name
        assert advice.mend.endswith("."), name
