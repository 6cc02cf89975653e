"""Backends of operations: which one runs, what settings demand, and what is refused."""

from __future__ import annotations

import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from workbench import FieldError, UnknownNameError, WorkbenchError, kernels
from workbench.errors import PluginError
from workbench.kernels import TORCH, VARIABLE, Backend, Operation

PROBED: list[str] = []


def works() -> None:
    PROBED.append("works")


def breaks() -> None:
    PROBED.append("breaks")
    raise ImportError("no compiled kernels\nand a second line")


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """No operation but the test's, no setting, and a device that is said to be there."""
    monkeypatch.setattr(kernels, "_operations", {})
    monkeypatch.setattr(kernels, "_preferred", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.delenv(VARIABLE, raising=False)
    kernels._from_environment.cache_clear()
    PROBED.clear()
    yield
    kernels._from_environment.cache_clear()


def operation(name="scan", **probes) -> Operation:
    """An operation with backends in the order given; all work if none is given."""
    probes = probes or {"fast": works, "slow": works}
    backends = [Backend(name=key, probe=p, install=f"get {key}") for key, p in probes.items()]
    return Operation(name, backends, home=__name__)


def test_the_first_that_works_and_can_take_the_call_is_chosen():
    scan = operation(broken=breaks, fast=works, slow=works)
    assert scan.choose(("broken", "fast", "slow")) == "fast"
    assert scan.choose(("slow", "fast")) == "fast"  # the operation's order, not the caller's
    assert scan.choose(("slow",)) == "slow"
    assert scan.choose(("broken",)) == TORCH
    assert scan.choose(()) == TORCH
    assert scan.order() == ("fast", "slow", TORCH)


def test_a_probe_runs_once_and_only_if_it_matters():
    scan = operation(fast=works, broken=breaks)
    for _ in range(3):
        assert scan.choose(("fast", "broken")) == "fast"
    assert PROBED == ["works"]
    for _ in range(3):
        assert scan.choose(("broken",)) == TORCH
    assert PROBED == ["works", "breaks"]


def test_what_another_process_found_is_not_probed_again():
    scan, mix = operation(fast=works, broken=breaks), operation("mix", fast=works)
    elsewhere = {
        "scan": {"fast": "", "broken": "ImportError: gone", "unknown": ""},
        "mix": {"fast": "too old"},
        "stranger": {"fast": ""},
    }
    assert mix.order() == ("fast", TORCH)
    kernels.take_over(elsewhere)
    assert scan.order() == ("fast", TORCH)
    assert mix.order() == ("fast", TORCH)  # seen here
    assert PROBED == ["works"]
    assert kernels.found() == {
        "scan": {"fast": "", "broken": "ImportError: gone"},
        "mix": {"fast": ""},
    }


def test_a_failed_probe_is_told_in_a_line():
    scan = operation(broken=breaks)
    assert scan.why_not("broken") == "ImportError: no compiled kernels"
    assert scan.why_not(TORCH) == ""


def test_without_a_device_nothing_is_probed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    scan = operation()
    assert scan.why_not("fast") == "there is no CUDA device"
    assert scan.choose(("fast", "slow")) == TORCH
    assert PROBED == []


def test_what_a_study_demands_runs_wherever_it_can():
    operation()
    kernels.prefer({"scan": "slow"})
    assert kernels.choose("scan", ("fast", "slow")) == "slow"
    assert kernels.choose("scan", ("fast",)) == TORCH  # not another that nobody asked for
    kernels.prefer({"scan": TORCH})
    assert kernels.choose("scan", ("fast", "slow")) == TORCH
    kernels.prefer({})
    assert kernels.choose("scan", ("fast", "slow")) == "fast"


def test_preferring_does_not_load_the_compiler(monkeypatch):
    operation()
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    kernels.prefer({"scan": "slow"})
    assert "torch._dynamo" not in sys.modules


def test_only_a_change_of_preferences_throws_compiled_code_away(monkeypatch):
    operation()
    resets = []
    compiler = SimpleNamespace(reset_code_caches=lambda: resets.append(1))
    monkeypatch.setitem(sys.modules, "torch._dynamo", compiler)
    for backends in ({}, {"scan": "slow"}, {"scan": "slow"}, {"scan": TORCH}, {}, {}):
        kernels.prefer(backends)
    assert len(resets) == 3


def test_a_demanded_backend_that_does_not_work_is_an_error_with_a_way_out(monkeypatch):
    scan = operation(fast=works, broken=breaks)
    kernels.prefer({"scan": "broken"})
    with pytest.raises(WorkbenchError) as caught:
        scan.choose(("fast",))
    for words in (
        "scan shall run on 'broken'",
        "ImportError: no compiled kernels",
        "Install it with: get broken",
        "leave it out of [runtime.backends] and WORKBENCH_BACKENDS",
    ):
        assert words in str(caught.value)
    with pytest.raises(WorkbenchError, match="get broken"):
        kernels.require("cuda")
    with pytest.raises(WorkbenchError, match="get broken"):
        kernels.in_use("cuda", {__name__.partition(".")[0]})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    scan = operation(broken=works)
    with pytest.raises(WorkbenchError, match="there is no CUDA device") as caught:
        scan.choose(("broken",))
    assert "Install" not in str(caught.value)  # it would not help


@pytest.mark.parametrize(
    ("text", "scan", "mix"),
    [
        ("", "fast", "fast"),
        ("scan=slow", "slow", "fast"),
        (" scan = slow , mix = torch ", "slow", TORCH),
        ("torch", TORCH, TORCH),
        ("slow", "slow", "fast"),  # mix has no such backend, and chooses for itself
        ("torch,scan=slow", "slow", TORCH),
        ("scan=slow,torch", "slow", TORCH),
        ("fast,scan=torch", TORCH, "fast"),
    ],
)
def test_every_form_of_the_environment_variable(monkeypatch, text, scan, mix):
    operation("scan")
    operation("mix", fast=works)
    monkeypatch.setenv(VARIABLE, text)
    assert kernels.choose("scan", ("fast", "slow")) == scan
    assert kernels.choose("mix", ("fast",)) == mix


def test_the_environment_goes_before_the_study(monkeypatch):
    operation("scan")
    operation("mix")
    kernels.prefer({"scan": "slow", "mix": "slow"})
    monkeypatch.setenv(VARIABLE, "scan=fast")
    assert kernels.preference("scan") == "fast"
    assert kernels.preference("mix") == "slow"
    monkeypatch.setenv(VARIABLE, "torch")
    assert kernels.preference("mix") == TORCH


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fsat", "unknown backend in WORKBENCH_BACKENDS 'fsat'. Did you mean 'fast'"),
        ("scna=fast", "unknown operation in WORKBENCH_BACKENDS 'scna'. Did you mean 'scan'"),
        ("scan=slwo", "unknown backend in WORKBENCH_BACKENDS.scan 'slwo'. Did you mean 'slow'"),
        ("scan=", "unknown backend in WORKBENCH_BACKENDS.scan ''"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_slip_in_the_environment_variable_is_refused_on_any_device(
    monkeypatch, device, text, words
):
    operation()
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(UnknownNameError) as caught:
        kernels.require(device)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("backends", "words"),
    [
        ({"scna": "fast"}, "unknown operation in runtime.backends 'scna'. Did you mean 'scan'"),
        ({"scan": "fsat"}, "unknown backend in runtime.backends.scan 'fsat'. Did you mean 'fast'"),
        ({"scan": 3}, "runtime.backends.scan: expected a backend's name, got 3"),
    ],
)
def test_a_slip_in_a_study_is_refused_and_changes_nothing(backends, words):
    operation()
    kernels.prefer({"scan": "slow"})
    with pytest.raises(WorkbenchError) as caught:
        kernels.prefer(backends)
    assert words in str(caught.value)
    assert kernels.preference("scan") == "slow"


def test_a_study_on_a_cpu_cannot_demand_kernels_of_a_cuda_device():
    operation()
    kernels.prefer({"scan": TORCH})
    kernels.require("cpu")
    kernels.prefer({"scan": "fast"})
    kernels.require("cuda:1")
    with pytest.raises(FieldError, match=r"runtime\.backends\.scan: 'fast' needs a CUDA device"):
        kernels.require("cpu")


def test_what_is_in_use_is_that_of_the_packages_named():
    operation("scan", broken=breaks, fast=works, slow=works)
    operation("mix")
    kernels.prefer({"mix": "slow"})
    here = {__name__.partition(".")[0]}
    expected = {"mix": ["slow", TORCH], "scan": ["fast", "slow", TORCH]}
    assert kernels.in_use("cuda", here) == expected
    assert kernels.in_use("cuda", {"another"}) == {}
    assert kernels.in_use("cpu", here) == {}


def test_statuses_list_every_backend_and_torch():
    operation("scan", broken=breaks, fast=works)
    found = {status.backend: status for status in kernels.statuses()}
    assert list(found) == ["broken", "fast", TORCH]
    assert [status.works for status in found.values()] == [False, True, True]
    assert found["broken"].reason == "ImportError: no compiled kernels"
    assert found["broken"].install == "get broken"


def test_constants_are_torchs():
    """The mark that torch's own decorator leaves, which the lighter one must leave too."""

    def one(): ...

    def two(): ...

    with warnings.catch_warnings(action="ignore"):  # the compiler's own, as it is loaded
        torch.compiler.assume_constant_result(one)
    assert vars(kernels.constant(two)) == vars(one) != {}


@pytest.mark.filterwarnings("ignore")  # torch deprecates what its own compiler uses
def test_compiled_code_has_the_choice_built_in(monkeypatch):
    scan = operation()
    assert scan.order() == ("fast", "slow", TORCH)  # probed, on the device that there is not
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def doubled_if_fast(x):
        return x * 2 if kernels.choose("scan", ("fast", "slow")) == "fast" else x

    compiled = torch.compile(doubled_if_fast, backend="eager", fullgraph=True)
    assert compiled(torch.ones(1)).item() == 2
    kernels.prefer({"scan": "slow"})  # and compiles anew
    assert compiled(torch.ones(1)).item() == 1


def test_importing_layers_and_training_loads_neither_compiler_nor_kernels():
    heavy = ("torch._dynamo", "triton", "mamba_ssm", "causal_conv1d", "flash_attn")
    script = (
        "import sys, workbench.training, workbench.decoding, workbench.trial\n"
        "from workbench.builder import Builder\n"
        "assert Builder.load().layers['mamba2']\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_two_modules_cannot_define_one_operation():
    operation()
    operation()  # the same module may, as when it is loaded again
    with pytest.raises(PluginError, match=r"'scan' is defined by .* and by elsewhere"):
        Operation("scan", [], home="elsewhere")


@pytest.mark.parametrize("text", ["fast,slow", "scan=fast,scan=torch", "nonsense,torch"])
def test_the_environment_names_one_backend_for_one_thing(monkeypatch, text):
    operation()
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(WorkbenchError, match="name one"):
        kernels.preference("scan")


def test_empty_parts_of_the_environment_say_nothing(monkeypatch):
    operation()
    monkeypatch.setenv(VARIABLE, "scan=slow, ,")
    assert kernels.preference("scan") == "slow"


def test_the_environment_goes_before_a_study_on_a_cpu_too(monkeypatch):
    operation()
    kernels.prefer({"scan": "slow"})
    with pytest.raises(WorkbenchError, match="WORKBENCH_BACKENDS=torch"):
        kernels.require("cpu")
    monkeypatch.setenv(VARIABLE, "torch")
    kernels.require("cpu")
