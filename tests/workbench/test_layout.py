"""Layouts: the same after JSON, one hash on every machine, and one clear error a mistake."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import FieldError, WorkbenchError
from workbench.layout import Block, Layout, Named

numbers = st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | numbers | st.text()
config = st.dictionaries(st.text(), scalars | st.lists(scalars), max_size=3)
named = st.builds(Named, name=st.text(), config=config)
blocks = st.builds(Block, layer=st.text(), config=config, quantizer=st.none() | named)
layouts = st.builds(
    Layout,
    d_model=st.integers(1, 2**20),
    vocab_size=st.integers(1, 2**20),
    blocks=st.lists(blocks, min_size=1, max_size=3).map(tuple),
    tie_embeddings=st.booleans(),
    norm=st.sampled_from(["rmsnorm", "layernorm"]),
    norm_eps=st.floats(1e-12, 1.0),
    prefix_lm=st.booleans(),
    embedding_multiplier=numbers | st.integers(-8, 8),
    residual_multiplier=numbers,
    logits_scaling=numbers.filter(bool),
)


def layout() -> Layout:
    """One of everything."""
    quantizer = Named(name="int4", config={"group_size": 64})
    return Layout(
        d_model=64,
        vocab_size=256,
        blocks=(
            Block(layer="mamba", config={"d_state": 16}),
            Block(layer="swiglu", config={"expand": 2.5, "bias": None}, quantizer=quantizer),
        ),
        norm="layernorm",
    )


@settings(derandomize=True, deadline=None)
@given(layouts)
def test_json_round_trip(original: Layout) -> None:
    back = Layout.from_json(original.to_json())
    assert back == original
    assert back.hash == original.hash
    assert hash(back) == hash(original)


def test_the_hash_is_the_same_on_every_machine() -> None:
    assert layout().hash == "7a6c81b929f1"


def test_the_hash_ignores_order_and_ways_of_writing() -> None:
    data = json.loads(layout().to_json())
    shuffled = dict(reversed(data.items()))
    shuffled["norm_eps"] = 1e-05
    shuffled["embedding_multiplier"] = 1
    assert Layout.from_dict(shuffled).hash == layout().hash
    assert layout().replace(embedding_multiplier=1).hash == layout().hash


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Layout)])
def test_every_field_counts_in_the_hash(field: str) -> None:
    other = {
        "d_model": 128,
        "vocab_size": 257,
        "blocks": layout().blocks[:1],
        "tie_embeddings": False,
        "norm": "rmsnorm",
        "prefix_lm": True,
    }.get(field, 0.5)
    assert layout().replace(**{field: other}).hash != layout().hash


def test_defaults_may_be_left_out_of_a_file() -> None:
    text = '{"d_model": 8, "vocab_size": 16, "blocks": [{"layer": "mamba"}]}'
    expected = Layout(d_model=8, vocab_size=16, blocks=(Block(layer="mamba"),))
    assert Layout.from_json(text) == expected


def test_pattern() -> None:
    assert layout().pattern({"mamba": "M"}) == "M?"


def test_a_layout_file_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "layout.json"
    path.write_text(layout().to_json(), encoding="utf-8")
    assert Layout.read(path) == layout()
    assert Layout.read(str(path)) == layout()


def changed(**changes: Any) -> str:
    """A layout file with some fields replaced, or left out where None."""
    data = {**layout().to_dict(), **changes}
    return json.dumps({name: value for name, value in data.items() if value is not None})


FILES = {
    "empty": ("", "not JSON at line 1, column 1"),
    "not JSON": ('{"d_model": 64,\n  oops}', "not JSON at line 2, column 3"),
    "a list": ("[]", "layout: expected an object, got list"),
    "a number": ("3", "layout: expected an object, got int"),
    "too many digits": ('{"d_model": ' + "9" * 5000 + "}", "not a layout: "),
    "too deep": ("[" * 100_000, "not a layout: "),
    "nothing in it": ("{}", "layout.blocks: is required"),
    "no d_model": (changed(d_model=None), "layout.d_model: is required"),
    "d_model a string": (changed(d_model="64"), "layout.d_model: expected int, got '64'"),
    "d_model a fraction": (changed(d_model=64.0), "layout.d_model: expected int, got 64.0"),
    "d_model true": (changed(d_model=True), "layout.d_model: expected int, got True"),
    "d_model zero": (changed(d_model=0), "d_model: must be at least 1, got 0"),
    "vocab_size negative": (changed(vocab_size=-1), "vocab_size: must be at least 1, got -1"),
    "no blocks": (changed(blocks=[]), "blocks: a layout needs at least one block"),
    "blocks an object": (changed(blocks={}), "layout.blocks: expected list, got {}"),
    "a block a string": (changed(blocks=["mamba"]), "blocks[0]: expected an object, got str"),
    "a block without layer": (changed(blocks=[{"config": {}}]), "blocks[0].layer: is required"),
    "a layer a number": (
        changed(blocks=[{"layer": 3}]),
        "blocks[0].layer: expected str, got 3",
    ),
    "a config a list": (
        changed(blocks=[{"layer": "mamba"}, {"layer": "mamba", "config": []}]),
        "blocks[1].config: expected an object, got list",
    ),
    "a block's field misspelled": (
        changed(blocks=[{"layer": "mamba", "quantiser": None}]),
        "unknown field of blocks[0] 'quantiser'. Did you mean 'quantizer'?",
    ),
    "a quantizer a string": (
        changed(blocks=[{"layer": "mamba", "quantizer": "int8"}]),
        "blocks[0].quantizer: expected an object, got str",
    ),
    "a quantizer without name": (
        changed(blocks=[{"layer": "mamba", "quantizer": {}}]),
        "blocks[0].quantizer.name: is required",
    ),
    "a field misspelled": (
        changed(tie_embedding=True),
        "unknown field of layout 'tie_embedding'. Did you mean 'tie_embeddings'?",
    ),
    "an unknown norm": (changed(norm="batchnorm"), "norm: 'batchnorm' is none of"),
    "norm_eps zero": (changed(norm_eps=0), "norm_eps: must be above 0, got 0"),
    "norm_eps a string": (changed(norm_eps="1e-5"), "norm_eps: expected float, got '1e-5'"),
    "norm_eps NaN": (changed(norm_eps=float("nan")), "NaN is no JSON number"),
    "norm_eps too large": (
        changed().replace("1e-05", "1e999"),
        "norm_eps: must be a finite number, got inf",
    ),
    "scaling by zero": (changed(logits_scaling=0), "logits_scaling: must not be 0"),
    "tied a number": (changed(tie_embeddings=1), "tie_embeddings: expected bool, got 1"),
    "a later format": (
        changed(format=2, attention_sinks=4),
        "layout format 2 cannot be read: this workbench reads format 1",
    ),
    "a format in words": (changed(format="new"), "layout format 'new' cannot be read"),
}


@pytest.mark.parametrize(("text", "message"), FILES.values(), ids=FILES)
def test_a_malformed_file_gives_one_clear_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "layout.json"
    path.write_text(text)
    with pytest.raises(WorkbenchError) as caught:
        Layout.read(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert caught.value.__suppress_context__, "no traceback of the JSON parser behind it"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(WorkbenchError, match=r"cannot read the layout file .*gone\.json"):
        Layout.read(tmp_path / "gone.json")
    with pytest.raises(WorkbenchError, match="cannot read the layout file"):
        Layout.read(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(WorkbenchError, match="cannot read the layout file"):
        Layout.read(tmp_path / "binary")


def test_a_layout_made_in_python_is_checked_too() -> None:
    with pytest.raises(FieldError, match="d_model"):
        layout().replace(d_model=0)
    with pytest.raises(FieldError, match="norm_eps: must be a finite number"):
        layout().replace(norm_eps=float("nan"))
