"""Hugging Face data sets, from local folders that `datasets` itself reads, and their failures."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub.constants
import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from workbench.config import from_dict
from workbench.errors import FieldError, UnknownNameError, WorkbenchError
from workbench.testing import DataSourceContract
from workbench_data.hub import Config, HubDataset

END = "<|end|>"
TOKENIZED: dict[str, Any] = {"tokenizer": "tokenizer"}


@pytest.fixture(scope="session")
def data_sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`jsonl/` (a train and a test split), `parquet/` (the train split), a tokenizer's folder."""
    folder = tmp_path_factory.mktemp("data_sets")
    rng = random.Random(0)
    texts = [sentence(rng) for _ in range(400)]
    texts[7] = ""
    (folder / "jsonl").mkdir()
    for split, rows in (("train", texts[:350]), ("test", texts[350:])):
        lines = (json.dumps({"text": text, "number": i}) for i, text in enumerate(rows))
        (folder / "jsonl" / f"{split}.jsonl").write_text("\n".join(lines))
    (folder / "parquet").mkdir()
    table = pyarrow.table({"content": texts[:350], "number": list(range(350))})
    pyarrow.parquet.write_table(table, folder / "parquet" / "train.parquet")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.enable_truncation(16)  # as published ones do; it must not cut our texts
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    config = folder / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": {"content": END}}))
    return folder


def sentence(rng: random.Random) -> str:
    words = (
        "".join(rng.choices("abcdefghijklmnoprstuvwäß界", k=rng.randint(1, 8))) for _ in range(40)
    )
    return " ".join(words)


@pytest.fixture(autouse=True)
def _offline_in_folder(data_sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.chdir(data_sets)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def make(folder: Path, **values: Any) -> HubDataset:
    return HubDataset(from_dict(Config, values), cache_dir=folder)


def texts(file: str) -> list[bytes]:
    rows = map(json.loads, Path(file).read_text().splitlines())
    return [row["text"].encode() for row in rows if row["text"]]


def part(source: HubDataset, name: str) -> list[bytes]:
    """The documents of a part, decoded from its tokens by the `tokenizers` library alone."""
    reference = Tokenizer.from_file("tokenizer/tokenizer.json")
    ids = getattr(source.store, name).tokens_N.tolist()
    return reference.decode(ids, skip_special_tokens=False).encode().split(END.encode())


class TestContract(DataSourceContract):
    source = HubDataset
    configs: ClassVar[list[Any]] = [
        Config(dataset="jsonl", validation_share=0.1),
        Config(dataset="jsonl", validation_share=0.1, **TOKENIZED),
        Config(dataset="jsonl", validation_split="test", validation_share=0.2, **TOKENIZED),
    ]


@pytest.mark.parametrize(
    "values", [{"dataset": "jsonl"}, {"dataset": "parquet", "text_column": "content"}]
)
def test_rows_become_documents(tmp_path: Path, values: dict[str, Any]) -> None:
    """Every row is in one part, whole and in order, as the hash of its text says."""
    source = make(tmp_path, validation_share=0.1, **TOKENIZED, **values)
    expected: dict[str, list[bytes]] = {"train": [], "validation": []}
    for text in texts("jsonl/train.jsonl"):
        below = int.from_bytes(hashlib.sha256(text).digest()[:8]) / 2**64 < 0.1
        expected["validation" if below else "train"].append(text)
    for name, documents in expected.items():
        assert part(source, name) == documents
        facts = source.describe()[name]
        assert facts["bytes"] == sum(map(len, documents)) + len(documents) - 1
        assert facts["byte_counts"].startswith("exact")
    assert source.store.train.tokens_N.dtype == "uint16"
    assert source.vocab_size == 500


def test_a_validation_split_is_judged_whole(tmp_path: Path) -> None:
    source = make(
        tmp_path, dataset="jsonl", validation_split="test", validation_share=0.999, **TOKENIZED
    )
    assert part(source, "train") == texts("jsonl/train.jsonl")
    assert part(source, "validation") == texts("jsonl/test.jsonl")


@pytest.mark.parametrize("validation_split", [None, "test"])
def test_max_tokens_ends_with_a_whole_row(tmp_path: Path, validation_split: str | None) -> None:
    source = make(
        tmp_path,
        dataset="jsonl",
        max_tokens=5000,
        validation_split=validation_split,
        validation_share=0.1,
        **TOKENIZED,
    )
    documents = part(source, "train")
    tokens = source.describe()["train"]["tokens"]
    assert tokens - len(source.encode(documents[-1].decode())) - 1 < 5000 <= tokens
    assert set(documents) <= set(texts("jsonl/train.jsonl"))
    if validation_split is not None:
        assert 500 <= source.describe()["validation"]["tokens"] < 800


def test_a_full_cache_needs_no_datasets_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make(tmp_path, dataset="jsonl")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert make(tmp_path, dataset="jsonl").describe() == first.describe()
    with pytest.raises(WorkbenchError, match=r"pip install 'lm-workbench\[hub\]'"):
        make(tmp_path, dataset="jsonl", max_tokens=1000)


def test_a_stream_that_breaks_leaves_nothing_and_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaking(*_: Any, **__: Any) -> Iterator[dict[str, str]]:
        yield from ({"text": f"row {number}"} for number in range(100))
        raise ConnectionError("reset by peer")

    with monkeypatch.context() as patch:
        patch.setattr("datasets.load_dataset", breaking)
        with pytest.raises(WorkbenchError, match=r"cannot be reached .*reset by peer"):
            make(tmp_path, dataset="jsonl")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert make(tmp_path, dataset="jsonl").describe()["train"]["documents"] > 300


def test_a_changed_folder_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    for word in ("first", "other"):
        lines = (json.dumps({"text": f"{word} {number}"}) for number in range(200))
        (tmp_path / "rows" / "train.jsonl").write_text("\n".join(lines))
        source = make(tmp_path, dataset=str(tmp_path / "rows"), validation_share=0.1)
        assert word in source.decode(source.train_batch(0, 1, 50).inputs_BT[0].tolist())


def test_an_unreachable_hub_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(WorkbenchError, match=r"hub cannot be reached .*'someone/something'"):
        make(tmp_path, dataset="someone/something")
    with pytest.raises(WorkbenchError, match=r"tokenizer 'someone/something' cannot be loaded"):
        make(tmp_path, dataset="jsonl", tokenizer="someone/something")


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ({"dataset": "nowhere/at/all"}, WorkbenchError, "'nowhere/at/all' cannot be read"),
        ({"split": "trian"}, WorkbenchError, "Bad split: trian"),
        ({"validation_split": "tset"}, WorkbenchError, "Bad split: tset"),
        ({"name": "french"}, WorkbenchError, "french"),
        ({"text_column": "txt"}, UnknownNameError, "unknown column 'txt'.*Did you mean 'text'"),
        ({"text_column": "number"}, FieldError, "text_column: 'number' holds int, not text"),
        ({"validation_split": "train"}, FieldError, "validation_split: 'train' is trained on"),
        ({"validation_share": 1.5}, FieldError, "validation_share: must lie between"),
        ({"validation_share": 1e-9}, WorkbenchError, "gives no validation text"),
        ({"max_tokens": 0}, FieldError, "max_tokens: must be at least 1"),
        ({"validation_tokens": 0}, FieldError, "validation_tokens: must be at least 1"),
    ],
)
def test_bad_values_say_what_to_do(
    tmp_path: Path, values: dict[str, Any], kind: type[WorkbenchError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        make(tmp_path, **{"dataset": "jsonl", **values})
