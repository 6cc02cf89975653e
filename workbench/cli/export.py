"""`workbench export`: a trial as a model that other people's software runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.cli import interrupts
from workbench.cli.common import (
    Json,
    PluginDirs,
    Runs,
    TrialName,
    count,
    print_json,
    prompt_of,
    say,
)

if TYPE_CHECKING:
    from workbench.study_config import StudyConfig

EXAMPLES = """\
  workbench export quickstart:7 exported/quickstart-7"""

TEXT = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({folder}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({folder})
prompt = tokenizer({prompt}, return_tensors="pt")
tokens = model.generate(prompt.input_ids, attention_mask=prompt.attention_mask, max_new_tokens=80)
print(tokenizer.decode(tokens[0]))"""

TOKENS = """\
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({folder}, trust_remote_code=True)
tokens = model.generate(torch.tensor([[0, 1, 2]]), max_new_tokens=16)  # ids: it has no tokenizer
print(tokens[0].tolist())"""


def export(
    trial: TrialName,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder to write.")],
    exporter: Annotated[
        str, typer.Option(metavar="NAME", help="One of those that workbench plugins lists.")
    ] = "huggingface",
    runs: Runs = None,
    plugin_dir: PluginDirs = None,
    json: Json = False,
) -> None:
    """Export a trial as a model folder, and prove it.

    A fresh process must compute the same logits from the folder as the trained model does here.
    """
    from workbench.export import export_trial, trial_builder
    from workbench.records import load_trial

    record = load_trial(trial, runs)
    folders = tuple(plugin_dir or ())
    with interrupts.explained("Nothing was exported."):
        report = export_trial(record, out, exporter, folders, runs)
    if json:
        print_json(
            {
                "path": str(report.path),
                "files": list(report.files),
                "max_difference": report.max_difference,
            }
        )
        return
    say(
        f"{report.path}: {count(len(report.files), 'file')}; the logits of a fresh process "
        f"differ by at most {report.max_difference:.2g}."
    )
    if exporter == "huggingface":
        print("Python that loads it and generates:\n")
        print(_snippet(report.path, trial_builder(record, folders)[1]))


def _snippet(folder: Path, config: StudyConfig) -> str:
    """Python that runs as it is: it generates text, or token ids where the data is no text."""
    from json import dumps  # its strings are Python's, in the quotes that code has

    from workbench.export import tokenizer_of

    template = TOKENS if tokenizer_of(config) is None else TEXT
    quoted = {"folder": dumps(str(folder)), "prompt": dumps(prompt_of(config))}
    return template.format(**quoted)
