"""The standard library's sources as data; what the plugin offers."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import sysconfig
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from workbench.builder import Builder
from workbench.config import fields_of
from workbench.errors import FieldError, WorkbenchError
from workbench.testing import DataSourceContract
from workbench_data.stdlib import Config, StandardLibrary, split_library


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def part_bytes(source: StandardLibrary, part: str) -> bytes:
    return bytes(getattr(source.store, part).tokens_N)


class TestStandardLibraryContract(DataSourceContract):
    source = StandardLibrary
    configs: ClassVar[list[Any]] = [
        Config(include_tests=False, validation_bytes=20_000),
        Config(validation_bytes=10_000),
    ]
    max_shared = 0.02  # sources repeat licences and idioms


def test_the_plugin_offers_all_four_with_labels(builder: Builder) -> None:
    for name in ("hub", "mqar", "stdlib", "text"):
        source = builder.data_sources[name]
        assert source.__module__ == f"workbench_data.{name}"
        assert all(field.label for field in fields_of(source.Config).values())


def test_the_library_is_held_out_by_whole_files(tmp_path: Path) -> None:
    """The parts, byte for byte, are the files of the two lists, zero bytes between."""
    root = Path(sysconfig.get_paths()["stdlib"])
    config = Config()
    source = StandardLibrary(config, cache_dir=tmp_path)
    lists = dict(zip(("train", "validation"), split_library(root, config), strict=True))
    for part, found in lists.items():
        expected = b"\0".join(document.path.read_bytes() for document in found)
        assert part_bytes(source, part) == expected
        facts = source.describe()[part]
        assert facts["documents"] == len(found)
        assert facts["bytes"] == facts["tokens"] == len(expected)
        assert facts["sha256"] == hashlib.sha256(expected).hexdigest()
    assert not {d.digest for d in lists["train"]} & {d.digest for d in lists["validation"]}
    names = [d.path.relative_to(root).parts for found in lists.values() for d in found]
    assert len(names) > 500
    assert not any({"site-packages", "__pycache__"} & set(parts) for parts in names)
    share = len(part_bytes(source, "validation")) / len(part_bytes(source, "train"))
    assert 0.005 < share < 0.1


def test_neither_seed_nor_test_suites_move_the_validation_part(tmp_path: Path) -> None:
    sources = [
        StandardLibrary(Config(include_tests=tests), seed=seed, cache_dir=tmp_path)
        for tests, seed in ((True, 0), (True, 1), (False, 0))
    ]
    assert len({source.store.validation.facts.sha256 for source in sources}) == 1
    assert sources[0].store.train.facts == sources[1].store.train.facts
    assert sources[0].store.train.facts.num_bytes >= sources[2].store.train.facts.num_bytes


def test_what_belongs_to_the_library(tmp_path: Path) -> None:
    files = {
        "b.py": b"b = 1",
        "a/c.py": b"c = 1",
        "copy_of_b.py": b"b = 1",
        "empty.py": b"",
        "note.txt": b"no source",
        "site-packages/x.py": b"x = 1",
        "dist-packages/y.py": b"y = 1",
        "a/__pycache__/z.py": b"z = 1",
        "config-3.11-linux/w.py": b"w = 1",
        "_sysconfigdata__linux.py": b"v = 1",
        "a/tests/test_c.py": b"t = 1",
        "test/copy_of_c.py": b"c = 1",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)

    def names(config: Config) -> list[str]:
        found = [document for part in split_library(tmp_path, config) for document in part]
        return sorted(document.path.relative_to(tmp_path).as_posix() for document in found)

    assert names(Config(include_tests=False)) == ["a/c.py", "b.py"]
    assert names(Config()) == ["a/c.py", "a/tests/test_c.py", "b.py"]
    held_out = split_library(tmp_path, Config(validation_share=0.999))[1]
    assert [document.path.name for document in held_out] == ["c.py", "b.py"], "never a test"


def test_a_python_without_sources_is_told_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "lib.zip")})
    with pytest.raises(WorkbenchError, match="use the data source 'text'"):
        StandardLibrary(Config(), cache_dir=tmp_path)


def test_the_limit_spreads_over_the_whole_validation_part(tmp_path: Path) -> None:
    config = Config(include_tests=False, validation_bytes=10_000)
    source = StandardLibrary(config, cache_dir=tmp_path)
    judged = list(source.validation_batches(8, 100))
    assert sum(batch.num_bytes or 0 for batch in judged) == 10_000
    whole = part_bytes(source, "validation")
    places = [whole.find(bytes(row.tolist())) for row in torch.cat([b.inputs_BT for b in judged])]
    assert min(places) < len(whole) / 50
    assert max(places) > len(whole) * 49 / 50


def test_shares_and_limits_of_the_library_are_checked() -> None:
    for share in (0.0, 1.0, math.nan):
        with pytest.raises(FieldError, match="validation_share"):
            Config(validation_share=share)
    with pytest.raises(FieldError, match="validation_bytes"):
        dataclasses.replace(Config(), validation_bytes=0)
