"""Run as a script: logits of the authors' own inference package (`pip install rwkv`).

    python _rwkv_probe.py MODEL ANSWER < TOKENS

MODEL is the checkpoint's path without `.pth`; ANSWER gets `whole`, the logits of all tokens at
once, and `continued`, those of the last tokens one at a time.
"""

from __future__ import annotations

import os
import sys

from safetensors.torch import save_file

ONE_BY_ONE = 10


def main() -> None:
    os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
    import torch

    torch.set_num_threads(1)
    from rwkv.model import RWKV

    tokens = [int(token) for token in sys.stdin.read().split()]
    model = RWKV(model=sys.argv[1], strategy="cpu fp32")
    whole, _ = model.forward(tokens, None, full_output=True)
    _, state = model.forward(tokens[:-ONE_BY_ONE], None)
    rows = []
    for token in tokens[-ONE_BY_ONE:]:
        logits, state = model.forward([token], state)
        rows.append(logits)
    save_file({"whole": whole.contiguous(), "continued": torch.stack(rows)}, sys.argv[2])


if __name__ == "__main__":
    main()
