"""`workbench generate`: text from a trial's trained model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli.common import (
    Device,
    Json,
    PluginDirs,
    Runs,
    TrialName,
    as_options,
    print_json,
)

if TYPE_CHECKING:
    from workbench.data import DataSource
    from workbench.model import HybridLM

EXAMPLES = """\
  workbench generate quickstart:7 --prompt 'def main(' --max-new-tokens 200
  workbench generate quickstart:7 --prompt 'import ' --temperature 0 --json"""

LONG = 128  # new tokens from which on capturing a decode step pays for itself

# A model of bytes may emit any; on a terminal control characters are commands.
CONTROLS = {
    code: "\ufffd" for code in (*range(32), 127, *range(128, 160)) if chr(code) not in "\n\t"
}


def generate(
    trial: TrialName,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens to generate.")] = 200,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="0 takes the most likely token.")
    ] = 0.8,
    top_k: Annotated[
        int | None, typer.Option(metavar="K", help="Only the K most likely tokens.")
    ] = None,
    top_p: Annotated[
        float, typer.Option(metavar="P", help="The smallest set with this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the draws.")] = 0,
    capture: Annotated[
        bool | None,
        typer.Option(
            "--capture/--no-capture",
            help=f"Replay steps as a CUDA graph; from {LONG} tokens on where that works.",
        ),
    ] = None,
    device: Device = "auto",
    runs: Runs = None,
    plugin_dir: PluginDirs = None,
    json: Json = False,
) -> None:
    """Continue a prompt with a trial's trained model.

    Prints the prompt and its continuation as it comes.
    """
    from workbench.errors import FieldError
    from workbench.generation import SamplingConfig

    if max_new_tokens < 1:
        raise FieldError("--max-new-tokens", f"must be at least 1, got {max_new_tokens}")
    _check_prompt(prompt)
    with as_options():
        sampling = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    model, data = _open(trial, device, tuple(plugin_dir or ()), runs)
    show = _Shown(silent=json)
    options = {
        "config": sampling,
        "seed": seed,
        "capture": _captures(model, max_new_tokens) if capture is None else capture,
    }
    made = _continue(model, data, prompt, max_new_tokens, show, **options)
    if json:
        print_json({"prompt": prompt, **made, "seed": seed, "captured": options["capture"]})
    else:
        sys.stdout.write("\n")


def _open(
    trial: str, device: str, plugin_dirs: tuple[Path, ...], runs: Path | None
) -> tuple[HybridLM, DataSource]:
    """A trial's trained model, and the data that knows how text becomes its tokens."""
    from workbench.environment import resolve_device
    from workbench.export import trial_builder
    from workbench.records import load_trial, runs_folder
    from workbench.trial import load_trained, make_data

    record = load_trial(trial, runs)
    builder, config = trial_builder(record, plugin_dirs)
    model = load_trained(builder, record.layout, record.weights, resolve_device(device))
    return model, make_data(config, builder, runs_folder(runs) / ".cache")


def _continue(
    model: HybridLM,
    data: DataSource,
    prompt: str,
    max_new_tokens: int,
    show: _Shown,
    **options: Any,
) -> dict[str, Any]:
    """Show the prompt and what follows it; the text and tokens that were added.

    Args:
        options: of `generation.stream`.
    """
    import torch

    from workbench.generation import TextStream, stream

    ids = data.encode(prompt)
    prompt_BT = torch.tensor([ids], device=model.device)
    text = TextStream(data.decode, ids)
    show(prompt)
    for token_B in stream(model, prompt_BT, max_new_tokens, **options):
        show(text.push(int(token_B[0])))
    show(text.finish())
    return {"text": show.text[len(prompt) :], "tokens": text.tokens}


def _captures(model: HybridLM, max_new_tokens: int) -> bool:
    """Whether a decode step is worth capturing, and can be."""
    from workbench.decoding import why_not_captured

    if model.device.type != "cuda" or max_new_tokens < LONG:
        return False
    return not why_not_captured(model, model.init_state(1, max_new_tokens))


def _check_prompt(prompt: str) -> None:
    from workbench.errors import FieldError

    if not prompt:
        raise FieldError("--prompt", "is empty: give at least one character")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise FieldError("--prompt", "is not UTF-8") from None


class _Shown:
    """Writes pieces of text as they come, and keeps them."""

    def __init__(self, silent: bool) -> None:
        self.text = ""
        self._silent = silent
        self._controls = CONTROLS if sys.stdout.isatty() else {}

    def __call__(self, piece: str) -> None:
        self.text += piece
        if not self._silent:
            sys.stdout.write(piece.translate(self._controls))
            sys.stdout.flush()
