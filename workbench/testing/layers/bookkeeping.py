"""What a layer says of itself: costs, state bytes, ranges, names; all without being built."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from workbench import config as configs
from workbench.costs import Costs
from workbench.errors import FieldError
from workbench.layer import State
from workbench.testing.advice import concerns, speaks_for
from workbench.testing.allocations import Allocations
from workbench.testing.configs import names_a_field, searched_fields, searched_values, with_value
from workbench.testing.derived import draws
from workbench.testing.layers.base import LayerSuite

LENGTHS = (1, 33, 1000)
DRAWS = 20  # from the whole search space, at each of two widths


class BookkeepingTests(LayerSuite):
    """Tests of `costs`, `check`, `init_state` sizes, the meta device and class attributes."""

    def test_class_attributes(self) -> None:
        """Kind, glyph and reference are set; the configs are instances of `Config`.

        Mend: Set `kind`, `glyph` (one character, no '?') and `reference` on the class.
        """
        assert self.layer.kind in ("attention", "recurrent", "mlp")
        assert len(self.layer.glyph) == 1
        assert self.layer.glyph != "?", "'?' stands for a layer without a glyph"
        assert self.layer.reference, "say which paper or implementation it follows"
        for config in self.configs:
            assert isinstance(config, self.layer.Config)

    @concerns("__init__")
    def test_meta_device_allocates_nothing(self, config: Any) -> None:
        """Construction on the meta device takes no memory, whatever the size.

        Mend: In the constructor pass `device` and `dtype` on to every tensor and module
        (`**factory`), and compute nothing there: move it to `reset_parameters` or `forward`.
        """
        with Allocations() as allocations:
            layer = self.layer(self.d_model, config, device="meta", dtype=torch.bfloat16)
        assert allocations.operations == []
        for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
            assert tensor.device.type == "meta", name

    @concerns("costs")
    def test_costs_count_parameters(self, config: Any) -> None:
        """`costs().parameters` is the number of trainable numbers, at any length.

        Mend: Correct `costs().parameters`: biases, norms and convolutions count, and it does not
        depend on the length.
        """
        self.layer.check(self.d_model, config)
        expected = self._parameters(config)
        for length in LENGTHS:
            costs = self._costs(config, length)
            assert costs.parameters == expected, (
                f"costs() says {costs.parameters}, the module has {expected}"
            )
            assert costs.active_parameters is not None
            assert 0 <= costs.active_parameters <= expected

    @concerns("costs", "shared")
    def test_costs_count_own_parameters(self, config: Any) -> None:
        """`costs().own_parameters` is what a block holds that takes the `shared` modules.

        Mend: Correct `costs().own_parameters`: `parameters` without those of the submodules that
        `shared` names. Leave it out where nothing is shared.
        """
        layer, costs = self.layer(self.d_model, config, device="meta"), self._costs(config, 1)
        if not layer.shared and costs.own_parameters == costs.parameters:
            return  # left out: whether the count is right is another check's question
        for name in layer.shared:
            delattr(layer, name)
        expected = sum(parameter.numel() for parameter in layer.parameters())
        assert costs.own_parameters == expected

    @concerns("costs", "init_state")
    def test_costs_count_state_bytes(self, config: Any) -> None:
        """`costs().state_bytes` is what `init_state` allocates, for every dtype and batch size.

        Mend: Make `costs().state_bytes` the bytes of one row of `init_state`'s tensors:
        `bytes_per_element` a number in the given dtype, 4 where the state is always float32; and
        let `init_state` use the dtype and device it is given.
        """
        layer = self.layer(self.d_model, config, device="meta")
        for length in LENGTHS:
            for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
                costs = self._costs(config, length, size)
                for batch_size in (1, 3):
                    state = layer.init_state(batch_size, length, device="meta", dtype=dtype)
                    assert state.num_bytes == batch_size * costs.state_bytes, (
                        f"{dtype}, length {length}, batch size {batch_size}"
                    )

    @concerns("forward", "step")
    @torch.no_grad()
    def test_states_do_not_grow(self, config: Any) -> None:
        """A state is updated in place: it keeps the shapes and dtypes that `init_state` gave it.

        Mend: Allocate all that the state will ever hold in `init_state`, and keep shape and dtype
        when `forward` and `step` update it: no concatenating, and cast before assigning.
        """
        for dtype in (torch.float64, torch.bfloat16):
            layer, x_BTD = self.build(config).to(dtype), self.inputs(2, 9).to(dtype)
            state = layer.init_state(2, 9, device="cpu", dtype=dtype)
            allocated, held = _held(state), state.num_bytes
            layer(x_BTD[:, :8], state=state)
            assert _held(state) == allocated, "after a prefill the state holds other tensors"
            layer.step(x_BTD[:, 8], state)
            assert _held(state) == allocated, "after a step the state holds other tensors"
            assert state.num_bytes == held, "a state grew"

    @speaks_for("costs")
    @concerns("costs")
    def test_costs_are_plausible(self, config: Any) -> None:
        """FLOPs cover the linears and grow with the length; a recurrent state is bounded.

        Mend: Correct `costs`: plain ints, forward FLOPs of at least 2 a weight and token, a state
        that is bounded for `recurrent` and empty for `mlp`.
        """
        rows = [self._costs(config, length) for length in (1, 100, 10_000, 100_000)]
        for row in rows:
            for name in ("forward_flops", "decode_flops", "state_bytes", "decode_state_bytes"):
                value = getattr(row, name)
                assert isinstance(value, int), f"{name} is {value!r}"
                assert value >= 0, name
        forward = [row.forward_flops for row in rows]
        assert forward == sorted(set(forward)), "forward_flops must grow with the length"
        if self.layer.kind == "recurrent":
            assert rows[-1].state_bytes == rows[-2].state_bytes, "a recurrent state is bounded"
            assert rows[-1].decode_flops == rows[-2].decode_flops
        if self.layer.kind == "mlp":
            assert rows[-1].state_bytes == 0, "an mlp carries nothing from token to token"
        if rows[0].active_parameters == rows[0].parameters:
            linears = 2 * self._linear_weights(config)
            assert rows[0].decode_flops >= linears, "decode_flops are below those of the linears"
            assert rows[1].forward_flops >= 100 * linears, "forward_flops are below the linears'"

    @concerns("check", "Config")
    def test_search_ranges(self) -> None:
        """Every value that a search could draw is built, or refused with a field named.

        Mend: Narrow the field's range to what can be built, or refuse the combination in `check`
        with a FieldError that names one of the Config's fields.
        """
        for field in searched_fields(self.layer.Config):
            built = 0
            for value in searched_values(field.domain):
                for config in self.configs:
                    built += self._builds(config, field, value)
            assert built, f"no value in the range of {field.name} can be built on any config"

    @speaks_for("check")
    @concerns("check", "Config")
    def test_search_space_can_be_built(self) -> None:
        """Values drawn together, at two widths, are built or refused by field; some are built.

        Mend: Refuse what does not fit together in `check`, with a FieldError that names a field of
        the Config, and offer ranges of which more than the defaults can be built.
        """
        built = 0
        for d_model in (self.d_model, 4 * self.d_model):
            for values in draws(self.layer.Config, DRAWS):
                config, refusal = self._drawn(d_model, values)
                if refusal is not None:
                    assert names_a_field(refusal, self.layer.Config, "d_model"), (
                        f"{values} is refused, but {refusal.field!r} is no field: {refusal}"
                    )
                    continue
                layer = self.layer(d_model, config, device="meta")
                counted = self.layer.costs(d_model, config, length=7).parameters
                assert counted == sum(parameter.numel() for parameter in layer.parameters()), (
                    f"costs count other parameters than {values} has at d_model {d_model}"
                )
                built += 1
        assert built, f"none of {2 * DRAWS} draws from the search ranges can be built"

    def _drawn(self, d_model: int, values: dict[str, Any]) -> tuple[Any, FieldError | None]:
        try:
            config = dataclasses.replace(self.configs[0], **values)
            self.layer.check(d_model, config)
        except FieldError as error:
            return None, error
        return config, None

    def _builds(self, config: Any, field: configs.Field, value: Any) -> bool:
        changed = with_value(config, field, value)
        refusal = changed if isinstance(changed, FieldError) else self._refusal(changed)
        if refusal is not None:
            assert names_a_field(refusal, self.layer.Config, "d_model"), (
                f"{field.name}={value!r} is refused, but {refusal.field!r} is no field: {refusal}"
            )
            return False
        assert self._costs(changed, 7).parameters == self._parameters(changed), (
            f"{field.name}={value!r}"
        )
        return True

    def _refusal(self, config: Any) -> FieldError | None:
        try:
            self.layer.check(self.d_model, config)
        except FieldError as error:
            return error
        return None

    @concerns("keep_precision")
    def test_keep_precision_names_submodules(self) -> None:
        """Each name of `keep_precision` is a submodule of some configuration, with a reason.

        Mend: Write names of submodules as `named_modules()` gives them, each with the reason.
        """
        names = {
            name
            for config in self.configs
            for name, _ in self.layer(self.d_model, config, device="meta").named_modules()
        }
        for name, reason in self.layer.keep_precision.items():
            assert name in names, f"keep_precision names {name!r}, which no config has"
            assert reason, f"say why {name!r} keeps its precision"

    def _costs(self, config: Any, length: int, bytes_per_element: int = 4) -> Costs:
        return self.layer.costs(
            self.d_model, config, length=length, bytes_per_element=bytes_per_element
        )

    def _parameters(self, config: Any) -> int:
        layer = self.layer(self.d_model, config, device="meta")
        return sum(parameter.numel() for parameter in layer.parameters())

    def _linear_weights(self, config: Any) -> int:
        layer = self.layer(self.d_model, config, device="meta")
        linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        return sum(linear.weight.numel() for linear in linears)


def _held(state: State) -> dict[str, str]:
    """Shape, dtype and device of a state's tensors."""
    return {
        name: f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
        for name, tensor in state.tensors().items()
    }
