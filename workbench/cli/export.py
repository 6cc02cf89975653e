"""`workbench export`: a trial as a model that other people's software runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from workbench.cli.common import Json, PluginDirs, Runs, console, print_json

EXAMPLE = "Example: workbench export quickstart:7 exported/quickstart-7"


def export(
    trial: Annotated[str, typer.Argument(help="STUDY:TRIAL.")],
    out: Annotated[Path, typer.Argument(help="New folder to write.")],
    exporter: Annotated[str, typer.Option(help="Exporter.")] = "huggingface",
    runs: Runs = None,
    plugin_dir: PluginDirs = None,
    json: Json = False,
) -> None:
    """Export a trial's trained model and prove it: a fresh process must give the same logits."""
    from workbench.export import export_trial
    from workbench.records import load_trial

    report = export_trial(load_trial(trial, runs), out, exporter, tuple(plugin_dir or ()), runs)
    if json:
        print_json(
            {
                "path": str(report.path),
                "files": list(report.files),
                "max_difference": report.max_difference,
            }
        )
        return
    made = console()
    made.print(
        f"{report.path}: {len(report.files)} files; logits of a fresh process differ by at most "
        f"{report.max_difference:.2g}."
    )
    if exporter == "huggingface":
        made.print("Load it with:", markup=False)
        made.print("  from transformers import AutoModelForCausalLM, AutoTokenizer")
        made.print(
            f'  model = AutoModelForCausalLM.from_pretrained("{report.path}", '
            "trust_remote_code=True)"
        )
