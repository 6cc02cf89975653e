"""The plugin through which faults reach a worker: toy things that strike where a ticket says."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch

from tests.workbench.faults.schedule import Fault
from tests.workbench.faults.tickets import Tickets
from tests.workbench.toy_plugins.toys import Alternate, Counting, Loss, Toy, Weights
from workbench import Metric, hookimpl

TICKETS = Tickets.from_environment()
PEER = "tests.workbench.faults.optuna_peer"  # for comparison: no parent, so the driver acts for it
PROCESSES = ("workbench.executors.worker", "workbench.executors.worker_source", PEER)
REPLACED = {"checkpoint.safetensors": "checkpoint", "model.safetensors": "weights"}
ROOM = 16 * 2**20  # bytes of address space that a limited worker has left


class Trial:
    """The trial that this worker is at, and the fault that it shall meet."""

    folder = ""
    fault: Fault | None = None
    passes = 0


def running() -> str:
    """The module that this process was started to run."""
    return getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", "")


def reach(place: str) -> bool:
    """Strike if the fault of the present trial is due; True where it is for the caller to do."""
    if running() not in PROCESSES:
        return False
    log = Path(os.readlink("/proc/self/fd/1"))  # what a trial prints is in its log
    folder = str(log.parent)
    if log.name != "log.txt":
        return False
    if folder != Trial.folder:
        Trial.folder, Trial.fault, Trial.passes = folder, TICKETS.take_for(log.parent), 0
    fault = Trial.fault
    if fault is None or fault.place != place:
        return False
    Trial.passes += 1
    if Trial.passes < fault.after:
        return False
    Trial.fault = None
    TICKETS.fire(fault, folder)
    return strike(fault)


def strike(fault: Fault) -> bool:
    match fault.kind:
        case "worker killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "worker exits":
            os._exit(3)
        case "sys.exit":
            sys.exit(0)
        case "hang":
            time.sleep(3600)
        case "out of memory":
            starve(fault.shape)
        case "plugin raises":
            raise ValueError("a planted fault")
        case "worker's clock jumps":
            real, jump = time.time, fault.seconds
            time.time = lambda: real() + jump
        case "parent killed":
            if running() == PEER:
                TICKETS.ask(fault, os.getpid())
            else:
                os.kill(study_process(), signal.SIGKILL)
            time.sleep(3600)
        case "disk full" | "storage away":
            TICKETS.ask(fault, study_process())
    return fault.kind == "NaN"


def study_process() -> int:
    """The process that runs the study: the parent of what this worker was forked from."""
    status = Path(f"/proc/{os.getppid()}/status").read_text()
    return int(status.partition("PPid:")[2].split()[0])


def starve(shape: str) -> None:
    if shape == "MemoryError":
        raise MemoryError
    if shape == "torch":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if shape == "allocator":
        torch.empty(2**50)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, before[1]))
    try:
        torch.ones(4 * ROOM)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    raise AssertionError("the limit did not hold")


def _replace(source, target, _real=os.replace):
    if place := REPLACED.get(Path(target).name):
        reach(place)
    _real(source, target)


os.replace = _replace


class Faulty(Toy):
    """A toy layer whose constructor and forward may fail."""

    glyph = "f"

    def __init__(self, d_model, config, **factory):
        super().__init__(d_model, config, **factory)
        if self.proj.weight.device.type != "meta":
            reach("constructor")

    def forward(self, x_BTD, context=None, state=None):
        y_BTD = super().forward(x_BTD, context, state)
        return y_BTD * float("nan") if self.training and reach("forward") else y_BTD


class Wide(Faulty):
    glyph = "w"


class FaultyLoss(Loss):
    """The objective."""

    def measure(self, subject):
        # The weights are written when the training is over, so not yet at a rung.
        is_over = Path(os.readlink("/proc/self/fd/1")).with_name("model.safetensors").exists()
        place = "quantized" if is_over else "rung"
        return float("nan") if reach(place) else super().measure(subject)


class Trained(Metric):
    stage = "trained"

    def measure(self, subject):
        reach("trained")
        return 1.0


class Measured(Metric):
    stage = "measured"

    def measure(self, subject):
        return float("nan") if reach("measured") else 1.0


@hookimpl
def register_layers(register):
    register("faulty", Faulty)
    register("wide", Wide)


@hookimpl
def register_placements(register):
    register("alternate", Alternate)


@hookimpl
def register_data_sources(register):
    register("counting", Counting)


@hookimpl
def register_metrics(register):
    register("loss", FaultyLoss)
    register("weights", Weights)
    register("trained", Trained)
    register("measured", Measured)
