"""What the tests of sharded training run in each of two processes that torchrun starts.

    torchrun --nproc-per-node 2 -m tests.workbench.sharded_worker FOLDER

Every check ends in both processes before the next begins, and one that fails ends both. Each writes
what they found to `FOLDER/foundRANK.json`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.workbench.conftest import TOYS
from tests.workbench.linked_layers import BareMLP, Loser, Publisher, Reader, SharedMLP
from workbench import sharded_processes
from workbench.builder import Builder
from workbench.cli.app import run_app
from workbench.data import Batch, DataSource
from workbench.evaluation import evaluate
from workbench.layout import Block, Layout
from workbench.model import HybridLM
from workbench.sharded_launch import leave, started
from workbench.sharded_model import gathered, local, rows, tensors_of
from workbench.sharded_optimizers import ShardedMuon, ShardedParameters
from workbench.sharded_processes import Processes
from workbench.sharded_training import Sharded, ShardedRun, ShardedStep, share_of
from workbench.testing.toys import toy_builder
from workbench.train_step import StepOptions, TrainStep
from workbench.training import TrainingConfig, TrainingRun, train

LINKED = ("shared", "toy-mlp", "publisher", "loser", "shared", "reader", "bare", "reader")
VOCABULARY, WIDTH = 37, 9  # odd, and shorter than some: rows do not divide
CONFIG = TrainingConfig(
    tokens=4 * 24 * 8, batch_size=4, seq_len=24, lr=0.01, grad_clip=0.05, checkpoint_seconds=0
)


def linked_builder() -> Builder:
    builder = toy_builder()
    layers = {
        "shared": SharedMLP, "publisher": Publisher, "reader": Reader, "loser": Loser,
        "bare": BareMLP,
    }  # fmt: skip
    for name, layer in layers.items():
        builder.layers.add(name, layer, builder.layers.provenance("toy-mlp"))
    return builder


def layout_of(*names: str, tied: bool = True) -> Layout:
    blocks = tuple(Block(layer=name) for name in names)
    return Layout(d_model=WIDTH, vocab_size=VOCABULARY, blocks=blocks, tie_embeddings=tied)


class Uneven(DataSource):
    """Random tokens; how many targets carry no loss differs from sequence to sequence."""

    @property
    def vocab_size(self) -> int:
        return VOCABULARY

    def _batch(self, key: int, batch_size: int, length: int) -> Batch:
        generator = torch.Generator().manual_seed(key)
        start = torch.randint(VOCABULARY, (batch_size, 1), generator=generator)
        tokens = (start + torch.arange(length + 1)) % VOCABULARY
        targets = tokens[:, 1:].clone()
        for row in range(batch_size):
            targets[row, : row * 5] = -100
        return Batch(inputs_BT=tokens[:, :-1], targets_BT=targets, num_bytes=7.0 * batch_size)

    def train_batch(self, step: int, batch_size: int, length: int) -> Batch:
        return self._batch(step, batch_size, length)

    def validation_batches(self, batch_size: int, length: int):
        for key, size in ((901, batch_size), (902, 3), (903, 1)):
            yield self._batch(key, size, length)

    def describe(self) -> dict[str, Any]:
        return {}


class TwoParts(TrainStep):
    """A step of one process that takes the halves of a batch one after the other."""

    def _run(self, batch: Batch) -> Tensor:
        losses = []
        for rank in range(2):
            part = share_of(batch, Processes(rank=rank, count=2, local_rank=0, local_count=1))
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.options.half):
                total = self.model.loss(part.inputs_BT, part.targets_BT, reduction="sum")
            losses.append(total / (batch.targets_BT != -100).sum())
            losses[-1].backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.options.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
        return sum(losses).detach()


class InTwoParts(TrainingRun):
    def _make_step(self, options: StepOptions) -> TrainStep:
        return TwoParts(self.model, self.optimizers, options)


class Checks:
    """Each public method is a check; what it returns is written down."""

    def __init__(self, team: Sharded, folder: Path) -> None:
        self.team, self.folder = team, folder
        self.builder = linked_builder()
        self.data = Uneven(None, seed=0, cache_dir=folder)

    def sharded(self, layout: Layout, seed: int = 5) -> HybridLM:
        return self.team.build(self.builder, layout, device="cpu", seed=seed)

    def whole(self, model: HybridLM) -> dict[str, Tensor]:
        """The tensors of a sharded model, in the first process; checked in the other, too."""
        return gathered(tensors_of(model), self.team.processes)

    def compared(
        self, layout: Layout, config: TrainingConfig, run: type[TrainingRun] = TrainingRun
    ) -> dict[str, Any]:
        """Curve, weights and figures of two processes beside those of one."""
        model = self.sharded(layout)
        result = self.team.train(model, self.data, config)
        judged = self.team.evaluate(model, self.data, 4, 24)
        weights = self.whole(model)
        alone = self.builder.build(layout, seed=5)
        expected = run(alone, self.data, config).complete(None, None, None)
        wanted = evaluate(alone, self.data, 4, 24)
        assert [p["step"] for p in result.curve] == [p["step"] for p in expected.curve]
        pairs = zip(result.curve, expected.curve, strict=True)
        return {
            "curve": max(abs(one["loss"] - other["loss"]) for one, other in pairs),
            "moved": expected.curve[0]["loss"] - expected.curve[-1]["loss"],
            "weights": distance(weights, tensors_of(alone)) if self.team.is_first else 0.0,
            "judged": abs(judged.loss - wanted.loss),
            "same": (judged.targets, judged.num_bytes) == (wanted.targets, wanted.num_bytes),
        }

    def initial_weights_are_those_of_one_process(self) -> dict[str, Any]:
        layouts = [layout_of(*LINKED), layout_of("toy-mlp", tied=False)]
        for layout in layouts:
            model = self.sharded(layout)
            expected = tensors_of(self.builder.build(layout, seed=5))
            held = sum(p.to_local().numel() for p in model.parameters())
            assert held < 0.62 * sum(p.numel() for p in expected.values())
            assert model.num_parameters == sum(p.numel() for p in expected.values())
            whole = self.whole(model)
            if self.team.is_first:
                assert list(whole) == list(expected)
                assert distance(whole, expected) == 0.0
        return {}

    def linked_blocks_with_adamw(self) -> dict[str, Any]:
        config = dataclasses.replace(CONFIG, optimizer="adamw")
        return self.compared(layout_of(*[n for n in LINKED if n != "loser"]), config)

    def untied_with_muon(self) -> dict[str, Any]:
        return self.compared(layout_of("toy-mlp", "shared", "shared", tied=False), CONFIG)

    def checkpointed_blocks(self) -> dict[str, Any]:
        config = dataclasses.replace(CONFIG, checkpoint_blocks=True, optimizer="adamw")
        return self.compared(layout_of("publisher", "shared", "reader", "shared"), config)

    def bfloat16(self) -> dict[str, Any]:
        config = dataclasses.replace(CONFIG, precision="bfloat16", optimizer="adamw")
        layout = layout_of("publisher", "shared", "reader", "shared")
        return self.compared(layout, config, run=InTwoParts)

    def a_loss_that_is_added(self) -> dict[str, Any]:
        layout = layout_of("loser", "toy-mlp")
        return self.compared(layout, dataclasses.replace(CONFIG, optimizer="adamw", tokens=960))

    def muon_updates_rows_as_torch_does_matrices(self) -> dict[str, Any]:
        def matrices() -> nn.Module:
            torch.manual_seed(3)
            shapes = [(5, 3), (5, 3), (5, 3), (3, 8), (1, 4), (6, 6)]
            return nn.Sequential(*(nn.Linear(n, m, bias=False) for m, n in shapes))

        options = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
        whole, dealt = matrices(), matrices()
        mesh = init_device_mesh("cpu", (2,))
        fully_shard(dealt, mesh=mesh)
        parameters = ShardedParameters(dealt)
        plain = [parameters.plain(p) for p in dealt.parameters()]
        theirs = torch.optim.Muon(whole.parameters(), **options)
        ours = ShardedMuon([{**options, "params": plain}], parameters, self.team.processes)
        for step in range(5):
            torch.manual_seed(step)
            for mine, other in zip(plain, whole.parameters(), strict=True):
                other.grad = torch.randn(other.shape)
                mine.grad = local(rows(other.grad, parameters.whole(mine)))
            ours.step()
            theirs.step()
        with torch.no_grad():
            pairs = zip(dealt.parameters(), whole.parameters(), strict=True)
            return {"difference": max(float((a.full_tensor() - b).abs().max()) for a, b in pairs)}

    def a_checkpoint_goes_on_in_any_number_of_processes(self) -> dict[str, Any]:
        layout = layout_of("shared", "publisher", "reader", "shared", tied=False)
        path = self.folder / "checkpoint.safetensors"

        def run(stop: int | None, checkpoint: Path | None) -> list[float]:
            model = self.sharded(layout, seed=5 if stop else 6)  # other weights, which are replaced
            sharded = ShardedRun(model, self.data, CONFIG, self.team.processes)
            return [p["loss"] for p in sharded.complete(checkpoint, None, stop).curve]

        unbroken = run(CONFIG.steps, None)
        begun = run(3, path)
        resumed = run(None, path)
        alone = train(self.builder.build(layout, seed=6), self.data, CONFIG, checkpoint=path)
        # And what one process began.
        self.team.first(path.unlink)
        begin = self.builder.build(layout, seed=5)
        self.team.first(lambda: train(begin, self.data, CONFIG, checkpoint=path, stop=3))
        handed = run(None, path)
        assert (len(begun), len(resumed)) == (3, CONFIG.steps)
        return {
            "resumed": resumed == unbroken,
            "alone": curve_distance([p["loss"] for p in alone.curve], unbroken),
            "handed": curve_distance(handed, unbroken),
        }


def curve_distance(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@torch.no_grad()
def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in other)


def commands(folder: Path) -> list[Any]:
    """`workbench train` as a user gives it: refused, broken off, resumed, and unbroken.

    Returns:
        Of each its exit status and what this process printed.
    """
    # A store meets only once: the commands talk through the processes' group that is there.
    sharded_processes.joined = contextlib.nullcontext
    sharded_processes.PATIENCE = 0.0
    (folder / "layout.json").write_text(
        json.dumps({"d_model": 9, "vocab_size": 16, "blocks": [{"layer": "toy"}] * 2})
    )
    options = (
        "--plugin-dir", TOYS, "--data", "counting", "--tokens", 64 * 8, "--seq-len", 16,
        "--runs", folder / "runs",
    )  # fmt: skip

    def command(out: str, *more: object) -> list[Any]:
        given = ["train", folder / "layout.json", folder / out, *options, *more]
        words = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(words[0]), contextlib.redirect_stderr(words[1]):
            status = run_app([str(x) for x in given])
        return [status, *(stream.getvalue() for stream in words)]

    done = [command("refused", "--batch-size", 5), command("odd", "--device", "cuda:1")]
    real, calls = ShardedStep._run, iter(range(100))

    def interrupted(step: ShardedStep, batch: Batch) -> Tensor:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return real(step, batch)

    ShardedStep._run = interrupted
    done.append(command("broken", "--batch-size", 4, "--checkpoint-seconds", 1e-9))
    ShardedStep._run = real
    done.append(command("broken", "--batch-size", 4, "--checkpoint-seconds", 1e-9))
    done.append(command("whole", "--batch-size", 4, "--json"))
    return done


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with started() as team:
        assert isinstance(team, Sharded)
        checks = Checks(team, folder)
        found: dict[str, Any] = {}
        for name in [n for n in vars(Checks) if not n.startswith("_")]:
            if name in ("sharded", "whole", "compared"):
                continue
            check: Callable[[], dict[str, Any]] = getattr(checks, name)
            found[name] = check()
        found["commands"] = commands(folder)
        (folder / f"found{team.processes.rank}.json").write_text(json.dumps(found, indent=1))
    leave(0)


if __name__ == "__main__":
    main()
