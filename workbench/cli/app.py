"""The commands together, and what their errors become: a message and an exit status."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from workbench import stray_output
from workbench.cli import (
    audit,
    check_plugin,
    confirm,
    dashboard,
    describe,
    doctor,
    export,
    generate,
    latency,
    measure,
    migrate,
    new_plugin,
    oracle,
    plugins,
    run,
    scale,
    show,
    train,
)
from workbench.errors import UnknownNameError, WorkbenchError

FAULT = 1
USER_ERROR = 2
COMMANDS = (
    run,
    show,
    confirm,
    audit,
    migrate,
    oracle,
    describe,
    measure,
    latency,
    scale,
    train,
    export,
    generate,
    plugins,
    new_plugin,
    check_plugin,
    doctor,
    dashboard,
)
EPILOG = """\b
Start with:
  workbench run studies/quickstart.toml

Exit status: 0 done, 1 a fault of the workbench or a check that failed, 2 a mistake in what was
given, 130 stopped by Ctrl-C."""


class _ConvertsLittle:
    """Converts only values that were given and are no text.

    typer converts absent values and text too, with pydantic, whose import would be half of the
    time that `workbench show` takes, or a description that is repeated.
    """

    def get_params(self, ctx: Any) -> list[Any]:
        parameters: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for parameter in parameters:
            if "process_value" not in vars(parameter):
                parameter.process_value = _lightened(parameter)
        return parameters


def _lightened(parameter: Any) -> Callable[[Any, Any], Any]:
    convert = parameter.process_value
    # Where a release of typer does not say the type, everything that is given is converted.
    kind = getattr(getattr(parameter, "type_descriptor", None), "annotation", None)

    def process(ctx: Any, value: Any) -> Any:
        if value is None and not parameter.required:
            return parameter.callback and parameter.callback(ctx, parameter, None)
        if kind in (str, Path) and isinstance(value, str) and parameter.callback is None:
            return kind(value)
        return convert(ctx, value)

    return process


class Command(_ConvertsLittle, TyperCommand):
    """One subcommand."""


class Commands(_ConvertsLittle, TyperGroup):
    """Commands by name; an unknown one gets the nearest and the list."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            raise UnknownNameError("command", args[0], self.list_commands(ctx))
        return super().resolve_command(ctx, args)


# Plain help: rich's panels take longer to import than everything else that --help does.
app = typer.Typer(
    cls=Commands,
    name="workbench",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in COMMANDS:
    name = module.__name__.rpartition(".")[2]
    app.command(name.replace("_", "-"), cls=Command, epilog=f"\b\nExamples:\n{module.EXAMPLES}")(
        getattr(module, name)
    )


def _version(value: bool) -> None:
    if value:
        from workbench import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Architecture search for small hybrid language models."""


def run_app(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status; only WORKBENCH_DEBUG lets errors through.

    Args:
        arguments: those of the process if None.
    """
    wants_json = "--json" in (sys.argv[1:] if arguments is None else arguments)
    try:
        with stray_output.apart() if wants_json else contextlib.nullcontext():
            app(arguments)
    except SystemExit as end:  # how typer always ends
        return _flushed(end.code if isinstance(end.code, int) else 0)
    except WorkbenchError as error:
        return _failed(f"Error: {error}", USER_ERROR)
    except BrokenPipeError:
        return _nobody_reads()
    except Exception as error:
        if os.environ.get("WORKBENCH_DEBUG"):
            raise
        return _failed(
            f"Unexpected {type(error).__name__}: {error}\n"
            "This is a fault of the workbench or of a plugin. WORKBENCH_DEBUG=1 shows where.",
            FAULT,
        )
    return _flushed(0)


def _failed(message: str, status: int) -> int:
    print(message, file=sys.stderr)
    return _flushed(status)


def _flushed(status: int) -> int:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return _nobody_reads()
    return status


def _nobody_reads() -> int:
    """The reader of our output went away (`| head`): nobody is left to tell."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return FAULT
