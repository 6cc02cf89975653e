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
from types import CodeType, FunctionType, TracebackType
from typing import Any, NamedTuple, Self

FRAME = re.compile(r'File "([^"]+)", line (\d+)(?:, in | in )?(\S*)')
CORE = Path(__file__).parents[1]
Place = tuple[str, int]


class Frame(NamedTuple):
    """Where a function was when a stack was written down."""

    file: str
    line: int
    name: str

    @classmethod
    def all_of(cls, text: str) -> list[Self]:
        """Those of a stack as Python prints it, in its order."""
        return [cls(file, int(line), name) for file, line, name in FRAME.findall(text)]


# Functions of the core that refuse what a member returned, after it has returned.
JUDGES = {(str(CORE / "model.py"), "sources_of"): "source"}


def place_of(error: BaseException | None, thing: Any, members: Sequence[str]) -> Place | None:
    """File and line to look at, or None.

    Args:
        error: what the check raised, with its causes.
        thing: the class or preset under test.
        members: names of its members that are to blame, the likeliest first.
    """
    own = own_files(thing)
    return _raised_in(error, own) or _member(thing, members, own)


def member_at(error: BaseException | None, thing: Any) -> str | None:
    """The member of the thing that raised, or that returned what the core refused; None for others.

    Of what a member calls, helpers count as the member itself.
    """
    members = members_of(thing)
    while error is not None:
        codes = list(_codes(error))[::-1]
        found = [members[code] for code in codes if code in members]
        judged = [(code.co_filename, code.co_name) for code in codes]
        found += [JUDGES[judge] for judge in judged if judge in JUDGES]
        if found:
            return found[0]
        error = error.__cause__ or error.__context__
    return None


def _codes(error: BaseException) -> Iterator[CodeType]:
    traceback: TracebackType | None = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame.f_code
        traceback = traceback.tb_next


def members_of(thing: Any) -> dict[CodeType, str]:
    """The code of each method that the author wrote, with its name."""
    own = own_files(thing)
    if not isinstance(thing, type) or own is None:
        return {}
    functions = {
        _function(value): name
        for owner in reversed(thing.__mro__)
        for name, value in vars(owner).items()
        if isinstance(_function(value), FunctionType)
    }
    codes = {inspect.unwrap(function).__code__: name for function, name in functions.items()}
    return {code: name for code, name in codes.items() if is_within(code.co_filename, own)}


def own_frames(stack: Iterable[Frame], own: str | None) -> list[Frame]:
    """Those of the frames that lie in the author's file or folder; in any author's if None."""
    if own is None:
        return [frame for frame in stack if _is_authors(frame.file)]
    return [frame for frame in stack if is_within(frame.file, Path(own))]


def is_within(file: str, own: Path) -> bool:
    """Whether a file is the author's file, or in the author's folder."""
    return Path(file).is_relative_to(own)


def last_own_line(traceback: str) -> Place | None:
    """The last line of a printed traceback that belongs to neither Python, torch nor us."""
    frames = [frame for frame in Frame.all_of(traceback) if _is_authors(frame.file)]
    return (frames[-1].file, frames[-1].line) if frames else None


def _is_authors(file: str) -> bool:
    stdlib = Path(sysconfig.get_path("stdlib"))
    path = Path(file)
    if file.startswith("<") or path.is_relative_to(CORE):
        return False
    if not path.is_relative_to(stdlib):
        return path.parts[-2:-1] != ("pluggy",)
    inside = path.relative_to(stdlib).parts
    return inside[:1] == ("site-packages",) and inside[1] not in ("torch", "pluggy")


def own_files(thing: Any) -> Path | None:
    """The author's: the file that defines the thing, or the folder of its package."""
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
        found = [place for place in _lines(error) if is_within(place[0], own)]
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
                if place is not None and own is not None and is_within(place[0], own):
                    return place
                break
    return _source_line(thing)


def _function(value: Any) -> Any:
    """What a classmethod, a static method or a property wraps; the value itself otherwise."""
    return getattr(value, "__func__", None) or getattr(value, "fget", None) or value


def _source_line(thing: Any) -> Place | None:
    thing = _function(thing)
    if not isinstance(thing, type | FunctionType):
        return None
    try:
        return str(inspect.getsourcefile(thing)), inspect.getsourcelines(thing)[1]
    except (OSError, TypeError):  # built at run time: there is no source to point at
        return None
