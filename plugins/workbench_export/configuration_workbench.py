"""The configuration of a hybrid language model: its layout beside transformers' own fields."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from workbench.layout import Layout


class WorkbenchConfig(PreTrainedConfig):  # type: ignore[misc]
    """What a `WorkbenchForCausalLM` is made of.

    Attributes:
        layout: the whole model as plain data: a block a residual layer, with every default
            written out. `vocab_size` and `tie_word_embeddings` beside it win over its own, so that
            `resize_token_embeddings` holds.
        vocab_size, hidden_size, num_hidden_layers, tie_word_embeddings: as in any configuration;
            `num_hidden_layers` counts blocks, an MLP being a block like any other.
        bos_token_id, eos_token_id, pad_token_id: None where the vocabulary has no such token.
    """

    model_type = "workbench_hybrid"

    layout: dict[str, Any] | None = None
    vocab_size: int = 256
    hidden_size: int = 64
    num_hidden_layers: int = 0
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def to_layout(self) -> Layout:
        """The layout to build.

        Raises:
            ValueError: there is none.
            WorkbenchError: it is malformed.
        """
        if self.layout is None:
            raise ValueError("this configuration holds no layout: load it with from_pretrained")
        return Layout.from_dict(self.layout).replace(
            vocab_size=self.vocab_size, tie_embeddings=self.tie_word_embeddings
        )
