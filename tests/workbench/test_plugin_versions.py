"""Installed plugins: the API they were made for, and what exactly they are.

Packages are faked by what pip leaves of one: a module and a `.dist-info` folder on `sys.path`.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.workbench.conftest import TOYS, make_config
from tests.workbench.plugin_files import HEADER, write_layer_plugin
from workbench import WorkbenchError
from workbench.builder import Builder, default_builder
from workbench.discovery import API, GROUP, discover
from workbench.errors import PluginError, UnknownNameError
from workbench.executors.process import ProcessExecutor
from workbench.study import run_study

Install = Callable[..., Path]
OFFER = "\n@hookimpl\ndef register_layers(register):\n    register({name!r}, Idle)\n"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a package with one module and one plugin on `sys.path`; gives the module's path."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    before = set(sys.modules)

    def put(
        package: str, groups: tuple[str, ...] = (GROUP,), version: str = "1.2", source: str = ""
    ) -> Path:
        module = package.replace("-", "_")
        info = site / f"{module}-{version}.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
        )
        (info / "entry_points.txt").write_text(
            "".join(f"[{group}]\n{package} = {module}\n" for group in groups)
        )
        (site / f"{module}.py").write_text(source or HEADER + OFFER.format(name=package))
        return site / f"{module}.py"

    yield put
    default_builder.cache_clear()
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(site)):
            del sys.modules[name]


def test_a_plugin_of_this_api_is_loaded(install: Install) -> None:
    path = install("some-plugin")
    builder = Builder.load()
    origin = builder.layers.provenance("some-plugin")
    assert (origin.package, origin.version, origin.file) == ("some-plugin", "1.2", str(path))
    assert origin.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("group", "made_for", "advice"),
    [
        ("workbench", 0, "upgrade the plugin, pip install --upgrade some-plugin"),
        (f"workbench.v{API + 1}", API + 1, "upgrade the workbench, pip install --upgrade lm-w"),
        ("workbench.v0", 0, "upgrade the plugin, pip install --upgrade some-plugin"),
    ],
)
def test_a_plugin_of_another_api_is_left_out(
    install: Install, group: str, made_for: int, advice: str
) -> None:
    install("some-plugin", (group,), source="raise RuntimeError('it must not be imported')")
    builder = Builder.load()
    failure = builder.plugins.failures["some-plugin"]
    assert failure.reason.startswith(f"some-plugin 1.2 was made for API {made_for} of the workben")
    assert f"has API {API}: {advice}" in failure.reason
    assert (failure.package, failure.version) == ("some-plugin", "1.2")
    assert "some-plugin" not in builder.plugins.loaded
    assert "mamba" in builder.layers, "the others work"
    with pytest.raises(UnknownNameError, match=rf"did not load \(some-plugin .* API {made_for}"):
        builder.layers["some-layer"]


def test_a_plugin_may_serve_several_apis(install: Install) -> None:
    install("some-plugin", ("workbench", GROUP, f"workbench.v{API + 1}"))
    plugins = discover()
    assert plugins.failures == {}
    assert "some-plugin" in plugins.loaded


def test_other_groups_are_none_of_ours(install: Install) -> None:
    install("some-plugin", ("workbench_tools", "workbench.v1beta", "my.workbench"))
    plugins = discover()
    assert "some-plugin" not in {*plugins.loaded, *plugins.failures}


def test_a_plugin_of_another_api_can_be_disabled(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("some-plugin", ("workbench",))
    monkeypatch.setenv("WORKBENCH_DISABLE", "some-plugin")
    assert discover().failures == {}


def test_two_packages_with_one_plugin_name_are_named(install: Install, tmp_path: Path) -> None:
    install("some-plugin")
    file = write_layer_plugin(tmp_path / "plugins", "some-plugin", "idle")
    with pytest.raises(PluginError, match=r"some_plugin \(some-plugin 1\.2\)") as caught:
        discover([tmp_path / "plugins"])
    assert str(file) in str(caught.value)


def test_a_package_missing_its_module_says_to_install_it_again(install: Install) -> None:
    install("some-plugin").unlink()
    reason = discover().failures["some-plugin"].reason
    assert "its own module: install some-plugin again" in reason


def test_the_sources_of_a_package_are_all_of_its_files(install: Install, tmp_path: Path) -> None:
    module = install("some-plugin")
    package = module.with_suffix("")
    package.mkdir()
    module.rename(package / "__init__.py")
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "x.pyc").write_bytes(b"\0")

    def digest() -> str:
        for name in [name for name in sys.modules if name.startswith("some_plugin")]:
            del sys.modules[name]
        return discover().loaded["some-plugin"].sha256

    (package / "kernel.py").write_text("x = 1\n")
    one = digest()
    assert one == digest()
    (package / "kernel.py").write_text("x = 2\n")
    two = digest()
    (package / "kernel.py").rename(package / "kernels.py")
    three = digest()
    (package / "__pycache__" / "x.pyc").write_bytes(b"\1")
    assert three == digest()
    assert len({one, two, three}) == 3


# Studies


@pytest.fixture
def packaged(install: Install, study_data: dict) -> Path:
    """The toys as an installed package, which the study then uses."""
    study_data["plugin_dirs"] = []
    default_builder.cache_clear()
    return install("toys", source=(TOYS / "toys.py").read_text())


def forget_toys() -> None:
    default_builder.cache_clear()
    del sys.modules["toys"]


def test_every_record_says_where_each_part_came_from(packaged, study_data, runs):
    study = run_study(make_config(study_data, **{"budget.trials": 2}), runs)
    digest = hashlib.sha256(packaged.read_bytes()).hexdigest()
    toys = {
        "plugin": "toys", "package": "toys", "version": "1.2", "module": "toys", "sha256": digest,
    }  # fmt: skip
    for trial in study.trials():
        used = {block.layer for block in trial.layout.blocks}
        assert trial.data["provenance"] == {
            "layers": dict.fromkeys(sorted(used), toys),
            "placements": {"alternate": toys},
            "quantizers": {},
            "metrics": dict.fromkeys(["toy_depth", "toy_loss", "toy_weights"], toys),
            "data_sources": {"counting": toys},
        }
        assert trial.data["plugins"] == {"toys": f"toys 1.2 sha256:{digest[:12]}"}
    assert study.data["plugins"]["toys"] == {**toys, "file": str(packaged)}


def test_a_study_whose_plugin_changed_is_refused(packaged, study_data, runs):
    """The version alone would not tell: an editable install keeps its own."""
    config = make_config(study_data, **{"budget.trials": 1})
    run_study(config, runs)
    before = packaged.read_text()
    packaged.write_text(before.replace("torch.relu", "torch.tanh"))
    forget_toys()
    with pytest.raises(WorkbenchError, match="started differently") as caught:
        run_study(config, runs)
    for text in (before, packaged.read_text()):
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        assert f"'toys 1.2 sha256:{digest}'" in str(caught.value)
    assert "Give the study another name" in str(caught.value)
    assert "check out the sources that had that sha256" in str(caught.value)
    packaged.write_text(before)
    forget_toys()
    run_study(config, runs)


def test_a_plugin_that_only_lends_its_code_counts_too(packaged, install, study_data, runs):
    """A layer made of another plugin's layer changes with it."""
    source = (
        "from workbench import hookimpl\nfrom toys import Toy\n"
        "class Made(Toy):\n    glyph = 'm'\n"
        "@hookimpl\ndef register_layers(register):\n    register('made', Made)\n"
    )
    install("made-of-toys", source=source)
    default_builder.cache_clear()
    builder = default_builder(())
    from workbench.identity import used_plugins

    config = make_config(study_data, **{"space.mixers": ["made"], "space.layers": {}})
    assert {"made-of-toys", "toys"} <= set(used_plugins(config, builder))
    for kind in ("objectives", "report", "constraints", "metrics"):
        study_data.pop(kind, None)
    study_data["data"] = {"source": "stdlib"}
    study_data["space"].update(mixers=["made"], placements=["uniform"], layers={})
    config = make_config(study_data, objectives=["parameters"])
    assert set(used_plugins(config, builder)) == {
        "made-of-toys", "toys", "placement", "metrics", "data",
    }  # fmt: skip


def test_a_plugin_edited_while_its_study_runs_is_noticed(packaged, study_data, runs, monkeypatch):
    """A worker that starts again would load the edited one."""
    real = ProcessExecutor.submit

    def edit_first(self, *arguments):
        packaged.write_text(packaged.read_text() + "\n# edited\n")
        return real(self, *arguments)

    monkeypatch.setattr(ProcessExecutor, "submit", edit_first)
    monkeypatch.setenv("PYTHONPATH", str(packaged.parent))
    changes = {"runtime.executor": "process", "budget.trials": 1}
    with pytest.raises(WorkbenchError, match=r"'toys' changed while the study ran: toys 1\.2 sha"):
        run_study(make_config(study_data, **changes), runs)
