"""What a report says of code that ended the process that ran it, or did not end."""

from __future__ import annotations

from typing import Any

from workbench.testing.blame import own_frames
from workbench.testing.subject import LOADS, Check
from workbench.testing.watching import End

RETURNS = "The plugin's code returns or raises: it neither ends the process that runs it nor hangs."
RAISE = (
    "Raise an error of your own where the code ends the process (`os._exit`, KeyboardInterrupt); "
    "after a signal, look at what C code and pointers do (`ctypes`, extensions, kernels)."
)
HURRY = (
    "Look for a loop that does not end at the line named here, or for a lock or an answer that "
    "never comes; a check that is only slow needs a smaller config, or a longer `--timeout`."
)
DERIVING = "configs"  # what the check of the things without configs is called


def of_check(end: End, started: dict[str, Any], seconds: float) -> Check:
    """A check in which the process ended or hung.

    Args:
        started: what was told of the check when it began.
        seconds: how long ago that was.
    """
    return Check(
        thing=started["thing"],
        check=started["check"],
        case=started["case"],
        outcome="failed",
        seconds=round(seconds, 3),
        message=end.how if end.hung else f"the process {end.how} during this check",
        **_advice(end, started["own"], RETURNS, started["place"]),
    )


def of_deriving(end: End, told: dict[str, Any]) -> Check:
    """A thing whose `Config`, `check`, `costs` or the like ended the process, or hung."""
    how = end.how if end.hung else f"the process {end.how}"
    return Check(
        thing=told["thing"],
        check=DERIVING,
        case="",
        outcome="failed",
        seconds=0.0,
        message=f"{how} while its configs were derived",
        **_advice(end, told["own"], RETURNS),
    )


def of_loading(end: End, plugin: str) -> Check:
    """A plugin whose import, or whose hooks, ended the process or hung."""
    how = end.how if end.hung else f"the process {end.how}"
    return Check(
        thing=f"plugin {plugin}",
        check="loads",
        case="",
        outcome="failed",
        seconds=0.0,
        message=f"{how} while it was loaded",
        **_advice(end, None, LOADS),
    )


def concerned(end: End, started: dict[str, Any]) -> list[str]:
    """The members to blame: the innermost one that the process was in, else all of the check's."""
    names = [frame.name for frame in own_frames(end.stack, started["own"])]
    members = [name for name in names if name in started["members"]]
    return members[:1] or list(started["concerns"])


def _advice(end: End, own: str | None, holds: str, place: Any = None) -> dict[str, Any]:
    frames = own_frames(end.stack, own)
    file, line = frames[0][:2] if frames else place or (None, None)
    return {"file": file, "line": line, "holds": holds, "mend": HURRY if end.hung else RAISE}
