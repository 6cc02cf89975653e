"""`workbench describe`: what a layout costs, exactly, without building it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench import stray_output
from workbench.cli.common import Json, PluginDirs, Runs, Source, line_width, print_json, warn

if TYPE_CHECKING:
    from workbench.description import Description

EXAMPLES = """\
  workbench describe mamba-130m
  workbench describe quickstart:7 --context 8192
  workbench describe layout.json --json"""


def describe(
    source: Source,
    context: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS",
            help="Context at which FLOPs and state are given; 2048, for a trial its study's.",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(metavar="N", help="Sequences held at once; 1, for a trial its study's."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="Of caches and of weights that no quantizer stores: float64, float32, bfloat16, "
            "float16; bfloat16, for a trial its study's.",
        ),
    ] = None,
    runs: Runs = None,
    plugin_dir: PluginDirs = None,
    json: Json = False,
) -> None:
    """Describe a layout exactly: parameters, FLOPs, bytes.

    A row a block, nothing measured and nothing allocated. A preset's description is kept in the
    user's cache folder, or in that which WORKBENCH_CACHE names, and shown again at once as long
    as no source that it was computed from has changed.
    """
    from workbench.costs import DTYPE_BYTES
    from workbench.description_text import to_text
    from workbench.errors import FieldError, UnknownNameError

    if dtype is not None and dtype not in DTYPE_BYTES:
        raise UnknownNameError("dtype", dtype, DTYPE_BYTES)
    for name, value in (("--context", context), ("--batch-size", batch_size)):
        if value is not None and value < 1:
            raise FieldError(name, f"must be at least 1, got {value}")
    description = _described(
        source,
        runs,
        tuple(str(folder.resolve()) for folder in plugin_dir or ()),
        context=context,
        batch_size=batch_size,
        bytes_per_element=None if dtype is None else DTYPE_BYTES[dtype],
    )
    if json:
        print_json(description.to_dict())
    else:
        print(to_text(description, line_width()))


def _described(
    source: str, runs: Path | None, plugin_dirs: tuple[str, ...], **conditions: int | None
) -> Description:
    """As it was kept, else computed, and kept for the next time where that can be."""
    from workbench.description_cache import DescriptionCache

    cache = DescriptionCache({"source": source, **conditions}, plugin_dirs)
    if (kept := cache.find()) is not None:
        return kept
    from workbench.api import describe as describe_layout
    from workbench.builder import default_builder
    from workbench.errors import DiskError

    options: dict[str, Any] = {**conditions, "runs": runs, "plugin_dirs": plugin_dirs}
    with stray_output.apart():
        description = describe_layout(source, **options)
    try:
        cache.keep(description, default_builder(tuple(dict.fromkeys(plugin_dirs))).plugins)
    except DiskError as error:
        warn(str(error))
    return description
