"""Run as a script in a fresh process: load an exported folder as a stranger would, and report.

It imports nothing of the workbench, and makes sure that nothing else can. The argument is a JSON
file with the request; the answer is a JSON file too (see `workbench_export.proof`).
"""

from __future__ import annotations

import json
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any


class Blocker(MetaPathFinder):
    """Hides packages: an import of them finds nothing."""

    def __init__(self, packages: list[str]) -> None:
        self.packages = packages

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname.partition(".")[0] in self.packages:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Logits of the folder's model against the expected ones, and its cache against none."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(request["threads"])
    sample = load_file(request["sample"])
    model = AutoModelForCausalLM.from_pretrained(
        request["folder"], trust_remote_code=True, dtype=torch.float32
    )
    with torch.inference_mode():
        logits = model(sample["tokens"]).logits
    prompt = sample["tokens"][:, : -request["new_tokens"]]
    generated = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        min_new_tokens=request["new_tokens"],
        max_new_tokens=request["new_tokens"],
        return_dict_in_generate=True,
        output_logits=True,
    )
    cached = torch.stack(generated.logits, dim=1)
    with torch.inference_mode():
        whole = model(generated.sequences[:, :-1]).logits[:, prompt.shape[1] - 1 :]
    return {
        "max_difference": (logits - sample["logits"]).abs().max().item(),
        "cache_error": ((cached - whole).norm() / whole.norm()).item(),
        "imported": [name for name in request["foreign"] if name in sys.modules],
    }


def main() -> None:
    request_path, answer_path = map(Path, sys.argv[1:])
    request = json.loads(request_path.read_text(encoding="utf-8"))
    sys.path[:] = request["path"]
    sys.meta_path.insert(0, Blocker(request["packages"]))
    answer_path.write_text(json.dumps(answer(request)), encoding="utf-8")


if __name__ == "__main__":
    main()
