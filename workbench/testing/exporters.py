"""ExporterContract: the tests that any exporter must pass."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from workbench.builder import Builder
from workbench.discovery import Provenance
from workbench.errors import WorkbenchError
from workbench.exporter import Exporter, ExportReport
from workbench.layout import Block, Layout
from workbench.model import HybridLM
from workbench.testing import toy_layers
from workbench.testing.advice import concerns
from workbench.testing.configs import ConfigContract

METADATA = {"study": "contract-suite", "trial": 3, "metrics": {"bits_per_byte": 1.25}}


class ExporterContract(ConfigContract):
    """What `workbench export` and the reader of an exported folder rely on in an exporter.

        class TestMyExporter(ExporterContract):
            exporter = MyExporter
            configs = [MyExporter.Config()]

    Class attributes:
        exporter: the class under test.
        configs: Config instances.
        tolerance: of the logits after reloading, absolute.

    Override `layout` for an exporter that cannot express the toys (a moving average and an MLP).
    """

    under_test = "exporter"
    exporter: ClassVar[type[Exporter]]
    tolerance: ClassVar[float] = 1e-4

    def layout(self) -> Layout:
        """What is exported: names of installed layers, or of the toys."""
        blocks = (Block(layer="toy-mixer"), Block(layer="toy-mlp"))
        return Layout(d_model=32, vocab_size=64, blocks=blocks)

    def builder(self) -> Builder:
        """A builder that knows the installed plugins and the toys."""
        builder = Builder.load()
        here = Provenance(
            plugin="toys",
            package="lm-workbench",
            version="",
            module=toy_layers.__name__,
            file=str(toy_layers.__file__),
        )
        builder.layers.add("toy-mixer", toy_layers.ToyMixer, here)
        builder.layers.add("toy-mlp", toy_layers.ToyMLP, here)
        return builder

    def model(self) -> HybridLM:
        return self.builder().build(self.layout()).eval()

    def export(self, model: HybridLM, out: Path, config: Any) -> ExportReport:
        return self.exporter.export(model, self.builder(), out, config, dict(METADATA))

    def test_class_attributes(self) -> None:
        """The configs are instances of `Config`.

        Mend: Make the suite's configs with the class's own Config.
        """
        for config in self.configs:
            assert isinstance(config, self.exporter.Config)

    @concerns("export")
    def test_writes_and_proves(self, config: Any, tmp_path: Path) -> None:
        """The folder holds what the report lists, with the provenance, and logits are the model's.

        Mend: Return the folder, the names of all files in it, and the largest difference of the
        logits that a fresh process computes from them; write `metadata` into one of the files.
        """
        model, out = self.model(), tmp_path / "exported"
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        generator = torch.get_rng_state()
        report = self.export(model, out, config)
        assert isinstance(report, ExportReport), f"export returned {report!r}"
        assert Path(report.path) == out, f"the report says {report.path}, not {out}"
        found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
        assert found == set(report.files), "the report lists other files than there are"
        assert math.isfinite(report.max_difference), f"max_difference is {report.max_difference}"
        assert 0 <= report.max_difference <= self.tolerance, (
            f"logits after reloading are off by {report.max_difference:.3g}"
        )
        assert any(b"contract-suite" in (out / name).read_bytes() for name in found), (
            "no file holds the metadata: its study 'contract-suite' is nowhere"
        )
        self._assert_unchanged(model, weights, generator)

    def _assert_unchanged(
        self, model: HybridLM, weights: dict[str, torch.Tensor], generator: torch.Tensor
    ) -> None:
        after = model.state_dict()
        assert list(after) == list(weights), "the model has other weights after the export"
        for name, tensor in weights.items():
            assert torch.equal(after[name], tensor), f"the export changed {name}"
        assert not model.training, "the export changed the model's training mode"
        assert torch.equal(torch.get_rng_state(), generator), "the global generator moved"

    @concerns("export")
    def test_refuses_what_is_there(self, config: Any, tmp_path: Path) -> None:
        """A folder that is there already is refused and stays as it was.

        Mend: Raise a WorkbenchError first thing if `out` exists; write to a temporary neighbour
        and rename it at the end.
        """
        (tmp_path / "kept.txt").write_text("mine")
        with pytest.raises(WorkbenchError):
            self.export(self.model(), tmp_path, config)
        assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
        assert (tmp_path / "kept.txt").read_text() == "mine"

    @concerns("export")
    def test_proof_is_honest(self, config: Any, tmp_path: Path) -> None:
        """A model that computes what no file can say is refused, or its difference reported.

        The model under test has a forward hook that doubles a layer's outputs.

        Mend: Compute `max_difference` from logits of `model` itself and of what was loaded from
        the folder alone, and refuse with a WorkbenchError if they differ.
        """
        model = self.model()
        model.layers[0].register_forward_hook(lambda module, given, output: 2 * output)
        try:
            report = self.export(model, tmp_path / "exported", config)
        except WorkbenchError:
            return
        assert report.max_difference > self.tolerance, (
            "the proof says that logits are equal, and they are not"
        )
