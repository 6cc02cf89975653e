"""The exported model's own code, run in this process: arguments, cache, loading, initialisation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache

from workbench.builder import Builder
from workbench.layer import Context
from workbench.layout import Block, Layout, Named
from workbench.model import HybridLM
from workbench_export.cache import WorkbenchCache
from workbench_export.configuration_workbench import WorkbenchConfig
from workbench_export.modeling_workbench import WorkbenchForCausalLM, build
from workbench_export.registered import LAYERS, QUANTIZERS
from workbench_export.tokenizer import save_tokenizer

LAYOUT = Layout(
    d_model=32,
    vocab_size=50,
    prefix_lm=True,
    blocks=(
        Block(layer="mamba", config={"d_state": 4}),
        Block(layer="attention", config={"num_heads": 2}),
        Block(layer="swiglu"),
    ),
)
EXACT = {"atol": 0.0, "rtol": 0.0}


@pytest.fixture(autouse=True)
def registered(builder: Builder, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tables as an export fills them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in builder.layers:
        monkeypatch.setitem(LAYERS, name, builder.layers[name])
    for name in builder.quantizers:
        monkeypatch.setitem(QUANTIZERS, name, builder.quantizers[name])
    yield
    torch.set_num_threads(before)


def config_of(layout: Layout) -> WorkbenchConfig:
    return WorkbenchConfig(
        layout=layout.to_dict(),
        vocab_size=layout.vocab_size,
        hidden_size=layout.d_model,
        num_hidden_layers=len(layout.blocks),
        tie_word_embeddings=layout.tie_embeddings,
    )


@pytest.fixture
def model() -> WorkbenchForCausalLM:
    torch.manual_seed(0)
    return WorkbenchForCausalLM(config_of(LAYOUT)).eval()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(1))


def ours(model: WorkbenchForCausalLM, tokens: Tensor, **context: Tensor) -> Tensor:
    inner = model.model
    assert isinstance(inner, HybridLM)
    logits: Tensor = inner(tokens, Context(**context))
    return logits


class TestForward:
    def test_packed_documents_reach_the_layers(
        self, model: WorkbenchForCausalLM, tokens: Tensor
    ) -> None:
        seq_idx = torch.tensor([[0] * 5 + [1] * 7] * 2, dtype=torch.int32)
        logits = model(tokens, seq_idx=seq_idx).logits
        torch.testing.assert_close(logits, ours(model, tokens, seq_idx_BT=seq_idx), **EXACT)
        alone = model(tokens[:, 5:]).logits
        torch.testing.assert_close(logits[:, 5:], alone, atol=1e-5, rtol=0.0)

    def test_prefixes_reach_the_layers(self, model: WorkbenchForCausalLM, tokens: Tensor) -> None:
        lengths = torch.tensor([3, 8])
        logits = model(tokens, prefix_lengths=lengths).logits
        torch.testing.assert_close(logits, ours(model, tokens, prefix_lengths_B=lengths), **EXACT)
        assert not torch.allclose(logits, model(tokens).logits)

    def test_a_prefix_counts_for_the_prompt_of_a_generation(
        self, model: WorkbenchForCausalLM, tokens: Tensor
    ) -> None:
        wanted = {"prefix_lengths": torch.tensor([3, 8]), "max_new_tokens": 6, "do_sample": False}
        cached = model.generate(tokens, **wanted)
        assert cached.tolist() == model.generate(tokens, use_cache=False, **wanted).tolist()

    def test_positions_to_keep(self, model: WorkbenchForCausalLM, tokens: Tensor) -> None:
        every = model(tokens).logits
        kept = torch.tensor([1, 4])
        torch.testing.assert_close(model(tokens, logits_to_keep=kept).logits, every[:, kept])
        torch.testing.assert_close(model(tokens, logits_to_keep=2).logits, every[:, -2:])

    def test_a_tuple_where_one_is_asked_for(
        self, model: WorkbenchForCausalLM, tokens: Tensor
    ) -> None:
        loss, logits = model(tokens, labels=tokens, return_dict=False)
        assert loss.shape == ()
        assert logits.shape == (2, 12, 50)

    def test_it_trains(self, model: WorkbenchForCausalLM, tokens: Tensor) -> None:
        model(tokens, labels=tokens).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())

    @pytest.mark.parametrize("shape", [(2, 1, 12, 12), (2, 5)])
    def test_other_masks_are_refused(
        self, model: WorkbenchForCausalLM, tokens: Tensor, shape: tuple[int, ...]
    ) -> None:
        with pytest.raises(ValueError, match=r"give \[batch, tokens\]"):
            model(tokens, attention_mask=torch.ones(shape))

    @pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers is about to rename it
    def test_no_gradient_checkpointing_is_promised(self, model: WorkbenchForCausalLM) -> None:
        with pytest.raises(ValueError, match="does not support"):
            model.gradient_checkpointing_enable()


class TestCache:
    def test_other_caches_are_refused(self, model: WorkbenchForCausalLM, tokens: Tensor) -> None:
        with pytest.raises(ValueError, match="DynamicCache"):
            model(tokens, past_key_values=DynamicCache())

    def test_it_cannot_go_back(self, model: WorkbenchForCausalLM, tokens: Tensor) -> None:
        cache = model(tokens, use_cache=True).past_key_values
        assert not cache.is_croppable
        with pytest.raises(NotImplementedError, match="cannot go back"):
            cache.crop(1)

    def test_none_is_made_unasked(self, model: WorkbenchForCausalLM, tokens: Tensor) -> None:
        assert model(tokens).past_key_values is None

    def test_rows_may_be_chosen_and_repeated(
        self, model: WorkbenchForCausalLM, tokens: Tensor
    ) -> None:
        cache = WorkbenchCache(14)
        model(tokens[:, :11], past_key_values=cache)
        cache.batch_select_indices(torch.tensor([1]))
        cache.batch_repeat_interleave(3)
        assert (len(cache), cache.batch_size, cache.get_seq_length()) == (3, 3, 11)
        last = model(tokens[1:, 11:].expand(3, 1), past_key_values=cache).logits
        expected = model(tokens[1:]).logits[:, -1:].expand(3, 1, 50)
        torch.testing.assert_close(last, expected, atol=1e-5, rtol=0.0)

    def test_after_a_reset_it_is_new(self, model: WorkbenchForCausalLM, tokens: Tensor) -> None:
        cache = WorkbenchCache()
        for _ in range(2):
            logits = model(tokens, past_key_values=cache).logits
            torch.testing.assert_close(logits, model(tokens).logits, atol=1e-5, rtol=0.0)
            cache.reset()
        assert not cache.is_initialized

    def test_it_grows_with_documents_prefix_and_other_rows(
        self, model: WorkbenchForCausalLM
    ) -> None:
        tokens = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(1))
        seq_idx = torch.tensor([[0] * 3 + [1] * 9] * 2, dtype=torch.int32)
        lengths = torch.tensor([2, 3])
        cache = WorkbenchCache(6)
        model(tokens[:, :5], seq_idx=seq_idx[:, :5], prefix_lengths=lengths, past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 1]))
        chosen = tokens[[1, 1]]
        for end in range(6, 13):
            logits = model(chosen[:, end - 1 : end], past_key_values=cache).logits
        assert cache.capacity > 6
        whole = model(chosen, seq_idx=seq_idx, prefix_lengths=lengths[[1, 1]]).logits
        torch.testing.assert_close(logits, whole[:, -1:], atol=1e-5, rtol=0.0)

    def test_recurrent_layers_alone_never_start_over(
        self, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        layout = LAYOUT.replace(blocks=LAYOUT.blocks[:1])
        model = WorkbenchForCausalLM(config_of(layout)).eval()
        cache = WorkbenchCache(4)
        model(tokens[:, :4], past_key_values=cache)
        before = cache.states
        model(tokens[:, 4:], past_key_values=cache)
        assert cache.states is before


class TestLoading:
    def test_a_missing_weight_is_initialised_and_no_other(
        self, model: WorkbenchForCausalLM, tmp_path: Path
    ) -> None:
        model.save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        missing = {"model.blocks.0.layer.A_log", "model.blocks.2.layer.up_proj.weight"}
        kept = {name: tensor for name, tensor in weights.items() if name not in missing}
        save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
        loaded = WorkbenchForCausalLM.from_pretrained(tmp_path).state_dict()
        for name, tensor in kept.items():
            assert torch.equal(loaded[name], tensor), name
        assert torch.equal(loaded["model.blocks.0.layer.A_log"], weights[sorted(missing)[0]])
        assert 0.01 < loaded["model.blocks.2.layer.up_proj.weight"].std() < 0.03

    def test_a_resized_vocabulary_survives(
        self, model: WorkbenchForCausalLM, tokens: Tensor, tmp_path: Path
    ) -> None:
        before = model(tokens).logits
        model.resize_token_embeddings(60)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        model.save_pretrained(tmp_path)
        loaded = WorkbenchForCausalLM.from_pretrained(tmp_path)
        logits = loaded(tokens).logits
        assert logits.shape[-1] == 60
        torch.testing.assert_close(logits[..., :50], before, atol=1e-5, rtol=0.0)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_packed_weights_keep_their_dtypes(self, dtype: torch.dtype, tmp_path: Path) -> None:
        blocks = (
            Block(layer="bitlinear_mamba", quantizer=Named(name="b1_58")),
            Block(layer="swiglu", quantizer=Named(name="int4")),
        )
        config = config_of(LAYOUT.replace(blocks=blocks))
        config.dtype = dtype
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = WorkbenchForCausalLM(config)
        finally:
            torch.set_default_dtype(default)
        model.save_pretrained(tmp_path)
        loaded = WorkbenchForCausalLM.from_pretrained(tmp_path).state_dict()
        dtypes = set()
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded[name], tensor), name
            assert loaded[name].dtype == tensor.dtype, name
            dtypes.add(tensor.dtype)
        assert dtypes == {dtype, torch.float32, torch.uint8}

    def test_a_config_without_a_layout(self) -> None:
        with pytest.raises(ValueError, match="no layout"):
            WorkbenchForCausalLM(WorkbenchConfig())

    def test_it_starts_as_the_builder_would(self, builder: Builder) -> None:
        fresh = build(builder.resolve(LAYOUT)).state_dict()
        for name, tensor in builder.build(LAYOUT, seed=0).state_dict().items():
            spread = tensor.std().item()
            apart = 4 * spread * math.sqrt(2 / tensor.numel()) + 1e-6  # of two means, at most
            assert abs((fresh[name].mean() - tensor.mean()).item()) < apart, name
            assert fresh[name].std().item() == pytest.approx(spread, rel=0.3), name


class TestTokenizer:
    def test_a_copy_keeps_tokens_and_special_ids(self, tmp_path: Path) -> None:
        from transformers import AutoTokenizer

        save_tokenizer({"kind": "bytes"}, 256, tmp_path / "bytes")
        source = AutoTokenizer.from_pretrained(tmp_path / "bytes")
        source.add_special_tokens({"eos_token": "<end>", "pad_token": "<pad>"})
        source.save_pretrained(tmp_path / "source")
        wanted = {"kind": "hf", "name_or_path": str(tmp_path / "source")}
        special = save_tokenizer(wanted, 258, tmp_path / "copy")
        assert special == {"bos_token_id": None, "eos_token_id": 256, "pad_token_id": 257}
        copy = AutoTokenizer.from_pretrained(tmp_path / "copy")
        assert copy("é<end>").input_ids == [*"é".encode(), 256]

    def test_none_writes_nothing(self, tmp_path: Path) -> None:
        assert set(save_tokenizer(None, 10, tmp_path).values()) == {None}
        assert list(tmp_path.iterdir()) == []
