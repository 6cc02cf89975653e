"""Exports a model as one safetensors file and one JSON file, and loads it again.

The two files hold weights and facts, no code: whoever loads them needs the workbench and the
plugins that the JSON names. For a folder that needs neither, use the `huggingface` exporter.

The proof runs this file as a script in a fresh process, which builds the layers from the same
sources, loads the folder through `load` and reports its logits.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pluggy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from workbench.builder import Builder
from workbench.discovery import Plugins, Provenance
from workbench.environment import package_versions
from workbench.errors import WorkbenchError
from workbench.exporter import (
    Exporter,
    ExportReport,
    refuse_unsaved_buffers,
    save_tensors,
    stored_tensors,
)
from workbench.files import new_folder, refuse_existing
from workbench.hookspecs import Register, hookimpl
from workbench.layout import Layout
from workbench.model import HybridLM
from workbench.registry import Registry
from workbench.storage_url import public_environment

FORMAT = 1
WEIGHTS, FACTS = "model.safetensors", "model.json"
TOLERANCE = 1e-5  # of logits; the same code on the same machine gives 0
BATCH_SIZE, LENGTH = 2, 64


class SafetensorsFile(Exporter):
    """Writes `model.safetensors`, the weights as the layout's quantizers store them, and
    `model.json`: layout, dtype, which weights are one tensor under several names, which plugin and
    version each layer and quantizer came from, and the metadata that it is given.
    """

    @classmethod
    def export(
        cls,
        model: HybridLM,
        builder: Builder,
        out: Path,
        config: Any,
        metadata: dict[str, Any],
    ) -> ExportReport:
        refuse_existing(out)
        stored = copy.deepcopy(model).cpu().eval()
        builder.quantize(stored)
        refuse_unsaved_buffers(stored)
        with new_folder(out) as folder:
            marks = {"format": "pt", "layout": stored.layout.hash}
            save_tensors(folder / WEIGHTS, stored_tensors(stored), marks)
            _write_facts(folder / FACTS, stored, builder, metadata)
            difference = prove(model, builder, folder)
        return ExportReport(path=out, files=(FACTS, WEIGHTS), max_difference=difference)


def load(folder: Path | str, builder: Builder, device: torch.device | str = "cpu") -> HybridLM:
    """The model that was exported to `folder`, in its dtype, quantized as it was, for inference.

    Args:
        builder: knows the layers and quantizers that model.json names; `Builder.load()` knows
            those of all installed plugins.

    Raises:
        WorkbenchError: the files are missing, damaged or of another format, or do not fit together.
        UnknownNameError: a layer or quantizer that no plugin here offers.
    """
    folder = Path(folder)
    facts = _read_facts(folder / FACTS)
    layout = Layout.from_dict(facts["layout"])
    model = builder.build(layout, device=device, dtype=getattr(torch, facts["dtype"]))
    builder.quantize(model)
    try:
        state = load_file(folder / WEIGHTS, device=str(device))
        for name, key in facts["tied"].items():
            state[name] = state[key]
        model.load_state_dict(state)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise WorkbenchError(f"{folder / WEIGHTS} does not fit its {FACTS}: {error}") from error
    return model.eval()


def prove(model: HybridLM, builder: Builder, folder: Path) -> float:
    """Largest difference of logits between `model` and what a fresh process loads from `folder`.

    Raises:
        WorkbenchError: it does not load there, or computes something else.
    """
    here = copy.deepcopy(model).cpu().eval()
    builder.quantize(here)
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(
        model.layout.vocab_size, (BATCH_SIZE, LENGTH), generator=generator, dtype=torch.int64
    )
    with torch.inference_mode():
        expected_BTV = here(tokens_BT)
    with tempfile.TemporaryDirectory(prefix="workbench-export-") as scratch:
        sample, answer = Path(scratch, "sample.safetensors"), Path(scratch, "answer.safetensors")
        save_file({"tokens": tokens_BT}, sample)
        request = {
            "folder": str(folder.resolve()),
            "sample": str(sample),
            "answer": str(answer),
            "threads": torch.get_num_threads(),
            "path": [entry or os.getcwd() for entry in sys.path],
            "layers": _sources(builder.layers, model.layout),
            "quantizers": _sources(builder.quantizers, model.layout),
        }
        Path(scratch, "request.json").write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-I", __file__, str(Path(scratch, "request.json"))]
        done = subprocess.run(
            command, env=public_environment(), capture_output=True, text=True, check=False
        )
        if done.returncode:
            last = done.stderr.strip().splitlines()[-12:] or [f"exit status {done.returncode}"]
            raise WorkbenchError(
                "the exported model does not load in a fresh process, so nothing was kept. "
                "Its last words:\n" + "\n".join(last)
            )
        found_BTV = load_file(answer)["logits"]
    difference = float((found_BTV.float() - expected_BTV.float()).abs().max())
    if not difference <= TOLERANCE:  # NaN fails, too
        raise WorkbenchError(
            f"the exported model's logits differ by {difference:.3g} (at most {TOLERANCE:g} is "
            "right), so nothing was kept. If they are NaN, look at the trained weights; else a "
            "layer depends on something that neither its source nor its state dict holds."
        )
    return difference


def _names(layout: Layout) -> dict[str, list[str]]:
    """The layers and quantizers of a layout, each once."""
    quantizers = [block.quantizer.name for block in layout.blocks if block.quantizer is not None]
    return {
        "layer": sorted({block.layer for block in layout.blocks}),
        "quantizer": sorted(set(quantizers)),
    }


def _sources(registry: Registry[Any], layout: Layout) -> dict[str, list[str]]:
    """Name → module, file and class of the things of one kind in a layout."""
    found = {}
    for name in _names(layout)[registry.kind]:
        thing: type = registry[name]
        module = sys.modules[thing.__module__]
        if getattr(module, thing.__qualname__, None) is not thing or not module.__file__:
            raise WorkbenchError(
                f"{registry.kind} {name!r} is the class {thing.__qualname__} of "
                f"{thing.__module__}, which a fresh process cannot import: define it at the top "
                "level of a module of your plugin."
            )
        found[name] = [thing.__module__, module.__file__, thing.__qualname__]
    return found


def _write_facts(
    path: Path, model: HybridLM, builder: Builder, metadata: Mapping[str, Any]
) -> None:
    names, state = _names(model.layout), model.state_dict()
    facts = {
        "format": FORMAT,
        "layout": model.layout.to_dict(),
        "layout_hash": model.layout.hash,
        "dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
        "tied": {name: key for name, key in model.tied.items() if name in state},
        "layers": {name: _origin(builder.layers, name) for name in names["layer"]},
        "quantizers": {name: _origin(builder.quantizers, name) for name in names["quantizer"]},
        "versions": package_versions(),
        "metadata": dict(metadata),
    }
    try:
        text = json.dumps(facts, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise WorkbenchError(f"the metadata of this export is no plain JSON: {error}") from error
    path.write_text(text + "\n", encoding="utf-8")
    shutil.copymode(path, path.with_name(WEIGHTS))  # that one is written for the owner only


def _origin(registry: Registry[Any], name: str) -> dict[str, Any]:
    """Where a thing came from; where it lay on this machine is nobody else's concern."""
    origin = registry.provenance(name).to_dict()
    return {
        **{key: value for key, value in origin.items() if key != "file"},
        "class": registry[name].__qualname__,
    }


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WorkbenchError(f"cannot read {path}: {error}") from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise WorkbenchError(f"{path} is not of format {FORMAT}, which this plugin reads.")
    return facts


def _answer(request: Mapping[str, Any]) -> None:
    """In the fresh process: logits of the folder's model."""
    torch.set_num_threads(request["threads"])
    builder = Builder(Plugins(pluggy.PluginManager("workbench"), {}, {}, ()))
    registries: tuple[tuple[str, Registry[Any]], ...] = (
        ("layers", builder.layers),
        ("quantizers", builder.quantizers),
    )
    for kind, registry in registries:
        for name, (module, file, qualname) in request[kind].items():
            here = Provenance(plugin=name, package=None, version="", module=module, file=file)
            registry.add(name, getattr(_import(module, file), qualname), here)
    model = load(request["folder"], builder)
    with torch.inference_mode():
        logits_BTV = model(load_file(request["sample"])["tokens"])
    save_file({"logits": logits_BTV.contiguous()}, request["answer"])


def _import(module: str, file: str) -> Any:
    """A module by its name or, for a file of a plugin folder, from the file under that name."""
    if module in sys.modules or importlib.util.find_spec(module.partition(".")[0]) is not None:
        return importlib.import_module(module)
    spec = importlib.util.spec_from_file_location(module, file)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[module] = loaded
    spec.loader.exec_module(loaded)
    return loaded


@hookimpl
def register_exporters(register: Register[type[Exporter]]) -> None:
    register("safetensors", SafetensorsFile)


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    sys.path[:] = asked["path"]
    _answer(asked)
