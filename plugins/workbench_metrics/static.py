"""Exact sizes and operation counts of a layout: nothing is built, nothing is measured."""

from __future__ import annotations

from typing import ClassVar

from workbench.builder import LayoutCosts
from workbench.metric import Metric, Subject
from workbench_metrics.config import Forward, Step, Stored, StoredState

ANY_LENGTH = 1  # for counts that do not depend on the context


class Parameters(Metric):
    """Trainable numbers, tied weights once."""

    unit = "parameters"
    stage = "static"
    label = "Parameters"

    def measure(self, subject: Subject) -> float:
        return subject.costs(ANY_LENGTH).parameters


class ActiveParameters(Metric):
    """Trainable numbers that one token uses: fewer than all in a mixture of experts."""

    unit = "parameters"
    stage = "static"
    label = "Parameters active a token"

    def measure(self, subject: Subject) -> float:
        active = subject.costs(ANY_LENGTH).active_parameters
        assert active is not None  # Costs fills it in
        return active


class WeightBytes(Metric):
    """Bytes of the weights as stored: quantized blocks at their packed size, scales included."""

    Config: ClassVar[type] = Stored
    unit = "bytes"
    stage = "static"
    label = "Weights as stored"

    def measure(self, subject: Subject) -> float:
        return _costs(subject, ANY_LENGTH, self.config).weight_bytes


class StateBytes(Metric):
    """Bytes that a batch of sequences carries from token to token: KV caches, SSM states."""

    Config: ClassVar[type] = StoredState
    unit = "bytes"
    stage = "static"
    label = "State of a batch at the context length"

    def measure(self, subject: Subject) -> float:
        return _state_bytes(subject, self.config)


class MemoryBytes(Metric):
    """Bytes held while decoding: the weights as stored and the states of a batch."""

    Config: ClassVar[type] = StoredState
    unit = "bytes"
    stage = "static"
    label = "Memory: weights and state at the context length"

    def measure(self, subject: Subject) -> float:
        weights = _costs(subject, ANY_LENGTH, self.config).weight_bytes
        state = _state_bytes(subject, self.config)
        subject.extras.update(weights=weights, state=state)
        return weights + state


class ForwardFlops(Metric):
    """FLOPs of a forward pass over one sequence; a multiply-add is two."""

    Config: ClassVar[type] = Forward
    unit = "FLOPs"
    stage = "static"
    label = "FLOPs of a forward pass"

    def measure(self, subject: Subject) -> float:
        return subject.costs(self.config.length).forward_flops


class DecodeFlops(Metric):
    """FLOPs of one decode step of one sequence; a multiply-add is two."""

    Config: ClassVar[type] = Step
    unit = "FLOPs/token"
    stage = "static"
    label = "FLOPs of a decode step at the context length"

    def measure(self, subject: Subject) -> float:
        return subject.costs(self.config.context).decode_flops


def _costs(subject: Subject, length: int, stored: Stored) -> LayoutCosts:
    return subject.builder.costs(
        subject.layout, length=length, bytes_per_element=stored.bytes_per_element
    )


def _state_bytes(subject: Subject, config: StoredState) -> int:
    return config.batch_size * _costs(subject, config.context, config).total.state_bytes
