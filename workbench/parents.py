"""Processes that run one study together: who they are, who of them lives, who has the turn.

A parent is a process that asks for trials and records their ends. Each holds a locked file,
`runs/<study>/parents/<id>`, for as long as it lives; the lock ends with the process, however that
ends, so whoever can lock the file knows that its parent is gone. All parents of a study share its
folder, on a file system with working `flock` (local, or NFS from version 4 on).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from workbench.errors import DiskError
from workbench.files import make_folder

FOLDER = "parents"
TURN = ".turn"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class Parent:
    """This process, as a parent of one study; `joined` makes it.

    Attributes:
        id: host, process and a random part.
        folder: the study's.
        in_flight: numbers of the trials that it began and has not finished.
        asking: whether it may have a trial in the storage that is in no record yet.
        closing: what is to be closed when it leaves.
    """

    def __init__(self, folder: Path) -> None:
        host = re.sub(r"[^A-Za-z0-9_]", "-", socket.gethostname().partition(".")[0]) or "host"
        self.id = f"{host.lstrip('-') or 'host'}-{os.getpid()}-{secrets.token_hex(4)}"
        self.folder = folder
        self.in_flight: set[int] = set()
        self.asking = False
        self.closing = contextlib.ExitStack()
        self._depth = 0
        with self.exclusive():
            self._file = _opened(self._path(self.id))
            fcntl.flock(self._file, fcntl.LOCK_EX)

    def fileno(self) -> int:
        """The lock's descriptor: a child that inherits it keeps this parent alive."""
        return self._file.fileno()

    def alive(self, parent: str) -> bool:
        """Whether a parent still runs."""
        if parent == self.id:
            return True
        if not NAME.fullmatch(parent):
            return False
        try:
            with self._path(parent).open("r") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def others(self) -> list[str]:
        """The other parents that run this study now."""
        return [name for name in self._names() if name != self.id and self.alive(name)]

    def dead(self) -> list[str]:
        """Parents that ended and left something unfinished."""
        return [name for name in self._names() if not self.alive(name)]

    def forget(self, parents: list[str]) -> None:
        """Remove the files of parents whose trials were all ended."""
        for name in parents:
            self._path(name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """The turn: only one parent is inside at any moment; the same one may go in twice.

        Raises:
            DiskError: the folder cannot be written, or its file system knows no locks.
        """
        self._depth += 1
        try:
            if self._depth > 1:
                yield
                return
            with _turn(self.folder / FOLDER):
                yield
        finally:
            self._depth -= 1

    def leave(self) -> None:
        """Give the place up; what is in flight is then anybody's."""
        self.closing.close()
        with contextlib.suppress(DiskError), self.exclusive():
            if not self.in_flight and not self.asking:
                self._path(self.id).unlink(missing_ok=True)
            if not (self.folder / "study.json").exists() and self._names() in ([], [self.id]):
                self._remove_folder()
        self._file.close()

    def _remove_folder(self) -> None:
        """Leave no trace of a study that never began."""
        for name in (self.id, TURN):
            self._path(name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # something else is in them: not ours to remove
            (self.folder / FOLDER).rmdir()
            self.folder.rmdir()

    def _names(self) -> list[str]:
        found = (path.name for path in (self.folder / FOLDER).iterdir())
        return sorted(name for name in found if NAME.fullmatch(name))

    def _path(self, name: str) -> Path:
        return self.folder / FOLDER / name


@contextlib.contextmanager
def joined(folder: Path) -> Iterator[Parent]:
    """Be a parent of the study in `folder` until the block ends.

    Raises:
        DiskError: the folder cannot be made or written.
    """
    parent = Parent(folder)
    try:
        yield parent
    finally:
        parent.leave()


@contextlib.contextmanager
def _turn(folder: Path) -> Iterator[None]:
    while True:
        make_folder(folder)
        with _opened(folder / TURN) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                raise DiskError(f"cannot lock {folder / TURN}: {error.strerror}") from None
            if _is_at(lock, folder / TURN):  # else its folder was removed while we waited
                yield
                return


def _is_at(file: TextIO, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    here = os.fstat(file.fileno())
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _opened(path: Path) -> TextIO:
    while True:
        try:
            return path.open("a")
        except FileNotFoundError:  # another process removed the folder that it made
            make_folder(path.parent)
        except OSError as error:
            raise DiskError(f"cannot write to {path.parent}: {error.strerror}") from None
