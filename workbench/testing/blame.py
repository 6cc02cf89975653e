"""Where in an author's files a failed check points: the line that raised, else the member at fault.

Nothing here imports torch or pytest.
"""

from __future__ import annotations

import inspect
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import FunctionType, TracebackType
from typing import Any

FRAME = re.compile(r'File "([^"]+)", line (\d+)')
CORE = Path(__file__).parents[1]
Place = tuple[str, int]


def place_of(error: BaseException | None, thing: Any, members: Sequence[str]) -> Place | None:
    """File and line to look at, or None.

    Args:
        error: what the check raised, with its causes.
        thing: the class or preset under test.
        members: names of its members that are to blame, the likeliest first.
    """
    own = _own_files(thing)
    return _raised_in(error, own) or _member(thing, members, own)


def last_own_line(traceback: str) -> Place | None:
    """The last line of a printed traceback that belongs to neither Python, torch nor us."""
    places = [(file, int(line)) for file, line in FRAME.findall(traceback)]
    return next((place for place in reversed(places) if _is_authors(place[0])), None)


def _is_authors(file: str) -> bool:
    stdlib = Path(sysconfig.get_path("stdlib"))
    path = Path(file)
    if file.startswith("<") or path.is_relative_to(CORE):
        return False
    if not path.is_relative_to(stdlib):
        return path.parts[-2:-1] != ("pluggy",)
    inside = path.relative_to(stdlib).parts
    return inside[:1] == ("site-packages",) and inside[1] not in ("torch", "pluggy")


def _own_files(thing: Any) -> Path | None:
    """The file that defines the thing, or the folder of its package."""
    code = thing if isinstance(thing, type) else getattr(thing, "layout", None)
    module = sys.modules.get(getattr(code, "__module__", "") or "")
    file = getattr(module, "__file__", None)
    if module is None or file is None:
        return None
    package = sys.modules.get(module.__name__.partition(".")[0])
    is_package = hasattr(package, "__path__") and "." in module.__name__
    home = Path(str(getattr(package, "__file__", None) or file)) if is_package else Path(file)
    return home.parent if is_package else home


def _raised_in(error: BaseException | None, own: Path | None) -> Place | None:
    """The innermost line of the author's that the error, or what caused it, went through."""
    while error is not None and own is not None:
        found = [place for place in _lines(error) if Path(place[0]).is_relative_to(own)]
        if found:
            return found[-1]
        error = error.__cause__ or error.__context__
    return None


def _lines(error: BaseException) -> Iterator[Place]:
    # Dynamo keeps the stack of what it traced beside its own.
    for frame in getattr(error, "real_stack", None) or ():
        yield frame.filename, frame.lineno
    traceback: TracebackType | None = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame.f_code.co_filename, traceback.tb_lineno
        traceback = traceback.tb_next


def _member(thing: Any, members: Iterable[str], own: Path | None) -> Place | None:
    """The first of the members that the author wrote, else the class itself."""
    if not isinstance(thing, type):
        return _source_line(getattr(thing, "layout", None))
    for name in members:
        for owner in thing.__mro__:
            if name in vars(owner):
                place = _source_line(vars(owner)[name])
                if place is not None and own is not None and Path(place[0]).is_relative_to(own):
                    return place
                break
    return _source_line(thing)


def _source_line(thing: Any) -> Place | None:
    thing = getattr(thing, "__func__", None) or getattr(thing, "fget", None) or thing
    if not isinstance(thing, type | FunctionType):
        return None
    try:
        return str(inspect.getsourcefile(thing)), inspect.getsourcelines(thing)[1]
    except (OSError, TypeError):  # built at run time: there is no source to point at
        return None
