"""The static stage in a hurry: what is kept of blocks changes no figure, hash or message."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest

from benchmarks.static_stage import Random
from workbench.builder import Builder, default_builder
from workbench.errors import FieldError
from workbench.layout import Block, Layout, Named, canonical_json
from workbench.space import Space
from workbench.study_config import StudyConfig

STUDY = Path(__file__).parents[2] / "studies" / "quickstart.toml"


@pytest.fixture(scope="module")
def layouts() -> list[Layout]:
    """Suggestions from the quickstart's space."""
    space = Space(StudyConfig.read(STUDY).space, default_builder(), 256)
    trial, found = Random(3), []
    while len(found) < 40:
        try:
            found.append(space.suggest(trial))
        except FieldError:
            continue
    return found


def test_a_hash_is_that_of_the_canonical_json(layouts):
    for layout in layouts:
        text = canonical_json(layout.to_dict())
        assert layout.hash == hashlib.sha256(text.encode()).hexdigest()[:12]
        assert Layout.from_json(json.dumps(layout.to_dict())).hash == layout.hash
        assert layout.replace(norm_eps=1e-3).hash != layout.hash


def test_what_is_kept_of_blocks_changes_no_figure(layouts):
    kept = default_builder()
    shuffled = layouts * 2
    random.Random(0).shuffle(shuffled)
    fresh = {}
    for layout in layouts:
        builder = Builder(kept.plugins)
        fresh[layout.hash] = [
            builder.costs(layout, length=length, bytes_per_element=size)
            for length, size in ((1, 4), (4096, 2))
        ]
    for layout in shuffled:
        assert kept.resolve(layout) == layout
        assert fresh[layout.hash] == [
            kept.costs(layout, length=length, bytes_per_element=size)
            for length, size in ((1, 4), (4096, 2))
        ]


def test_equal_numbers_of_other_types_are_other_blocks():
    """1 and 1.0 and True are equal as keys; a Config takes one of them."""
    builder = default_builder()
    good = Layout(d_model=64, vocab_size=16, blocks=(Block(layer="swiglu", config={"expand": 1}),))
    builder.resolve(good)
    bad = good.replace(blocks=(Block(layer="swiglu", config={"expand": True}),))
    with pytest.raises(FieldError, match=r"blocks\[0\] \(swiglu\).expand"):
        builder.resolve(bad)


def test_a_message_names_the_block_where_it_is():
    builder = default_builder()
    fine = Block(layer="swiglu")
    odd = Block(layer="attention", config={"head_dim": 48})
    for before in range(3):
        layout = Layout(d_model=64, vocab_size=16, blocks=(*[fine] * before, odd))
        with pytest.raises(FieldError, match=rf"blocks\[{before}\] \(attention\)"):
            builder.resolve(layout)
    stored = Block(layer="swiglu", quantizer=Named(name="int8", config={"group_sise": 3}))
    with pytest.raises(Exception, match="group_sise"):
        builder.resolve(Layout(d_model=64, vocab_size=16, blocks=(fine, stored)))


def test_a_space_refuses_an_unknown_norm_at_once():
    config = StudyConfig.read(STUDY)
    data = {**config.to_dict(), "space": {**config.to_dict()["space"], "norm": "batchnorm"}}
    with pytest.raises(FieldError, match="norm"):
        Space(StudyConfig.from_dict(data).space, default_builder(), 256)
