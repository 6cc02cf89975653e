"""Text files as data: parts, exact bytes, windows, bad input."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from workbench.config import from_dict
from workbench.data import Batch
from workbench.errors import FieldError, WorkbenchError
from workbench.model import IGNORE
from workbench.testing import DataSourceContract
from workbench_data import documents, text
from workbench_data.text import TextFiles
from workbench_data.token_source import TokenSource

END = "<|end|>"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`many/*.txt` (60 files of made-up words, some not ASCII), `one.txt`, and two tokenizers."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "many").mkdir()
    rng = random.Random(0)
    for number in range(60):
        (folder / "many" / f"{number:02}.txt").write_text(words(rng, 300), encoding="utf-8")
    (folder / "one.txt").write_text(words(rng, 3000), encoding="utf-8")
    files = sorted(map(str, (folder / "many").glob("*.txt")))
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    train(byte_level, files, pre_tokenizers.ByteLevel.alphabet())
    byte_level.save(str(folder / "tokenizer.json"))
    lower = Tokenizer(models.BPE(unk_token=END))
    lower.normalizer = normalizers.Lowercase()
    lower.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    train(lower, files, [])
    lower.save(str(folder / "lower.json"))
    return folder


def words(rng: random.Random, count: int) -> str:
    letters = "abcdefghijklmnopqrstuvwxyzÄßé界🙂"
    lines = []
    for _ in range(count // 10):
        line = ("".join(rng.choices(letters, k=rng.randint(1, 9))) for _ in range(10))
        lines.append(" ".join(line))
    return "\n".join(lines)


def train(tokenizer: Tokenizer, files: list[str], alphabet: list[str]) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train(files, trainer)


@pytest.fixture(autouse=True)
def _in_corpus(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(corpus)


def text_source(folder: Path, *, seed: int = 0, **values: Any) -> TextFiles:
    return TextFiles(from_dict(text.Config, values), seed=seed, cache_dir=folder)


def part_bytes(source: TokenSource, part: str) -> bytes:
    return bytes(getattr(source.store, part).tokens_N)


class TestTextContract(DataSourceContract):
    source = TextFiles
    configs: ClassVar[list[Any]] = [
        text.Config(paths=("many/*.txt",)),
        text.Config(paths=("one.txt",), validation_share=0.2),
        text.Config(paths=("many/*.txt",), tokenizer="tokenizer.json", end_of_document=END),
        text.Config(paths=("many/[0-4]*.txt",), validation_paths=("many/5*.txt",)),
    ]


# Parts and bytes


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_one_file_gives_its_end(tmp_path: Path, corpus: Path, share: float) -> None:
    source = text_source(tmp_path, paths=["one.txt"], validation_share=share)
    content = (corpus / "one.txt").read_bytes()
    train, validation = part_bytes(source, "train"), part_bytes(source, "validation")
    assert train + validation == content
    assert len(validation) == pytest.approx(share * len(content), abs=4)
    assert (train.decode() + validation.decode()).encode() == content, "cut between characters"
    assert source.describe()["split"] == "the end of every file"


def test_many_files_are_held_out_whole(tmp_path: Path, corpus: Path) -> None:
    source = text_source(tmp_path, paths=["many/*.txt", "many/07.txt"])
    parts = [part_bytes(source, part).split(b"\0") for part in ("train", "validation")]
    files = [path.read_bytes() for path in sorted((corpus / "many").iterdir())]
    assert sorted(parts[0] + parts[1]) == sorted(files)
    assert parts[0] == [file for file in files if file in parts[0]], "in sorted order"
    digests = [hashlib.sha256(file).digest() for file in parts[1]]
    assert all(int.from_bytes(digest[:8]) / 2**64 < 0.05 for digest in digests)
    assert "hash" in source.describe()["split"]


def test_validation_paths_are_never_trained_on(tmp_path: Path, corpus: Path) -> None:
    source = text_source(tmp_path, paths=["many/*.txt"], validation_paths=["many/0*.txt"])
    first = [path.read_bytes() for path in sorted((corpus / "many").glob("0*.txt"))]
    rest = [path.read_bytes() for path in sorted((corpus / "many").glob("[1-5]*.txt"))]
    assert part_bytes(source, "validation") == b"\0".join(first)
    assert part_bytes(source, "train") == b"\0".join(rest)


@given(content=st.text(min_size=1, max_size=200), size=st.integers(1, 20))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_blocks_are_the_bytes_and_never_cut_a_character(
    content: str, size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = content.encode("utf-8", errors="replace")
    path = tmp_path_factory.getbasetemp() / "blocks"
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "BLOCK_BYTES", size)
        blocks = list(documents.read_document(path).blocks())
    assert b"".join(blocks) == data
    assert all(block.decode() for block in blocks)


@pytest.mark.parametrize("tokenizer", ["tokenizer.json", "lower.json"])
def test_bytes_of_tokens_are_those_of_the_files(tmp_path: Path, tokenizer: str) -> None:
    """The same files count the same bytes whatever the vocabulary: bits per byte compare."""
    values: dict[str, Any] = {"paths": ["many/*.txt"], "validation_tokens": 10**6}
    plain = text_source(tmp_path, **values)
    tokens = text_source(tmp_path, tokenizer=tokenizer, end_of_document=END, **values)
    for part in ("train", "validation"):
        facts, expected = tokens.describe()[part], plain.describe()[part]
        assert facts["bytes"] == expected["bytes"]
        assert facts["documents"] == expected["documents"]
        assert facts["tokens"] < expected["tokens"]
        exact = tokenizer == "tokenizer.json"
        assert facts["byte_counts"].startswith("exact" if exact else "by the part's")
    facts = tokens.describe()["validation"]
    first = tokens.store.validation.tokens_N[0]  # a target of no window
    lost = tokens.tokenizer.byte_lengths[first] if exact else facts["bytes"] / facts["tokens"]
    for length in (7, 64):
        judged = sum(batch.num_bytes or 0 for batch in tokens.validation_batches(4, length))
        assert judged == pytest.approx(facts["bytes"] - lost, abs=1e-6)


def test_bytes_of_a_batch_are_exact_at_every_length(tmp_path: Path) -> None:
    """Against the `tokenizers` library's own decoder, byte by byte."""
    source = text_source(
        tmp_path, paths=["many/*.txt"], tokenizer="tokenizer.json", end_of_document=END
    )
    reference = Tokenizer.from_file("tokenizer.json")
    spelled = dict.fromkeys(pre_tokenizers.ByteLevel.alphabet(), 1)
    for step in range(20):
        batch = source.train_batch(step, 3, 50)
        expected = 0
        for token in batch.targets_BT.flatten().tolist():
            piece = reference.id_to_token(token)
            expected += 1 if piece == END else sum(spelled[character] for character in piece)
        assert batch.num_bytes == expected


def test_a_document_that_spells_the_separator_stays_one(tmp_path: Path) -> None:
    path = tmp_path / "tricky.txt"
    path.write_text(f"before {END} after " * 50)
    source = text_source(
        tmp_path, paths=[str(path)], tokenizer="tokenizer.json", end_of_document=END
    )
    assert source.tokenizer.separator not in source.store.train.tokens_N
    assert source.describe()["train"]["byte_counts"].startswith("exact")
    assert source.decode(source.encode(path.read_text())) == path.read_text()


@pytest.mark.parametrize("tokenizer", [None, "tokenizer.json"])
@pytest.mark.parametrize("sample", ["", "plain", "Äß 界 🙂\n\ttab", f"x{END}y\0z"])
def test_text_goes_both_ways(tmp_path: Path, tokenizer: str | None, sample: str) -> None:
    end = END if tokenizer else None
    source = text_source(tmp_path, paths=["one.txt"], tokenizer=tokenizer, end_of_document=end)
    assert source.decode(source.encode(sample)) == sample
    if tokenizer is None:
        assert source.encode(sample) == list(sample.encode())


def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    source = text_source(tmp_path, paths=["one.txt"])
    for token in (-1, 256):
        with pytest.raises(FieldError, match="outside the vocabulary of 256"):
            source.decode([65, token])


# Steps


def test_any_step_can_be_had_without_the_earlier_ones(tmp_path: Path) -> None:
    whole = text_source(tmp_path, paths=["many/*.txt"], seed=3)
    batches = [whole.train_batch(step, 4, 32) for step in range(12)]
    resumed = text_source(tmp_path, paths=["many/*.txt"], seed=3)
    for step in (11, 7, 8):
        assert torch.equal(resumed.train_batch(step, 4, 32).inputs_BT, batches[step].inputs_BT)
    starts = {tuple(row) for batch in batches for row in batch.inputs_BT.tolist()}
    assert len(starts) == 48, "no window twice among so many places"


def test_the_whole_validation_part_is_judged_once(tmp_path: Path) -> None:
    source = text_source(tmp_path, paths=["one.txt"], validation_tokens=10**6)
    whole = list(part_bytes(source, "validation"))
    for batch_size, length in ((1, 1), (3, 10), (8, len(whole)), (2, 10**4)):
        judged = targets(source.validation_batches(batch_size, length))
        assert judged == whole[1:]


def targets(batches: Iterator[Batch]) -> list[int]:
    found = (batch.targets_BT[batch.targets_BT != IGNORE].tolist() for batch in batches)
    return [token for row in found for token in row]


# Bad input


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "paths: is required"),
        ({"paths": []}, "paths: name at least one"),
        ({"paths": ["no*.txt"]}, r"paths: no file matches 'no\*\.txt'"),
        ({"paths": ["many"]}, r"paths: 'many' is a folder: write 'many/\*\*/\*\.txt'"),
        ({"paths": ["one.txt"], "validation_paths": ["x"]}, "validation_paths: no file matches"),
        ({"paths": ["one.txt"], "validation_paths": ["one.txt"]}, "hold out every file"),
        ({"paths": ["one.txt"], "validation_share": 0.0}, "validation_share: must lie between"),
        ({"paths": ["one.txt"], "validation_tokens": 0}, "validation_tokens: must be at least 1"),
        ({"paths": ["one.txt"], "path": 1}, "unknown field 'path'.*Did you mean 'paths'"),
        ({"paths": ["one.txt"], "end_of_document": END}, "end_of_document: needs a tokenizer"),
        ({"paths": ["one.txt"], "tokenizer": "one.txt"}, "'one.txt' cannot be loaded"),
        ({"paths": ["one.txt"], "tokenizer": "many"}, "'many' cannot be loaded"),
        (
            {"paths": ["one.txt"], "tokenizer": "tokenizer.json"},
            rf"end_of_document: .*does not say.*{END.replace('|', '.')}",
        ),
        (
            {"paths": ["one.txt"], "tokenizer": "tokenizer.json", "end_of_document": "</s>"},
            "end_of_document: '</s>' is no token",
        ),
    ],
)
def test_bad_values_say_what_to_do(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(WorkbenchError, match=message):
        text_source(tmp_path, **values)


def test_empty_and_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "dangling.md").symlink_to(tmp_path / "gone")
    with pytest.raises(WorkbenchError, match=r"empty\.txt is empty: remove it"):
        text_source(tmp_path, paths=[str(tmp_path / "*.txt")])
    with pytest.raises(WorkbenchError, match=r"cannot read .*dangling\.md: No such file"):
        text_source(tmp_path, paths=[str(tmp_path / "*.md")])


def test_names_with_brackets_are_meant_as_they_stand(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("some text " * 20)
    source = text_source(tmp_path, paths=[str(tmp_path / "a[1].txt")])
    assert source.describe()["train"]["documents"] == 1


def test_any_bytes_will_do_without_a_tokenizer_only(tmp_path: Path) -> None:
    path = tmp_path / "latin1.txt"
    path.write_bytes("é".encode("latin-1") * 1000)
    source = text_source(tmp_path, paths=[str(path)])
    assert part_bytes(source, "train") + part_bytes(source, "validation") == path.read_bytes()
    with pytest.raises(WorkbenchError, match=r"latin1\.txt.*train on bytes"):
        text_source(tmp_path, paths=[str(path)], tokenizer="tokenizer.json", end_of_document=END)


def test_too_little_text_names_seq_len(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("x" * 100)
    source = text_source(tmp_path, paths=[str(path)], validation_share=0.1)
    with pytest.raises(FieldError, match=r"seq_len: 256 inputs .* 90 tokens: use at most 89"):
        source.train_batch(0, 1, 256)
    assert source.train_batch(0, 1, 89).num_bytes == 89
    path.write_text("x")
    with pytest.raises(WorkbenchError, match="validation part is empty"):
        text_source(tmp_path, paths=[str(path)])


def test_changed_files_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    for content in ("first " * 50, "other " * 50):
        path.write_text(content)
        source = text_source(tmp_path, paths=[str(path)])
        assert part_bytes(source, "train") == content.encode()[: len(part_bytes(source, "train"))]
