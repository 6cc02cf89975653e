"""Writes the package of a new plugin, which installs and passes its own test as it is."""

from __future__ import annotations

import dataclasses
import importlib.util
import keyword
import re
import shutil
import sys
from importlib.metadata import PackageNotFoundError, distribution
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from workbench.errors import FieldError, UnknownNameError, WorkbenchError

if TYPE_CHECKING:
    from workbench.builder import Builder

NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of plugin.

    Attributes:
        registry: of `Builder.registries()`.
        what: a description to begin with, `A layer`.
        study: how a study, or a command, names such a thing.
    """

    registry: str
    what: str
    study: str


KINDS = {
    "layer": Kind(registry="layers", what="A layer", study='mixers = ["{name}"]'),
    "placement": Kind(
        registry="placements", what="A placement policy", study='placements = ["{name}"]'
    ),
    "quantizer": Kind(
        registry="quantizers", what="A quantizer", study='quantizers = ["none", "{name}"]'
    ),
    "metric": Kind(registry="metrics", what="A metric", study='report = ["{name}"]'),
    "data": Kind(registry="data_sources", what="A data source", study='[data] source = "{name}"'),
    "exporter": Kind(
        registry="exporters",
        what="An exporter",
        study="workbench export STUDY:TRIAL FOLDER --exporter {name}",
    ),
}


def write_plugin(name: str, kind: str, into: Path, builder: Builder) -> Path:
    """Write a package of that kind to the new folder `into/name`, whole or not at all.

    Args:
        name: of the distribution, of its entry point and of the thing: lower-case-with-dashes.
        kind: one of `KINDS`.
        builder: knows what is installed, whose names are taken.

    Raises:
        FieldError: a name that cannot be used, or that something has already.
        UnknownNameError: no such kind.
        WorkbenchError: the folder is there, or cannot be written.
    """
    if kind not in KINDS:
        raise UnknownNameError("kind", kind, KINDS)
    module = _module_name(name)
    _refuse_taken(name, module, kind, builder)
    folder = into / name
    if folder.exists() or folder.is_symlink():
        raise WorkbenchError(f"{folder} is there already: choose another NAME, or --into elsewhere")
    temporary = into / f".{name}.tmp"
    try:
        temporary.mkdir(parents=True)
        for path, text in plugin_files(name, kind).items():
            (temporary / path).write_text(text, encoding="utf-8")
        temporary.rename(folder)
    except OSError as error:
        raise WorkbenchError(f"cannot write {folder}: {error.strerror}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def plugin_files(name: str, kind: str) -> dict[str, str]:
    """The package's files: name → text."""
    from workbench.discovery import GROUP

    module, about = _module_name(name), KINDS[kind]
    title = "".join(part.capitalize() for part in name.split("-"))
    fields = {
        "name": name,
        "module": module,
        "title": title,
        "glyph": title[0],
        "kind": about.what.partition(" ")[2],
        "what": about.what,
        "study": about.study.format(name=name),
        "group": GROUP,
    }
    templates = {
        "pyproject.toml": "pyproject.toml.txt",
        "README.md": "README.md.txt",
        f"{module}.py": f"{kind}/module.py.txt",
        f"test_{module}.py": f"{kind}/test.py.txt",
    }
    home = files("workbench") / "templates"
    text = home.joinpath(f"{kind}/module.py.txt").read_text("utf-8")
    if re.search(rf"\b{title}\b", text.replace("$title", "")):
        raise FieldError(
            "NAME", f"its class {title} would hide another of that name: choose another"
        )
    return {
        path: Template(home.joinpath(template).read_text("utf-8")).substitute(fields)
        for path, template in templates.items()
    }


def _module_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise FieldError(
            "NAME", f"{name!r}: use lower case letters and digits, with single dashes between words"
        )
    module = name.replace("-", "_")
    if keyword.iskeyword(module) or module in sys.stdlib_module_names:
        raise FieldError("NAME", f"{name!r} is a name of Python's own: choose another")
    return module


def _refuse_taken(name: str, module: str, kind: str, builder: Builder) -> None:
    plugins = {*builder.plugins.loaded, *builder.plugins.failures}
    registry = builder.registries()[KINDS[kind].registry]
    taken = None
    if name in plugins:
        taken = "a plugin"
    elif name in registry:
        taken = f"a {registry.kind} of {registry.provenance(name).plugin}"
    elif _is_installed(name):
        taken = "an installed package"
    elif importlib.util.find_spec(module) is not None:
        taken = f"a module ({module}) that can be imported here"
    if taken:
        raise FieldError("NAME", f"{name!r} is {taken} already: choose another")


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True
