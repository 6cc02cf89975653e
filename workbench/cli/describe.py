"""`workbench describe`: what a layout costs, exactly, without building it."""

from __future__ import annotations

from typing import Annotated

import typer

from workbench import stray_output
from workbench.cli.common import Json, PluginDirs, Runs, Source, line_width, print_json

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

    A row a block, nothing measured and nothing allocated: an 8 B layout takes a second.
    """
    from workbench.api import describe as describe_layout
    from workbench.costs import DTYPE_BYTES
    from workbench.description_text import to_text
    from workbench.errors import FieldError, UnknownNameError

    if dtype is not None and dtype not in DTYPE_BYTES:
        raise UnknownNameError("dtype", dtype, DTYPE_BYTES)
    for name, value in (("--context", context), ("--batch-size", batch_size)):
        if value is not None and value < 1:
            raise FieldError(name, f"must be at least 1, got {value}")
    with stray_output.apart():
        description = describe_layout(
            source,
            runs=runs,
            context=context,
            batch_size=batch_size,
            bytes_per_element=None if dtype is None else DTYPE_BYTES[dtype],
            plugin_dirs=tuple(plugin_dir or ()),
        )
    if json:
        print_json(description.to_dict())
    else:
        print(to_text(description, line_width()))
