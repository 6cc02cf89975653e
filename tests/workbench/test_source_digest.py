"""What the sha256 of a plugin's sources covers: all that it imports of its own, and no more.

Distributions are laid out as pip leaves them: copied into a folder on `sys.path` with the list of
their files, or editable, where that list only names what leads to the sources.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import distributions
from pathlib import Path

import pytest

import workbench
from tests.workbench.plugin_files import (
    builder_of,
    only_these,
    write_layer_plugin,
    write_plugin,
)
from workbench.discovery import GROUP, discover
from workbench.neighbours import Neighbours, imported_names

PLUGIN = "import workbench\n"


class Site:
    """An installation folder, and a folder of sources that editable installs lead to."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.checkout = folder / "site-packages", folder / "checkout"
        self.folder.mkdir()
        self.checkout.mkdir()

    def install(
        self, files: Mapping[str, str], entry: str, how: str = "copied", name: str = "mine"
    ) -> Path:
        """A distribution with one plugin, called as it is; gives the folder of its sources."""
        root = self.checkout if how == "editable" else self.folder
        for path, source in files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(source)
        info = self.folder / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {entry}\n")
        own = [f"{info.name}/METADATA", f"{info.name}/RECORD", "../../bin/tool"]
        leading = [f"__editable__.{name}.pth", f"__editable___{name}_finder.py"]
        shipped = leading if how == "editable" else list(files)
        if how != "unlisted":
            (info / "RECORD").write_text("".join(f"{path},,\n" for path in [*shipped, *own]))
        tops = {path.partition("/")[0].removesuffix(".py") for path in files}
        (info / "top_level.txt").write_text("\n".join(sorted(tops)))
        return root

    def digest(self, name: str = "mine") -> str:
        """Of a plugin that is loaded afresh."""
        points = [p for found in distributions(path=[str(self.folder)]) for p in found.entry_points]
        with only_these(*points):
            plugins = discover()
        forget(self.folder.parent)
        assert name in plugins.loaded, plugins.failures
        return plugins.loaded[name].sha256

    def changed(self, path: Path, text: str = "x = 2\n") -> bool:
        """Whether the digest is another one after a change of that file."""
        one, before = self.digest(), path.read_text()
        assert self.digest() == one, "the same sources give the same digest"
        path.write_text(before + text)
        two = self.digest()
        path.write_text(before)
        assert self.digest() == one, "and they do when the change is taken back"
        return one != two


def forget(folder: Path) -> None:
    """Unload what was loaded from there."""
    for name, module in list(sys.modules.items()):
        said = getattr(module, "__dict__", {})  # some of torch's answer to any name
        if str(folder) in f"{said.get('__file__')} {said.get('__path__')}":
            del sys.modules[name]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    site = Site(tmp_path)
    for folder in (site.folder, site.checkout):
        monkeypatch.syspath_prepend(str(folder))
    return site


HOW = pytest.mark.parametrize("how", ["copied", "editable", "unlisted"])
FLAT = {
    "one.py": PLUGIN + "import one_kern\n",
    "one_kern.py": "def scan():\n    from one_deep import x\n    return x\n",
    "one_deep.py": "import one, one_kern  # and one_tool some day\nx = 1\n",
    "one_tool.py": "x = 1\n",
}


@HOW
@pytest.mark.parametrize(("file", "counts"), [
    ("one.py", True), ("one_kern.py", True), ("one_deep.py", True), ("one_tool.py", False),
])  # fmt: skip
def test_modules_side_by_side(site: Site, how: str, file: str, counts: bool) -> None:
    """What a module imports counts, in functions and through others, too."""
    root = site.install(FLAT, "one", how)
    assert site.changed(root / file) is counts


def test_how_it_is_installed_does_not_matter(tmp_path: Path, site: Site) -> None:
    """A study that was started in a checkout goes on where the wheel is installed."""
    site.install(FLAT, "one", "editable")
    editable = site.digest()
    for file in FLAT:
        (site.checkout / file).rename(site.folder / file)
    info = site.folder / "mine-1.0.dist-info"
    for record in ["".join(f"{file},,\n" for file in FLAT), ""]:
        (info / "RECORD").write_text(record)
        assert site.digest() == editable


PACKAGE = {
    "mypk/__init__.py": "",
    "mypk/plug/__init__.py": "",
    "mypk/plug/layer.py": PLUGIN + "from mypk import kern\nimport mypk_ops.scan\n",
    "mypk/kern.py": "x = 1\n",
    "mypk/kernels/scan.cu": "// 1\n",
    "mypk_ops/__init__.py": "",
    "mypk_ops/scan.py": "x = 1\n",
    "other.py": "x = 1\n",
}


@HOW
@pytest.mark.parametrize(("file", "counts"), [
    ("mypk/plug/layer.py", True), ("mypk/kern.py", True), ("mypk/kernels/scan.cu", True),
    ("mypk_ops/scan.py", True), ("other.py", False),
])  # fmt: skip
def test_a_module_deep_in_a_package(site: Site, how: str, file: str, counts: bool) -> None:
    root = site.install(PACKAGE, "mypk.plug.layer", how)
    assert site.changed(root / file, "\n") is counts


SHARED = ("mypk/__init__.py", "mypk_ops/__init__.py")
NAMESPACE = {path: text for path, text in PACKAGE.items() if path not in SHARED}


@pytest.mark.parametrize("how", ["copied", "editable"])
def test_a_namespace_package_is_shared(site: Site, how: str) -> None:
    """Of two distributions that fill one namespace, each has a digest of its own part."""
    root = site.install(NAMESPACE, "mypk.plug.layer", how)
    files = {"mypk/theirs.py": PLUGIN, "mypk_ops/theirs.py": ""}
    theirs = site.install(files, "mypk.theirs", name="theirs")
    for file in ("mypk/kern.py", "mypk_ops/scan.py"):
        assert site.changed(root / file), file
    for file in files:
        assert not site.changed(theirs / file), file
    assert site.digest("theirs") != site.digest("mine")


def test_another_distribution_beside_it_is_not_its_own(site: Site) -> None:
    """Not even where the list of its own files is lost: one would hash all of torch."""
    mine = {"one.py": PLUGIN + "import theirs_kern, also_theirs\n"}
    site.install(mine, "one", "unlisted")
    root = site.install({"theirs_kern.py": PLUGIN}, "theirs_kern", name="theirs")
    site.install({"also_theirs.py": PLUGIN}, "also_theirs", "unlisted", name="also-theirs")
    assert not site.changed(root / "theirs_kern.py")
    assert not site.changed(root / "also_theirs.py")


def test_a_name_that_leads_elsewhere_is_not_what_lies_beside(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kern.py").write_text("")
    monkeypatch.syspath_prepend(str(elsewhere))
    files = {"one.py": PLUGIN + "import kern, json\n", "kern.py": "", "json/__init__.py": ""}
    root = site.install(files, "one", "editable")
    assert not site.changed(root / "kern.py")
    assert not site.changed(root / "json" / "__init__.py")


def test_the_core_is_nobodys_source(tmp_path: Path) -> None:
    """Not even where a plugin lies beside it."""
    plugin = tmp_path / "mine.py"
    plugin.write_text(PLUGIN)
    beside_it = Path(workbench.__file__).parents[1] / "mine.py"
    assert Neighbours(beside_it, frozenset(), None).imported_by([plugin]) == []
    listed = {str(beside_it), workbench.__file__}
    assert Neighbours(beside_it, listed, None).imported_by([plugin]) == []


def test_a_lone_file_is_what_sha256sum_prints(site: Site) -> None:
    root = site.install({"one.py": PLUGIN + "import torch\n"}, "one")
    printed = subprocess.run(
        ["sha256sum", str(root / "one.py")], capture_output=True, text=True, check=True
    )
    assert site.digest() == printed.stdout.split()[0]


def test_a_renamed_module_counts(site: Site) -> None:
    either = "try:\n    import a\nexcept ImportError:\n    import b\n"
    root = site.install({"one.py": PLUGIN + either, "a.py": "x = 1\n"}, "one", "editable")
    one = site.digest()
    (root / "a.py").rename(root / "b.py")
    assert site.digest() != one


# Plugin folders


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A plugin folder that is on no path, as in `--plugin-dir`."""
    path = list(sys.path)
    yield tmp_path / "plugins"
    sys.path[:] = path


BESIDE = "import sys\nfrom pathlib import Path\nsys.path.insert(0, str(Path(__file__).parent))\n"
OFFER = "@hookimpl\ndef register_layers(register):\n    register({name!r}, Idle)\n"


def of_folder(folder: Path, name: str = "mine") -> tuple[str, str]:
    origin = builder_of(folder).layers.provenance(name)
    forget(folder)
    return origin.sha256, str(origin)


@pytest.mark.parametrize("after", ["", "del sys.path[0]\n"], ids=["path-left", "path-put-back"])
def test_a_plugin_file_counts_with_what_it_imports_from_its_folder(
    folder: Path, after: str
) -> None:
    body = BESIDE + "import _scan\n" + after + OFFER.format(name="mine")
    write_plugin(folder, "mine", body)
    lazy = "from importlib import import_module\ndef fast(): return import_module('_kern.fast')\n"
    (folder / "_scan.py").write_text(lazy)
    (folder / "_kern").mkdir()
    (folder / "_kern" / "__init__.py").write_text("")
    (folder / "_kern" / "fast.py").write_text("x = 1\n")
    (folder / "_unused.py").write_text("x = 1\n")
    seen = {of_folder(folder)}
    for path in ("mine.py", "_scan.py", "_kern/fast.py"):
        (folder / path).write_text((folder / path).read_text() + "# changed\n")
        now = of_folder(folder)
        assert now[0][:12] in now[1], "the study's identity compares the text"
        assert now not in seen, path
        seen.add(now)
    (folder / "_unused.py").write_text("x = 2\n")
    assert of_folder(folder) in seen


def test_a_plugin_file_counts_with_another_that_it_imports(folder: Path) -> None:
    write_layer_plugin(folder, "good", "good")
    write_plugin(folder, "mine", "import workbench_plugin_good\n" + OFFER.format(name="mine"))
    one = of_folder(folder)
    write_layer_plugin(folder, "good", "better")
    assert of_folder(folder) != one


@pytest.mark.parametrize(("source", "names"), [
    ("import a.b, c as d", {"a", "c"}),
    ("from a.b import c", {"a"}),
    ("from . import a\nfrom .b import c", set()),
    ("def f():\n    if 1: import a; import b", {"a", "b"}),
    ("import importlib\nimportlib.import_module('a.b')\n__import__('c')", {"importlib", "a", "c"}),
    ("from x import (\n    y,\n)", {"x"}),
    ("'''\nimport a\n'''\n# import b\nprint('import c')", set()),
    ("this is {{ no }} Python", set()),
    (r"import a; '\d'", {"a"}),
])  # fmt: skip
def test_imported_names(source: str, names: set[str]) -> None:
    assert imported_names(source.encode()) == names
