"""`workbench export`: a trial as a model that other people's software runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from workbench.cli import interrupts
from workbench.cli.common import Json, PluginDirs, Runs, TrialName, count, print_json, say

EXAMPLES = """\
  workbench export quickstart:7 exported/quickstart-7"""


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
    from workbench.export import export_trial
    from workbench.records import load_trial

    record = load_trial(trial, runs)
    with interrupts.explained("Nothing was exported."):
        report = export_trial(record, out, exporter, tuple(plugin_dir or ()), runs)
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
        print("Load it with:")
        print("  from transformers import AutoModelForCausalLM, AutoTokenizer")
        print(
            f'  model = AutoModelForCausalLM.from_pretrained("{report.path}", '
            "trust_remote_code=True)"
        )
