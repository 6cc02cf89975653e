"""Run as a script: an interpreter that has imported modules, which others are forked from.

    python OPTION prepared_source.py MODULE… [-- PACKAGE…]

Standard input is a socket. On it comes a line of JSON for each process: its `command` (what follows
the interpreter and the same OPTION), `environment`, `folder` (to run in) and `session` (whether it
leads one of its own), with three descriptors: its standard streams. It is answered by the process's
id and, when it has ended, by its status, both as an `INT`. One process runs at a time.

What is forked runs the command here, as the last thing that this script does, so that it ends as
any interpreter does. It has not imported the PACKAGEs until it does, although that takes no time.
"""

import contextlib
import gc
import importlib
import importlib.abc
import json
import os
import runpy
import socket
import struct
import sys
import tempfile
from importlib.machinery import ModuleSpec
from types import ModuleType

INT = struct.Struct("i")


class Shelf(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Takes an imported package away, and puts it back whole when it is imported.

    Args:
        package: its name.
    """

    def __init__(self, package: str) -> None:
        self._spec = sys.modules[package].__spec__
        names = [name for name in sys.modules if name.partition(".")[0] == package]
        self._modules = {name: sys.modules.pop(name) for name in names}
        sys.meta_path.insert(0, self)

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name not in self._modules or name != self._spec.name:
            return None
        spec = ModuleSpec(name, self, origin=self._spec.origin, is_package=True)
        spec.submodule_search_locations = self._spec.submodule_search_locations
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        sys.meta_path.remove(self)
        module.__spec__ = self._spec
        sys.modules.update(self._modules)


def serve(control: socket.socket) -> dict | None:
    """Fork until nobody asks any more: None. In what is forked: what to run."""
    with contextlib.suppress(BrokenPipeError):  # who asked is gone
        while received := receive(control):
            asked, streams = received
            process = os.fork()
            if not process:
                control.close()
                become(asked, streams)
                return asked
            for stream in streams:
                os.close(stream)
            control.sendall(INT.pack(process))
            _, status = os.waitpid(process, 0)
            control.sendall(INT.pack(os.waitstatus_to_exitcode(status)))
    return None


def receive(control: socket.socket) -> tuple[dict, list[int]] | None:
    text, streams, _, _ = socket.recv_fds(control, 1 << 16, 3)
    part = text
    while part and not text.endswith(b"\n"):
        part = control.recv(1 << 16)
        text += part
    return (json.loads(text), streams) if part else None


def become(asked: dict, streams: list[int]) -> None:
    """Have the surroundings that a new process would have."""
    if asked["session"]:
        os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    kept = [entry for entry in sys.path if entry not in python_path()]
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.path[:] = dict.fromkeys(python_path() + kept)
    importlib.invalidate_caches()
    tempfile.tempdir = None  # found anew


def python_path() -> list[str]:
    entries = [] if sys.flags.ignore_environment else os.environ.get("PYTHONPATH", "").split(":")
    return [os.path.abspath(entry) for entry in entries if entry]


def run(command: list[str]) -> None:
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    elif command[0] == "-c":
        sys.argv = ["-c", *command[2:]]
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(command[1], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    control = socket.socket(fileno=os.dup(0))
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    gc.disable()  # imports leave no garbage, and it takes tenths of a second to see that
    modules = sys.argv[1:]
    hidden = modules.index("--") if "--" in modules else len(modules)
    for name in modules[:hidden]:
        importlib.import_module(name)
    for name in modules[hidden + 1 :]:
        Shelf(name)
    gc.enable()
    gc.freeze()
    asked = serve(control)
    if asked is not None:
        run(asked["command"])
