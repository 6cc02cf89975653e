"""Token files: whole or not there, whoever fills them and whatever stops them; windows over them.

Shape suffixes: B batch, T tokens, N tokens of a part, W windows.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import FieldError, WorkbenchError
from workbench.model import IGNORE
from workbench_data.sampling import gather, random_starts, validation_starts
from workbench_data.store import PartWriter, cached
from workbench_data.tokenization import ByteTokenizer

BYTES = ByteTokenizer()


def fill(train: PartWriter, validation: PartWriter) -> None:
    for writer, text in ((train, b"abc" * 1000), (validation, b"xyz")):
        for _ in range(2):
            writer.open_document()
            writer.add(BYTES.encode_batch([text])[0], len(text))


def never(train: PartWriter, validation: PartWriter) -> None:
    raise AssertionError("filled again")


def check(folder: Path, filling: Callable[[PartWriter, PartWriter], None]) -> None:
    store = cached(folder, "key", BYTES, filling)
    assert store.train.tokens_N.tobytes() == b"abc" * 1000 + b"\0" + b"abc" * 1000
    assert store.validation.tokens_N.tobytes() == b"xyz\0xyz"
    assert store.validation.facts.num_bytes == store.validation.facts.tokens == 7
    assert store.validation.facts.documents == 2
    assert store.validation.facts.exact


def test_is_filled_once_and_mapped_afterwards(tmp_path: Path) -> None:
    check(tmp_path / "new" / "folder", fill)
    check(tmp_path / "new" / "folder", never)
    store = cached(tmp_path / "new" / "folder", "key", BYTES, never)
    assert isinstance(store.train.tokens_N.base, np.memmap)
    assert not store.train.tokens_N.flags.writeable
    assert not list(tmp_path.rglob("*.tmp"))


def test_another_key_is_another_store(tmp_path: Path) -> None:
    check(tmp_path, fill)
    with pytest.raises(AssertionError, match="filled again"):
        cached(tmp_path, "another", BYTES, never)


@pytest.mark.parametrize("damage", ["shorter", "longer", "gone", "index cut", "index emptied"])
def test_a_damaged_store_is_written_again(tmp_path: Path, damage: str) -> None:
    check(tmp_path, fill)
    (index,) = tmp_path.glob("*.json")
    data = tmp_path / json.loads(index.read_text())["train"]["file"]
    if damage == "shorter":
        os.truncate(data, data.stat().st_size // 2)
    elif damage == "longer":
        data.write_bytes(data.read_bytes() + b"?")
    elif damage == "gone":
        data.unlink()
    else:
        index.write_text(index.read_text()[:50] if damage == "index cut" else "{}")
    check(tmp_path, fill)
    check(tmp_path, never)


CHILD = """
import sys, time
from pathlib import Path
from workbench_data.store import cached
from workbench_data.tokenization import ByteTokenizer

folder, name, others = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]

def fill(train, validation):
    for writer, text in ((train, b"abc" * 1000), (validation, b"xyz")):
        for _ in range(2):
            writer.open_document()
            writer.add(ByteTokenizer().encode_batch([text])[0], len(text))
    (folder / f"{name}.filling").touch()
    while not all((folder / f"{other}.filling").exists() for other in others):
        time.sleep(0.01)

store = cached(folder / "cache", "key", ByteTokenizer(), fill)
assert store.train.tokens_N.tobytes() == b"abc" * 1000 + b"\\0" + b"abc" * 1000
"""


def child(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", CHILD, str(folder), *arguments])


def test_two_processes_fill_one_store_at_once(tmp_path: Path) -> None:
    """Each waits, everything written and nothing published, until the other is as far."""
    with child(tmp_path, "one", "two") as one, child(tmp_path, "two", "one") as two:
        assert one.wait(timeout=60) == 0
        assert two.wait(timeout=60) == 0
    check(tmp_path / "cache", never)
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [
        ".json",
        ".uint8",
        ".uint8",
    ]


def test_a_killed_fill_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    with child(tmp_path, "one", "nobody") as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "one.filling").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    check(tmp_path / "cache", fill)


def test_an_interrupted_fill_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(train: PartWriter, validation: PartWriter) -> None:
        fill(train, validation)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, "key", BYTES, interrupted)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(WorkbenchError, match=r"No space left on device.*Free some space"):
            cached(tmp_path, "key", BYTES, fill)
    assert list(tmp_path.iterdir()) == []
    check(tmp_path, fill)


def test_a_cache_folder_that_is_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WorkbenchError, match="choose another cache folder"):
        cached(tmp_path / "file", "key", BYTES, fill)


# Windows


@given(
    num_tokens=st.integers(2, 400),
    length=st.integers(1, 50),
    limit=st.integers(1, 500),
)
@settings(deadline=None, derandomize=True)
def test_validation_windows_judge_no_target_twice(num_tokens: int, length: int, limit: int) -> None:
    tokens_N = np.arange(num_tokens, dtype=np.uint16)
    starts_W = validation_starts(num_tokens, length, limit)
    inputs_WT, targets_WT = gather(tokens_N, starts_W, length)
    judged = targets_WT[targets_WT != IGNORE].tolist()
    assert len(judged) == len(set(judged)) > 0
    assert torch.equal(inputs_WT[targets_WT != IGNORE] + 1, torch.tensor(judged))
    if limit >= num_tokens:
        assert judged == list(range(1, num_tokens))
    else:
        assert len(judged) < limit + length
    if len(starts_W) > 1:
        distances = np.diff(starts_W)
        assert distances.max() - distances.min() <= length, "evenly spread"
        assert num_tokens - starts_W[-1] <= distances.max() + length + 1, "up to the end"


def test_gather_is_slicing() -> None:
    tokens_N = np.random.default_rng(0).integers(0, 2**16, 1000).astype(np.uint16)
    starts_B = random_starts(1000, 64, 30, seed=3, step=9)
    inputs_BT, targets_BT = gather(tokens_N, starts_B, 30)
    for row, start in enumerate(starts_B):
        assert inputs_BT[row].tolist() == tokens_N[start : start + 30].tolist()
        assert targets_BT[row].tolist() == tokens_N[start + 1 : start + 31].tolist()


def test_window_starts_are_uniform_up_to_the_last() -> None:
    """6 places to begin; 3000 draws each: five standard deviations of a binomial count."""
    starts = np.concatenate([random_starts(15, 18, 9, seed=0, step=step) for step in range(1000)])
    counts = np.bincount(starts, minlength=6)
    assert len(counts) == 6
    assert (abs(counts - 3000) < 5 * np.sqrt(18000 * 1 / 6 * 5 / 6)).all()


def test_window_starts_are_the_same_everywhere() -> None:
    """Golden: another figure here means that recorded studies cannot be repeated."""
    assert random_starts(10**6, 4, 256, seed=1, step=2).tolist() == [672558, 508280, 634302, 888216]


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**70])
def test_any_integer_is_a_seed(seed: int) -> None:
    assert len(random_starts(100, 3, 10, seed=seed, step=0)) == 3


def test_a_part_that_holds_exactly_one_window() -> None:
    assert random_starts(11, 3, 10, seed=0, step=0).tolist() == [0, 0, 0]
    with pytest.raises(FieldError, match=r"seq_len: 11 inputs .* 11 tokens: use at most 10"):
        random_starts(11, 3, 11, seed=0, step=0)
    with pytest.raises(FieldError, match=r"seq_len: .* add data"):
        random_starts(1, 3, 11, seed=0, step=0)
