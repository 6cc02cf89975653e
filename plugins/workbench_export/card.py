"""The model card: what the exported model is, how to load it, and where it comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from workbench.builder import Builder
from workbench.model import HybridLM
from workbench.provenance import SHORT
from workbench.registry import Registry
from workbench_export.code import ModelCode
from workbench_export.proof import Proof

FRONT_MATTER = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- workbench
- custom_code
---
"""

LOADING = """\
```python
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokens = model.generate(torch.tensor([[0, 1, 2]]), max_new_tokens=16)
print(tokens[0].tolist())
```
"""

LOADING_TEXT = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}")
prompt = tokenizer("def ", return_tensors="pt")
tokens = model.generate(prompt.input_ids, attention_mask=prompt.attention_mask, max_new_tokens=40)
print(tokenizer.decode(tokens[0]))
```
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What a card tells besides the model itself.

    Attributes:
        name: of the folder.
        weight_bytes: of the weights file.
        code: the Python files of the folder.
        proof: what the fresh process found.
        metadata: as given to the exporter.
    """

    name: str
    weight_bytes: int
    code: ModelCode
    proof: Proof
    metadata: Mapping[str, Any]


def model_card(model: HybridLM, builder: Builder, facts: Facts) -> str:
    """The text of README.md."""
    sections = [
        f"{FRONT_MATTER}\n# {facts.name}\n\n{_summary(model, builder, facts)}",
        f"## Loading\n\n{_loading(facts)}",
        f"## Layers\n\n{_layers(model, builder, facts)}",
        _figures(facts.metadata.get("metrics") or {}, facts.metadata.get("units") or {}),
        _origin(facts.metadata),
    ]
    return "\n".join(section for section in sections if section)


def _summary(model: HybridLM, builder: Builder, facts: Facts) -> str:
    layout = model.layout
    parameters = builder.costs(layout, length=1).total.parameters
    head = "shared with the embedding" if layout.tie_embeddings else "its own"
    return (
        f"A hybrid language model of {len(layout.blocks)} residual blocks, found and trained with "
        f"workbench.\n\n"
        f"- pattern, from the input up: `{builder.pattern(layout)}`\n"
        f"- parameters: {parameters:,}; weights file: {facts.weight_bytes:,} bytes\n"
        f"- width {layout.d_model}, vocabulary {layout.vocab_size:,}, head {head}\n"
        f"- layout `{layout.hash}`, in full in config.json\n"
    )


def _loading(facts: Facts) -> str:
    has_text = facts.metadata.get("tokenizer") is not None
    text = (LOADING_TEXT if has_text else LOADING).format(name=facts.name)
    needs = ["torch", "transformers >= 5.17", *facts.proof.imported]
    text += f"\nIt needs {', '.join(needs)}. The code is in this folder: read it first.\n"
    if not has_text:
        text += "It has no tokenizer: it takes token ids.\n"
    return text + (
        "For batches, pad on the left and give the attention mask; a byte tokenizer has no pad "
        "token (all 256 ids are bytes), so pad its ids by hand.\n\n"
        "When it was exported, a fresh process loaded this folder and computed the same logits: "
        f"the largest difference in float32 was {facts.proof.max_difference:.2g}.\n"
    )


def _layers(model: HybridLM, builder: Builder, facts: Facts) -> str:
    rows = ["| | name | blocks | code | from | sources |", "|---|---|---|---|---|---|"]
    blocks = list(enumerate(model.layout.blocks))
    for name, code in facts.code.layers.items():
        at = [index for index, block in blocks if block.layer == name]
        glyph = f"`{builder.layers[name].glyph}`"
        rows.append(_row(glyph, name, at, code, builder.layers.provenance(name)))
    for name, code in facts.code.quantizers.items():
        at = [index for index, block in blocks if block.quantizer and block.quantizer.name == name]
        rows.append(_row("quantizer", name, at, code, builder.quantizers.provenance(name)))
    changed = _changed_since_trained(builder, facts)
    if changed:
        rows.append(
            f"\nThe sources of {', '.join(changed)} are not those of the trial that the figures "
            "below are of: workbench.json has both."
        )
    return "\n".join(rows) + "\n"


def _changed_since_trained(builder: Builder, facts: Facts) -> list[str]:
    trained = facts.metadata.get("provenance") or {}
    now: dict[str, tuple[Registry[Any], Iterable[str]]] = {
        "layers": (builder.layers, facts.code.layers),
        "quantizers": (builder.quantizers, facts.code.quantizers),
    }
    return [
        name
        for kind, (registry, names) in now.items()
        for name in names
        if name in trained.get(kind, {})
        and trained[kind][name]["sha256"] != registry.provenance(name).sha256
    ]


def _row(kind: str, name: str, at: list[int], code: tuple[str, str], origin: Any) -> str:
    blocks = ", ".join(map(str, at))
    source = f"{origin.package or origin.plugin} {origin.version}, `{origin.module}`"
    digest = f"sha256 `{origin.sha256[:SHORT]}`"
    return f"| {kind} | {name} | {blocks} | `{code[0]}`: `{code[1]}` | {source} | {digest} |"


def _figures(metrics: Mapping[str, Any], units: Mapping[str, str]) -> str:
    if not metrics:
        return ""
    rows = ["## Figures\n", "| metric | value | unit |", "|---|---|---|"]
    for name, value in metrics.items():
        shown = f"{value:.6g}" if isinstance(value, float) else value
        rows.append(f"| {name} | {shown} | {units.get(name, '')} |")
    return "\n".join(rows) + "\n"


def _origin(metadata: Mapping[str, Any]) -> str:
    rows = [f"- {name}: {metadata[name]}" for name in ("study", "trial") if name in metadata]
    for kind in ("placements", "data_sources", "metrics"):
        for name, origin in (metadata.get("provenance") or {}).get(kind, {}).items():
            source = f"{origin['package'] or origin['plugin']} {origin['version']}"
            digest = f"`{origin['module']}`, sha256 `{origin['sha256'][:SHORT]}`"
            rows.append(f"- {kind.removesuffix('s').replace('_', ' ')} {name}: {source}, {digest}")
    versions = metadata.get("versions") or {}
    rows += [f"- {name} {version}" for name, version in versions.items() if version]
    rows.append("- workbench.json holds all that is known of its making")
    return "## Where it comes from\n\n" + "\n".join(rows) + "\n"
