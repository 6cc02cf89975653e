"""Proves an exported folder: a fresh process that cannot import the workbench loads it."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from workbench.errors import WorkbenchError
from workbench.model import HybridLM
from workbench.storage_url import public_environment

# Of logits in float32, whatever the weights' dtype. The same code on the same machine gives 0.
LOGITS_TOLERANCE = 1e-5
# Of a decode step against the full forward, in norm. Rounding gives 1e-6, and 1e-3 where a layer
# rounds its activations to integers; a cache that is wrong gives 0.1 and more.
CACHE_TOLERANCE = 1e-2
BATCH_SIZE, LENGTH, NEW_TOKENS = 2, 80, 8


@dataclasses.dataclass(frozen=True)
class Proof:
    """What the fresh process found.

    Attributes:
        max_difference: largest absolute difference of the logits.
        cache_error: norm of the difference between cached and full logits, relative.
        imported: those of the foreign packages that loading needed.
    """

    max_difference: float
    cache_error: float
    imported: tuple[str, ...]


def prove(
    model: HybridLM, folder: Path, hidden: Iterable[str], foreign: Iterable[str] = ()
) -> Proof:
    """Load `folder` in a fresh process and compare it with `model`, in float32 on the CPU.

    Args:
        hidden: top-level packages that the process must do without.
        foreign: packages to tell apart by whether loading needs them.

    Raises:
        WorkbenchError: it does not load, or computes something else.
    """
    model = copy.deepcopy(model).to("cpu", torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH_SIZE, LENGTH)
    tokens_BT = torch.randint(model.layout.vocab_size, shape, generator=generator)
    with torch.inference_mode():
        sample = {"tokens": tokens_BT, "logits": model(tokens_BT)}
    with tempfile.TemporaryDirectory(prefix="workbench-export-") as scratch:
        save_file(sample, Path(scratch, "sample.safetensors"))
        request = {
            "folder": str(folder.resolve()),
            "sample": str(Path(scratch, "sample.safetensors")),
            "new_tokens": NEW_TOKENS,
            "threads": torch.get_num_threads(),
            "path": [entry or os.getcwd() for entry in sys.path],
            "packages": sorted(hidden),
            "foreign": sorted(foreign),
        }
        found = _ask(request, Path(scratch))
    proof = Proof(found["max_difference"], found["cache_error"], tuple(found["imported"]))
    _judge(proof)
    return proof


def _ask(request: dict[str, Any], scratch: Path) -> dict[str, Any]:
    spec = find_spec("workbench_export.reload")
    assert spec is not None
    assert spec.origin is not None
    question, reply = scratch / "request.json", scratch / "answer.json"
    question.write_text(json.dumps(request), encoding="utf-8")
    environment = {
        **public_environment(),
        "HF_HOME": str(scratch / "hf"),
        "HF_MODULES_CACHE": str(scratch / "hf_modules"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-I", spec.origin, str(question), str(reply)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise WorkbenchError(
            "the exported model does not load in a fresh process, so nothing was kept. "
            "Its last words:\n" + "\n".join(lines[-12:])
        )
    answer: dict[str, Any] = json.loads(reply.read_text(encoding="utf-8"))
    return answer


def _judge(proof: Proof) -> None:
    # Written so that NaN fails too.
    if not proof.max_difference <= LOGITS_TOLERANCE:
        raise WorkbenchError(
            f"the exported model's logits differ by {proof.max_difference:.3g} (at most "
            f"{LOGITS_TOLERANCE:g} is right), so nothing was kept. {_cause(proof.max_difference)}"
        )
    if not proof.cache_error <= CACHE_TOLERANCE:
        raise WorkbenchError(
            f"generating with the cache differs from a full forward by {proof.cache_error:.3g} "
            f"(relative; at most {CACHE_TOLERANCE:g} is right), so nothing was kept. A layer's "
            "`step` or prefill does not equal its forward: run workbench.testing.LayerContract "
            "on the layers of this model."
        )


def _cause(difference: float) -> str:
    if math.isnan(difference):
        return "They are NaN: look at the trained weights first."
    return (
        "A layer depends on something that its source and its state dict do not hold (a global set "
        "while running, an attribute set after building, a file), or its source was edited since "
        "this process imported it."
    )
