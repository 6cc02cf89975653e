"""`workbench train`: train one layout outside a study."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli import common, interrupts
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
    from workbench.builder import Builder
    from workbench.data import DataSource
    from workbench.layout import Layout
    from workbench.model import HybridLM
    from workbench.sharded_launch import Alone
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
    compile: Annotated[
        bool, typer.Option("--compile/--no-compile", help="The blocks; on a CUDA device alone.")
    ] = True,
    cuda_graph: Annotated[
        bool,
        typer.Option("--cuda-graph/--no-cuda-graph", help="Replay steps; on a CUDA device alone."),
    ] = True,
    checkpoint_blocks: Annotated[
        bool,
        typer.Option(
            "--checkpoint-blocks", help="Keep no activations inside blocks: less memory, slower."
        ),
    ] = False,
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

    On several GPUs: accelerate launch --use_fsdp -m workbench train LAYOUT OUT, where --batch-size
    counts the sequences of all together.
    """
    from workbench.cli.memory import explained
    from workbench.sharded_launch import started

    given = {
        "tokens": tokens,
        "batch_size": batch_size,
        "seq_len": seq_len,
        "lr": lr,
        "optimizer": optimizer,
        "precision": precision,
        "compile": "auto" if compile else "off",
        "cuda_graph": "auto" if cuda_graph else "off",
        "checkpoint_blocks": checkpoint_blocks,
        "checkpoint_seconds": checkpoint_seconds,
    }
    folders = tuple(plugin_dir or ())
    with started() as team:
        run = team.everywhere(
            lambda: _open(team, source, data, data_option, given, seed, device, folders, runs)
        )
        with interrupts.explained(RESUME), explained(ADVICE):
            record = _run(run, out)
    if json and team.is_first:
        print_json({**record, "path": str(out)})
    elif team.is_first:
        _print(record, out)


@dataclasses.dataclass(frozen=True)
class Run:
    """What is to be trained on what by whom, every option checked."""

    team: Alone
    source: str
    layout: Layout
    plugins: Builder
    device: str
    config: TrainingConfig
    data: str
    options: Any
    seed: int
    runs: Path | None

    def identity(self) -> dict[str, Any]:
        """What a run that goes on must share with the one that began."""
        from workbench import config as configs

        return {
            "layout": self.layout.hash,
            "training": dataclasses.asdict(self.config),
            "data": {"source": self.data, **configs.to_dict(self.options)},
            "seed": self.seed,
        }


def _open(
    team: Alone,
    source: str,
    data: str,
    data_option: list[str] | None,
    given: dict[str, Any],
    seed: int,
    device: str,
    plugin_dirs: tuple[Path, ...],
    runs: Path | None,
) -> Run:
    """Check what can be checked before anything is read or written.

    Raises:
        WorkbenchError: an unknown name or field, or a model that cannot fit into memory.
    """
    from workbench import config as configs
    from workbench.api import find
    from workbench.cli.memory import require_memory
    from workbench.kernel_caches import use_kernel_caches
    from workbench.records import runs_folder
    from workbench.training import TrainingConfig

    with as_options():
        config = configs.from_dict(TrainingConfig, given)
        team.check(config)
    where = team.device(device)
    use_kernel_caches(runs_folder(runs) / ".cache", where)
    plugins, layout, _ = find(source, plugin_dirs, runs)
    options = _data_config(plugins.data_sources[data], data_option)
    total = plugins.costs(layout, length=config.seq_len).total
    require_memory(team.bytes_needed(total.parameters, where), where, ADVICE)
    return Run(team, source, layout, plugins, where, config, data, options, seed, runs)


def _run(run: Run, out: Path) -> dict[str, Any]:
    """Train, judge and write; the record of what came of it."""
    text = run.team.in_turn(lambda: _data(run))
    run.team.first(lambda: _claim(out, run))
    model = run.team.build(run.plugins, run.layout, device=run.device, seed=run.seed)
    result = _train(model, text, run, out)
    return _finish(model, text, run, result, out)


def _print(record: dict[str, Any], out: Path) -> None:
    figures = f"validation loss {record['validation_loss']:.4f} nats a token"
    if record["bits_per_byte"] is not None:
        figures += f", {record['bits_per_byte']:.4f} bits a byte"
    say(f"{figures}, after {record['seconds']:.0f} s. Weights and curve: {out}/")


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


def _data(run: Run) -> DataSource:
    """The run's data, opened.

    Raises:
        FieldError: it has tokens that the layout does not know.
    """
    from workbench.errors import FieldError
    from workbench.files import make_folder
    from workbench.records import runs_folder

    cache = runs_folder(run.runs) / ".cache"
    make_folder(cache)
    text = run.plugins.data_sources[run.data](run.options, seed=run.seed, cache_dir=cache)
    if text.vocab_size > run.layout.vocab_size:
        raise FieldError(
            "vocab_size",
            f"the layout has {run.layout.vocab_size} rows and {run.data} yields ids up to "
            f"{text.vocab_size - 1}: change the layout's vocab_size or the data",
        )
    return text


def _claim(out: Path, run: Run) -> None:
    """Take the folder for this run, or find that it is this run's already.

    Raises:
        FieldError: it holds something else; says what.
    """
    from workbench.errors import FieldError
    from workbench.files import make_folder, read_json, write_json

    now = run.identity()
    if (out / "model.safetensors").exists():
        raise FieldError("OUT", f"{out} holds a trained model already: name another folder")
    if (out / "run.json").exists():
        before = read_json(out / "run.json")
        changed = [
            name for name in now if not isinstance(before, dict) or before.get(name) != now[name]
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
    write_json(out / "layout.json", run.layout.to_dict())
    write_json(out / "run.json", now)


def _train(model: HybridLM, text: DataSource, run: Run, out: Path) -> TrainingResult:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from workbench.errors import WorkbenchError
    from workbench.training import DivergedError

    console, config = log(), run.config
    console.quiet = not run.team.is_first
    checkpoint = out / "checkpoint.safetensors"
    if checkpoint.exists():
        console.print(f"Resuming from {checkpoint}")
    columns = (TextColumn("training"), BarColumn(), TextColumn("{task.description}"))
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=config.steps)

        told = time.monotonic()

        def show(point: dict[str, float]) -> None:
            nonlocal told
            state = f"step {point['step']:,} of {config.steps:,}, loss {point['loss']:.3f}"
            bar.update(task, completed=point["step"], description=state)
            if not console.is_terminal and time.monotonic() - told >= common.SILENCE:
                told = time.monotonic()
                console.print(f"training, {state}")

        try:
            return run.team.train(model, text, config, checkpoint=checkpoint, progress=show)
        except DivergedError as error:
            raise WorkbenchError(f"training diverged: {error}. Lower --lr.") from None


def _finish(
    model: HybridLM, text: DataSource, run: Run, result: TrainingResult, out: Path
) -> dict[str, Any]:
    """Judge the model and write what came of it, the weights last: they mark a finished run."""
    from workbench.environment import environment
    from workbench.files import write_json
    from workbench.model import backends_of

    config, team = run.config, run.team
    judged = team.evaluate(model, text, config.batch_size, config.seq_len)
    record = {
        **run.identity(),
        "source": run.source,
        "tokens": config.steps * config.batch_size * config.seq_len,
        "seconds": result.seconds,
        "preparing_seconds": result.preparing_seconds,
        "mode": result.mode,
        "note": result.note,
        "processes": team.count,
        "backend": backends_of(model, half=config.precision == "bfloat16"),
        "validation_loss": judged.loss,
        "bits_per_byte": None if judged.num_bytes is None else judged.bits_per_byte,
        "environment": environment(str(model.device)),
    }
    team.first(lambda: write_json(out / "training.json", {**record, "curve": result.curve}))
    team.save_weights(model, out / "model.safetensors", {"layout": model.layout.hash})
    team.first(lambda: (out / "checkpoint.safetensors").unlink(missing_ok=True))
    return record
