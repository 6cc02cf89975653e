"""The hooks: the whole contract of a plugin on one screen.

A plugin is a module whose functions, marked with `@workbench.hookimpl`, carry these names. Each
hook gets `register` and calls it once a thing; what it registers is checked at once.

An installed plugin is found by an entry point in the group `workbench.v1`: `API` is that number. It
goes up when plugins must change to go on working; a plugin of another number is left out and
listed, with the advice to upgrade it or the workbench.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

import pluggy

if TYPE_CHECKING:
    from workbench.data import DataSource
    from workbench.exporter import Exporter
    from workbench.layer import Layer
    from workbench.metric import Metric
    from workbench.placement import Placement
    from workbench.preset import Preset
    from workbench.quantizer import Quantizer

API = 1

hookspec = pluggy.HookspecMarker("workbench")
hookimpl = pluggy.HookimplMarker("workbench")

T = TypeVar("T", contravariant=True)


class Register(Protocol[T]):
    """What a hook is given: call it with a name, unique among its kind, and the thing."""

    def __call__(self, name: str, thing: T, /) -> None: ...


@hookspec
def register_layers(register: Register[type[Layer]]) -> None:
    """Offer layer types: `register("mamba", Mamba)`, a subclass of `workbench.Layer`."""


@hookspec
def register_placements(register: Register[type[Placement]]) -> None:
    """Offer placement policies: `register("periodic", Periodic)`."""


@hookspec
def register_quantizers(register: Register[type[Quantizer]]) -> None:
    """Offer quantizers: `register("int8", Int8)`."""


@hookspec
def register_metrics(register: Register[type[Metric]]) -> None:
    """Offer metrics: `register("bits_per_byte", BitsPerByte)`."""


@hookspec
def register_data_sources(register: Register[type[DataSource]]) -> None:
    """Offer data sources: `register("text", TextFiles)`."""


@hookspec
def register_exporters(register: Register[type[Exporter]]) -> None:
    """Offer exporters: `register("huggingface", HuggingFace)`."""


@hookspec
def register_presets(register: Register[Preset]) -> None:
    """Offer presets: `register("mamba-130m", Preset(layout=..., source=...))`."""
