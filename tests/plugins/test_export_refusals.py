"""The `huggingface` exporter when it cannot do what it is asked: it says why and leaves nothing."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from workbench.builder import Builder
from workbench.errors import WorkbenchError
from workbench.exporter import ExportReport
from workbench.layout import Block, Layout

FICKLE = '''
"""Layers that cannot be exported, each for a reason of its own."""

import torch
import workbench
from torch import nn
from workbench.layer import PLAIN

OFFSET = 0.0


class Fickle(workbench.Layer):
    """Adds what a global holds."""

    kind = "mlp"

    def __init__(self, d_model, config, **factory):
        super().__init__(d_model, config)

    @classmethod
    def costs(cls, d_model, config, *, length, bytes_per_element=4):
        return workbench.Costs()

    def forward(self, x_BTD, context=workbench.Context(), state=None):
        return x_BTD + OFFSET * torch.arange(x_BTD.shape[-1])


class Forgetful(Fickle):
    """Keeps a buffer out of its state dict."""

    def __init__(self, d_model, config, **factory):
        super().__init__(d_model, config)
        self.inner = nn.Identity()
        self.inner.register_buffer("table", torch.ones(d_model), persistent=False)


class Leaky(Fickle):
    """Its step is not its forward."""

    def step(self, x_BD, state, context=PLAIN):
        return x_BD.flip(-1)


class Broken(Fickle):
    """Cannot be built on the meta device."""

    def __init__(self, d_model, config, **factory):
        super().__init__(d_model, config)
        self.weight = nn.Parameter(torch.ones(d_model))
        self.largest = self.weight.max().item()


def hidden_class():
    class Inner(Fickle):
        pass

    return Inner


@workbench.hookimpl
def register_layers(register):
    for layer in (Fickle, Forgetful, Leaky, Broken):
        register(layer.__name__.lower(), layer)
    register("inner", hidden_class())
'''


@pytest.fixture(scope="module")
def stocked(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    """A builder that knows the layers above."""
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "fickle.py").write_text(FICKLE, encoding="utf-8")
    return Builder.load([folder])


@contextlib.contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Writing more to a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestRefusals:
    def export(self, builder: Builder, layer: str, out: Path, **metadata: Any) -> ExportReport:
        layout = Layout(d_model=8, vocab_size=16, blocks=(Block(layer=layer),))
        exporter = builder.exporters["huggingface"]
        return exporter.export(builder.build(layout), builder, out, None, metadata)

    def refused(self, builder: Builder, layer: str, folder: Path, **metadata: Any) -> str:
        """The message of a refusal, after which nothing is left."""
        with pytest.raises(WorkbenchError) as caught:
            self.export(builder, layer, folder / "out", **metadata)
        assert list(folder.iterdir()) == []
        return str(caught.value)

    def test_an_existing_folder_is_left_alone(self, stocked: Builder, tmp_path: Path) -> None:
        (tmp_path / "notes").touch()
        with pytest.raises(WorkbenchError, match="there already"):
            self.export(stocked, "fickle", tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["notes"]

    def test_a_file_where_a_folder_should_be(self, stocked: Builder, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(WorkbenchError, match="cannot write"):
            self.export(stocked, "fickle", tmp_path / "file" / "out")

    def test_a_disk_that_takes_no_more(self, stocked: Builder, tmp_path: Path) -> None:
        with files_of_at_most(512):
            message = self.refused(stocked, "fickle", tmp_path)
        assert "cannot write" in message
        assert "make room" in message

    def test_weights_that_do_not_fit(self, stocked: Builder, tmp_path: Path) -> None:
        layout = Layout(d_model=8, vocab_size=65536, blocks=(Block(layer="fickle"),))
        model = stocked.build(layout)
        exporter = stocked.exporters["huggingface"]
        with files_of_at_most(1 << 20), pytest.raises(WorkbenchError, match="cannot write"):
            exporter.export(model, stocked, tmp_path / "out", None, {})
        assert list(tmp_path.iterdir()) == []

    def test_an_interruption(
        self, stocked: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(*arguments: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("workbench_export.huggingface.prove", interrupted)
        with pytest.raises(KeyboardInterrupt):
            self.export(stocked, "fickle", tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_a_buffer_that_is_not_saved(self, stocked: Builder, tmp_path: Path) -> None:
        message = self.refused(stocked, "forgetful", tmp_path)
        assert "blocks[0] (forgetful): buffer 'inner.table'" in message

    def test_a_class_that_no_import_reaches(self, stocked: Builder, tmp_path: Path) -> None:
        message = self.refused(stocked, "inner", tmp_path)
        assert "top level of a module" in message

    def test_a_tokenizer_of_another_model(self, stocked: Builder, tmp_path: Path) -> None:
        message = self.refused(stocked, "fickle", tmp_path, tokenizer={"kind": "bytes"})
        assert "256 tokens and the model knows 16" in message

    def test_a_tokenizer_that_is_not_there(self, stocked: Builder, tmp_path: Path) -> None:
        wanted = {"kind": "hf", "name_or_path": str(tmp_path / "nowhere")}
        assert "cannot be loaded" in self.refused(stocked, "fickle", tmp_path, tokenizer=wanted)

    def test_logits_that_differ(
        self, stocked: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module = sys.modules[stocked.layers["fickle"].__module__]
        monkeypatch.setattr(module, "OFFSET", 1.0)
        assert "logits differ by" in self.refused(stocked, "fickle", tmp_path)

    def test_a_cache_that_is_wrong(self, stocked: Builder, tmp_path: Path) -> None:
        assert "generating with the cache differs" in self.refused(stocked, "leaky", tmp_path)

    def test_a_folder_that_does_not_load(self, stocked: Builder, tmp_path: Path) -> None:
        message = self.refused(stocked, "broken", tmp_path)
        assert "does not load in a fresh process" in message
        assert "item()" in message
