"""Which earlier block a layer builds on: `source`, for any blocks that may stand below it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from workbench.config import to_dict
from workbench.errors import FieldError
from workbench.layout import Block
from workbench.testing.advice import concerns, speaks_for
from workbench.testing.layers.base import LayerSuite


class SourceTests(LayerSuite):
    """The test of `source`."""

    @speaks_for("source")
    @concerns("source")
    def test_source_names_an_earlier_block(self, config: Any) -> None:
        """`source` names an earlier block or none, the same each time, or refuses by FieldError.

        Mend: Return the index of a block before the last one, or None; raise a FieldError where
        the layer needs a block that is not there. Take any name and config in the other blocks,
        write to none, and keep nothing between calls. A layer that needs an earlier block is
        tested with one: override `earlier` in the suite of your tests.
        """
        stacks = list(self._stacks(config))
        answers = [self._source(blocks) for blocks in stacks]
        for blocks, answer in zip(reversed(stacks), reversed(answers), strict=True):
            again = self._source(blocks)
            assert again == answer, f"source of {_last(blocks)} is {answer}, and then {again}"

    def _stacks(self, config: Any) -> Iterator[tuple[Block, ...]]:
        """Blocks up to one of the layer's own, at every depth of a few models."""
        below = [Block(layer=name, config=to_dict(made)) for name, _, made in self.earlier(config)]
        own, *others = (Block(layer=self.name, config=to_dict(c)) for c in (config, *self.configs))
        stranger = Block(layer="another-layer")
        models = (
            [own, own, own],
            [*below, own, *below, own],
            [stranger, own, stranger, *below, own, own],
            [*others, own],
        )
        for model in models:
            for index, block in enumerate(model):
                if block.layer == self.name:
                    yield tuple(model[: index + 1])

    def _source(self, blocks: tuple[Block, ...]) -> Any:
        """The answer for blocks of its own; the message of a refusal."""
        given = copy.deepcopy(blocks)
        answer: Any
        try:
            answer = self.layer.source(self.d_model, given)
        except FieldError as error:
            answer = str(error)
        else:
            is_earlier = isinstance(answer, int) and 0 <= answer < len(blocks) - 1
            assert answer is None or is_earlier, (
                f"source of {_last(blocks)} is {answer!r}, which is no earlier block"
            )
        assert given == blocks, f"source of {_last(blocks)} changed the blocks"
        return answer


def _last(blocks: tuple[Block, ...]) -> str:
    return f"block {len(blocks) - 1} of ({', '.join(block.layer for block in blocks)})"
