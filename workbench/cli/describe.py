"""`workbench describe`: what a layout costs, exactly, without building it."""

from __future__ import annotations

from typing import Annotated

import typer

from workbench.cli.common import Json, PluginDirs, Runs, console, print_json

EXAMPLE = "Examples: workbench describe mamba-130m · workbench describe quickstart:7 --context 8192"


def describe(
    source: Annotated[str, typer.Argument(help="JSON file, STUDY:TRIAL or preset.")],
    context: Annotated[int, typer.Option(help="Tokens of context for FLOPs and state.")] = 2048,
    batch_size: Annotated[int, typer.Option(help="Sequences held at once.")] = 1,
    dtype: Annotated[
        str, typer.Option(help="Of weights that no quantizer stores, and of caches.")
    ] = "bfloat16",
    runs: Runs = None,
    plugin_dir: PluginDirs = None,
    json: Json = False,
) -> None:
    """Describe a layout: exact parameters, FLOPs, weight and state bytes, a row a block.

    Nothing is allocated: an 8 B layout is described in a second.
    """
    from workbench.api import describe as describe_layout
    from workbench.costs import DTYPE_BYTES
    from workbench.errors import FieldError, UnknownNameError

    if dtype not in DTYPE_BYTES:
        raise UnknownNameError("dtype", dtype, DTYPE_BYTES)
    for name, value in (("--context", context), ("--batch-size", batch_size)):
        if value < 1:
            raise FieldError(name, f"must be at least 1, got {value}")
    folders = tuple(plugin_dir or ())
    description = describe_layout(
        source,
        runs=runs,
        context=context,
        batch_size=batch_size,
        bytes_per_element=DTYPE_BYTES[dtype],
        plugin_dirs=folders,
    )
    if json:
        print_json(description.to_dict())
    else:
        console().print(str(description), markup=False)
