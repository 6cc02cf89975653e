"""Which trial trains a layout: a file a layout, so that two processes never train one twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from workbench.errors import WorkbenchError
from workbench.files import read_json, write_json
from workbench.parents import Parent

FOLDER = "layouts"


class Claims:
    """Claims on layouts, in `runs/<study>/layouts/<hash>`.

    Args:
        folder: the study's.
        parent: of this process.
        holds: whether a trial still has a right to a layout that it claimed: it is in flight, or
            judged it. A trial that will run again has none; the one that repeats it claims anew.
    """

    def __init__(self, folder: Path, parent: Parent, holds: Callable[[int], bool]) -> None:
        self.folder = folder / FOLDER
        self._parent = parent
        self._holds = holds

    def take(self, layout_hash: str, number: int) -> int | None:
        """Claim a layout for a trial.

        Returns:
            None: it is this trial's now. Else the number of the trial that holds it.

        Raises:
            DiskError: the claim cannot be written.
            WorkbenchError: an earlier one cannot be read.
        """
        with self._parent.exclusive():
            holder = self.holder(layout_hash)
            if holder is not None and holder != number and self._holds(holder):
                return holder
            write_json(self.folder / layout_hash, number)
            return None

    def holder(self, layout_hash: str) -> int | None:
        """The trial that claimed a layout last; None if none ever did.

        Raises:
            WorkbenchError: the claim cannot be read; says what to do.
        """
        path = self.folder / layout_hash
        try:
            found = read_json(path) if path.exists() else None
            if found is None or type(found) is int:
                return found
            raise WorkbenchError(f"{path} names no trial")
        except WorkbenchError as error:
            raise WorkbenchError(
                f"{error}. It is a claim on a layout: remove it while no process runs the study."
            ) from None
