"""Data sets of the Hugging Face hub, streamed and tokenized once into memory-mapped files."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from numpy.typing import NDArray

from workbench.errors import FieldError, UnknownNameError, WorkbenchError
from workbench_data.documents import check_share, is_held_out
from workbench_data.store import PartWriter, TokenStore, cached
from workbench_data.token_source import TokenSource
from workbench_data.tokenization import Tokenizer, encode_all, make_tokenizer

if TYPE_CHECKING:
    from datasets import IterableDataset

logger = logging.getLogger(__name__)
LOG_TOKENS = 1_000_000  # say how far it is after so many


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    dataset: Annotated[str, "id on the hub, or a local folder of jsonl, parquet, csv or text files"]
    name: Annotated[str | None, "which of the data set's configurations"] = None
    revision: Annotated[str | None, "branch, tag or commit; name a commit to pin the data"] = None
    split: Annotated[str, "trained on"] = "train"
    validation_split: Annotated[
        str | None, "judged on; without: rows of split, by the hash of their text"
    ] = None
    validation_share: Annotated[
        float, "of the rows held out; with a validation_split, its size against max_tokens"
    ] = 0.01
    validation_tokens: Annotated[
        int, "about how many held-out tokens are judged, evenly spread (above what there is: all)"
    ] = 65_536
    text_column: Annotated[str, "column that holds the text"] = "text"
    tokenizer: Annotated[
        str | None, "a tokenizer.json, a folder with one, or a hub id; without: bytes"
    ] = None
    end_of_document: Annotated[
        str | None, "token between documents; without: the tokenizer's end of sequence"
    ] = None
    max_tokens: Annotated[int, "stop after the row that reaches so many training tokens"] = (
        50_000_000
    )

    def __post_init__(self) -> None:
        check_share("validation_share", self.validation_share)
        for name in ("validation_tokens", "max_tokens"):
            if getattr(self, name) < 1:
                raise FieldError(name, f"must be at least 1, got {getattr(self, name)}")
        if self.validation_split == self.split:
            raise FieldError(
                "validation_split",
                f"{self.split!r} is trained on: name another, or leave it out to hold out rows",
            )


class HubDataset(TokenSource):
    """Rows of a data set as documents, in the data set's order, up to `max_tokens`.

    Read once; the tokens stay in `cache_dir` under the data set's name, revision and the
    tokenizer, and later runs need neither the hub nor the `datasets` package. A run that is cut
    short while it fills the cache leaves nothing, and the next begins anew.

    Raises:
        WorkbenchError: `datasets` is not installed, the hub or the data set cannot be had, or it
            holds no text.
        UnknownNameError: no such column.
    """

    Config = Config

    def _open(self) -> tuple[Tokenizer, TokenStore, int]:
        config: Config = self.config
        tokenizer = make_tokenizer(config.tokenizer, config.end_of_document)
        fill = _fill_by_hash if config.validation_split is None else _fill_by_split

        def fill_parts(train: PartWriter, validation: PartWriter) -> None:
            logger.info("reading %s up to %d tokens", config.dataset, config.max_tokens)
            fill(config, tokenizer, train, validation)
            for part, writer in (("training", train), ("validation", validation)):
                if not writer.tokens:
                    raise WorkbenchError(
                        f"data set {config.dataset!r} gives no {part} text: check split, "
                        "text_column and validation_share"
                    )

        store = cached(self.cache_dir / "tokens", _key(config), tokenizer, fill_parts)
        return tokenizer, store, config.validation_tokens

    def _facts(self) -> dict[str, Any]:
        config: Config = self.config
        by_hash = f"rows of {config.split} by the hash of their text"
        return {
            "dataset": config.dataset,
            "name": config.name,
            "revision": config.revision,
            "split": config.validation_split or by_hash,
        }


def _fill_by_hash(
    config: Config, tokenizer: Tokenizer, train: PartWriter, validation: PartWriter
) -> None:
    rows = ((text, text) for text in _rows(config, config.split))
    for text, ids, num_bytes in encode_all(tokenizer, rows):
        digest = hashlib.sha256(text).hexdigest()
        writer = validation if is_held_out(digest, config.validation_share) else train
        _add(writer, ids, num_bytes)
        if train.tokens >= config.max_tokens:
            return


def _fill_by_split(
    config: Config, tokenizer: Tokenizer, train: PartWriter, validation: PartWriter
) -> None:
    assert config.validation_split is not None
    validation_limit = round(config.max_tokens * config.validation_share)
    for split, writer, limit in (
        (config.split, train, config.max_tokens),
        (config.validation_split, validation, validation_limit),
    ):
        rows = ((None, text) for text in _rows(config, split))
        for _, ids, num_bytes in encode_all(tokenizer, rows):
            _add(writer, ids, num_bytes)
            if writer.tokens >= limit:
                break


def _add(writer: PartWriter, ids: NDArray[Any], num_bytes: int) -> None:
    before = writer.tokens
    writer.open_document()
    writer.add(ids, num_bytes)
    if before // LOG_TOKENS < writer.tokens // LOG_TOKENS:
        logger.info("%d tokens so far", writer.tokens)


def _rows(config: Config, split: str) -> Iterator[bytes]:
    """The texts of a split, empty ones left out."""
    rows = iter(_stream(config, split))
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # `datasets` passes on the errors of many libraries
            raise _unreadable(config, error) from error
        if row is None:
            return
        if config.text_column not in row:
            raise UnknownNameError("column", config.text_column, row, "Set text_column.")
        text = row[config.text_column]
        if not isinstance(text, str):
            raise FieldError(
                "text_column",
                f"{config.text_column!r} holds {type(text).__name__}, not text: name another of "
                f"{', '.join(sorted(row))}",
            )
        if text:
            yield text.encode()


def _stream(config: Config, split: str) -> IterableDataset:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise WorkbenchError(
            "the data source 'hub' needs the package 'datasets': pip install 'lm-workbench[hub]'"
        ) from error
    # Absolute, as `datasets` takes a folder called "parquet" or "text" for one of its readers.
    folder = Path(config.dataset)
    path = str(folder.resolve()) if folder.is_dir() else config.dataset
    try:
        return load_dataset(
            path, config.name, split=split, revision=config.revision, streaming=True
        )
    except Exception as error:  # `datasets` passes on the errors of many libraries
        raise _unreadable(config, error) from error


def _unreadable(config: Config, error: Exception) -> WorkbenchError:
    if isinstance(error, ConnectionError):
        return WorkbenchError(
            f"the Hugging Face hub cannot be reached for data set {config.dataset!r} ({error}). "
            "Connect once to fill the cache, name a local folder, or use the data source 'text' "
            "or 'stdlib'."
        )
    return WorkbenchError(
        f"data set {config.dataset!r} cannot be read ({type(error).__name__}: {error}). "
        "Check dataset, name, revision and the splits."
    )


def _key(config: Config) -> Any:
    """What decides the content; of a local folder also which files it holds."""
    names = ("dataset", "name", "revision", "split", "validation_split", "validation_share")
    key = {name: getattr(config, name) for name in (*names, "text_column", "max_tokens")}
    folder = Path(config.dataset)
    if folder.is_dir():
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        key["files"] = [
            (path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns)
            for path in files
        ]
    return key
