"""The contract suites; the entropy against enumeration and samples; models come near it."""

from __future__ import annotations

import itertools
import math
import tomllib
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from lm_formal_language_data import (
    BitsAboveEntropy,
    Dyck,
    DyckConfig,
    code_length,
    entropy_rate,
    exact_entropy,
    open_probabilities,
    sample,
    stationary,
)

from workbench.config import NoConfig
from workbench.errors import FieldError, WorkbenchError
from workbench.evaluation import evaluate
from workbench.layout import Block, Layout
from workbench.metric import Subject
from workbench.study import run_study
from workbench.study_config import StudyConfig
from workbench.testing import DataSourceContract, MetricContract
from workbench.testing.toys import toy_builder, toy_layout
from workbench.training import TrainingConfig, train

HERE = Path(__file__).parent
SMALL = DyckConfig(num_types=2, max_depth=3, open_probability=0.3, validation_examples=24)
LANGUAGES = (
    SMALL,
    DyckConfig(num_types=1, max_depth=4, open_probability=0.7),
    DyckConfig(num_types=3, max_depth=2),
    DyckConfig(num_types=2, max_depth=1),
)


class TestDyck(DataSourceContract):
    source = Dyck
    configs = (SMALL, DyckConfig(validation_examples=10), DyckConfig(num_types=8, max_depth=1))


class TestBitsAboveEntropy(MetricContract):
    metric = BitsAboveEntropy
    configs: ClassVar = (NoConfig(),)

    def subject(self, folder: Path) -> Subject:
        builder, source = toy_builder(), Dyck(SMALL, cache_dir=folder)
        layout = builder.resolve(toy_layout().replace(vocab_size=source.vocab_size))
        model = builder.build(layout).eval()
        return Subject(
            layout=layout, builder=builder, model=model, data=source, batch_size=7, length=16
        )


def draws(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return 1.0 - np.random.default_rng(seed).random((rows, length))


def strings(config: DyckConfig, length: int) -> list[tuple[tuple[int, ...], float]]:
    """Every string of that length with its probability, by trying them all."""
    found = []
    for tokens in itertools.product(range(2 * config.num_types), repeat=length):
        stack, probability = [], 1.0
        for token in tokens:
            p = 1.0 if not stack else config.open_probability
            p = 0.0 if len(stack) == config.max_depth else p
            if token < config.num_types:
                probability *= p / config.num_types
                stack.append(token)
            elif stack and stack.pop() == token - config.num_types:
                probability *= 1 - p
            else:
                probability = 0.0
            if probability == 0.0:
                break
        if probability:
            found.append((tokens, probability))
    return found


@pytest.mark.parametrize("config", LANGUAGES)
def test_entropy_is_that_of_all_strings(config: DyckConfig) -> None:
    """Brute force: the entropy of whole strings, less that of the first token."""
    for length in range(1, 6 if config.num_types == 3 else 8):
        every = strings(config, length)
        assert sum(p for _, p in every) == pytest.approx(1.0)
        bits = -sum(p * math.log2(p) for _, p in every)
        if length > 1:
            rest = bits - math.log2(config.num_types)
            assert exact_entropy(config, length - 1) == pytest.approx(rest / (length - 1))
        lengths = code_length(config, np.array([tokens for tokens, _ in every])).sum(-1)
        assert lengths == pytest.approx([-math.log2(p) for _, p in every])


@pytest.mark.parametrize("config", LANGUAGES)
def test_the_optimal_code_of_a_long_sample_is_as_long_as_the_entropy(config: DyckConfig) -> None:
    tokens = sample(config, draws(64, 1501))
    bits = code_length(config, tokens)[:, 1:]
    assert np.isfinite(bits).all(), "a string outside the language"
    rows = bits.mean(-1)
    error = 4 * rows.std() / math.sqrt(len(rows)) + 1e-12
    assert rows.mean() == pytest.approx(exact_entropy(config, 1500), abs=error)
    assert exact_entropy(config, 100_000) == pytest.approx(entropy_rate(config), rel=1e-4)


@pytest.mark.parametrize("config", LANGUAGES)
def test_stationary_shares_are_kept_by_a_step(config: DyckConfig) -> None:
    p, size = open_probabilities(config), config.max_depth + 1
    steps = np.diag(p[:-1], 1) + np.diag(1 - p[1:], -1)
    shares = stationary(config)
    assert steps.shape == (size, size)
    assert shares @ steps == pytest.approx(shares)
    assert shares.sum() == pytest.approx(1.0)


def test_a_known_rate() -> None:
    """Two types, at most two deep, p = 1/2: depths 1/4, 1/2, 1/4 with 1, 1.5 and 0 bits."""
    config = DyckConfig(num_types=2, max_depth=2)
    assert stationary(config) == pytest.approx([0.25, 0.5, 0.25])
    assert entropy_rate(config) == pytest.approx(0.25 * 1 + 0.5 * 1.5)


def test_strings_have_the_frequencies_of_the_distribution() -> None:
    """A chi-square test over all strings of five tokens."""
    every = dict(strings(SMALL, 5))
    tokens = sample(SMALL, draws(20_000, 5, seed=1))
    seen = dict.fromkeys(every, 0)
    for row in map(tuple, tokens.tolist()):
        seen[row] += 1
    expected = {string: p * len(tokens) for string, p in every.items()}
    statistic = sum((seen[s] - n) ** 2 / n for s, n in expected.items())
    freedom = len(every) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


def test_what_is_outside_the_language_has_no_probability() -> None:
    config = DyckConfig(num_types=2, max_depth=2)
    rows = np.array([[0, 3, 0, 0], [2, 0, 0, 0], [0, 1, 0, 0], [0, 1, 3, 2]])
    finite = np.isfinite(code_length(config, rows))
    assert finite.sum(-1).tolist() == [1, 0, 2, 4]


def test_describe_says_the_rate(tmp_path: Path) -> None:
    facts = Dyck(SMALL, cache_dir=tmp_path).describe()
    assert facts["language"] == "Dyck-(2, 3)"
    assert facts["entropy_rate_bits"] == entropy_rate(SMALL)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    for field, value in (("num_types", 0), ("max_depth", 0), ("open_probability", 1.0)):
        with pytest.raises(FieldError, match=f"{field}: must"):
            DyckConfig(**{field: value})
    with pytest.raises(FieldError, match="max_depth: 1 leaves one string"):
        DyckConfig(num_types=1, max_depth=1)


def test_the_metric_needs_a_source_of_known_entropy(tmp_path: Path) -> None:
    from workbench.testing import MetricContract

    text = MetricContract().subject(tmp_path)
    with pytest.raises(WorkbenchError, match=r"entropy is not known: .*dyck"):
        BitsAboveEntropy(NoConfig()).measure(text)


@pytest.mark.slow
def test_training_comes_near_the_entropy_and_not_below(builder, tmp_path: Path) -> None:
    config = DyckConfig(num_types=2, max_depth=3, validation_examples=256)
    source = Dyck(config, cache_dir=tmp_path)
    blocks = (Block(layer="mamba"), Block(layer="swiglu"))
    layout = builder.resolve(Layout(d_model=32, vocab_size=source.vocab_size, blocks=blocks * 2))
    torch.set_num_threads(1)
    model = builder.build(layout, seed=0)
    length = 32
    training = TrainingConfig(tokens=200_000, batch_size=16, seq_len=length, lr=5e-3)
    train(model, source, training, checkpoint=tmp_path / "checkpoint.safetensors")
    bits = evaluate(model, source, 32, length).loss / math.log(2)
    batches = list(source.validation_batches(32, length))
    best = sum(map(source.optimal_bits, batches)) / sum(b.targets_BT.numel() for b in batches)
    assert best == pytest.approx(exact_entropy(config, length), rel=0.02)
    assert best - 1e-3 < bits < best + 0.05


def test_the_readmes_study_runs(tmp_path: Path) -> None:
    text = (HERE / "README.md").read_text(encoding="utf-8")
    data = tomllib.loads(text.split("```toml\n")[1].split("```")[0])
    data["plugin_dirs"] = [str(HERE)]
    data["data"]["validation_examples"] = 8
    data["training"] = {"tokens": 1024, "batch_size": 4, "seq_len": 16}
    data["budget"] = {"trials": 1}
    data["runtime"] = {"device": "cpu", "executor": "inline", "threads": 1}
    (trial,) = run_study(StudyConfig.from_dict(data), tmp_path).trials()
    assert trial.outcome == "complete", trial.reason
    extras = trial.data["extras"]
    above = extras["bits_above_entropy.model"] - extras["bits_above_entropy.optimal_on_sample"]
    assert trial.metrics["bits_above_entropy"] == pytest.approx(above)
    assert above > 0
