"""Folders that are whole or not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from workbench.errors import DiskError, WorkbenchError
from workbench.files import new_folder


def test_a_folder_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "parent" / "out"
    with new_folder(path) as folder:
        (folder / "file").write_text("content")
        assert not path.exists()
    assert (path / "file").read_text() == "content"
    assert [entry.name for entry in path.parent.iterdir()] == ["out"]


def write(path: Path, *, meanwhile: Callable[[], object] = lambda: None) -> None:
    with new_folder(path) as folder:
        (folder / "file").write_text("ours")
        meanwhile()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_where_writing_stops(tmp_path: Path, error: type[BaseException]) -> None:
    def stop() -> None:
        raise error

    with pytest.raises(error):
        write(tmp_path / "out", meanwhile=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "folder", "dead link"])
def test_what_is_there_stays_as_it_is(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "out"
    if kind == "file":
        path.write_text("mine")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nowhere")
    before = path.lstat()
    with pytest.raises(WorkbenchError, match="out is there already"):
        write(path)
    assert path.lstat() == before
    assert list(tmp_path.iterdir()) == [path]


def test_what_comes_there_meanwhile_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "out"

    def come() -> None:
        path.mkdir()
        (path / "theirs").touch()

    with pytest.raises(DiskError, match=r"cannot write .*out: .*Nothing was kept"):
        write(path, meanwhile=come)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert [entry.name for entry in path.iterdir()] == ["theirs"]


def test_a_place_that_cannot_hold_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match=r"cannot write .*file/out: Not a directory"):
        write(tmp_path / "file" / "out")
