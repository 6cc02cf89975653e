"""The tokenizer that goes with an exported model: bytes, or a copy of a Hugging Face one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from workbench.errors import WorkbenchError

SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
BYTES = 256


def save_tokenizer(wanted: Any, vocab_size: int, folder: Path) -> dict[str, int | None]:
    """Write a tokenizer that `AutoTokenizer.from_pretrained(folder)` loads, if one is wanted.

    Args:
        wanted: `{"kind": "bytes"}`, `{"kind": "hf", "name_or_path": …}` or None.
        vocab_size: of the model.

    Returns:
        The ids of the special tokens, None where there is none.

    Raises:
        WorkbenchError: it cannot be had, or has tokens that the model does not know.
    """
    kind = None if wanted is None else wanted.get("kind")
    if kind not in (None, "bytes", "hf"):
        raise WorkbenchError(f"unknown kind of tokenizer {kind!r}: 'bytes', 'hf' or none at all")
    if kind is None:
        return dict.fromkeys(SPECIAL)
    tokenizer = _bytes_tokenizer() if kind == "bytes" else _copied(wanted["name_or_path"])
    if len(tokenizer) > vocab_size:
        raise WorkbenchError(
            f"the tokenizer has {len(tokenizer)} tokens and the model knows {vocab_size}: it was "
            "trained with another one."
        )
    tokenizer.save_pretrained(folder)
    return {name: getattr(tokenizer, name) for name in SPECIAL}


def _copied(name_or_path: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise WorkbenchError(
            f"the tokenizer {name_or_path!r} cannot be loaded: {str(error).splitlines()[0]}"
        ) from error


def _bytes_tokenizer() -> Any:
    """Each byte of the UTF-8 text is the token of that number; there is no other token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, padding_side="left"
    )


def _byte_symbols() -> list[str]:
    """The character by which a byte-level tokenizer writes each byte (GPT-2's rule).

    Visible Latin-1 characters stand for themselves, the others for those from U+0100 on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(BYTES) if byte not in visible]
    return [
        chr(byte) if byte in visible else chr(BYTES + hidden.index(byte)) for byte in range(BYTES)
    ]
