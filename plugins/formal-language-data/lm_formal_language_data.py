"""Bounded Dyck languages under a distribution whose entropy is known exactly.

Dyck-(k, m): brackets of k types, rightly nested, never more than m deep (Hewitt et al. 2020,
arXiv:2010.07515). At depth 0 a bracket opens, at depth m the last one closes, and in between one
opens with probability p, of any type with equal chance; which one closes the stack says. The depth
is a Markov chain, so the entropy of each token given all before it depends on the depth alone:

    h(d) = H2(p_d) + p_d log2 k       bits, with p_0 = 1, p_m = 0, p_d = p in between

and the best possible bits per token are its mean over the chain's distribution.

Shape suffixes: B batch, T tokens, S depths from 0 to m.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from workbench.config import Choice, Range
from workbench.data import Batch, DataSource
from workbench.errors import FieldError, WorkbenchError
from workbench.hookspecs import Register, hookimpl
from workbench.metric import Metric, Subject
from workbench_data.sampling import TRAIN, VALIDATION, generator, uniform

Floats = NDArray[np.float64]
Tokens = NDArray[np.int64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DyckConfig:
    """Which language, and how deep its strings tend to nest."""

    num_types: Annotated[int, Choice(1, 2, 4, 8), "k, types of brackets"] = 2
    max_depth: Annotated[int, Range(2, 16), "m, brackets open at once"] = 8
    open_probability: Annotated[float, Range(0.1, 0.9), "p, of opening where both can be"] = 0.5
    validation_examples: Annotated[int, "sequences that are judged"] = 512

    def __post_init__(self) -> None:
        for name in ("num_types", "max_depth", "validation_examples"):
            if getattr(self, name) < 1:
                raise FieldError(name, f"must be at least 1, got {getattr(self, name)}")
        if not 0 < self.open_probability < 1:
            raise FieldError(
                "open_probability", f"must lie between 0 and 1, got {self.open_probability}"
            )
        if self.num_types == self.max_depth == 1:
            raise FieldError("max_depth", "1 leaves one string of one type: use at least 2")


class Dyck(DataSource):
    """Strings of Dyck-(k, m), each from an empty stack; judge by `bits_above_entropy`.

    Token i opens type i, token k + i closes it. Every string is made when it is asked for;
    training and validation draw from different streams of the generator, and the validation part
    is the same for every seed. A string of a small language may turn up in both.
    """

    Config = DyckConfig

    def __init__(self, config: Any, *, seed: int = 0, cache_dir: Path) -> None:
        super().__init__(config, seed=seed, cache_dir=cache_dir)

    @property
    def vocab_size(self) -> int:
        return 2 * int(self.config.num_types)

    def train_batch(self, step: int, batch_size: int, length: int) -> Batch:
        bits = generator(seed=self.seed, stream=TRAIN, step=step)
        return _batch(sample(self.config, uniform(bits, batch_size, length + 1)))

    def validation_batches(self, batch_size: int, length: int) -> Iterator[Batch]:
        """See `DataSource`; a string does not depend on the batch it comes in."""
        for first in range(0, self.config.validation_examples, batch_size):
            numbers = range(first, min(first + batch_size, self.config.validation_examples))
            streams = (generator(seed=0, stream=VALIDATION, step=number) for number in numbers)
            draws_BT = np.concatenate([uniform(bits, 1, length + 1) for bits in streams])
            yield _batch(sample(self.config, draws_BT))

    def exact_entropy(self, length: int) -> float:
        """Bits a target, the mean over `length` targets: what no model can go below."""
        return exact_entropy(self.config, length)

    def optimal_bits(self, batch: Batch) -> float:
        """Bits that the true distribution gives the targets of a batch, all together."""
        whole_BT = torch.cat((batch.inputs_BT[:, :1], batch.targets_BT), dim=1).numpy()
        return float(code_length(self.config, whole_BT)[:, 1:].sum())

    def describe(self) -> dict[str, Any]:
        return {
            "language": f"Dyck-({self.config.num_types}, {self.config.max_depth})",
            "vocab_size": self.vocab_size,
            "open_probability": self.config.open_probability,
            "entropy_rate_bits": entropy_rate(self.config),
            "validation_examples": self.config.validation_examples,
        }


class BitsAboveEntropy(Metric):
    """How far a model is from the best there is: its bits a token less those of the true
    distribution, on the same validation strings.

    The difference of both on one sample estimates their divergence with less noise than the exact
    entropy would; that, and the sample's optimal bits, are left beside it.
    """

    unit: ClassVar[str] = "bits/token"
    stage = "quantized"
    label = "Bits a token above the source's entropy"

    def measure(self, subject: Subject) -> float:
        source = subject.data
        model_bits = subject.evaluation.loss / math.log(2)
        if not isinstance(source, Dyck):
            raise WorkbenchError(
                'this source\'s entropy is not known: give the study [data] source = "dyck"'
            )
        batches = source.validation_batches(subject.batch_size, subject.length)
        optimal = sum(source.optimal_bits(batch) for batch in batches) / subject.evaluation.targets
        exact = source.exact_entropy(subject.length)
        subject.extras.update(model=model_bits, optimal_on_sample=optimal, exact_entropy=exact)
        return model_bits - optimal


def open_probabilities(config: DyckConfig) -> Floats:
    """Probability of opening at each depth, `[S]`."""
    probabilities_S = np.full(config.max_depth + 1, config.open_probability)
    probabilities_S[0], probabilities_S[-1] = 1.0, 0.0
    return probabilities_S


def token_entropies(config: DyckConfig) -> Floats:
    """Bits of the next token at each depth, `[S]`."""
    p_S = open_probabilities(config)
    bits_S = p_S * math.log2(config.num_types)
    inner = p_S[1:-1]
    bits_S[1:-1] -= inner * np.log2(inner) + (1 - inner) * np.log2(1 - inner)
    return bits_S


def stationary(config: DyckConfig) -> Floats:
    """Share of the tokens that are drawn at each depth of an endless string, `[S]`.

    The depth is a birth-death chain, in balance where as many strings go from d to d + 1 as come
    back. It is even and odd in turn, so these are shares over time, not a limit.
    """
    p_S = open_probabilities(config)
    weights_S = np.concatenate(([1.0], np.cumprod(p_S[:-1] / (1 - p_S[1:]))))
    shares_S: Floats = weights_S / weights_S.sum()
    return shares_S


def entropy_rate(config: DyckConfig) -> float:
    """Bits a token of an endless string."""
    return float(stationary(config) @ token_entropies(config))


def exact_entropy(config: DyckConfig, length: int) -> float:
    """Bits a token, the mean over the `length` tokens after the first of a string.

    The first opens a bracket for certain and is the model's first input. Below the rate at first,
    where strings begin, and equal to it in the limit.
    """
    p_S, bits_S = open_probabilities(config), token_entropies(config)
    depth_S = np.zeros_like(p_S)
    depth_S[1] = 1.0
    total = 0.0
    for _ in range(length):
        total += float(depth_S @ bits_S)
        up_S, down_S = depth_S * p_S, depth_S * (1 - p_S)
        depth_S = np.concatenate((down_S[1:], [0.0])) + np.concatenate(([0.0], up_S[:-1]))
    return total / length


def sample(config: DyckConfig, draws_BT: Floats) -> Tokens:
    """Strings `[B, T]` from an empty stack; one uniform draw in (0, 1] a token decides it."""
    p_S = open_probabilities(config)
    rows = np.arange(len(draws_BT))
    depth_B = np.zeros(len(draws_BT), dtype=np.int64)
    stack_BS = np.zeros((len(draws_BT), config.max_depth), dtype=np.int64)
    tokens_BT = np.empty(draws_BT.shape, dtype=np.int64)
    for t, draw_B in enumerate(draws_BT.T):
        p_B = p_S[depth_B]
        opens_B = draw_B <= p_B
        # Where it opens, the draw is uniform in (0, p]: its share of p chooses the type.
        type_B = np.ceil(draw_B / np.maximum(p_B, draw_B) * config.num_types).astype(np.int64) - 1
        top_B = stack_BS[rows, depth_B - 1]
        tokens_BT[:, t] = np.where(opens_B, type_B, config.num_types + top_B)
        stack_BS[rows[opens_B], depth_B[opens_B]] = type_B[opens_B]
        depth_B += np.where(opens_B, 1, -1)
    return tokens_BT


def code_length(config: DyckConfig, tokens_BT: Tokens) -> Floats:
    """Bits of each token given all before it, `[B, T]`: -log2 of its probability.

    Infinite from where a string leaves the language.
    """
    p_S = open_probabilities(config)
    bits_BT = np.full(tokens_BT.shape, np.inf)
    for bits_T, tokens_T in zip(bits_BT, tokens_BT.tolist(), strict=True):
        stack: list[int] = []
        for t, token in enumerate(tokens_T):
            p = float(p_S[len(stack)])
            if 0 <= token < config.num_types and p > 0:
                bits_T[t] = math.log2(config.num_types) - math.log2(p)
                stack.append(token)
            elif stack and token == config.num_types + stack[-1]:
                bits_T[t] = -math.log2(1 - p)
                stack.pop()
            else:
                break
    return bits_BT


def _batch(tokens_BT: Tokens) -> Batch:
    tokens = torch.from_numpy(tokens_BT)
    return Batch(inputs_BT=tokens[:, :-1].contiguous(), targets_BT=tokens[:, 1:].contiguous())


@hookimpl
def register_data_sources(register: Register[type[DataSource]]) -> None:
    register("dyck", Dyck)


@hookimpl
def register_metrics(register: Register[type[Metric]]) -> None:
    register("bits_above_entropy", BitsAboveEntropy)
