"""`workbench train`: train one layout outside a study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from workbench.cli.common import Device, PluginDirs, Runs, builder, console

EXAMPLE = "Example: workbench train mamba.json trained/mamba --tokens 1000000 --data stdlib"


def train(
    source: Annotated[str, typer.Argument(help="JSON file, STUDY:TRIAL or preset.")],
    out: Annotated[Path, typer.Argument(help="Folder for layout, curve and weights.")],
    tokens: Annotated[int, typer.Option(help="Training tokens.")] = 1_000_000,
    data: Annotated[str, typer.Option(help="Data source: stdlib, mqar, …")] = "stdlib",
    data_option: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE of the source's Config, VALUE in TOML; repeatable."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences a step.")] = 8,
    seq_len: Annotated[int, typer.Option(help="Tokens a sequence.")] = 256,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    optimizer: Annotated[str, typer.Option(help="muon or adamw.")] = "muon",
    precision: Annotated[str, typer.Option(help="float32 or bfloat16 (autocast).")] = "float32",
    seed: Annotated[int, typer.Option(help="Of weights and data order.")] = 0,
    device: Device = "auto",
    runs: Runs = None,
    plugin_dir: PluginDirs = None,
) -> None:
    """Train one layout; run again with the same arguments, it continues from its checkpoint."""
    from workbench import config as configs
    from workbench.api import load_layout
    from workbench.environment import environment, resolve_device
    from workbench.errors import FieldError
    from workbench.evaluation import evaluate
    from workbench.files import write_json
    from workbench.records import runs_folder
    from workbench.training import TrainingConfig, save_weights
    from workbench.training import train as run_training

    plugins = builder(plugin_dir)
    config = configs.from_dict(
        TrainingConfig,
        {
            "tokens": tokens,
            "batch_size": batch_size,
            "seq_len": seq_len,
            "lr": lr,
            "optimizer": optimizer,
            "precision": precision,
        },
    )
    where = resolve_device(device)
    layout = load_layout(source, runs=runs, plugin_dirs=tuple(plugin_dir or ()))
    source_class = plugins.data_sources[data]
    cache = runs_folder(runs) / ".cache"
    cache.mkdir(parents=True, exist_ok=True)
    text = source_class(
        configs.from_dict(source_class.Config, _options(data_option)), seed=seed, cache_dir=cache
    )
    if text.vocab_size > layout.vocab_size:
        raise FieldError(
            "vocab_size",
            f"the layout has {layout.vocab_size} rows and {data} yields ids up to "
            f"{text.vocab_size - 1}: change the layout's vocab_size or the data",
        )
    if (out / "model.safetensors").exists():
        raise FieldError("OUT", f"{out} holds a trained model already: name another folder")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "layout.json", layout.to_dict())
    model = plugins.build(layout, device=where, seed=seed)
    result = _with_progress(run_training, model, text, config, out / "checkpoint.safetensors")
    judged = evaluate(model, text, batch_size, seq_len)
    write_json(
        out / "training.json",
        {
            "tokens": config.steps * batch_size * seq_len,
            "seconds": result.seconds,
            "validation_loss": judged.loss,
            "bits_per_byte": None if judged.num_bytes is None else judged.bits_per_byte,
            "curve": result.curve,
            "environment": environment(where),
        },
    )
    save_weights(model, out / "model.safetensors", {"layout": layout.hash})
    (out / "checkpoint.safetensors").unlink(missing_ok=True)
    figures = f"validation loss {judged.loss:.4f} nats a token"
    if judged.num_bytes is not None:
        figures += f", {judged.bits_per_byte:.4f} bits a byte"
    console().print(f"{figures}, after {result.seconds:.0f} s. Weights and curve: {out}/")


def _options(pairs: list[str] | None) -> dict[str, Any]:
    import tomllib

    from workbench.errors import WorkbenchError

    try:
        return tomllib.loads("\n".join(pairs or ()))
    except tomllib.TOMLDecodeError as error:
        raise WorkbenchError(
            f"--data-option: {error}. Write KEY=VALUE with a TOML value, such as "
            "--data-option 'paths=[\"notes/*.txt\"]'."
        ) from None


def _with_progress(run: Any, model: Any, data: Any, config: Any, checkpoint: Path) -> Any:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    out = console(stderr=True)
    columns = (TextColumn("training"), BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeRemainingColumn(), console=out, disable=not out.is_terminal) as bar:
        task = bar.add_task("", total=config.steps)

        def show(point: dict[str, float]) -> None:
            bar.update(task, completed=point["step"], description=f"loss {point['loss']:.3f}")

        return run(model, data, config, checkpoint=checkpoint, progress=show)
