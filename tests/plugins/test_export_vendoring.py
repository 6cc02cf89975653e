"""Flattening sources: what runs from the flat folder is what ran from the packages."""

from __future__ import annotations

import ast
import importlib
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from transformers.dynamic_module_utils import check_imports, get_relative_import_files

from workbench.errors import WorkbenchError
from workbench_export.vendoring import Vendored, vendor

# A package with a bit of everything that a plugin may do.
PACKAGE = {
    "acme/__init__.py": """
        from workbench import hookimpl
        from acme.heavy import NOTHING

        @hookimpl
        def register_layers(register):
            raise AssertionError
    """,
    "acme/heavy.py": "raise AssertionError('only the hooks need it')",
    "acme/maths/__init__.py": """
        from .plain import double as twice, HALF
        from . import deeper
        if True:
            OWN = 5
    """,
    "acme/maths/plain.py": """
        HALF = 0.5
        def double(x): return 2 * x
    """,
    "acme/maths/deeper.py": """
        from .. import names
        def name(): return names.NAME
    """,
    "acme/names.py": "NAME = 'näme'",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of `acme`, importable."""
    for name, text in PACKAGE.items():
        write(tmp_path / "src" / name, text)
    monkeypatch.syspath_prepend(tmp_path / "src")
    before = set(sys.modules)
    yield tmp_path / "src" / "acme"
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text), encoding="utf-8")


def flat(package: Path, text: str) -> Vendored:
    """What becomes of `acme.main`, given its text."""
    write(package / "main.py", text)
    importlib.invalidate_caches()
    return vendor(["acme.main"], {"acme", "workbench"})


def run(package: Path, code: Vendored) -> ModuleType:
    """The flat folder's `acme_main`, with the packages themselves out of reach."""
    folder = package.parents[1] / "flat_folder"
    for name, text in code.files.items():
        write(folder / name, text)
    write(folder / "__init__.py", "")
    sys.path.insert(0, str(folder.parent))
    sys.path.remove(str(package.parent))
    try:
        importlib.invalidate_caches()
        return importlib.import_module("flat_folder.acme_main")
    finally:
        sys.path.remove(str(folder.parent))


FORMS = {
    "the module that defines it": "from acme.maths.plain import double",
    "under another name": "from acme.maths.plain import double as d\ndouble = d",
    "a re-export of a package": "from acme.maths import twice as double",
    "relative": "from .maths.plain import double",
    "relative to the package": "from .maths import twice as double",
    "several lines": "from acme.maths import (\n    OWN,\n    twice as double,  # 2 x\n)",
    "inside a function": "def double(x):\n    from acme.maths import twice\n    return twice(x)",
    "inside a try": "try:\n    from acme.maths import twice as double\nfinally:\n    pass",
    "a module": "from acme.maths import plain\ndef double(x): return plain.double(x)",
    "a dotted module": "import acme.maths.plain\ndef double(x): return acme.maths.plain.double(x)",
    "a module by another name": "import acme.maths as m\ndouble = m.twice",
    "beside another module": "import math, acme.maths\ndouble = math and acme.maths.plain.double",
    "after a wide character": "import acme.maths as m\ndef double(é): return '漢' and m.twice(é)",
    "inside a class": "class A:\n    from acme.maths import twice\ndouble = A.twice",
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_import_gives_the_same_function(package: Path, form: str) -> None:
    code = flat(package, FORMS[form])
    module = run(package, code)
    assert module.double(21) == 42
    assert not {"acme.py", "acme_heavy.py"} & set(code.files)
    assert "acme" not in sys.modules


def test_modules_reach_one_another_through_packages(package: Path) -> None:
    module = run(package, flat(package, "from acme.maths import deeper\nfound = deeper.name()"))
    assert module.found == "näme"


def test_hooks_and_type_checking_stay_behind(package: Path) -> None:
    code = flat(
        package,
        """
        from __future__ import annotations
        import dataclasses
        from typing import TYPE_CHECKING, Annotated, get_type_hints
        import workbench
        from workbench import hookimpl as hook
        from workbench.hookspecs import Register
        if TYPE_CHECKING:
            from workbench.builder import Builder
            import nowhere
        else:
            from acme.names import NAME

        @dataclasses.dataclass(frozen=True)
        class Config:
            size: Annotated[int, workbench.Choice(1, 2), "é size"] = 1

        @hook
        def register_layers(register: Register[Builder]):
            register(1)

        @workbench.hookimpl(trylast=True)
        def register_presets(register):
            register(2)

        domain = get_type_hints(Config, include_extras=True)["size"].__metadata__[0]
        """,
    )
    assert set(code.files) == {
        "acme_main.py",
        "acme_names.py",
        "workbench_config.py",
        "workbench_errors.py",
    }
    module = run(package, code)
    assert module.domain.values == (1, 2)
    assert module.domain.__class__.__module__ == "flat_folder.workbench_config"
    assert not [name for name in vars(module) if name.startswith("register")]


def test_hugging_face_finds_every_file_and_asks_for_no_optional_package(package: Path) -> None:
    code = flat(
        package,
        """
        import torch
        from acme.maths import twice

        def fast(x):
            from no_such_kernels.ops import (
                scan,
            )
            import no_such_package.at_all as other
            return scan(other, x)

        if twice(1) == 3:
            import no_such_kernels
        try:
            import not_here_either
        except ImportError:
            not_here_either = None
        """,
    )
    module = run(package, code)
    folder = Path(module.__file__ or "").parent
    for name in code.files:
        check_imports(folder / name)
    found = {Path(file).name for file in get_relative_import_files(folder / "acme_main.py")}
    assert found == set(code.files) - {"acme_main.py"}
    with pytest.raises(ModuleNotFoundError, match="no_such_kernels"):
        module.fast(1)
    assert module.not_here_either is None
    assert code.foreign == frozenset()


def test_packages_that_it_cannot_do_without_are_named(package: Path) -> None:
    code = flat(package, "import json\nimport torch\nfrom pytest import approx")
    assert code.foreign == {"pytest"}


def test_two_modules_of_one_flat_name_get_two_files(package: Path) -> None:
    write(package / "maths_plain.py", "HALF = 'other'")
    text = "from acme.maths.plain import HALF\nfrom acme.maths_plain import HALF as other"
    module = run(package, flat(package, text))
    assert (module.HALF, module.other) == (0.5, "other")


def test_everything_else_stays_as_it_was_written(package: Path) -> None:
    rest = '"""Says \\"from acme.names import NAME\\"."""\n\n\nx = {\n  1:2}  # odd\f spacing\n'
    code = flat(package, rest + "from acme.names import NAME\n")
    assert rest + "from .acme_names import NAME\n" in code.files["acme_main.py"]


REFUSED = {
    "names what it needs": ("from acme.names import *", "imports everything"),
    "a module as a value": ("from acme import names\nprint(names)", "as a value"),
    "a package as a value": ("import acme.names\nf = acme.names", "as a value"),
    "assigning to a module": ("import acme.names as n\nn.NAME = 1", "assigns to"),
    "an argument in the way": ("import acme.names as n\ndef f(n): return n.NAME", "rename one"),
    "an f-string": ("import acme.names as n\nprint(f'{n.NAME}')", "f-string"),
    "two on a line": ("import math; from acme.names import NAME", "line of its own"),
    "one-line if": ("if True: from acme.names import NAME", "line of its own"),
    "a call": ("import importlib\nimportlib.import_module('acme.names')", "by a call"),
    "a hook elsewhere": ("from workbench import hookimpl\nmark = hookimpl", "outside the hooks"),
    "no such name": ("from acme.maths import nothing", "defines no 'nothing'"),
    "no such module": ("from acme.nowhere import nothing", "has no Python source"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_cannot_be_carried_is_refused_with_its_place(package: Path, form: str) -> None:
    text, why = REFUSED[form]
    with pytest.raises(WorkbenchError, match=why) as caught:
        flat(package, text)
    assert "acme" in str(caught.value)


def test_a_module_without_a_source_is_refused() -> None:
    with pytest.raises(WorkbenchError, match="no Python source"):
        vendor(["itertools"], {"itertools"})


def test_the_models_own_code_needs_nothing_of_the_workbench() -> None:
    code = vendor(["workbench_export.modeling_workbench"], {"workbench", "workbench_export"})
    for name, text in code.files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert not (node.module or "").startswith("workbench"), name
            elif isinstance(node, ast.Import):
                assert not any(alias.name.startswith("workbench") for alias in node.names), name
    assert "workbench_builder.py" not in code.files
