"""The `huggingface` exporter, seen from a process that knows nothing of the workbench."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.dynamic_module_utils import get_imports

from tests.prepared import Proofs
from workbench.builder import Builder
from workbench.exporter import ExportReport
from workbench.layer import Context
from workbench.layout import Block, Layout, Named
from workbench.model import HybridLM

# Its two models are exported and probed once: on one worker, not on each.
pytestmark = pytest.mark.xdist_group("export")

HERE = Path(__file__).parent
EXAMPLE = HERE.parents[1] / "plugins/example-linear-attention/lm_linear_attention.py"
TOLERANCE = {"atol": 1e-5, "rtol": 0.0}


@dataclasses.dataclass
class Exported:
    """A model, its folder, and what a fresh process saw of it."""

    model: HybridLM
    report: ExportReport
    tokens: Tensor
    seen: dict[str, Tensor]
    untouched: bool


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def plugin_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plugins")
    shutil.copy(EXAMPLE, folder / "lm-linear-attention.py")
    return folder


@pytest.fixture(scope="module")
def stocked(plugin_dir: Path) -> Builder:
    """A builder that knows the third-party layers too."""
    builder = Builder.load([plugin_dir])
    assert not builder.plugins.failures
    return builder


ORIGIN = {"plugin": "p", "package": "some-package", "version": "3.1", "module": "some.module"}
METADATA = {
    "provenance": {
        "layers": {"mamba": {**ORIGIN, "sha256": "0" * 64}},  # not as it is now
        "metrics": {"bits_per_byte": {**ORIGIN, "sha256": "ab" * 32}},
    },
    "study": "quickstart",
    "trial": 7,
    "metrics": {"bits_per_byte": 2.5},
    "units": {"bits_per_byte": "bits/byte"},
    "versions": {"torch": torch.__version__, "mamba-ssm": None},
    "tokenizer": {"kind": "bytes"},
}

HYBRID = Layout(
    d_model=32,
    vocab_size=256,
    blocks=(
        Block(layer="mamba", config={"d_state": 4, "dt_bc_norm": True}),
        Block(layer="swiglu"),
        Block(layer="mamba2", config={"d_state": 8, "headdim": 16, "chunk_size": 16}),
        Block(layer="attention", config={"num_heads": 4, "num_kv_heads": 2, "qk_norm": True}),
        Block(layer="relu2_mlp"),
        Block(layer="bitlinear_mamba", config={"d_state": 4}),
        Block(layer="linear-attention"),
    ),
)

QUANTIZED = Layout(
    d_model=64,
    vocab_size=99,
    tie_embeddings=False,
    norm="layernorm",
    embedding_multiplier=3.0,
    residual_multiplier=0.5,
    logits_scaling=0.25,
    blocks=(
        Block(
            layer="mamba2",
            config={"d_state": 8, "headdim": 32},
            quantizer=Named(name="int4", config={"group_size": 32}),
        ),
        Block(
            layer="attention",
            config={"num_heads": 2, "position": "alibi", "sliding_window": 16},
            quantizer=Named(name="int8"),
        ),
        Block(layer="bitlinear_mamba", config={"d_state": 4}, quantizer=Named(name="b1_58")),
        Block(layer="attention", config={"num_heads": 2, "position": "none"}),
        Block(layer="swiglu", quantizer=Named(name="int4")),
    ),
)


def exported(
    layout: Layout, builder: Builder, folder: Path, prepared: Proofs, **metadata: Any
) -> Exported:
    model = builder.build(layout, seed=1)
    before = model.training, str(model)
    report = builder.exporters["huggingface"].export(
        model, builder, folder / "model", None, {**METADATA, **metadata}
    )
    untouched = before == (model.training, str(model))
    builder.quantize(model)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(layout.vocab_size, (2, 40), generator=generator)
    seen = probe(builder, report.path, tokens, prepared)
    return Exported(model.eval(), report, tokens, seen, untouched)


def probe(builder: Builder, folder: Path, tokens: Tensor, prepared: Proofs) -> dict[str, Tensor]:
    modules = [found.module for found in builder.plugins.loaded.values()]
    hidden = {"workbench", *(module.partition(".")[0] for module in modules)}
    question, answer = folder.with_name("question"), folder.with_name("answer")
    save_file({"tokens": tokens}, question, {"folder": str(folder), "hidden": " ".join(hidden)})
    done = prepared.run(
        [sys.executable, "-I", HERE / "export_probe.py", question, answer],
        env={**os.environ, "HF_HOME": str(folder.with_name("hf")), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return load_file(answer)


@pytest.fixture(scope="module")
def hybrid(
    stocked: Builder, tmp_path_factory: pytest.TempPathFactory, prepared: Proofs
) -> Exported:
    """Every built-in layer type and a stranger's, tied head, bytes."""
    return exported(HYBRID, stocked, tmp_path_factory.mktemp("hybrid"), prepared)


@pytest.fixture(scope="module")
def quantized(
    stocked: Builder, tmp_path_factory: pytest.TempPathFactory, prepared: Proofs
) -> Exported:
    """Every quantizer, multipliers, a head of its own, no text."""
    folder = tmp_path_factory.mktemp("quantized")
    return exported(QUANTIZED, stocked, folder, prepared, tokenizer=None)


@pytest.fixture(params=["hybrid", "quantized"])
def case(request: pytest.FixtureRequest) -> Exported:
    found: Exported = request.getfixturevalue(request.param)
    return found


def greedy(model: HybridLM, prompt: Tensor, context: Context, new_tokens: int = 12) -> Tensor:
    """Our own decoding: prefill, then a step a token."""
    with torch.inference_mode():
        states = model.init_state(prompt.shape[0], prompt.shape[1] + new_tokens)
        tokens = [model.prefill(prompt, states, context).argmax(-1)]
        while len(tokens) < new_tokens:
            tokens.append(model.step(tokens[-1], states).argmax(-1))
    return torch.cat([prompt, torch.stack(tokens, 1)], 1)


class TestFreshProcess:
    def test_logits_are_the_trained_models(self, case: Exported) -> None:
        with torch.inference_mode():
            expected = case.model(case.tokens)
        torch.testing.assert_close(case.seen["logits"], expected, **TOLERANCE)
        torch.testing.assert_close(case.seen["last_logits"], expected[:, -3:], **TOLERANCE)
        assert case.report.max_difference <= 1e-5

    def test_the_base_model_gives_the_activations_before_the_head(self, case: Exported) -> None:
        with torch.inference_mode():
            expected = case.model.hidden(case.tokens)
        torch.testing.assert_close(case.seen["hidden"], expected, **TOLERANCE)

    def test_the_loss_is_ours_on_shifted_labels(self, case: Exported) -> None:
        with torch.inference_mode():
            expected = case.model.loss(case.tokens[:, :-1], case.tokens[:, 1:])
        torch.testing.assert_close(case.seen["loss"], expected, **TOLERANCE)

    def test_greedy_generation_is_our_prefill_and_steps(self, case: Exported) -> None:
        expected = greedy(case.model, case.tokens[:, :9], Context())
        assert case.seen["greedy"].tolist() == expected.tolist()
        assert case.seen["greedy_without_cache"].tolist() == expected.tolist()

    def test_a_prompt_may_come_in_chunks_or_be_continued(self, case: Exported) -> None:
        expected = case.seen["greedy"].tolist()
        assert case.seen["chunked_greedy"].tolist() == expected
        assert case.seen["continued_greedy"].tolist() == expected

    def test_left_padding_changes_no_row(self, case: Exported) -> None:
        short = case.tokens[1:, 4:9]
        with torch.inference_mode():
            expected = case.model(short)
        torch.testing.assert_close(case.seen["padded_logits"][1:, 4:], expected, **TOLERANCE)
        assert case.seen["padded_greedy"][0].tolist() == case.seen["greedy"][0].tolist()
        alone = greedy(case.model, short, Context())
        assert case.seen["padded_greedy"][1, 4:].tolist() == alone[0].tolist()

    def test_beam_search_reorders_the_cache(self, case: Exported) -> None:
        assert case.seen["beams"].tolist() == case.seen["beams_without_cache"].tolist()
        assert case.seen["beams"].tolist() != case.seen["greedy"].tolist()

    def test_sampling_draws_tokens_of_the_vocabulary(self, case: Exported) -> None:
        sampled = case.seen["sampled"]
        assert sampled.shape == (4, 21)
        assert sampled.min() >= 0
        assert sampled.max() < case.model.layout.vocab_size
        assert sampled[0].tolist() != sampled[1].tolist()

    def test_a_cache_without_a_length_grows(self, case: Exported) -> None:
        torch.testing.assert_close(
            case.seen["outgrown"], case.seen["outgrown_whole"], atol=1e-4, rtol=1e-4
        )

    def test_a_loaded_model_saves_and_loads_again(self, case: Exported) -> None:
        torch.testing.assert_close(
            case.seen["saved_again_logits"], case.seen["logits"], atol=0.0, rtol=0.0
        )

    def test_a_config_alone_gives_a_fresh_model(self, case: Exported) -> None:
        fresh, trained = case.seen["fresh_logits"], case.seen["logits"]
        assert fresh.isfinite().all()
        assert not torch.allclose(fresh, trained)
        assert 0.5 < fresh.std() / trained.std() < 2

    def test_bytes_are_tokens(self, hybrid: Exported) -> None:
        assert hybrid.seen["ids"].tolist() == hybrid.seen["bytes"].tolist()

    def test_the_cards_example_runs(self, hybrid: Exported, quantized: Exported) -> None:
        assert hybrid.seen["card"][0, :4].tolist() == list(b"def ")
        assert hybrid.seen["card"].shape == (1, 44)
        assert quantized.seen["card"][0, :3].tolist() == [0, 1, 2]  # it has no tokenizer
        assert quantized.seen["card"].shape == (1, 19)


class TestFolder:
    def test_the_model_stays_as_it_was(self, case: Exported) -> None:
        assert case.untouched

    def test_its_code_asks_for_nothing_but_torch_and_transformers(self, case: Exported) -> None:
        for path in case.report.path.glob("*.py"):
            packages = set(get_imports(path)) - sys.stdlib_module_names
            assert packages <= {"torch", "transformers"}, path.name

    def test_weights_keep_their_dtype(self, stocked: Builder, tmp_path: Path) -> None:
        layout = Layout(d_model=32, vocab_size=20, blocks=(Block(layer="mamba"),))
        model = stocked.build(layout, dtype=torch.bfloat16)
        out = tmp_path / "deep" / "er"
        report = stocked.exporters["huggingface"].export(model, stocked, out, None, {})
        assert report.max_difference <= 1e-5
        stored = load_file(out / "model.safetensors")
        ours = model.state_dict()
        assert {stored[f"model.{name}"].dtype for name in ours if name != "lm_head.weight"} == {
            torch.bfloat16
        }
        assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
        assert "It has no tokenizer" in (out / "README.md").read_text()

    def test_the_report_lists_what_is_there(self, case: Exported) -> None:
        assert case.report.files == tuple(sorted(p.name for p in case.report.path.iterdir()))

    def test_only_what_the_layout_uses_is_carried(self, quantized: Exported) -> None:
        assert "workbench_mamba_mamba2.py" in quantized.report.files
        assert "workbench_mlp_relu2.py" not in quantized.report.files
        assert "tokenizer.json" not in quantized.report.files

    def test_nothing_but_rewritten_imports_differs_from_the_sources(self, hybrid: Exported) -> None:
        ours = EXAMPLE.read_text(encoding="utf-8").splitlines()
        theirs = (hybrid.report.path / "workbench_plugin_lm_linear_attention.py").read_text()
        code = [line for line in theirs.splitlines() if line and not line.startswith(("#", "from"))]
        assert set(code) < set(ours)
        assert "class LinearAttention(Layer):" in code
        assert not any("register" in line for line in code)

    def test_tied_weights_are_stored_once(self, hybrid: Exported, quantized: Exported) -> None:
        tied = load_file(hybrid.report.path / "model.safetensors")
        assert "model.lm_head.weight" not in tied
        assert sum(tensor.numel() for tensor in tied.values()) == hybrid.model.num_parameters
        untied = load_file(quantized.report.path / "model.safetensors")
        assert "model.lm_head.weight" in untied

    def test_quantized_weights_are_stored_packed(
        self, quantized: Exported, stocked: Builder
    ) -> None:
        stored = load_file(quantized.report.path / "model.safetensors")
        counted = stocked.costs(quantized.model.layout, length=1).weight_bytes
        assert sum(tensor.nbytes for tensor in stored.values()) == counted

    def test_the_card_and_the_record_say_where_it_comes_from(self, hybrid: Exported) -> None:
        card = (hybrid.report.path / "README.md").read_text(encoding="utf-8")
        assert "`M-2A=BL`" in card
        assert f"{hybrid.model.num_parameters:,}" in card
        assert "| bits_per_byte | 2.5 | bits/byte |" in card
        assert "mamba-ssm" not in card
        record = json.loads((hybrid.report.path / "workbench.json").read_text(encoding="utf-8"))
        assert record["trial"] == 7
        assert record["layers"]["mamba"]["package"] == "lm-workbench"
        assert record["layers"]["linear-attention"]["version"].startswith("sha256:")

    def test_the_sources_are_told_and_no_path_of_this_machine(
        self, hybrid: Exported, stocked: Builder, plugin_dir: Path
    ) -> None:
        card = (hybrid.report.path / "README.md").read_text(encoding="utf-8")
        record = json.loads((hybrid.report.path / "workbench.json").read_text(encoding="utf-8"))
        for name in ("mamba", "linear-attention"):
            origin = stocked.layers.provenance(name)
            assert record["layers"][name] == origin.public()
            assert f"`{origin.module}` | sha256 `{origin.sha256[:12]}` |" in card
        metric = "metric bits_per_byte: some-package 3.1, `some.module`, sha256 `abababababab`"
        assert f"- {metric}\n" in card
        assert "The sources of mamba are not those of the trial" in card
        places = (str(plugin_dir), stocked.layers.provenance("mamba").file.rpartition("/")[0])
        for path in hybrid.report.path.glob("*"):
            if path.suffix in (".json", ".md", ".py"):
                text = path.read_text(encoding="utf-8")
                assert not any(place in text for place in places), path.name

    def test_the_layout_travels_in_the_config(self, case: Exported) -> None:
        config = json.loads((case.report.path / "config.json").read_text(encoding="utf-8"))
        assert Layout.from_dict(config["layout"]) == case.model.layout
        assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}

    def test_anyone_may_read_it(self, case: Exported) -> None:
        modes = {path.name: path.stat().st_mode for path in case.report.path.iterdir()}
        assert modes["model.safetensors"] == modes["config.json"]
