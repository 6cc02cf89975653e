"""PresetContract: the tests that any preset must pass."""

from __future__ import annotations

from typing import ClassVar

import torch

from workbench.builder import Builder
from workbench.layout import Layout
from workbench.preset import Preset
from workbench.testing.advice import concerns
from workbench.testing.allocations import Allocations


class PresetContract:
    """What `workbench describe NAME` and a study's reader rely on in a preset.

        class TestMyPreset(PresetContract):
            preset = MY_PRESET

    Class attributes:
        preset: the Preset under test. Its layers must be registered.
    """

    under_test = "preset"
    preset: ClassVar[Preset]

    def builder(self) -> Builder:
        """A builder with the installed plugins."""
        return Builder.load()

    def resolved(self) -> tuple[Builder, Layout]:
        """The builder, and the preset's layout with every default written out."""
        builder = self.builder()
        return builder, builder.resolve(self.preset.layout())

    @concerns("source")
    def test_says_where_it_is_from(self) -> None:
        """The source is named; a stated count is worded as its document words it.

        Mend: Set `source` to the document or repository, and `stated_parameters` to its words
        (`"~2.1B"`) or to None.
        """
        assert self.preset.source.strip(), "name the document that the figures come from"
        stated = self.preset.stated_parameters
        assert stated is None or stated.strip(), "stated_parameters is empty: use None"

    @concerns("layout")
    def test_resolves(self) -> None:
        """Every layer and field is known and fits, and each call gives the same layout.

        Mend: Correct the block and the field that the error names; make the layout from constants.
        """
        builder, layout = self.resolved()
        assert builder.resolve(self.preset.layout()).hash == layout.hash, "two calls, two layouts"
        assert builder.resolve(layout) == layout
        assert Layout.from_json(layout.to_json()) == layout

    @concerns("layout")
    def test_counts_without_weights(self) -> None:
        """It is built on the meta device, where nothing is allocated, with the parameters counted.

        Mend: Correct the layout, or `costs` and the constructor of the layer that it names.
        """
        builder, layout = self.resolved()
        with Allocations() as allocations:
            model = builder.build(layout, device="meta", dtype=torch.bfloat16)
        assert allocations.operations == []
        counted = builder.costs(layout, length=1).total.parameters
        assert counted == model.num_parameters, (
            f"costs count {counted:,} parameters, the model has {model.num_parameters:,}"
        )
