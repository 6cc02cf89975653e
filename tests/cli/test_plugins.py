"""`workbench plugins` and `workbench doctor`, and plugins that are broken in every way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import TOYS, Cli
from workbench.builder import default_builder


@pytest.fixture(autouse=True)
def fresh_builders() -> Iterator[None]:
    """Builders are kept for the process, whose environment these tests change."""
    default_builder.cache_clear()
    yield
    default_builder.cache_clear()


def test_everything_is_listed_with_its_origin(cli: Cli) -> None:
    data = cli("plugins", "--json").json
    assert data["failed"] == []
    assert data["disabled"] == []
    listed = {(row["kind"], row["name"]) for row in data["registered"]}
    registries = default_builder().registries().items()
    assert listed == {(kind, name) for kind, registry in registries for name in registry}
    for row in data["registered"]:
        assert row["package"] == "lm-workbench"
        assert row["version"]
        assert Path(row["file"]).is_file()
        assert row["about"]


@pytest.mark.parametrize("columns", ["80", "120"])
def test_the_listing_fits(cli: Cli, columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    text = cli("plugins").out
    assert max(map(len, text.splitlines())) <= int(columns)
    for registry in default_builder().registries().values():
        for name in registry:
            assert f" {name} " in text
    assert "lm-workbench" in text


def test_a_plugin_folder_and_a_disabled_plugin(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_DISABLE", "export, data")
    data = cli("plugins", "--json", "--plugin-dir", TOYS).json
    assert data["disabled"] == ["export", "data"]
    rows = {row["name"]: row for row in data["registered"]}
    assert "huggingface" not in rows
    assert rows["toy"]["package"] is None
    assert rows["toy"]["version"].startswith("sha256:")
    assert "Disabled by WORKBENCH_DISABLE: export, data" in cli("plugins").out
    monkeypatch.setenv("WORKBENCH_DISABLE", "exprt")
    default_builder.cache_clear()
    assert "Did you mean 'export'?" in cli("plugins").refused()


BROKEN = {
    "syntax": ("def broken(:\n", "SyntaxError: invalid syntax"),
    "import": ("import a_package_that_is_not_there\n", "ModuleNotFoundError: No module named 'a_"),
    "raises": ("raise RuntimeError('at import')\n", "RuntimeError: at import"),
    "exits": ("import sys\nsys.exit(3)\n", "SystemExit: 3"),
    "no layer": (
        "import workbench\n@workbench.hookimpl\ndef register_layers(register):\n"
        "    register('mine', int)\n",
        "TypeError: register a subclass of workbench.Layer",
    ),
}


@pytest.mark.parametrize(("code", "reason"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_plugin_is_reported_and_skipped(
    cli: Cli, tmp_path: Path, code: str, reason: str
) -> None:
    (tmp_path / "mine.py").write_text(code)
    listing = cli("plugins", "--plugin-dir", tmp_path)
    assert listing.status == 0
    assert f"Plugin 'mine' did not load: {reason}" in listing.out
    assert "mamba2" in listing.out
    assert "Traceback" not in listing.out
    (failure,) = cli("plugins", "--plugin-dir", tmp_path, "--json").json["failed"]
    assert failure["plugin"] == "mine"
    assert reason in failure["reason"]
    assert str(tmp_path / "mine.py") in cli("plugins", "--plugin-dir", tmp_path, "--traceback").out
    assert "mine" in cli("doctor", "--plugin-dir", tmp_path, "--json").json["failed_plugins"]
    # What only it would offer is unknown, and the message says why.
    (tmp_path / "layout.json").write_text(
        '{"d_model": 8, "vocab_size": 8, "blocks": [{"layer": "mine"}]}'
    )
    message = cli("describe", tmp_path / "layout.json", "--plugin-dir", tmp_path).refused()
    assert "unknown layer 'mine'" in message
    assert "Plugin 'mine' did not load" in message


HOOK = "import workbench\n@workbench.hookimpl\ndef {}(register):\n    {}\n"
REFUSED = {
    "misspelled hook": (
        {"mine": HOOK.format("register_layer", "pass")},
        "unknown hook 'register_layer'. Did you mean 'register_layers'?",
    ),
    "unmarked hook": (
        {"mine": "def register_layers(register):\n    pass\n"},
        "mark it with @workbench.hookimpl",
    ),
    "unknown argument": (
        {"mine": HOOK.format("register_layers", "pass").replace("(register)", "(registry)")},
        "registry",
    ),
    "name of an installed plugin": ({"mamba": "x = 1\n"}, "two plugins are called 'mamba'"),
    "layer of an installed plugin": (
        {
            "mine": HOOK.format(
                "register_layers",
                "from workbench_mamba.mamba import Mamba; register('mamba', Mamba)",
            )
        },
        "two plugins offer a layer called 'mamba'",
    ),
}


@pytest.mark.parametrize(("files", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_a_plugin_against_the_contract_is_refused(
    cli: Cli, tmp_path: Path, files: dict[str, str], words: str
) -> None:
    for name, code in files.items():
        (tmp_path / f"{name}.py").write_text(code)
    for command in (["plugins"], ["doctor"], ["describe", "mamba-130m"]):
        message = cli(*command, "--plugin-dir", tmp_path).refused()
        assert words in message
        assert str(tmp_path) in message


def test_a_plugin_folder_that_is_not_there(cli: Cli, tmp_path: Path) -> None:
    message = cli("plugins", "--plugin-dir", tmp_path / "nowhere").refused()
    assert f"--plugin-dir {tmp_path / 'nowhere'}: no such folder" in message


def test_doctor_names_device_versions_and_memory(cli: Cli) -> None:
    data = cli("doctor", "--json").json
    assert data["versions"]["torch"]
    assert data["available_memory"] > 2**20
    assert {"mamba", "attention"} <= set(data["plugins"])
    text = " ".join(cli("doctor").out.split())
    for fact in (data["device_name"], data["versions"]["torch"], data["python"], "mamba-ssm"):
        assert " ".join(fact.split()) in text
