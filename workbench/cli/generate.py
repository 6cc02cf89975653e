"""`workbench generate`: text from a trial's trained model."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from workbench.cli.common import Device, Json, PluginDirs, Runs, print_json

EXAMPLE = "Example: workbench generate quickstart:7 --prompt 'def main(' --max-new-tokens 200"


def generate(
    trial: Annotated[str, typer.Argument(help="STUDY:TRIAL.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Only the k most likely tokens.")] = None,
    top_p: Annotated[float, typer.Option(help="Nucleus probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    device: Device = "auto",
    runs: Runs = None,
    plugin_dir: PluginDirs = None,
    json: Json = False,
) -> None:
    """Continue a prompt with a trial's trained model."""
    import torch

    from workbench.environment import resolve_device
    from workbench.errors import FieldError
    from workbench.export import trial_builder
    from workbench.generation import SamplingConfig, stream
    from workbench.records import load_trial, runs_folder
    from workbench.trial import load_trained, make_data

    if max_new_tokens < 1:
        raise FieldError("--max-new-tokens", f"must be at least 1, got {max_new_tokens}")
    sampling = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    record = load_trial(trial, runs)
    builder, config = trial_builder(record, tuple(plugin_dir or ()))
    model = load_trained(builder, record.layout, record.weights, resolve_device(device))
    data = make_data(config, builder, runs_folder(runs) / ".cache")
    ids = data.encode(prompt)
    if not ids:
        raise FieldError("--prompt", "is empty: give at least one character")
    prompt_BT = torch.tensor([ids], device=model.device)
    made: list[int] = []
    shown = ""
    for token_B in stream(model, prompt_BT, max_new_tokens, config=sampling, seed=seed):
        made.append(int(token_B[0]))
        if not json:
            # Decode from the start: a character may take several tokens.
            text = data.decode([*ids, *made]).rstrip("\ufffd")
            sys.stdout.write(text.removeprefix(shown))
            sys.stdout.flush()
            shown = text
    if json:
        print_json({"prompt": prompt, "text": data.decode(made), "tokens": made, "seed": seed})
    else:
        sys.stdout.write("\n")
