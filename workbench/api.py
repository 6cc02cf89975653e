"""The notebook's view of the workbench: a layout from anywhere, built, described, or a study.

    layout = workbench.load_layout("mamba-130m")
    print(workbench.describe("mamba-130m"))
    model = workbench.build(layout)                    # tokens [B, T] → logits [B, T, V]

Wherever a `source` is taken, it is one of

- a `Layout`, or the same as a dict (what `Layout.to_dict` gives),
- the name of a preset (`"mamba-130m"`),
- a trial, as `"study:number"` (`"quickstart:7"`),
- the path of a JSON file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.builder import Builder, default_builder
from workbench.description import STATED, Description, describe_layout
from workbench.description_conditions import Conditions, conditions_of
from workbench.errors import FieldError, UnknownNameError, WorkbenchError
from workbench.layout import Layout
from workbench.preset import Preset
from workbench.records import load_study, load_trial

if TYPE_CHECKING:
    import torch

    from workbench.model import HybridLM

__all__ = ["Source", "build", "describe", "load_layout", "load_study", "preset_table"]

Source = Layout | Mapping[str, Any] | str | Path
TRIAL = re.compile(r".+:\d+")


def load_layout(
    source: Source,
    *,
    plugin_dirs: Iterable[str | Path] = (),
    runs: str | Path | None = None,
) -> Layout:
    """The layout that `source` names, every default written out and every check passed.

    Args:
        source: see the module's docstring.
        plugin_dirs: folders whose `.py` files are plugins too.
        runs: the folder that holds the studies; `WORKBENCH_RUNS`, else `./runs`.

    Raises:
        WorkbenchError: nothing has that name (says what is near and what was tried), a file that
            cannot be read, or a trial that has no layout.
        UnknownNameError, FieldError: the layout names a layer or field that does not exist, or
            cannot be built; or there is no such study.
    """
    return find(source, plugin_dirs, runs)[1]


def build(
    source: Source,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    seed: int = 0,
    quantized: bool = False,
    plugin_dirs: Iterable[str | Path] = (),
    runs: str | Path | None = None,
) -> HybridLM:
    """A freshly initialised model: token ids `[batch, length]` to logits `[batch, length, vocab]`.

    The weights of a trial are not loaded: this gives its architecture.

    Args:
        source: see the module's docstring.
        device: `"meta"` allocates nothing.
        dtype: of weights; torch's default (float32) if None.
        seed: of the initial weights; torch's global generator is left untouched.
        quantized: store each block's weights as the layout's quantizers say.
        plugin_dirs, runs: as in `load_layout`.

    Raises:
        UnknownNameError, FieldError, WorkbenchError: as `load_layout`.
    """
    builder, layout, _ = find(source, plugin_dirs, runs)
    model = builder.build(layout, device=device, dtype=dtype, seed=seed)
    if quantized:
        builder.quantize(model)
    return model


def describe(
    source: Source,
    *,
    context: int | None = None,
    batch_size: int | None = None,
    bytes_per_element: int | None = None,
    plugin_dirs: Iterable[str | Path] = (),
    runs: str | Path | None = None,
) -> Description:
    """Exact parameters, FLOPs, weight and state bytes, a row a block; nothing is allocated.

    Args:
        source: see the module's docstring; a preset's claim stands beside its exact count, also
            for a Layout that equals a preset's.
        context: tokens of a sequence at which FLOPs and state bytes are given; 2048 if None.
        batch_size: sequences whose states are held; 1 if None.
        bytes_per_element: of weights that no quantizer stores, and of caches: 2 (bfloat16; where
            it is None), 4 (float32) or 8. For a trial, None is what its study's memory metric
            counts with, of each of the three; the Description says which it was.
        plugin_dirs, runs: as in `load_layout`.

    Returns:
        A Description: `print` it, or take `.frame()` (pandas), `.to_dict()` (JSON), `.total`.

    Raises:
        UnknownNameError, FieldError, WorkbenchError: as `load_layout`; FieldError also for an
            argument that makes no sense.
    """
    for name, value in (("context", context), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise FieldError(name, f"must be at least 1, got {value}")
    if bytes_per_element not in (None, 2, 4, 8):
        raise FieldError("bytes_per_element", f"must be 2, 4 or 8, got {bytes_per_element}")
    builder, layout, preset = find(source, plugin_dirs, runs)
    name = str(source) if isinstance(source, str | Path) else ""
    if isinstance(source, Layout | Mapping):
        name, preset = _registered(builder, layout)
    conditions = _study_conditions(source, builder, plugin_dirs, runs)
    return describe_layout(
        builder,
        layout,
        conditions.given(
            context=context, batch_size=batch_size, bytes_per_element=bytes_per_element
        ),
        name=name,
        preset=preset,
    )


def _study_conditions(
    source: Source, builder: Builder, plugin_dirs: Iterable[str | Path], runs: str | Path | None
) -> Conditions:
    if not _names_trial(source, builder):
        return Conditions()
    from workbench.export import trial_builder

    _, study = trial_builder(load_trial(str(source), runs), tuple(map(Path, plugin_dirs)))
    return conditions_of(study, builder)


def _registered(builder: Builder, layout: Layout) -> tuple[str, Preset | None]:
    """The preset that has this very layout, and its name."""
    for name in builder.presets:
        preset = builder.presets[name]
        other = preset.layout()
        # Resolving a deep layout takes milliseconds, and most differ at a glance.
        if (other.d_model, len(other.blocks)) != (layout.d_model, len(layout.blocks)):
            continue
        if builder.resolve(other) == layout:
            return name, preset
    return "", None


def preset_table(*, plugin_dirs: Iterable[str | Path] = ()) -> str:
    """A Markdown table of every preset: exact parameters beside those that its source states."""
    builder = _builder(plugin_dirs)
    lines = [f"| preset | exact parameters | {STATED} | source |", "|---|---:|---:|---|"]
    for name in builder.presets:
        preset = builder.presets[name]
        exact = builder.costs(preset.layout(), length=1).total.parameters
        stated = preset.stated_parameters or "–"
        lines.append(f"| {name} | {exact:,} | {stated} | {preset.source} |")
    return "\n".join(lines) + "\n"


def find(
    source: Source, plugin_dirs: Iterable[str | Path], runs: str | Path | None
) -> tuple[Builder, Layout, Preset | None]:
    """What `source` names: the builder that knows its plugins, the resolved layout, its preset.

    Args and errors as in `load_layout`; the preset is None for all but presets.
    """
    builder = _builder(plugin_dirs)
    if isinstance(source, Layout):
        return builder, builder.resolve(source), None
    if isinstance(source, Mapping):
        return builder, builder.resolve(Layout.from_dict(source)), None
    if _names_trial(source, builder):
        return *_trial(str(source), plugin_dirs, runs), None
    path = Path(source)
    if isinstance(source, Path):
        return builder, builder.resolve(Layout.read(path)), None
    if source not in builder.presets and (path.suffix == ".json" or path.exists()):
        return builder, builder.resolve(Layout.read(path)), None
    preset = _preset(builder, source)
    return builder, builder.resolve(preset.layout()), preset


def _names_trial(source: Source, builder: Builder) -> bool:
    """Whether it is `STUDY:NUMBER`, and neither a preset nor a file of that name."""
    if not isinstance(source, str) or source in builder.presets:
        return False
    path = Path(source)
    return TRIAL.fullmatch(source) is not None and path.suffix != ".json" and not path.exists()


def _preset(builder: Builder, name: str) -> Preset:
    try:
        return builder.presets[name]
    except UnknownNameError as error:
        raise WorkbenchError(
            f"{error} There is no file {Path(name).absolute()} either, and a trial is written "
            "STUDY:NUMBER, such as quickstart:7."
        ) from None


def _trial(
    name: str, plugin_dirs: Iterable[str | Path], runs: str | Path | None
) -> tuple[Builder, Layout]:
    from workbench.export import trial_builder

    # The study may have brought plugins of its own, and its layers be among them.
    trial = load_trial(name, runs)
    builder, _ = trial_builder(trial, tuple(map(Path, plugin_dirs)))
    return builder, builder.resolve(trial.layout)


def _builder(plugin_dirs: Iterable[str | Path]) -> Builder:
    folders = dict.fromkeys(str(Path(folder).resolve()) for folder in plugin_dirs)
    return default_builder(tuple(folders))
