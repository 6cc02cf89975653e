"""What exporters are given: the weights as a file can hold them, a refusal of what it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.workbench.plugin_files import builder_of, write_layer_plugin
from workbench.errors import WorkbenchError
from workbench.exporter import refuse_unsaved_buffers, save_tensors, stored_tensors
from workbench.layout import Block, Layout
from workbench.model import HybridLM


@pytest.fixture
def model(tmp_path: Path) -> HybridLM:
    """Tied embeddings, and blocks that do nothing."""
    write_layer_plugin(tmp_path / "plugins", "idle", "idle")
    layout = Layout(d_model=4, vocab_size=6, blocks=(Block(layer="idle"),) * 2)
    return builder_of(tmp_path / "plugins").build(layout)


def test_stored_tensors_come_back_from_a_file(model: HybridLM, tmp_path: Path) -> None:
    both = torch.arange(8.0)
    model.layers[0].first = nn.Parameter(both[:4])
    model.layers[0].second = nn.Parameter(both[4:])
    model.layers[0].turned = nn.Parameter(torch.arange(6.0).view(2, 3).T)
    tensors = stored_tensors(model)
    state, tied = model.state_dict(), model.tied
    assert tied
    assert tensors.keys() == state.keys() - tied.keys()
    save_tensors(tmp_path / "weights", tensors, {"format": "pt"})
    found = load_file(tmp_path / "weights")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], state[name]) for name in found)
    assert all(torch.equal(found[key], state[name]) for name, key in tied.items())


def test_what_cannot_be_written_is_an_os_error(model: HybridLM, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        save_tensors(tmp_path / "nowhere" / "weights", stored_tensors(model), {})


def test_a_buffer_outside_the_state_dict_is_refused(model: HybridLM) -> None:
    refuse_unsaved_buffers(model)
    model.layers[1].inner = nn.Module()
    model.layers[1].inner.register_buffer("table", torch.ones(2), persistent=False)
    with pytest.raises(WorkbenchError, match=r"blocks\[1\] \(idle\): buffer 'inner.table'"):
        refuse_unsaved_buffers(model)
