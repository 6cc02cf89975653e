"""`workbench train`: train one layout outside a study."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli import interrupts
from workbench.cli.common import (
    Device,
    Json,
    PluginDirs,
    Runs,
    Source,
    as_options,
    log,
    print_json,
    say,
)

if TYPE_CHECKING:
    from workbench.data import DataSource
    from workbench.model import HybridLM
    from workbench.training import TrainingConfig, TrainingResult

EXAMPLES = """\
  workbench train mamba.json trained/mamba --tokens 1_000_000
  workbench train quickstart:7 trained/notes \\
      --data text --data-option 'paths=["notes/*.txt"]'"""

ADVICE = "take a smaller layout, --batch-size or --seq-len."
RESUME = "The same command goes on from the last checkpoint."


def train(
    source: Source,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="New folder for layout, curve and weights.")
    ],
    tokens: Annotated[int, typer.Option(metavar="N", help="Training tokens.")] = 1_000_000,
    data: Annotated[
        str, typer.Option(metavar="NAME", help="Data source; workbench plugins lists them.")
    ] = "stdlib",
    data_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Field of the data source's Config, the value in TOML; repeatable.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Sequences a step.")] = 8,
    seq_len: Annotated[int, typer.Option(metavar="TOKENS", help="Of a sequence.")] = 256,
    lr: Annotated[float, typer.Option(metavar="RATE", help="Peak learning rate.")] = 3e-3,
    optimizer: Annotated[
        str, typer.Option(metavar="NAME", help="Of hidden matrices: muon or adamw.")
    ] = "muon",
    precision: Annotated[
        str, typer.Option(metavar="DTYPE", help="Of autocast: float32 or bfloat16.")
    ] = "float32",
    checkpoint_seconds: Annotated[
        float, typer.Option(metavar="SECONDS", help="Between checkpoints; 0 makes none.")
    ] = 30.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Of weights and data order.")] = 0,
    device: Device = "auto",
    runs: Runs = None,
    plugin_dir: PluginDirs = None,
    json: Json = False,
) -> None:
    """Train one layout outside a study.

    Run again with the same arguments, it goes on from its checkpoint. Weights stay as trained:
    the layout's quantizers are not applied.
    """
    from workbench import config as configs
    from workbench.api import find
    from workbench.cli.memory import explained, require_memory
    from workbench.environment import resolve_device
    from workbench.training import TrainingConfig

    given = {
        "tokens": tokens,
        "batch_size": batch_size,
        "seq_len": seq_len,
        "lr": lr,
        "optimizer": optimizer,
        "precision": precision,
        "checkpoint_seconds": checkpoint_seconds,
    }
    with as_options():
        config = configs.from_dict(TrainingConfig, given)
    where = resolve_device(device)
    plugins, layout, _ = find(source, tuple(plugin_dir or ()), runs)
    source_class = plugins.data_sources[data]
    options = _data_config(source_class, data_option)
    # Weights, gradients and at least one moment a weight.
    require_memory(12 * plugins.costs(layout, length=seq_len).total.parameters, where, ADVICE)
    run = {
        "layout": layout.hash,
        "training": dataclasses.asdict(config),
        "data": {"source": data, **configs.to_dict(options)},
        "seed": seed,
    }
    with interrupts.explained(RESUME), explained(ADVICE):
        text = _open(source_class, options, seed, runs)
        _refuse_vocabulary(text, data, layout.vocab_size)
        _claim(out, run, layout.to_dict())
        model = plugins.build(layout, device=where, seed=seed)
        result = _train(model, text, config, out)
        record = _finish(model, text, config, out, {**run, "source": source}, result)
    if json:
        print_json({**record, "path": str(out)})
        return
    figures = f"validation loss {record['validation_loss']:.4f} nats a token"
    if record["bits_per_byte"] is not None:
        figures += f", {record['bits_per_byte']:.4f} bits a byte"
    say(f"{figures}, after {result.seconds:.0f} s. Weights and curve: {out}/")


def _data_config(source_class: type[DataSource], pairs: list[str] | None) -> Any:
    """The Config of a data source from `KEY=VALUE` pairs.

    Raises:
        WorkbenchError: no TOML, or no such field.
    """
    import tomllib

    from workbench import config as configs
    from workbench.errors import WorkbenchError

    values: dict[str, Any] = {}
    for pair in pairs or ():
        try:
            values.update(tomllib.loads(pair))
        except tomllib.TOMLDecodeError as error:
            key, _, value = pair.partition("=")
            raise WorkbenchError(
                f"--data-option {pair}: {error}. Write KEY=VALUE with a TOML value; text is "
                f"quoted: --data-option '{key.strip() or 'KEY'}=\"{value.strip() or 'VALUE'}\"'"
            ) from None
    try:
        return configs.from_dict(source_class.Config, values)
    except WorkbenchError as error:
        raise error.within("--data-option") from None


def _open(source_class: type[DataSource], options: Any, seed: int, runs: Path | None) -> DataSource:
    from workbench.files import make_folder
    from workbench.records import runs_folder

    cache = runs_folder(runs) / ".cache"
    make_folder(cache)
    return source_class(options, seed=seed, cache_dir=cache)


def _refuse_vocabulary(text: DataSource, name: str, vocab_size: int) -> None:
    from workbench.errors import FieldError

    if text.vocab_size > vocab_size:
        raise FieldError(
            "vocab_size",
            f"the layout has {vocab_size} rows and {name} yields ids up to "
            f"{text.vocab_size - 1}: change the layout's vocab_size or the data",
        )


def _claim(out: Path, run: dict[str, Any], layout: dict[str, Any]) -> None:
    """Take the folder for this run, or find that it is this run's already.

    Raises:
        FieldError: it holds something else; says what.
    """
    from workbench.errors import FieldError
    from workbench.files import make_folder, read_json, write_json

    if (out / "model.safetensors").exists():
        raise FieldError("OUT", f"{out} holds a trained model already: name another folder")
    if (out / "run.json").exists():
        before = read_json(out / "run.json")
        changed = [
            name for name in run if not isinstance(before, dict) or before.get(name) != run[name]
        ]
        if changed:
            raise FieldError(
                "OUT",
                f"{out} holds an unfinished run with another {' and another '.join(changed)}: "
                "repeat its arguments to go on, or name another folder",
            )
        return
    make_folder(out)
    if any(out.iterdir()):
        raise FieldError("OUT", f"{out} is not empty: name a new folder")
    write_json(out / "layout.json", layout)
    write_json(out / "run.json", run)


def _train(model: HybridLM, text: DataSource, config: TrainingConfig, out: Path) -> TrainingResult:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from workbench.errors import WorkbenchError
    from workbench.training import DivergedError
    from workbench.training import train as run_training

    console = log()
    checkpoint = out / "checkpoint.safetensors"
    if checkpoint.exists():
        console.print(f"Resuming from {checkpoint}")
    columns = (TextColumn("training"), BarColumn(), TextColumn("{task.description}"))
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=config.steps)

        def show(point: dict[str, float]) -> None:
            bar.update(task, completed=point["step"], description=f"loss {point['loss']:.3f}")

        try:
            return run_training(model, text, config, checkpoint=checkpoint, progress=show)
        except DivergedError as error:
            raise WorkbenchError(f"training diverged: {error}. Lower --lr.") from None


def _finish(
    model: HybridLM,
    text: DataSource,
    config: TrainingConfig,
    out: Path,
    run: dict[str, Any],
    result: TrainingResult,
) -> dict[str, Any]:
    """Judge the model and write what came of it, the weights last: they mark a finished run."""
    from workbench.environment import environment
    from workbench.evaluation import evaluate
    from workbench.files import write_json
    from workbench.training import save_weights

    judged = evaluate(model, text, config.batch_size, config.seq_len)
    record = {
        **run,
        "tokens": config.steps * config.batch_size * config.seq_len,
        "seconds": result.seconds,
        "validation_loss": judged.loss,
        "bits_per_byte": None if judged.num_bytes is None else judged.bits_per_byte,
        "environment": environment(str(model.device)),
    }
    write_json(out / "training.json", {**record, "curve": result.curve})
    save_weights(model, out / "model.safetensors", {"layout": model.layout.hash})
    (out / "checkpoint.safetensors").unlink(missing_ok=True)
    return record
