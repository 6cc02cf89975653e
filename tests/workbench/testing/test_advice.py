"""Whose advice a failure gets: that of the member which is at fault, whatever check it fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.workbench.testing.planting import Edit, plant
from workbench.testing import DataSourceContract, LayerContract
from workbench.testing.advice import advice_of, spokesman
from workbench.testing.blame import member_at, place_of

METHODS = "    @classmethod\n    def costs(\n"
COUNT = "        linears, taps ="
IMPORT = "from workbench.costs import"
BEGIN = "        length, past ="
RAISE = "raise TypeError('planted')"
HELPER = "def helper(*_):\n    raise TypeError('planted')\n\n\n"
STATE = "@dataclasses.dataclass\nclass LastTokens"


def classmethod_of(name: str, body: str) -> Edit:
    return (
        METHODS,
        f"    @classmethod\n    def {name}(cls, d_model, it):\n        {body}\n\n{METHODS}",
    )


FAULTS: dict[str, tuple[str, str, tuple[Edit, ...]]] = {
    "source raises": ("causality", "source", (classmethod_of("source", RAISE),)),
    "source names itself": ("causality", "source", (classmethod_of("source", "return 0"),)),
    "source refuses": (
        "gradients",
        "source",
        (
            classmethod_of("source", "raise FieldError('layer', 'planted')"),
            (IMPORT, f"from workbench.errors import FieldError\n{IMPORT}"),
        ),
    ),
    "a helper of source raises": (
        "causality",
        "source",
        (classmethod_of("source", "return helper(it)"), (STATE, HELPER + STATE)),
    ),
    "check raises": ("leaves_torch_alone", "check", (classmethod_of("check", RAISE),)),
    "costs raises": ("prints_nothing", "costs", ((COUNT, f"        {RAISE}\n{COUNT}"),)),
    "forward raises": ("causality", "forward", ((BEGIN, f"        {RAISE}\n{BEGIN}"),)),
    "forward asks check, which raises": (
        "causality",
        "check",
        (
            classmethod_of("check", RAISE),
            (BEGIN, f"        self.check(self.d_model, self.config)\n{BEGIN}"),
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_the_member_at_fault_is_found(fault: str, tmp_path: Path) -> None:
    check, member, edits = FAULTS[fault]
    layer = plant(tmp_path, "layer", *edits).Good
    suite = type("Suite", (LayerContract,), {"layer": layer, "configs": (layer.Config(),)})
    with pytest.raises(Exception, match=r"planted|earlier block") as caught:
        getattr(suite(), f"test_{check}")(config=layer.Config())
    assert member_at(caught.value, layer) == member
    place = place_of(caught.value, layer, (member,))
    assert place is not None
    assert place[0].startswith(str(tmp_path))


def test_a_failed_comparison_is_no_members(tmp_path: Path) -> None:
    layer = plant(tmp_path, "layer").Good
    assert member_at(AssertionError("outputs differ"), layer) is None
    assert member_at(None, layer) is None


def test_each_speaks_for_its_own() -> None:
    for member, test in (
        ("source", "test_source_names_an_earlier_block"),
        ("costs", "test_costs_are_plausible"),
        ("check", "test_search_space_can_be_built"),
    ):
        assert spokesman(LayerContract, member) == advice_of(getattr(LayerContract, test))
        assert spokesman(LayerContract, member).where[0] == member  # type: ignore[union-attr]
    assert spokesman(LayerContract, "forward") is None
    assert spokesman(DataSourceContract, "source") is None
