"""Training in several processes: what one process computes, and what each must refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from workbench.data import Batch
from workbench.errors import FieldError, WorkbenchError
from workbench.layer import Context
from workbench.layout import Block, Layout
from workbench.sharded_model import shard
from workbench.sharded_processes import Processes, check_launcher, launched, own_device
from workbench.sharded_training import Sharded, check_batch_size, share_of
from workbench.testing.toys import toy_builder

ROOT = Path(__file__).parents[2]
LAUNCHED = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "somewhere", "MASTER_PORT": "29500",
}  # fmt: skip


def process(rank: int, count: int = 2) -> Processes:
    return Processes(rank=rank, count=count, local_rank=rank, local_count=count)


def batch_of(rows: int) -> Batch:
    numbers_BT = torch.arange(rows * 3).reshape(rows, 3)
    context = Context(prefix_lengths_B=torch.arange(rows), attention_mask_BT=numbers_BT > 4)
    return Batch(inputs_BT=numbers_BT, targets_BT=numbers_BT + 1, context=context)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 9])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_shares_are_the_batch_in_its_order(rows: int, count: int) -> None:
    batch = batch_of(rows)
    shares = [share_of(batch, process(rank, count)) for rank in range(count)]
    real = [share for share in shares if (share.targets_BT != -100).any()]
    for field in ("inputs_BT", "targets_BT"):
        assert torch.equal(torch.cat([getattr(s, field) for s in real]), getattr(batch, field))
    for field in ("prefix_lengths_B", "attention_mask_BT"):
        parts = torch.cat([getattr(s.context, field) for s in real])
        assert torch.equal(parts, getattr(batch.context, field))
    for share in shares:  # every process computes, be it for nothing
        assert share.context.prefix_lengths_B is not None
        assert len(share.inputs_BT) == len(share.context.prefix_lengths_B) > 0


def test_a_batch_that_does_not_divide_is_refused_with_ones_that_do() -> None:
    check_batch_size(8, process(0, 4))
    with pytest.raises(FieldError, match=r"batch_size: 10 .* 4 processes: take 8 or 12, or"):
        check_batch_size(10, process(0, 4))
    with pytest.raises(FieldError, match="take 4, or"):
        check_batch_size(3, process(0, 4))


def test_what_a_launcher_says_is_read() -> None:
    assert launched(LAUNCHED) == Processes(rank=5, count=8, local_rank=1, local_count=4)
    assert launched({}) is None
    assert launched({**LAUNCHED, "WORLD_SIZE": "1"}) is None
    # A cluster's own WORLD_SIZE counts machines, for a launcher that is still to come.
    assert launched({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "x"}) is None
    with pytest.raises(WorkbenchError, match="MASTER_PORT not: start the processes with"):
        launched({name: value for name, value in LAUNCHED.items() if name != "MASTER_PORT"})
    with pytest.raises(WorkbenchError, match="must be numbers"):
        launched({**LAUNCHED, "RANK": "first"})


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("ACCELERATE_MIXED_PRECISION", "fp16", "give workbench train --precision bfloat16"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "computes in float32"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "--use_deepspeed true, which workbench train does"),
        ("FSDP_OFFLOAD_PARAMS", "true", "--fsdp_offload_params true"),
        ("FSDP_SHARDING_STRATEGY", "NO_SHARD", "--fsdp_sharding_strategy NO_SHARD"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "give workbench train --checkpoint-blocks"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "compiles blocks by itself"),
    ],
)
def test_what_the_launcher_was_asked_in_vain_is_refused(
    variable: str, value: str, words: str
) -> None:
    usual = {
        "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO",
        "FSDP_SHARDING_STRATEGY": "FULL_SHARD", "FSDP_OFFLOAD_PARAMS": "false",
    }  # fmt: skip
    check_launcher("float32", {})
    check_launcher("float32", usual)
    check_launcher("bfloat16", {**usual, "ACCELERATE_MIXED_PRECISION": "bf16"})
    with pytest.raises(WorkbenchError, match=words):
        check_launcher("float32", {**usual, variable: value})


def test_each_process_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert [own_device("auto", process(rank), {}) for rank in (0, 1)] == ["cuda:0", "cuda:1"]
    assert taken == [0, 1]
    assert own_device("auto", process(1), {"ACCELERATE_USE_CPU": "True"}) == "cpu"
    assert own_device("cpu", process(1), {}) == "cpu"
    with pytest.raises(FieldError, match="device: 'cuda:1': each process takes"):
        own_device("cuda:1", process(1), {})
    with pytest.raises(FieldError, match="3 processes and 2 CUDA devices"):
        own_device("auto", process(1, 3), {})


def test_memory_is_counted_by_rows() -> None:
    """Weights, gradients, a moment of a process's rows; or its rows and all initial weights."""
    assert Sharded(process(0, 2)).bytes_needed(1000, "cuda:0") == max(12 * 500, 4 * 1500)
    assert Sharded(process(0, 8)).bytes_needed(1000, "cuda:0") == max(12 * 125, 4 * 1125)
    # Processes on the CPU share its memory.
    assert Sharded(process(0, 2)).bytes_needed(1000, "cpu") == 12 * 1000


def test_a_parameter_without_rows_is_named() -> None:
    layout = Layout(d_model=8, vocab_size=16, blocks=(Block(layer="toy-mlp"),))
    model = toy_builder().build(layout, device="meta")
    model.layers[0].gain = torch.nn.Parameter(torch.empty((), device="meta"))
    with pytest.raises(WorkbenchError, match=r"blocks\.0\.layer\.gain has no dimension"):
        shard(model, mesh=None)  # type: ignore[arg-type]


LEAVING = """
import atexit
import workbench.cli.app
from workbench.cli import main

class Tensor:  # of a thread that lets go of it while Python clears up
    def __del__(self):
        print("too late")

tensor = Tensor()
atexit.register(print, "at exit")
workbench.cli.app.run_app = lambda: print("ran") or 2
main()
"""


@pytest.mark.parametrize(("count", "late"), [("2", []), (None, ["too late"])])
def test_a_process_of_a_launcher_leaves_before_python_clears_up(
    count: str | None, late: list[str]
) -> None:
    """Or gloo's threads, which outlive their group, now and then end it with SIGABRT."""
    environment = {k: v for k, v in os.environ.items() if k != "WORLD_SIZE"}
    done = subprocess.run(
        [sys.executable, "-c", LEAVING],
        env=environment | ({"WORLD_SIZE": count} if count else {}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == ["ran", "at exit", *late]
    assert (done.returncode, done.stderr) == (2, "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes of `accelerate launch` left: one launch for all tests below."""
    made = tmp_path_factory.mktemp("sharded")
    launcher = str(Path(sys.executable).with_name("accelerate"))
    command = [launcher, "launch", "--use_fsdp", "--num_processes", "2", "--main_process_port", "0"]
    done = subprocess.run(
        [*command, "-m", "tests.workbench.sharded_worker", str(made)],
        cwd=ROOT,
        # Without the GPUs and the Accelerate settings of this machine.
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HOME": str(made / "home"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return made


def found(folder: Path, check: str, rank: int = 0) -> Any:
    return json.loads((folder / f"found{rank}.json").read_text())[check]


pytest.importorskip("accelerate", reason="the launcher is the extra `accelerate`")


@pytest.mark.slow
@pytest.mark.xdist_group("sharded")
class TestTwoProcesses:
    def test_they_begin_with_the_weights_of_one(self, folder: Path) -> None:
        assert found(folder, "initial_weights_are_those_of_one_process") == {}

    @pytest.mark.parametrize(
        ("check", "curve", "weights"),
        [
            ("linked_blocks_with_adamw", 1e-5, 1e-5),
            ("checkpointed_blocks", 1e-5, 1e-5),
            ("a_loss_that_is_added", 1e-5, 1e-5),
            ("bfloat16", 1e-5, 1e-4),  # beside one process that takes the same halves
            ("untied_with_muon", 1e-4, 2e-3),  # which multiplies in bfloat16
        ],
    )
    def test_they_train_what_one_would(
        self, folder: Path, check: str, curve: float, weights: float
    ) -> None:
        for rank in range(2):
            seen = found(folder, check, rank)
            assert seen["curve"] < curve
            assert seen["weights"] < weights
            assert seen["judged"] < curve
            assert seen["same"]
            assert seen["moved"] > 0.2

    def test_muon_is_torchs(self, folder: Path) -> None:
        assert found(folder, "muon_updates_rows_as_torch_does_matrices")["difference"] < 1e-6

    def test_a_run_goes_on_in_any_number_of_processes(self, folder: Path) -> None:
        seen = found(folder, "a_checkpoint_goes_on_in_any_number_of_processes")
        assert seen["resumed"]  # to the last bit
        assert seen["alone"] < 1e-4
        assert seen["handed"] < 1e-4

    def test_the_first_one_speaks_for_all(self, folder: Path) -> None:
        refused, odd, broken, resumed, whole = found(folder, "commands")
        assert refused[0] == odd[0] == 2
        assert "Error: --batch-size: 5 sequences a step cannot be dealt out" in refused[2]
        assert "Error: device: 'cuda:1': each process takes" in odd[2]
        assert broken[0] == 130
        assert "The same command goes on from the last checkpoint." in broken[2]
        assert resumed[2].startswith("Resuming from ")
        assert "bits a byte" in resumed[1]
        record = json.loads(whole[1])
        assert record["processes"] == 2
        others = found(folder, "commands", rank=1)
        assert [status for status, _, _ in others] == [1, 1, 130, 0, 0]
        assert [out for _, out, _ in others] == [""] * 5
        assert [err for _, _, err in (*others[:2], *others[3:])] == [""] * 4

    def test_out_is_that_of_one_process(self, folder: Path) -> None:
        assert not (folder / "refused").exists()
        for name in ("broken", "whole"):
            assert {path.name for path in (folder / name).iterdir()} == {
                "layout.json", "run.json", "training.json", "model.safetensors",
            }  # fmt: skip
        weights = [
            (folder / name / "model.safetensors").read_bytes() for name in ("broken", "whole")
        ]
        assert weights[0] == weights[1]
