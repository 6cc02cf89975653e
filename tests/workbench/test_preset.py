"""What presets are written with: mixers and MLPs by turns, a rare block among common ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.errors import FieldError
from workbench.layout import Block
from workbench.preset import interleave, interspersed

COMMON, RARE, MLP = (Block(layer=name) for name in ("common", "rare", "mlp"))
blocks = st.lists(st.sampled_from([COMMON, RARE]), max_size=9)


@given(blocks)
def test_interleaving_one_mlp_or_one_for_each(mixers: list[Block]) -> None:
    made = interleave(mixers, MLP)
    assert list(made[::2]) == mixers
    assert set(made[1::2]) <= {MLP}
    assert len(made) == 2 * len(mixers)
    assert interleave(iter(mixers), iter([MLP] * len(mixers))) == made


@given(blocks, blocks)
def test_each_mixer_has_the_mlp_of_its_place(mixers: list[Block], mlps: list[Block]) -> None:
    if len(mixers) == len(mlps):
        made = interleave(mixers, mlps)
        assert (list(made[::2]), list(made[1::2])) == (mixers, mlps)
    else:
        with pytest.raises(FieldError, match=f"{len(mlps)} for {len(mixers)} mixers"):
            interleave(mixers, mlps)


@given(st.sets(st.integers(0, 8)))
def test_the_rare_block_stands_where_it_is_put(indices: set[int]) -> None:
    made = interspersed(9, COMMON, RARE, indices)
    assert len(made) == 9
    assert {index for index, block in enumerate(made) if block == RARE} == indices
    assert interspersed(9, COMMON, RARE, iter(indices)) == made


@pytest.mark.parametrize("index", [-1, 9])
def test_an_index_that_no_layer_has_is_refused(index: int) -> None:
    with pytest.raises(FieldError, match=f"at: {index} is no layer's index: the last is 8"):
        interspersed(9, COMMON, RARE, (0, index))
