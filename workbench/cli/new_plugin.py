"""`workbench new-plugin`: a package that installs and passes its own test at once."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from workbench.cli.common import builder

EXAMPLES = """\
  workbench new-plugin my-mixer --kind layer
  workbench new-plugin my-int6 --kind quantizer --into ~/plugins"""
HELP = "layer, placement, quantizer, metric, data or exporter."


def new_plugin(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Of package and thing: lower-case-with-dashes.")
    ],
    kind: Annotated[str, typer.Option(metavar="KIND", help=HELP)],
    into: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where its folder is made; here.")
    ] = None,
) -> None:
    """Write the package of a new plugin, with a test that passes.

    A pyproject.toml with the entry point, one module with a small working thing to be replaced,
    a test that subclasses the contract suite, and a README.
    """
    from workbench.scaffold import KINDS, write_plugin

    folder = write_plugin(name, kind, into or Path(), builder(None))
    written = sorted(path.name for path in folder.iterdir())
    place = shlex.quote(str(folder))
    study = KINDS[kind].study.format(name=name)
    print(f"Wrote {folder}: {', '.join(written)}\n\nNext:")
    print(f"  pip install -e {place}")
    print(f"  python -m pytest {place}")
    print(f"  workbench check-plugin {name}")
    print(f"  {study}" + ("" if study.startswith("workbench") else "   # in a study"))
