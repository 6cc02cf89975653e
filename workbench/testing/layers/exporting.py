"""Whether a model of the layer survives its export; slow: exporters prove it in a fresh process."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from workbench import config as configs
from workbench.builder import Builder
from workbench.discovery import Provenance
from workbench.errors import WorkbenchError
from workbench.layer import Layer
from workbench.layout import Block, Layout
from workbench.testing.advice import concerns
from workbench.testing.layers.base import LayerSuite

EXPORT_TOLERANCE = 1e-4  # of logits, absolute; the same code on the same machine gives 0


class ExportTests(LayerSuite):
    """The export round trip, once a layer and for the first of its configs."""

    @pytest.mark.slow
    @concerns("forward", "__init__", "step")
    def test_export_round_trip(self, tmp_path: Path) -> None:
        """A model of two blocks, exported and loaded again, computes the same logits.

        Every exporter that is installed is tried. One that cannot express the layer refuses the
        block by name; at least one must take it.

        Mend: Keep all that the layer computes with in its module's source, its Config and its
        state dict; import from `workbench.layer`, `workbench.config` and so on by `from … import`;
        register buffers as persistent.
        """
        config = self.configs[0]
        blocks = [*self.earlier(config), (self.name, self.layer, config)]
        if len(blocks) == 1:
            blocks *= 2
        builder = _builder_with(blocks)
        layout = Layout(
            d_model=self.d_model,
            vocab_size=64,
            blocks=tuple(
                Block(layer=name, config=configs.to_dict(config)) for name, _, config in blocks
            ),
        )
        refusals = {}
        for name in builder.exporters:
            exporter = builder.exporters[name]
            model = builder.build(layout).eval()
            try:
                report = exporter.export(
                    model,
                    builder,
                    tmp_path / name,
                    configs.from_dict(exporter.Config, {}),
                    {"study": "contract", "trial": 0},
                )
            except WorkbenchError as error:
                refusals[name] = str(error)
                continue
            assert report.max_difference <= EXPORT_TOLERANCE, (
                f"{name}: logits of the reloaded model are off by {report.max_difference:.3g}"
            )
        for name, reason in refusals.items():
            assert "blocks[" in reason, f"{name}: {reason}"
        assert len(refusals) < len(builder.exporters), f"no exporter takes the layer: {refusals}"


def _builder_with(blocks: Sequence[tuple[str, type[Layer], Any]]) -> Builder:
    """A builder with the installed plugins, which knows these layers by these names."""
    builder = Builder.load()
    for name, layer, _ in blocks:
        if name not in builder.layers:
            origin = Provenance(
                plugin=name,
                package=None,
                version="under test",
                module=layer.__module__,
                file=inspect.getfile(layer),
            )
            builder.layers.add(name, layer, origin)
        assert builder.layers[name] is layer, f"another layer is called {name!r}: set `name`"
    return builder
