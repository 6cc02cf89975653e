"""Where Python keeps what it compiled, on a machine that keeps nothing.

Container images often set PYTHONDONTWRITEBYTECODE and hold torch without compiled files, or hold
it where nobody may write: every process then compiles hundreds of its modules again, for
seconds. Processes of a study keep them in `runs/.cache/python` there, and the next ones begin
sooner. Where compiled files of torch are found, or can be written beside it, nothing changes.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

FOLDER = "python"


def use_python_cache(cache_dir: Path, package: str = "torch") -> Path | None:
    """Let this process and its children keep compiled Python files beside the studies, if needed.

    To be called before the package is imported. A PYTHONPYCACHEPREFIX of the user's stays.

    Args:
        cache_dir: what all studies of a runs folder share, `runs/.cache`.
        package: whose compiled files decide.

    Returns:
        The folder; None where Python finds or keeps them by itself.
    """
    folder = cache_dir.resolve() / FOLDER
    if sys.pycache_prefix is not None:
        return folder if sys.pycache_prefix == str(folder) else None
    if _keeps_itself(package):
        return None
    sys.pycache_prefix, sys.dont_write_bytecode = str(folder), False
    os.environ["PYTHONPYCACHEPREFIX"] = str(folder)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    return folder


def _keeps_itself(package: str) -> bool:
    """Whether the package's compiled files are there, or will be after its first import."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        return True  # its import will say so
    if Path(importlib.util.cache_from_source(found.origin)).exists():
        return True
    return not sys.dont_write_bytecode and os.access(Path(found.origin).parent, os.W_OK)
