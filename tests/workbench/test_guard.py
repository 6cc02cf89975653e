"""The guard sees what a plugin changes of what all share, puts it back, and minds nothing else."""

from __future__ import annotations

import functools
import os
import random
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from workbench.errors import PatchError
from workbench.guard import Guard, guarded
from workbench.layer import Layer

F = nn.functional


@pytest.fixture(scope="module")
def strangers() -> Iterator[types.ModuleType]:
    """Another plugin's package: a class and a function."""
    module = types.ModuleType("strangers_plugin")
    source = "class Mixer:\n    def forward(self): return 1\n\ndef scan(): return 2\n"
    exec(source, vars(module))
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


def other(*args: Any, **kwargs: Any) -> None:
    """What patches put in the place of something."""


def another(*args: Any, **kwargs: Any) -> None:
    """What patches put in the place of that."""


PATCHES: dict[str, tuple[Any, str]] = {
    "torch.nn.functional.softmax": (F, "softmax"),
    "torch.softmax": (torch, "softmax"),
    "torch.float32": (torch, "float32"),
    "torch.nn.init.normal_": (nn.init, "normal_"),
    "torch.nn.utils.clip_grad_norm_": (nn.utils, "clip_grad_norm_"),
    "torch.nn.modules.linear.Linear.forward": (nn.Linear, "forward"),
    "torch.nn.modules.normalization.RMSNorm.forward": (nn.RMSNorm, "forward"),
    "torch.nn.modules.module.Module.__call__": (nn.Module, "__call__"),
    "torch.nn.modules.module.Module._call_impl": (nn.Module, "_call_impl"),
    "torch.optim.adam.Adam.step": (torch.optim.Adam, "step"),
    # Inherited from the C base class: a patch adds a name.
    "torch.Tensor.__matmul__": (torch.Tensor, "__matmul__"),
    "torch.Tensor.sum": (torch.Tensor, "sum"),
    "torch.nn.modules.linear.Linear.__call__": (nn.Linear, "__call__"),
    "workbench.layer.Layer.step": (Layer, "step"),
    "builtins.sum": (__import__("builtins"), "sum"),
}


@pytest.mark.parametrize(("name", "place"), PATCHES.items(), ids=PATCHES.keys())
def test_a_patch_is_seen_and_undone(name: str, place: tuple[Any, str]) -> None:
    owner, attribute = place
    had = vars(owner).get(attribute)
    guard = Guard()
    setattr(owner, attribute, other)
    (change,) = guard.restore()
    assert change.what.startswith(f"{name} became other")
    assert change.module == __name__
    assert __file__ in change.where
    assert vars(owner).get(attribute) is had
    assert guard.restore() == []


def test_a_deleted_function_comes_back() -> None:
    guard, softmax = Guard(), F.softmax
    del F.softmax
    (change,) = guard.restore()
    assert change.what == "torch.nn.functional.softmax was deleted"
    assert F.softmax is softmax


def test_a_function_of_torch_in_the_place_of_another() -> None:
    guard, softmax = Guard(), F.softmax
    F.softmax = F.log_softmax
    assert [change.module for change in guard.restore()] == ["torch.nn.functional"]
    assert F.softmax is softmax


def test_a_wrapped_function_is_a_patch_too() -> None:
    """Even one that was wrapped by torch itself, for someone."""
    guard, softmax = Guard(), F.softmax
    F.softmax = torch.no_grad()(F.softmax)
    assert len(guard.restore()) == 1
    assert F.softmax is softmax


@pytest.mark.parametrize(("name", "place"), PATCHES.items(), ids=PATCHES.keys())
def test_a_renewed_guard_sees_what_a_new_one_does(name: str, place: tuple[Any, str]) -> None:
    """What changed before is nobody's fault and stays; what changes after is seen and undone."""
    owner, attribute = place
    had = vars(owner).get(attribute)
    guard = Guard()
    setattr(owner, attribute, other)
    try:
        for _ in range(2):
            guard.renew()
            assert guard.restore() == []
            assert vars(owner)[attribute] is other
        guard.renew()
        setattr(owner, attribute, another)
        (change,) = guard.restore()
        assert change.what.startswith(f"{name} became another")
        assert vars(owner)[attribute] is other
    finally:
        if had is None:
            delattr(owner, attribute)
        else:
            setattr(owner, attribute, had)
    guard.renew()
    assert guard.restore() == []


def test_a_renewed_guard_watches_what_came_since(
    strangers: types.ModuleType, vandals: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class that a plugin defines at its first use, a module that it imports then."""
    guard = Guard([strangers.__name__, vandals.__name__])
    exec("class Late:\n    def forward(self): return 6\n", vars(strangers))
    late = types.ModuleType(f"{strangers.__name__}.late")
    exec("def scan(): return 7\n", vars(late))
    monkeypatch.setitem(sys.modules, late.__name__, late)
    guard.renew()
    forward, scan = strangers.Late.forward, late.scan
    strangers.Late.forward = late.scan = vandals.scan
    assert len(guard.restore()) == 2
    assert (strangers.Late.forward, late.scan) == (forward, scan)


def test_a_class_that_came_while_watched_is_watched_from_then_on(
    strangers: types.ModuleType, vandals: types.ModuleType
) -> None:
    guard = Guard([strangers.__name__, vandals.__name__])
    exec("class Later:\n    def forward(self): return 8\n", vars(strangers))
    assert guard.restore() == []
    strangers.Later.forward = vandals.scan
    assert len(guard.restore()) == 1


def test_a_renewed_guard_takes_settings_and_generators_as_they_are_now() -> None:
    guard = Guard()
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(3), random.seed(3)
        guard.renew()
        expected = (random.random(), float(torch.rand(())))
        assert guard.restore() == []
        assert torch.get_default_dtype() == torch.float64
        assert (random.random(), float(torch.rand(()))) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_guarded_renews_the_guard_that_it_is_given() -> None:
    guard, softmax = Guard(), F.softmax
    F.softmax = other
    try:
        with guarded("it", guard=guard):
            pass
        assert F.softmax is other
    finally:
        F.softmax = softmax
    with pytest.raises(PatchError, match=r"softmax became other"), guarded("it", guard=guard):
        F.softmax = other
    assert F.softmax is softmax


def test_two_patches_in_a_row_are_both_seen() -> None:
    guard = Guard()
    for name in ("relu", "gelu"):
        setattr(F, name, other)
        (change,) = guard.restore()
        assert name in change.what


@pytest.fixture(scope="module")
def vandals() -> types.ModuleType:
    """A second plugin's package."""
    module = types.ModuleType("vandals_plugin")
    exec("def scan(*args): return 3\nclass Scan:\n    def __call__(self): return 4", vars(module))
    return module


VALUES: dict[str, Callable[[types.ModuleType], Any]] = {
    "a function": lambda plugin: plugin.scan,
    "a class": lambda plugin: plugin.Scan,
    "an object": lambda plugin: plugin.Scan(),
    "a method": lambda plugin: types.MethodType(plugin.scan, 1),
    "a static method": lambda plugin: staticmethod(plugin.scan),
    "a property": lambda plugin: property(plugin.scan),
    "a part": lambda plugin: functools.partial(functools.partial(plugin.scan, 1), 2),
    "something wrapped": lambda plugin: torch.no_grad()(plugin.scan),
    "something kept": lambda plugin: functools.lru_cache(plugin.scan),
    "a module": lambda plugin: plugin,
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES.keys())
def test_one_plugin_may_not_patch_another(
    strangers: types.ModuleType, vandals: types.ModuleType, value: Callable[..., Any]
) -> None:
    guard = Guard([strangers.__name__, vandals.__name__])
    forward, scan = strangers.Mixer.forward, strangers.scan
    strangers.Mixer.forward = strangers.scan = value(vandals)
    changes = guard.restore()
    assert [change.module for change in changes] == [vandals.__name__] * 2
    assert (strangers.Mixer.forward, strangers.scan) == (forward, scan)


def test_nor_may_it_shadow_what_another_inherits(
    strangers: types.ModuleType, vandals: types.ModuleType
) -> None:
    exec("class Fast(Mixer): pass", vars(strangers))
    guard = Guard([strangers.__name__, vandals.__name__])
    strangers.Fast.forward = vandals.scan
    assert len(guard.restore()) == 1
    assert strangers.Fast.forward is strangers.Mixer.forward


def test_nor_may_it_hand_out_what_is_the_workbenchs(strangers: types.ModuleType) -> None:
    guard = Guard([strangers.__name__])
    strangers.scan = guarded
    (change,) = guard.restore()
    assert change.what.startswith("strangers_plugin.scan became guarded (workbench.guard")


def test_a_module_that_took_anothers_place_is_watched(
    strangers: types.ModuleType, vandals: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of a file of a plugin folder, which is loaded anew with each builder."""
    guard = Guard([strangers.__name__, vandals.__name__])
    new = types.ModuleType(strangers.__name__)
    exec("def scan(): return 5", vars(new))
    monkeypatch.setitem(sys.modules, new.__name__, new)
    assert guard.restore() == []
    new.scan = vandals.scan
    assert len(guard.restore()) == 1
    assert new.scan() == 5


LAZY = """
import types

def scan(x): return x

class Mixer:
    kernel = scan

def use_theirs(function):
    global scan
    scan = Mixer.kernel = function

def use_none():
    global scan
    scan = None

def use_nothing():
    global scan
    del scan
"""
FOUND = {
    "torch's": lambda: F.scaled_dot_product_attention,
    "a third package's": lambda: numpy.linalg.norm,
    "a class": lambda: numpy.ndarray,
    "a part": lambda: functools.partial(numpy.linalg.norm, axis=0),
    "a module": lambda: numpy.linalg,
}


@pytest.mark.parametrize("found", FOUND.values(), ids=FOUND.keys())
def test_a_plugin_may_fall_back_to_a_third_package(
    monkeypatch: pytest.MonkeyPatch, vandals: types.ModuleType, found: Callable[[], Any]
) -> None:
    """At its first use it looks for a faster function, and puts that in its own one's place."""
    module = types.ModuleType("lazy_plugin")
    exec(LAZY, vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    guard = Guard([module.__name__, vandals.__name__])
    module.use_theirs(found())
    assert guard.restore() == []
    assert module.scan == module.Mixer.kernel == found() or isinstance(found(), functools.partial)
    module.use_none()
    assert guard.restore() == []
    module.scan = module.use_none
    guard.restore()
    module.use_nothing()
    assert guard.restore() == []
    module.scan = module.Mixer.kernel = found()
    guard.restore()
    module.scan = vandals.scan
    assert len(guard.restore()) == 1, "what was found is watched in its turn"


def test_who_put_a_third_packages_function_there_is_not_seen(strangers: types.ModuleType) -> None:
    """As the guard's docstring says: by the plugin itself, or by another, it looks the same."""
    guard, scan = Guard([strangers.__name__, "vandals_plugin"]), strangers.scan
    source = "import numpy, strangers_plugin\nstrangers_plugin.scan = numpy.sum"
    exec(source, {"__name__": "vandals_plugin"})
    assert guard.restore() == []
    strangers.scan = scan
    guard.restore()


def test_a_plugin_may_change_itself(strangers: types.ModuleType) -> None:
    guard = Guard([strangers.__name__])
    strangers.Mixer.forward = strangers.scan
    assert guard.restore() == []
    assert strangers.Mixer.forward is strangers.scan


def set_hook() -> None:
    nn.modules.module.register_module_forward_hook(other)


SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "default dtype": (lambda: torch.set_default_dtype(torch.float64), torch.get_default_dtype),
    "default device": (lambda: torch.set_default_device("meta"), torch.get_default_device),
    "grad mode": (lambda: torch.set_grad_enabled(False), torch.is_grad_enabled),
    "number of threads": (
        lambda: torch.set_num_threads(torch.get_num_threads() + 1),
        torch.get_num_threads,
    ),
    "deterministic": (
        lambda: torch.use_deterministic_algorithms(True, warn_only=True),
        torch.are_deterministic_algorithms_enabled,
    ),
    "matmul precision": (
        lambda: torch.set_float32_matmul_precision("medium"),
        torch.get_float32_matmul_precision,
    ),
    "anomaly": (lambda: torch.autograd.set_detect_anomaly(True), torch.is_anomaly_enabled),
    "autocast on cpu": (
        lambda: torch.set_autocast_enabled("cpu", True),
        lambda: torch.is_autocast_enabled("cpu"),
    ),
    "cudnn.benchmark": (
        lambda: setattr(torch.backends.cudnn, "benchmark", True),
        lambda: torch.backends.cudnn.benchmark,
    ),
    "math attention": (
        lambda: torch.backends.cuda.enable_math_sdp(False),
        torch.backends.cuda.math_sdp_enabled,
    ),
    "function modes": (
        lambda: torch.overrides.TorchFunctionMode.__enter__(Mode()),
        torch._C._len_torch_function_stack,
    ),
    "denormal": (
        lambda: torch.set_flush_denormal(True),
        lambda: bool(torch.tensor(1e-310, dtype=torch.float64) * 1 == 0),
    ),
    "_global_forward_hooks": (
        set_hook,
        lambda: len(nn.modules.module._global_forward_hooks),
    ),
    "working directory": (lambda: os.chdir("/"), os.getcwd),
}


class Mode(torch.overrides.TorchFunctionMode):
    """Does nothing, everywhere."""


@pytest.mark.parametrize(("words", "setting"), SETTINGS.items(), ids=SETTINGS.keys())
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_a_setting_is_seen_and_put_back(
    words: str, setting: tuple[Callable[[], Any], Callable[[], Any]]
) -> None:
    change, read = setting
    guard, before = Guard(), read()
    change()
    assert read() != before, "the test's own change had no effect"
    (found,) = guard.restore()
    assert words in found.what
    assert read() == before


def test_random_generators_are_put_back_and_that_is_no_fault() -> None:
    guard = Guard()
    expected = (random.random(), numpy.random.rand(), float(torch.rand(())))
    guard.restore()
    random.seed(3), numpy.random.seed(3), torch.manual_seed(3)
    assert guard.restore() == []
    assert (random.random(), numpy.random.rand(), float(torch.rand(()))) == expected


SEEDS = """
import sys
from workbench.guard import Guard
import torch
is_new = "numpy.random" not in sys.modules  # older versions of numpy import it at once
guard = Guard()
assert is_new == ("numpy.random" not in sys.modules), "nobody needs it yet"
drawn = []
for _ in range(2):
    import numpy
    numpy.random.seed(3)
    assert guard.restore() == []
    drawn.append(numpy.random.rand())
assert (drawn[0] != drawn[1]) == is_new, "either seeded afresh, or put back"
"""


def test_a_generator_that_was_not_there_yet_is_fresh_again(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SEEDS], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


def test_warnings_stay_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        guard = Guard()
        warnings.filterwarnings("error", message="ours")
        assert guard.restore() == []
        with pytest.warns(UserWarning, match="ours"):
            warnings.warn("ours", stacklevel=1)


def test_what_is_merely_added_is_no_patch(strangers: types.ModuleType) -> None:
    guard = Guard([strangers.__name__])
    torch.a_new_name = other  # as a lazy import of a submodule leaves one
    nn.Linear.a_new_name = other
    try:
        assert guard.restore() == []
        assert torch.a_new_name is nn.Linear.a_new_name is other
    finally:
        del torch.a_new_name, nn.Linear.a_new_name


def patch_inside(then: Callable[[], Any]) -> None:
    with guarded("it"):
        F.softmax = other
        then()


def test_guarded_restores_whatever_happens() -> None:
    softmax = F.softmax
    with pytest.raises(KeyError):
        patch_inside(lambda: {}["gone"])
    assert F.softmax is softmax
    with pytest.raises(PatchError, match=r"^it changed what all .* torch\.nn\.functional\.softmax"):
        patch_inside(lambda: None)
    assert F.softmax is softmax


COLD = """
import torch
from torch import nn
from workbench.guard import Guard
guard = Guard(["workbench_mamba"])
layer = nn.Linear(4, 4)
for optimizer in (torch.optim.AdamW(layer.parameters()), torch.optim.Muon([layer.weight])):
    layer(torch.ones(2, 4)).sum().backward()
    optimizer.step()
print("optimizers", guard.restore())
import torch._dynamo, torch.fx, torch.export, torch.utils.checkpoint, torch.distributed
torch.compile(lambda x: x.softmax(-1), backend="eager")(torch.ones(3))
print("compiler", guard.restore())
import transformers
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=16, intermediate_size=32
)
LlamaForCausalLM(config).generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2)
print("transformers", guard.restore())
"""


def test_torch_may_change_itself(tmp_path: Path) -> None:
    """What torch and transformers do to torch when first used is nobody's patch."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COLD],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["optimizers []", "compiler []", "transformers []"]
