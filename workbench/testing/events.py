"""What the process that checks a plugin tells the one that waits: a line of JSON an event.

Through a file, not a pipe: what was told before the process ended, however it ended, stays told.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Event = dict[str, Any]

_file: list[Path] = []  # where this process tells, if anybody listens


def begin(file: Path) -> None:
    """Tell in this file from now on."""
    _file[:] = [file]


def tell(event: str, **facts: Any) -> None:
    """Append one event; without `begin` nobody listens, and nothing happens."""
    for path in _file:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **facts}) + "\n")


class Listener:
    """Reads the events of a file that another process still writes."""

    def __init__(self, file: Path) -> None:
        file.touch()
        self._file = file.open("rb")
        self._rest = b""

    def heard(self) -> list[Event]:
        """What was told since the last call, whole lines only."""
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        self._file.close()
