"""A disk that can be full: a small file system of its own where we may mount one."""

from __future__ import annotations

import contextlib
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

SIZE = "48m"
ROOM = 4096  # bytes that the last pieces of the ballast are


class SmallDisk:
    """A mounted file system; `fill` leaves no room on it, `clear` gives it back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"

    def fill(self, study_process: int) -> None:
        with self._ballast.open("wb", buffering=0) as file:
            for piece in (1 << 20, ROOM):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(b"\0" * piece)

    def clear(self) -> None:
        self._ballast.unlink(missing_ok=True)


class LimitedFiles:
    """Where nothing may be mounted: no file of the study's processes may grow past a page."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self, study_process: int) -> None:
        for pid in tree(study_process):
            _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (ROOM // 4, hard))

    def clear(self) -> None:
        """The limit ended with the processes."""


def tree(pid: int) -> Iterator[int]:
    """A process and all that descend from it."""
    yield pid
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        yield from tree(int(child))


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[SmallDisk | LimitedFiles]:
    """A small disk at `folder`: mounted, or by limits on the processes that write to it."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        yield LimitedFiles(folder)
        return
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
