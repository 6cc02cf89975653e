"""PlacementContract: the tests that any placement policy must pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from workbench.config import Field, PerLayer
from workbench.errors import FieldError
from workbench.placement import Placement
from workbench.testing.advice import concerns
from workbench.testing.configs import (
    ConfigContract,
    names_a_field,
    searched_fields,
    searched_values,
    with_value,
)

DEPTHS = range(1, 49)


class PlacementContract(ConfigContract):
    """What the search relies on in a placement policy, at every depth from 1 to 48.

        class TestMyPlacement(PlacementContract):
            placement = MyPlacement
            configs = [MyPlacement.Config(majority="mamba", minority="attention")]

    Class attributes:
        placement: the class under test.
        configs: Config instances; each must place at least one depth.
        mixers: the names that are offered.
    """

    under_test = "placement"
    placement: ClassVar[type[Placement]]
    mixers: ClassVar[Sequence[str]] = ("mamba", "attention")

    def test_class_attributes(self) -> None:
        """The reference is set; the configs are instances of `Config`.

        Mend: Set `reference`, and make the suite's configs with the class's own Config.
        """
        assert self.placement.reference, "say which paper or model it follows"
        for config in self.configs:
            assert isinstance(config, self.placement.Config)

    @concerns("place")
    def test_places_only_what_is_offered(self, config: Any) -> None:
        """A tuple of the right length with offered names, or a FieldError that names a field.

        Mend: Return a tuple of exactly `num_layers` names out of `mixers`; where the config cannot
        place that many, raise a FieldError that names one of its fields.
        """
        placed = [num_layers for num_layers in DEPTHS if self._places(num_layers, config)]
        assert placed, "no depth from 1 to 48 can be placed"

    @concerns("place")
    def test_is_pure(self, config: Any) -> None:
        """Same arguments, same result; the offered names are neither changed nor held.

        Mend: Compute from the arguments alone: no random draws, nothing kept on the class, and copy
        `mixers` before changing it.
        """
        for num_layers in DEPTHS:
            offered = list(self.mixers)
            first = self._outcome(num_layers, offered, config)
            assert offered == list(self.mixers), "place changed the list of mixers"
            for other in DEPTHS[::7]:
                self._outcome(other, self.mixers[::-1], config)
            assert self._outcome(num_layers, tuple(self.mixers), config) == first

    @concerns("place", "Config")
    def test_search_ranges(self) -> None:
        """Every value that a search could draw places some depth, or is refused by field.

        Mend: Narrow the field's range to values that place some depth from 1 to 48, or refuse the
        others with a FieldError that names the field.
        """
        for field in searched_fields(self.placement.Config):
            for config in self.configs:
                if isinstance(field.domain, PerLayer):
                    self._assert_places_per_layer(config, field, field.domain)
                else:
                    self._assert_places_values(config, field)

    def _assert_places_values(self, config: Any, field: Field) -> None:
        for value in searched_values(field.domain, self.mixers):
            changed = with_value(config, field, value)
            if isinstance(changed, FieldError):
                assert names_a_field(changed, self.placement.Config), str(changed)
            else:
                placed = [n for n in DEPTHS if self._places(n, changed)]
                assert placed, f"{field.name}={value!r} places no depth from 1 to 48"

    def _assert_places_per_layer(self, config: Any, field: Field, domain: PerLayer) -> None:
        values = list(searched_values(domain.inner, self.mixers))
        for num_layers in DEPTHS:
            drawn = tuple(values[index % len(values)] for index in range(num_layers))
            changed = with_value(config, field, drawn)
            assert not isinstance(changed, FieldError), str(changed)
            assert self._places(num_layers, changed), f"{field.name} with one value a layer"

    def _places(self, num_layers: int, config: Any) -> bool:
        outcome = self._outcome(num_layers, self.mixers, config)
        if isinstance(outcome, str):
            return False
        assert isinstance(outcome, tuple), f"{num_layers} layers: not a tuple but {outcome!r}"
        assert len(outcome) == num_layers, f"{num_layers} layers: {outcome}"
        assert set(outcome) <= set(self.mixers), f"{num_layers} layers: {outcome}"
        return True

    def _outcome(self, num_layers: int, mixers: Sequence[str], config: Any) -> Any:
        """What `place` returned, or the message of its FieldError."""
        try:
            return self.placement.place(num_layers, mixers, config)
        except FieldError as error:
            refusal = error
        assert names_a_field(refusal, self.placement.Config), (
            f"{num_layers} layers: {refusal.field!r} is no field: {refusal}"
        )
        return str(refusal)
