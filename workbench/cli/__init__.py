"""The `workbench` command: one module a subcommand, each importing its heavy parts when it runs."""

from __future__ import annotations

import os
import sys

import typer

from workbench.cli import (
    dashboard,
    describe,
    doctor,
    export,
    generate,
    measure,
    plugins,
    run,
    show,
    train,
)
from workbench.errors import WorkbenchError

USER_ERROR = 2
INTERRUPTED = 130

app = typer.Typer(
    name="workbench",
    help="Architecture search for small hybrid language models.",
    epilog="Start with: workbench run studies/quickstart.toml",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (run, show, describe, measure, train, export, generate, plugins, doctor, dashboard):
    name = module.__name__.rpartition(".")[2]
    app.command(name, epilog=module.EXAMPLE)(getattr(module, name))


def _version(value: bool) -> None:
    if value:
        from workbench import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True),
) -> None:
    """Architecture search for small hybrid language models."""


def main() -> None:
    """Run the command line; exit 2 for a user's mistake, 130 for Ctrl-C, 1 for a fault of ours."""
    try:
        app()
    except WorkbenchError as error:
        _fail(f"error: {error}", USER_ERROR)
    except KeyboardInterrupt:
        _fail("interrupted. The same command goes on where this one stopped.", INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output went away (`| head`): nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if os.environ.get("WORKBENCH_DEBUG"):
            raise
        _fail(
            f"unexpected {type(error).__name__}: {error}\n"
            "This is a fault of the workbench or of a plugin. WORKBENCH_DEBUG=1 shows where.",
            1,
        )


def _fail(message: str, status: int) -> None:
    print(message, file=sys.stderr)
    sys.exit(status)
