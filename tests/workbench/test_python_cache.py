"""Compiled Python files are kept beside the studies where nobody else keeps them."""

import json
import os
import subprocess
import sys

import pytest

CODE = """
import json, sys
from pathlib import Path
from workbench.python_cache import use_python_cache
folder = use_python_cache(Path({cache!r}), "heavy")
import heavy, heavy.part
json.dump([str(folder), sys.dont_write_bytecode, sys.pycache_prefix, heavy.part.VALUE], sys.stdout)
"""


@pytest.fixture
def begin(tmp_path):
    """Imports a package in a new process; returns what it said and the files it left."""
    package, cache = tmp_path / "site" / "heavy", tmp_path / "cache"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "part.py").write_text("VALUE = 7\n")

    def run(**variables):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        root = os.pathsep.join([str(package.parent), *filter(None, sys.path)])
        done = subprocess.run(
            [sys.executable, "-c", CODE.format(cache=str(cache))],
            env=environment | {"PYTHONPATH": root} | variables,
            capture_output=True,
            text=True,
            check=True,
        )
        kept = {path.name.partition(".")[0] for path in cache.rglob("*.pyc")}
        return json.loads(done.stdout), {"__init__", "part"} <= kept

    return run


def test_kept_where_python_may_not_write(begin, tmp_path):
    folder = str(tmp_path / "cache" / "python")
    for _ in range(2):  # the second finds what the first left
        said, kept = begin(PYTHONDONTWRITEBYTECODE="1")
        assert said == [folder, False, folder, 7]
        assert kept
    assert not list((tmp_path / "site").rglob("*.pyc"))


def test_nothing_changes_where_python_writes_by_itself(begin, tmp_path):
    said, kept = begin()
    assert said == ["None", False, None, 7]
    assert not kept
    assert list((tmp_path / "site").rglob("part.*.pyc"))
    # Nor where they are found, and no more may be written.
    assert begin(PYTHONDONTWRITEBYTECODE="1") == (["None", True, None, 7], False)


def test_a_folder_of_the_users_stays(begin, tmp_path):
    theirs = str(tmp_path / "theirs")
    said, kept = begin(PYTHONPYCACHEPREFIX=theirs, PYTHONDONTWRITEBYTECODE="1")
    assert said == ["None", True, theirs, 7]
    assert not kept
