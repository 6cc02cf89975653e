"""The `huggingface` exporter: a folder that transformers loads without the workbench.

The folder carries the very sources of the layers that were trained, flattened, so that a loaded
model computes what the trained one did; see `workbench_export.vendoring`.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from workbench.builder import Builder
from workbench.exporter import (
    Exporter,
    ExportReport,
    refuse_unsaved_buffers,
    save_tensors,
    stored_tensors,
)
from workbench.files import new_folder, refuse_existing
from workbench.model import HybridLM
from workbench_export.card import Facts, model_card
from workbench_export.code import AUTO_MAP, ModelCode, model_code
from workbench_export.proof import prove
from workbench_export.tokenizer import save_tokenizer


class HuggingFace(Exporter):
    """Writes what `AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)` loads.

    Weights are stored as the layout's quantizers store them and in the model's dtype, the code is
    the layers' own. Of the metadata the model card shows `study`, `trial`, `metrics` (name →
    value), `units` (name → unit) and `versions` (distribution → version); `tokenizer` is
    `{"kind": "bytes"}`, `{"kind": "hf", "name_or_path": …}` or None; workbench.json holds all.
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
        model = _as_stored(model, builder)
        refuse_unsaved_buffers(model)
        code = model_code(model.layout, builder)
        with new_folder(out) as folder:
            for name, text in code.files.items():
                (folder / name).write_text(text, encoding="utf-8")
            special = save_tokenizer(metadata.get("tokenizer"), model.layout.vocab_size, folder)
            _write_configs(folder, model, special)
            weight_bytes = _write_weights(folder / "model.safetensors", model)
            proof = prove(model, folder, code.packages, code.foreign)
            facts = Facts(
                name=out.name, weight_bytes=weight_bytes, code=code, proof=proof, metadata=metadata
            )
            (folder / "README.md").write_text(model_card(model, builder, facts), encoding="utf-8")
            _write_json(folder / "workbench.json", _record(builder, code, metadata))
            written = tuple(sorted(path.name for path in folder.iterdir()))
        return ExportReport(path=out, files=written, max_difference=proof.max_difference)


def _as_stored(model: HybridLM, builder: Builder) -> HybridLM:
    """The model with the quantizers of its layout applied; the given one is left as it is."""
    if all(block.quantizer is None for block in model.layout.blocks):
        return model
    model = copy.deepcopy(model)
    builder.quantize(model)
    return model


def _write_weights(path: Path, model: HybridLM) -> int:
    """Write the state dict, each weight once; the bytes that the file takes."""
    tensors = {f"model.{name}": tensor for name, tensor in stored_tensors(model).items()}
    save_tensors(path, tensors, {"format": "pt"})
    shutil.copymode(path.with_name("config.json"), path)  # it is written for the owner only
    return path.stat().st_size


def _write_configs(folder: Path, model: HybridLM, special: Mapping[str, int | None]) -> None:
    layout = model.layout
    made_with = {"transformers_version": version("transformers")}
    configuration = {
        "architectures": ["WorkbenchForCausalLM"],
        "auto_map": AUTO_MAP,
        "model_type": "workbench_hybrid",
        "dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
        "vocab_size": layout.vocab_size,
        "hidden_size": layout.d_model,
        "num_hidden_layers": len(layout.blocks),
        "tie_word_embeddings": layout.tie_embeddings,
        **special,
        "layout": layout.to_dict(),
        **made_with,
    }
    _write_json(folder / "config.json", configuration)
    known = {name: value for name, value in special.items() if value is not None}
    _write_json(folder / "generation_config.json", {**known, **made_with})


def _record(builder: Builder, code: ModelCode, metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **metadata,
        "layers": {name: builder.layers.provenance(name).public() for name in code.layers},
        "quantizers": {
            name: builder.quantizers.provenance(name).public() for name in code.quantizers
        },
    }


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
