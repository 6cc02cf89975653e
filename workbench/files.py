"""Writing that is whole or not there: a temporary neighbour, then a rename."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from workbench.errors import DiskError, WorkbenchError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; it takes the name `path` when the block ends well.

    Raises:
        DiskError: the file cannot be written (a full disk, say); nothing half-written stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise DiskError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def refuse_existing(path: Path) -> None:
    """Refuse to write where something is already.

    Raises:
        WorkbenchError: `path` is there, be it a link that leads nowhere.
    """
    if path.exists() or path.is_symlink():
        raise WorkbenchError(f"{path} is there already: name a new folder, or remove it first.")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`; it takes the name `path` when the block ends well.

    Raises:
        WorkbenchError: `path` is there already, and stays as it is.
        DiskError: it cannot be written (a full disk, say); nothing half-written stays.
    """
    refuse_existing(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(path)
    except OSError as error:
        raise DiskError(
            f"cannot write {path}: {error.strerror or error}. Nothing was kept: make room or "
            "choose another place, and try again."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, data: Any) -> None:
    """Write JSON data to `path`, whole or not at all. NaN and infinity are refused."""
    text = json.dumps(data, indent=2, allow_nan=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def make_folder(path: Path) -> None:
    """Make a folder and its parents; one that is there already will do.

    Raises:
        DiskError: it cannot be made; says why.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"cannot make the folder {path}: {error.strerror}") from None


def read_json(path: Path) -> Any:
    """The JSON data in `path`.

    Raises:
        WorkbenchError: it cannot be read or is no JSON; names the file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise WorkbenchError(f"cannot read {path}: {error}") from None
    except json.JSONDecodeError as error:
        raise WorkbenchError(
            f"{path} is not JSON at line {error.lineno}, column {error.colno}: {error.msg}"
        ) from None


def known_json(path: Path) -> Any:
    """The JSON data in `path`; None if it is missing, or no JSON: a machine died as it was written.

    Raises:
        WorkbenchError: it is there and cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    except OSError as error:
        raise WorkbenchError(f"cannot read {path}: {error}") from None
