"""Generation against the full forward, sampling against what it may draw, text as it comes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import workbench
from workbench import FieldError, HybridLM
from workbench.generation import GREEDY, SamplingConfig, TextStream, generate, sample, stream
from workbench.layer import Context

VOCAB = 32
LAYERS = [
    ("mamba", {"d_state": 4}),
    ("attention", {"num_heads": 2, "num_kv_heads": 1}),
    ("swiglu", {}),
    ("mamba2", {"d_state": 8, "headdim": 8}),
    ("attention", {"num_heads": 2, "sliding_window": 5, "position": "alibi"}),
]


@pytest.fixture(scope="module")
def model() -> HybridLM:
    """A hybrid whose draws are far from uniform, in double precision: argmax has no near ties."""
    torch.set_num_threads(1)
    layout = {
        "d_model": 16,
        "vocab_size": VOCAB,
        "tie_embeddings": False,
        "blocks": [{"layer": name, "config": config} for name, config in LAYERS],
    }
    made = workbench.build(layout, dtype=torch.float64, seed=3).eval()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        made.reset_parameters(std=0.5)
    return made


@pytest.fixture
def prompt_BT() -> Tensor:  # noqa: N802
    return torch.randint(VOCAB, (3, 9), generator=torch.Generator().manual_seed(5))


def continuation(model: HybridLM, prompt_BT: Tensor, count: int, **options: object) -> Tensor:
    return generate(model, prompt_BT, count, **options)[:, prompt_BT.shape[1] :]


def test_greedy_takes_the_most_likely_token_of_the_full_forward(
    model: HybridLM, prompt_BT: Tensor
) -> None:
    made_BT = generate(model, prompt_BT, 20)
    assert made_BT.shape == (3, 29)
    assert torch.equal(made_BT[:, :9], prompt_BT)
    with torch.no_grad():
        logits_BTV = model(made_BT)
    assert torch.equal(made_BT[:, 9:], logits_BTV[:, 8:-1].argmax(-1))
    assert len(made_BT[:, 9:].unique()) > 8  # no loop that any model would fall into


def test_a_row_does_not_depend_on_its_neighbours(model: HybridLM, prompt_BT: Tensor) -> None:
    together = continuation(model, prompt_BT, 8)
    alone = torch.cat([continuation(model, row_T[None], 8) for row_T in prompt_BT])
    assert torch.equal(together, alone)


def test_a_prompt_padded_on_the_left_continues_as_without(
    model: HybridLM, prompt_BT: Tensor
) -> None:
    lengths = [9, 6, 1]
    mask_BT = torch.zeros(3, 9, dtype=torch.bool)
    padded_BT = torch.full((3, 9), 7)
    for row, length in enumerate(lengths):
        mask_BT[row, 9 - length :] = True
        padded_BT[row, 9 - length :] = prompt_BT[row, :length]
    together = continuation(model, padded_BT, 12, context=Context(attention_mask_BT=mask_BT))
    for row, length in enumerate(lengths):
        alone = continuation(model, prompt_BT[row : row + 1, :length], 12)
        assert torch.equal(together[row : row + 1], alone)


def test_draws_repeat_with_the_seed(model: HybridLM, prompt_BT: Tensor) -> None:
    config = SamplingConfig(temperature=1.5)
    torch.manual_seed(0)
    one = continuation(model, prompt_BT, 16, config=config, seed=1)
    torch.manual_seed(1)  # the global generator has no part in it
    assert torch.equal(continuation(model, prompt_BT, 16, config=config, seed=1), one)
    assert not torch.equal(continuation(model, prompt_BT, 16, config=config, seed=2), one)


def test_tokens_come_one_at_a_time(model: HybridLM, prompt_BT: Tensor) -> None:
    tokens = stream(model, prompt_BT, 5)
    first_B = next(tokens)
    assert first_B.shape == (3,)
    assert torch.equal(torch.stack([first_B, *tokens], dim=1), continuation(model, prompt_BT, 5))
    assert list(stream(model, prompt_BT, 0)) == []


def test_nothing_is_recorded_for_gradients(model: HybridLM, prompt_BT: Tensor) -> None:
    generate(model, prompt_BT, 2)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not generate(model, prompt_BT, 2).requires_grad


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (torch.zeros(1, 0, dtype=torch.long), "prompt: is empty"),
        (torch.zeros(0, 4, dtype=torch.long), "prompt: is empty"),
        (torch.zeros(4, dtype=torch.long), r"must be \[batch, tokens\], got shape \[4\]"),
        (torch.tensor([[VOCAB]]), f"token ids must be below {VOCAB}"),
        (torch.tensor([[-1]]), "token ids must be"),
    ],
)
def test_prompts_that_make_no_sense(model: HybridLM, prompt: Tensor, words: str) -> None:
    with pytest.raises(FieldError, match=words):
        generate(model, prompt, 1)


@pytest.mark.parametrize(
    ("options", "field"),
    [({"temperature": -0.1}, "temperature"), ({"top_k": 0}, "top_k"), ({"top_p": 0.0}, "top_p"),
     ({"top_p": 1.1}, "top_p")],
)  # fmt: skip
def test_sampling_that_makes_no_sense(options: dict[str, float], field: str) -> None:
    with pytest.raises(FieldError) as error:
        SamplingConfig(**options)  # type: ignore[arg-type]
    assert error.value.field == field


def drawn(logits_V: Tensor, config: SamplingConfig, count: int = 4000) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return sample(logits_V.expand(count, -1), config, generator)


LOGITS = torch.tensor([0.5, 0.1, 0.25, 0.05, 0.1]).log()


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 1}, {0}),
        ({"top_k": 2}, {0, 2}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.3}, {0}),  # never empty
        ({"top_p": 0.6}, {0, 2}),
        ({"top_p": 0.74}, {0, 2}),
        ({"top_p": 0.96}, {0, 1, 2, 3, 4}),
        ({"top_k": 2, "top_p": 0.6}, {0}),  # 0.5 of 0.75 is two thirds
        ({"temperature": 0.0}, {0}),
    ],
    ids=str,
)
def test_only_allowed_tokens_are_drawn_and_all_of_them(
    options: dict[str, float], allowed: set[int]
) -> None:
    config = SamplingConfig(**{"temperature": 1.0, **options})  # type: ignore[arg-type]
    assert set(drawn(LOGITS, config).tolist()) == allowed


@given(st.integers(1, 8), st.floats(0.01, 1.0), st.integers(0, 100))
def test_top_k_and_top_p_are_the_definition(top_k: int, top_p: float, seed: int) -> None:
    logits_V = torch.randn(8, generator=torch.Generator().manual_seed(seed))
    config = SamplingConfig(temperature=1.0, top_k=top_k, top_p=top_p)
    kept = sorted(range(8), key=lambda token: -float(logits_V[token]))[:top_k]
    shares = logits_V[kept].double().softmax(0)
    nucleus, total = set(), 0.0
    for token, share in zip(kept, shares.tolist(), strict=True):
        if total >= top_p + 1e-6:
            break
        nucleus.add(token)
        total += share
    assert set(drawn(logits_V, config, 200).tolist()) <= nucleus


def test_temperature_sharpens_and_flattens() -> None:
    def share(temperature: float) -> float:
        return float((drawn(LOGITS, SamplingConfig(temperature=temperature)) == 0).double().mean())

    for temperature in (0.5, 1.0, 2.0):
        exact = float((LOGITS / temperature).softmax(0)[0])
        # Five standard deviations of 4,000 draws.
        assert share(temperature) == pytest.approx(exact, abs=5 * (exact / 4000) ** 0.5)
    assert GREEDY.temperature == 0


def decode(tokens: list[int]) -> str:
    return bytes(tokens).decode(errors="replace")


@given(st.text(min_size=1), st.text())
def test_streamed_text_is_whole_and_complete(prompt: str, text: str) -> None:
    pieces = TextStream(decode, list(prompt.encode()))
    made = [pieces.push(byte) for byte in text.encode()]
    made.append(pieces.finish())
    # A replacement character at the very end cannot be told from an unfinished one.
    assert "".join(made) == text.rstrip("\ufffd")
    assert pieces.tokens == list(text.encode())
    assert all("\ufffd" not in piece for piece in made if "\ufffd" not in text)


@given(st.binary(max_size=40))
def test_any_bytes_are_streamed_as_they_decode(data: bytes) -> None:
    pieces = TextStream(decode, list(b"x"))
    made = "".join([*map(pieces.push, data), pieces.finish()])
    assert made == decode(list(data)).rstrip("\ufffd")
    assert pieces.finish() == ""


def test_a_token_whose_text_depends_on_the_one_before() -> None:
    """As in SentencePiece, whose decoders drop the space of the first word."""
    words = ["▁one", "▁two", "s", "▁three"]

    def decode_words(tokens: list[int]) -> str:
        return "".join(words[token] for token in tokens).replace("▁", " ").removeprefix(" ")

    pieces = TextStream(decode_words, [0])
    assert [pieces.push(token) for token in (1, 2, 3)] == [" two", "s", " three"]
