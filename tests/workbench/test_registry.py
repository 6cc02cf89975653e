"""One name, one thing: what breaks its contract is refused and breaks nothing else."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from tests.workbench.plugin_files import builder_of, write_layer_plugin, write_plugin
from workbench.discovery import Failure, Provenance
from workbench.errors import PluginError, UnknownNameError
from workbench.registry import Registry


def provenance(name: str) -> Provenance:
    return Provenance(
        plugin=name, package="some-package", version="1", module=name, file=f"/{name}.py"
    )


def accept(thing: object) -> None:
    """Any thing will do."""


def registry(failures: dict[str, Failure] | None = None) -> Registry[str]:
    things = Registry[str]("thing", accept, failures or {})
    for name in ("banana", "apple"):
        things.add(name, name.upper(), provenance(f"plugin-of-{name}"))
    return things


def test_a_registry_is_a_sorted_mapping() -> None:
    things = registry()
    assert list(things) == ["apple", "banana"]
    assert len(things) == 2
    assert things["apple"] == "APPLE"
    assert "apple" in things
    assert "cherry" not in things
    assert things.provenance("apple").plugin == "plugin-of-apple"


def test_an_unknown_name_is_met_with_the_nearest() -> None:
    for look_up in (registry().__getitem__, registry().provenance):
        with pytest.raises(UnknownNameError) as caught:
            look_up("aple")
        message = "unknown thing 'aple'. Did you mean 'apple'? Known: apple, banana."
        assert str(caught.value) == message


def test_an_unknown_name_may_be_of_a_plugin_that_did_not_load() -> None:
    failure = Failure(plugin="cherries", module="c", reason="ImportError: no stone", traceback="…")
    with pytest.raises(UnknownNameError, match=r"'cherries' did not load \(ImportError: no stone"):
        registry({"cherries": failure})["cherry"]


@pytest.mark.parametrize("name", ["", "Upper", "two words", "_x", "ä", "a/b", 3, None])
def test_malformed_names_are_refused(name: object) -> None:
    with pytest.raises(ValueError, match="use lower case letters"):
        registry().add(name, "x", provenance("p"))  # type: ignore[arg-type]


def test_a_taken_name_names_both_plugins() -> None:
    things = registry()
    with pytest.raises(PluginError) as caught:
        things.add("apple", "another", provenance("late"))
    for part in ("called 'apple'", "plugin-of-apple", "/late.py", "WORKBENCH_DISABLE=late"):
        assert part in str(caught.value)
    assert things["apple"] == "APPLE"


def test_two_layers_of_one_name_name_both_files(tmp_path: Path) -> None:
    first = write_layer_plugin(tmp_path, "first", "idle")
    second = write_layer_plugin(tmp_path, "second", "idle")
    with pytest.raises(PluginError, match="two plugins offer a layer called 'idle'") as caught:
        builder_of(tmp_path)
    assert str(first) in str(caught.value)
    assert str(second) in str(caught.value)


def register(kind: str, thing: str) -> str:
    return f"@hookimpl\ndef register_{kind}(register):\n    register('bad', {thing})\n"


FAULTS = {
    "no class": (register("layers", "Idle(4, None)"), "register a subclass of workbench.Layer"),
    "another class": (register("layers", "dict"), "register a subclass of workbench.Layer"),
    "of another kind": (register("metrics", "Idle"), "register a subclass of workbench.Metric"),
    "Config not frozen": (
        """
        class Bad(Idle):
            @dataclass
            class Config:
                width: int = 1
        """
        + register("layers", "Bad"),
        "Bad.Config must be frozen",
    ),
    "Config no dataclass": (
        "class Bad(Idle):\n    class Config: ...\n" + register("layers", "Bad"),
        "Config must be a dataclass",
    ),
    "Config with unknown types": (
        """
        class Bad(Idle):
            @dataclass(frozen=True)
            class Config:
                width: 'Width' = 1
        """
        + register("layers", "Bad"),
        "name 'Width' is not defined",
    ),
    "two glyphs": (
        "class Bad(Idle):\n    glyph = 'ab'\n" + register("layers", "Bad"),
        "Bad.glyph is 'ab': use one character",
    ),
    "unknown kind": (
        "class Bad(Idle):\n    kind = 'mixer'\n" + register("layers", "Bad"),
        "Bad.kind is 'mixer': use 'attention', 'recurrent' or 'mlp'",
    ),
    "abstract": (
        "class Bad(Metric):\n    stage = 'static'\n" + register("metrics", "Bad"),
        "Bad lacks measure",
    ),
    "no stage": (
        "class Bad(Metric):\n    def measure(self, subject): ...\n" + register("metrics", "Bad"),
        "Bad.stage must be one of static",
    ),
    "no direction": (
        """
        class Bad(Metric):
            stage, direction = "static", "up"
            def measure(self, subject): ...
        """
        + register("metrics", "Bad"),
        "Bad.direction must be 'minimize' or 'maximize'",
    ),
    "no preset": (register("presets", "{}"), "register a workbench.Preset"),
    "malformed name": (
        "@hookimpl\ndef register_layers(register):\n    register('My Layer', Idle)\n",
        "layer name 'My Layer'",
    ),
    "a hook that raises": (
        "@hookimpl\ndef register_layers(register):\n    {}['gone']\n",
        "KeyError: 'gone'",
    ),
}


@pytest.mark.parametrize(("body", "message"), FAULTS.values(), ids=FAULTS)
def test_what_breaks_its_contract_breaks_nothing_else(
    tmp_path: Path, body: str, message: str
) -> None:
    path = write_plugin(tmp_path, "bad-plugin", _dedent(body))
    write_layer_plugin(tmp_path, "good", "idle")
    builder = builder_of(tmp_path)
    assert list(builder.layers) == ["idle"]
    failure = builder.plugins.failures["bad-plugin"]
    assert message in failure.reason
    assert f'"{path}", line' in failure.traceback, "the traceback points at the plugin"
    with pytest.raises(UnknownNameError, match="Plugin 'bad-plugin' did not load"):
        builder.layers["bad"]


def test_every_failing_hook_of_a_plugin_is_kept(tmp_path: Path) -> None:
    body = register("layers", "dict") + register("metrics", "dict")
    write_plugin(tmp_path, "bad", body)
    failure = builder_of(tmp_path).plugins.failures["bad"]
    for kind in ("Layer", "Metric"):
        assert f"register a subclass of workbench.{kind}" in failure.reason
        assert f"register a subclass of workbench.{kind}" in failure.traceback


def _dedent(body: str) -> str:
    """The class, which may be indented, and the hook after it."""
    before, mark, hook = body.partition("@hookimpl")
    return textwrap.dedent(before) + mark + hook
