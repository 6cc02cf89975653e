"""Faults planted in the source of a good layer: each is found by the check that is there for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import workbench_attention.kernels  # noqa: F401 - defines the operation "attention"
from tests.workbench.testing.planting import Edit, plant
from tests.workbench.testing.running import failure, suite_tests
from workbench import NoConfig
from workbench.testing import LayerContract
from workbench.testing.toy_layers import ToyMLP

TAP = "weight_D * u_BSD[:, here] * same_BT1"
OUT = "self.out_proj(y_BTD.to(gate_BTD.dtype) * F.silu(gate_BTD))"
RETURN = "return projected_BTD  # `step` is this on one token"
BEGIN = "        length, past = x_BTD.shape[1], self.config.width - 1\n"
METHODS = "    @classmethod\n    def costs(\n"
STATE = "    last_BWD: Tensor\n"
STATE_OUT = "(u_BSD[:, -past:] * same_BW1).to(state.last_BWD.dtype)"
ALLOCATE = "self.taps_WD = nn.Parameter(torch.empty(config.width, d_model, **factory))"
RESET = "nn.init.normal_(self.taps_WD, std=self.config.width**-0.5)"
CLASS = '    kind = "recurrent"\n'


def first_in_forward(line: str) -> Edit:
    return BEGIN, f"        {line}\n{BEGIN}"


def method(text: str) -> Edit:
    return METHODS, f"{text}\n\n{METHODS}"


def source(body: str) -> Edit:
    return method(f"    @classmethod\n    def source(cls, d_model, blocks):\n        {body}")


def backends(value: str) -> Edit:
    return method(f"    def backends(self, dtype):\n        return {value}")


SOURCE = "source_names_an_earlier_block"
FAULTS: dict[str, tuple[str, tuple[Edit, ...]]] = {
    "leaks the future by one": ("causality", ((TAP, TAP.replace("here]", "here].roll(-1, 1)")),)),
    "leaks a faint mean": ("causality", ((OUT, f"{OUT} + 1e-6 * x_BTD.mean(1, keepdim=True)"),)),
    "sees the past only": ("causality", (first_in_forward("x_BTD = x_BTD.roll(1, 1)"),)),
    "forgets the state in step": (
        "prefill_and_steps_equal_forward",
        (
            method(
                "    def step(self, x_BD, state, context=PLAIN):\n"
                "        return self.forward(x_BD[:, None], context)[:, 0]"
            ),
        ),
    ),
    "starts every call anew": (
        "prefill_and_steps_equal_forward",
        (("before_BWD = state.last_BWD.to(u_BTD.dtype)", "pass"),),
    ),
    "leaves the state as it was": (
        "steps_continue_a_prefill",
        ((f"state.last_BWD = {STATE_OUT}", "pass"),),
    ),
    "selects its own memory": (
        "selected_states_go_their_own_way",
        (
            (
                STATE,
                STATE + "\n    def select(self, indices_B):\n"
                "        same = len(indices_B) == len(self.last_BWD)\n"
                "        return self if same else super().select(indices_B)\n",
            ),
        ),
    ),
    "forgets the padding": (
        "left_padding_leaks_nothing",
        (("u_BTD = context.mask_padding(u_BTD)", "pass"),),
    ),
    "masks before it adds a bias": (
        "left_padding_leaks_nothing",
        (("context.mask_padding(u_BTD)", "context.mask_padding(u_BTD) + 0.1"),),
    ),
    "NaN where all is padding": (
        "padding_stays_finite",
        (
            (
                "u_BTD = context.mask_padding(u_BTD)",
                "u_BTD = context.mask_padding(u_BTD)\n"
                "        if context.attention_mask_BT is not None:\n"
                "            seen = context.attention_mask_BT.cumsum(1)[..., None]\n"
                "            u_BTD = u_BTD * seen / seen",
            ),
        ),
    ),
    "ignores the documents": (
        "documents_of_a_packed_row_are_strangers",
        (("document_BT = context.seq_idx_BT", "document_BT = None"),),
    ),
    "carries a document into the next": (
        "a_state_belongs_to_one_document",
        ((STATE_OUT, STATE_OUT.replace(" * same_BW1", "")),),
    ),
    "reads the prefix": (
        "prefix",
        (
            (
                RETURN,
                "if context.prefix_lengths_B is not None:\n"
                "            projected_BTD = projected_BTD + x_BTD[:, 1:2]\n"
                f"        {RETURN}",
            ),
        ),
    ),
    "wrong shape": ("shapes_and_numbers", ((RETURN, "return projected_BTD[..., :-1]"),)),
    "returns a pair": ("shapes_and_numbers", ((RETURN, "return projected_BTD, state"),)),
    "takes a logarithm": ("shapes_and_numbers", ((OUT, OUT.replace("F.silu", "torch.log")),)),
    "changes its input": ("inputs_are_left_alone", (first_in_forward("x_BTD.clamp_(-1.0, 1.0)"),)),
    "changes the mask": (
        "inputs_are_left_alone",
        (
            first_in_forward(
                "_ = context.attention_mask_BT is None or context.attention_mask_BT.fill_(True)"
            ),
        ),
    ),
    "mixes the rows of a batch": (
        "rows_of_a_batch_are_strangers",
        (("context.mask_padding(u_BTD)", "context.mask_padding(u_BTD - 1e-4 * u_BTD.mean(0))"),),
    ),
    "prints": ("prints_nothing", (first_in_forward('print("forward")'),)),
    "patches torch": ("leaves_torch_alone", (first_in_forward("F.gelu = torch.tanh"),)),
    "sets a global": (
        "leaves_torch_alone",
        ((ALLOCATE, f"{ALLOCATE}\n        torch.set_float32_matmul_precision('medium')"),),
    ),
    "draws in forward": ("leaves_torch_alone", (first_in_forward("torch.rand(1)"),)),
    "detaches": ("gradients", ((OUT, OUT.replace("y_BTD.to", "y_BTD.detach().to")),)),
    "an idle parameter": (
        "gradients",
        (
            (ALLOCATE, f"{ALLOCATE}\n        self.idle = nn.Parameter(torch.empty(2, **factory))"),
            (RESET, f"{RESET}\n        nn.init.zeros_(self.idle)"),
        ),
    ),
    "rounds on its way": ("gradients", ((OUT, OUT.replace("y_BTD.to", "y_BTD.bfloat16().to")),)),
    "rounds in float32": (
        "float32",
        (
            (
                OUT,
                "self.out_proj((y_BTD if y_BTD.dtype == torch.float64 else y_BTD.bfloat16())"
                ".to(gate_BTD.dtype) * F.silu(gate_BTD))",
            ),
        ),
    ),
    "a float64 constant": (
        "bfloat16",
        ((OUT, OUT.replace("y_BTD.to(gate_BTD.dtype)", "y_BTD * torch.ones(1, 1, 1).double()")),),
    ),
    "adds two dtypes in place": (
        "autocast",
        ((f"y_BTD + {TAP}", f"y_BTD.index_add(1, torch.arange(length), {TAP})"),),
    ),
    "branches on a value": (
        "compiles",
        (first_in_forward("x_BTD = x_BTD if x_BTD.abs().max().item() < 1e9 else x_BTD / 2"),),
    ),
    "breaks the graph in step": (
        "compiles_steps",
        (
            method(
                "    def step(self, x_BD, state, context=PLAIN):\n"
                "        if float(state.last_BWD.sum()) > 1e9:\n"
                "            return x_BD\n"
                "        return super().step(x_BD, state, context)"
            ),
        ),
    ),
    "static from nothing": (
        "static_steps_are_steps",
        (
            (
                STATE,
                f"{STATE}\n    def make_static(self):\n"
                "        self.last_BWD = torch.zeros_like(self.last_BWD)\n",
            ),
        ),
    ),
    "restores nothing": (
        "static_steps_are_steps",
        ((STATE, f"{STATE}\n    def restore(self, before):\n        pass\n"),),
    ),
    "an operation that nobody defines": (
        "backends_are_known",
        (backends('{"shift": "torch"}'),),
    ),
    "a kernel on a CPU": ("backends_are_known", (backends('{"attention": "flash-attn"}'),)),
    "no operations, but a name": ("backends_are_known", (backends('"torch"'),)),
    "half the FLOPs": (
        "costs_cover_counted_flops",
        (("forward_flops=2 * (", "forward_flops=("),),
    ),
    "twice the decode FLOPs": (
        "costs_cover_counted_flops",
        (("decode_flops=2 * (", "decode_flops=4 * ("),),
    ),
    "FLOPs of one token": ("costs_are_plausible", (("(linears + taps) * length", "(linears)"),)),
    "an mlp with a state": ("costs_are_plausible", ((CLASS, '    kind = "mlp"\n'),)),
    "costs off by one tap": (
        "costs_count_parameters",
        (("parameters=linears + taps", "parameters=linears + taps - d_model"),),
    ),
    "shared weights counted twice": (
        "costs_count_own_parameters",
        ((CLASS, f'{CLASS}    shared = ("out_proj",)\n'),),
    ),
    "state bytes doubled": (
        "costs_count_state_bytes",
        (("            state_bytes=state_bytes", "            state_bytes=2 * state_bytes"),),
    ),
    "state of another dtype": (
        "costs_count_state_bytes",
        (("self.d_model, **factory))", 'self.d_model, device=factory.get("device")))'),),
    ),
    "state grows": (
        "states_do_not_grow",
        ((STATE_OUT, f"torch.cat([state.last_BWD[:, :1], {STATE_OUT}], 1)"),),
    ),
    "state changes its dtype": (
        "states_do_not_grow",
        ((STATE_OUT, STATE_OUT.replace("state.last_BWD.dtype", "torch.float64")),),
    ),
    "differs from run to run": (
        "determinism",
        ((OUT, f"{OUT} * (1 + 1e-9 * torch.rand((), dtype=x_BTD.dtype))"),),
    ),
    "allocates on the meta device": (
        "meta_device_allocates_nothing",
        ((ALLOCATE, ALLOCATE.replace("**factory", 'dtype=factory.get("dtype")')),),
    ),
    "resets all but one": ("reset_parameters_needs_no_constructor", ((RESET, "pass"),)),
    "a buffer that is not saved": (
        "save_and_load",
        (
            (
                ALLOCATE,
                f"{ALLOCATE}\n        self.register_buffer("
                '"gain_D", torch.empty(d_model, **factory), persistent=False)',
            ),
            (RESET, f"{RESET}\n        nn.init.uniform_(self.gain_D)"),
            (OUT, f"{OUT} * self.gain_D"),
        ),
    ),
    "a range that cannot be built": (
        "search_ranges",
        (("Choice(2, 3, 4)", "Choice(2, 3, -1)"),),
    ),
    "refuses without a field": (
        "search_ranges",
        (
            method(
                "    @classmethod\n"
                "    def check(cls, d_model, config):\n"
                "        from workbench.errors import FieldError\n\n"
                "        if config.width == 2:\n"
                '            raise FieldError("kernel", "is too narrow")'
            ),
        ),
    ),
    "fits one width only": (
        "search_space_can_be_built",
        ((ALLOCATE, f"assert d_model < 100\n        {ALLOCATE}"),),
    ),
    "a source that raises": (SOURCE, (source("return len(blocks) + None"),)),
    "builds on itself": (SOURCE, (source("return len(blocks) - 1"),)),
    "builds on a later block": (SOURCE, (source("return len(blocks)"),)),
    "counts from the end": (SOURCE, (source("return -1 if len(blocks) > 1 else None"),)),
    "names a block by its layer": (SOURCE, (source("return blocks[0].layer"),)),
    "knows its own kind only": (
        SOURCE,
        (source("_ = [block.config['width'] for block in blocks]\n        return None"),),
    ),
    "writes to a block": (
        SOURCE,
        (source("blocks[-1].config['width'] = 2\n        return None"),),
    ),
    "keeps what it was asked": (
        SOURCE,
        (
            source(
                "cls.asked = getattr(cls, 'asked', 0) + 1\n"
                "        return 0 if len(blocks) > 1 and cls.asked > 5 else None"
            ),
        ),
    ),
    "a Config that is no data": (
        "config_is_plain_data",
        (
            (
                '"tokens that the convolution sees"] = 4',
                '"tokens that the convolution sees"] = 4\n        limit: float = float("inf")',
            ),
        ),
    ),
    "no glyph": ("class_attributes", (('glyph = "G"', 'glyph = "?"'),)),
    "misspelt projection": ("output_projection", (('= "out_proj"', '= "o_proj"'),)),
    "misspelt precision": (
        "keep_precision_names_submodules",
        ((CLASS, f'{CLASS}    keep_precision = {{"taps": "few"}}\n'),),
    ),
}
SLOW = {
    "an attribute that no file holds": (
        "export_round_trip",
        (
            (ALLOCATE, f"{ALLOCATE}\n        self.gain = 1.0"),
            (RESET, f"{RESET}\n        self.gain = 1.5"),
            (OUT, f"{OUT} * self.gain"),
        ),
    ),
}


def found(folder: Path, check: str, edits: tuple[Edit, ...]) -> str:
    """How the check fails on the layer with these edits; "" if it does not."""
    layer = plant(folder, "layer", *edits).Good
    configs = (layer.Config(),)
    return failure(LayerContract, f"test_{check}", folder / "run", layer=layer, configs=configs)


@pytest.mark.parametrize("check", sorted(suite_tests(LayerContract) - {"test_export_round_trip"}))
def test_the_good_layer_passes(check: str, tmp_path: Path) -> None:
    assert found(tmp_path, check.removeprefix("test_"), ()) == ""


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_by_its_check(fault: str, tmp_path: Path) -> None:
    check, edits = FAULTS[fault]
    assert found(tmp_path, check, edits) != ""


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("leaks the future by one", "outputs before token 1 when it and later ones change: off by"),
        ("wrong shape", "forward returned shape [1, 1, 31] for inputs [1, 1, 32]"),
        ("returns a pair", "forward returned tuple"),
        ("takes a logarithm", "forward returned NaN for inputs of 1 σ"),
        ("changes its input", "x was changed in place"),
        ("changes the mask", "attention_mask_BT was changed in place"),
        ("prints", "the layer printed 'forward"),
        ("patches torch", "torch.nn.functional.gelu became"),
        ("sets a global", "torch's float32 matmul precision: highest became medium"),
        ("half the FLOPs", "forward_flops says 204,800, but torch counts 393,216"),
        (
            "twice the decode FLOPs",
            "decode_flops says 12,800, 2.08 times what torch counts (6,144)",
        ),
        ("branches on a value", "torch.compile breaks the graph: "),
        ("state changes its dtype", "after a prefill the state holds other tensors"),
        ("adds two dtypes in place", "self (BFloat16) and source (Float)"),
        ("allocates on the meta device", "on cpu"),
        ("static from nothing", "static step 0: off by"),
        ("restores nothing", "static step 0 after `restore`: off by"),
        ("an operation that nobody defines", "'shift', which nobody defines"),
        ("a kernel on a CPU", "the operation 'attention' with 'flash-attn', on a CPU"),
        ("no operations, but a name", "returned 'torch', no dict"),
        ("a source that raises", "TypeError: unsupported operand"),
        ("builds on itself", "source of block 0 of (under-test) is 0, which is no earlier block"),
        ("builds on a later block", "source of block 0 of (under-test) is 1, which is no"),
        ("writes to a block", "source of block 0 of (under-test) changed the blocks"),
        ("keeps what it was asked", "is None, and then 0"),
    ],
)
def test_what_was_found_is_named(fault: str, words: str, tmp_path: Path) -> None:
    assert words in found(tmp_path, *FAULTS[fault])


@pytest.mark.slow
@pytest.mark.parametrize("fault", [None, *SLOW])
def test_the_export_tells_the_good_layer_from_the_faulty(fault: str | None, tmp_path: Path) -> None:
    message = found(tmp_path, "export_round_trip", SLOW[fault][1] if fault else ())
    assert bool(message) == bool(fault), message


def test_steps_that_cannot_be_captured_fail_where_the_suite_says_that_they_can(
    tmp_path: Path,
) -> None:
    layer = plant(tmp_path, "layer", (STATE, f"{STATE}    seen: int = 0\n")).Good
    given = {"layer": layer, "configs": (layer.Config(),)}
    test = "test_static_steps_are_steps"
    reason = "keeps 'seen' on the host"
    assert reason in failure(LayerContract, test, tmp_path / "1", **given, captured=True)
    with pytest.raises(pytest.skip.Exception, match=reason):
        failure(LayerContract, test, tmp_path / "2", **given)


def test_a_layer_made_of_layers_says_what_they_run_on(tmp_path: Path) -> None:
    class Inner(ToyMLP):
        def backends(self, dtype: torch.dtype) -> dict[str, str]:
            return {"attention": "torch"}

    class Outer(ToyMLP):
        def __init__(self, d_model: int, config: NoConfig, **factory: Any) -> None:
            super().__init__(d_model, config, **factory)
            self.inner = Inner(d_model, config, **factory)

    class Telling(Outer):
        def backends(self, dtype: torch.dtype) -> dict[str, str]:
            return self.inner.backends(dtype)

    def said(layer: type[ToyMLP]) -> str:
        folder = tmp_path / layer.__name__
        return failure(
            *(LayerContract, "test_backends_are_known", folder), layer=layer, configs=(NoConfig(),)
        )

    assert "backends(torch.float32) leaves out ['attention'] of inner" in said(Outer)
    assert said(Telling) == ""


def test_every_check_has_a_fault() -> None:
    checks = {f"test_{check}" for check, _ in (*FAULTS.values(), *SLOW.values())}
    assert checks == suite_tests(LayerContract)
