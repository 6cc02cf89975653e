"""Run as a script in a fresh process: does with an exported folder what its users do.

    python -I export_probe.py QUESTION ANSWER

QUESTION is a safetensors file with `tokens` [2, T] and, as metadata, the folder and the packages
to hide. ANSWER is a safetensors file with one entry an observation; the tests judge them.
"""

import importlib.abc
import sys
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

NEW = {"do_sample": False, "max_new_tokens": 12}


class Hidden(importlib.abc.MetaPathFinder):
    def __init__(self, packages: list[str]) -> None:
        self.packages = packages

    def find_spec(self, fullname, path=None, target=None):  # type: ignore[no-untyped-def]
        if fullname.partition(".")[0] in self.packages:
            raise ModuleNotFoundError(f"No module named {fullname!r}")


def load(folder: Path, auto: type = transformers.AutoModelForCausalLM, **kwargs: object):  # type: ignore[no-untyped-def]
    return auto.from_pretrained(folder, trust_remote_code=True, **kwargs)


def generated(model, tokens: Tensor, **kwargs: object) -> Tensor:  # type: ignore[no-untyped-def]
    return model.generate(
        tokens, **{"attention_mask": torch.ones_like(tokens), **NEW, **kwargs}
    ).contiguous()


def left_padded(tokens: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """The same rows, the second one without its first `pad` tokens."""
    padded, mask = tokens.clone(), torch.ones_like(tokens)
    padded[1, :pad], mask[1, :pad] = 0, 0
    return padded, mask


def observe(folder: Path, tokens: Tensor) -> dict[str, Tensor]:
    model = load(folder)
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    seen = {"logits": model(tokens).logits}
    seen["hidden"] = load(folder, transformers.AutoModel)(tokens).last_hidden_state
    seen["last_logits"] = model(tokens, logits_to_keep=3).logits
    seen["loss"] = model(tokens, labels=tokens).loss
    prompt = tokens[:, :9]
    seen["greedy"] = generated(model, prompt)
    seen["greedy_without_cache"] = generated(model, prompt, use_cache=False)
    padded, mask = left_padded(prompt, pad=4)
    seen["padded_logits"] = model(padded, attention_mask=mask).logits
    seen["padded_greedy"] = generated(model, padded, attention_mask=mask)
    seen["beams"] = generated(model, prompt, num_beams=3)
    seen["beams_without_cache"] = generated(model, prompt, num_beams=3, use_cache=False)
    seen["chunked_greedy"] = generated(model, prompt, prefill_chunk_size=4)
    torch.manual_seed(0)
    seen["sampled"] = generated(model, prompt, do_sample=True, num_return_sequences=2)
    seen |= continued(model, prompt)
    seen |= outgrown(model)
    seen |= saved_again(model, folder, tokens)
    fresh = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    seen["fresh_logits"] = fresh(tokens).logits
    return {name: value.detach().clone().contiguous() for name, value in seen.items()}


def continued(model, prompt: Tensor) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    """A second call of generate() with the cache that the first one returned."""
    first = model.generate(prompt, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    second = model.generate(
        first.sequences,
        past_key_values=first.past_key_values,
        max_new_tokens=7,
        do_sample=False,
    )
    return {"continued_greedy": second}


def outgrown(model) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    """Calls with a cache made without a length: 250 tokens with padding, then one by one to 260."""
    generator = torch.Generator().manual_seed(3)
    long = torch.randint(model.config.vocab_size, (2, 260), generator=generator)
    padded, mask = left_padded(long, pad=100)
    with torch.inference_mode():
        out = model(padded[:, :250], attention_mask=mask[:, :250], use_cache=True)
        logits = [out.logits]
        for end in range(251, 261):
            out = model(
                padded[:, end - 1 : end],
                attention_mask=mask[:, :end],
                past_key_values=out.past_key_values,
            )
            logits.append(out.logits)
        whole = model(padded, attention_mask=mask).logits
    return {"outgrown": torch.cat(logits, 1)[:, 100:], "outgrown_whole": whole[:, 100:]}


def saved_again(model, folder: Path, tokens: Tensor) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    again = folder.with_name(f"{folder.name}-again")
    model.save_pretrained(again)
    return {"saved_again_logits": load(again)(tokens).logits}


def text(folder: Path) -> dict[str, Tensor]:
    """What the tokenizer makes of all kinds of characters."""
    sample = "".join(map(chr, range(0x250))) + "\n\t é 漢字 🐍 </s> <pad>\r\n"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(sample).input_ids
    assert tokenizer.decode(ids) == sample
    return {"ids": torch.tensor(ids), "bytes": torch.tensor(list(sample.encode()))}


def example(folder: Path) -> dict[str, Tensor]:
    """What the code on the model card generates."""
    namespace: dict[str, object] = {}
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    exec(code.replace(f'"{folder.name}"', f'"{folder}"'), namespace)
    return {"card": namespace["tokens"]}  # type: ignore[dict-item]


def main() -> None:
    torch.set_num_threads(1)
    with safe_open(sys.argv[1], "pt") as file:
        tokens, request = file.get_tensor("tokens"), file.metadata()
    sys.meta_path.insert(0, Hidden(request["hidden"].split()))
    folder = Path(request["folder"])
    seen = observe(folder, tokens) | example(folder)
    if (folder / "tokenizer.json").exists():
        seen |= text(folder)
    save_file(seen, sys.argv[2])


if __name__ == "__main__":
    main()
