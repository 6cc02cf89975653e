"""A latency model: seconds of a layout as the sum of its parts' in a table.

    predicted = overhead + outside + Σ over blocks: scale[layer] · seconds[block]

Single layers add up to a whole only nearly, so overhead and scales are fitted to models that were
measured whole (`latency_fit`). Judge such a model on layouts that it was not fitted to
(`latency_evaluation`), and always measure the layouts that you choose with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from math import fsum

from workbench.builder import Builder
from workbench.latency_fit import Correction, fit
from workbench.latency_machine import PHASES, Load, Machine, Phase
from workbench.latency_parts import OUTSIDE, Part, Parts, label, outside_part
from workbench.latency_table import LatencyTable, Observation, Role
from workbench.layout import Block, Layout
from workbench.roofline import Roofline, Work, block_work, outside_work


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a layout is predicted to take.

    Attributes:
        seconds: of one prefill or one decode step; None where the table lacks something.
        lower_bound: what the device's ceilings allow at the least; None for a model without them.
        missing: parts that the table lacks, in words.
    """

    seconds: float | None
    lower_bound: float | None
    missing: tuple[str, ...] = ()


class LatencyModel:
    """Predicts from a table, thousands of layouts a second: what a block adds is looked up once.

    Args:
        table: not to be filled meanwhile but with what it lacked.
        builder: knows the layers.
        roofline: of the table's device and dtype; None leaves lower bounds out.
        corrections: by phase; none by default, see `fitted`.
    """

    def __init__(
        self,
        table: LatencyTable,
        builder: Builder,
        roofline: Roofline | None = None,
        corrections: Mapping[Phase, Correction] | None = None,
    ) -> None:
        self.table = table
        self.builder = builder
        self.roofline = roofline
        self.corrections = {phase: Correction() for phase in PHASES} | dict(corrections or {})
        self._parts = Parts(builder)
        self._frames: dict[tuple[object, ...], _Frame] = {}

    @classmethod
    def fitted(
        cls, table: LatencyTable, builder: Builder, roofline: Roofline | None = None
    ) -> LatencyModel:
        """A model corrected by all whole models that the table holds to fit to."""
        plain = cls(table, builder, roofline)
        seen = plain.observations("fit")
        rows = [(o.load.phase, plain.terms(o.layout, o.load), o.seconds) for o in seen]
        fits = {
            phase: fit([(terms, seconds) for of, terms, seconds in rows if of == phase and terms])
            for phase in PHASES
        }
        return cls(table, builder, roofline, fits)

    @property
    def machine(self) -> Machine:
        return self.table.machine

    def observations(self, role: Role) -> list[Observation]:
        """The table's whole models of a role that are of the code as it is now."""
        return [
            seen
            for seen in self.table.observations
            if seen.role == role
            and self.table.current(seen.sources, self._parts.layout_sources(seen.layout))
        ]

    def predict(self, layout: Layout, phase: Phase, batch_size: int, length: int) -> Prediction:
        """Seconds of one prefill of `length` tokens, or of one decode step at that context.

        Raises:
            UnknownNameError, FieldError: as `Builder.resolve`, or a size below 1.
        """
        frame = self._frame(layout, phase, batch_size, length)
        terms = frame.terms(layout)
        missing = [term.missing for term in terms if term.seconds is None]
        bound = None
        if self.roofline is not None:
            work = Work(
                bytes=frame.outside_work.bytes + sum(term.bytes for term in terms),
                flops=frame.outside_work.flops + sum(term.flops for term in terms),
            )
            bound = self.roofline.bound_of(work).seconds
        if frame.outside is None:
            missing.append(label(frame.outside_part))
        if missing:
            lacking = tuple(dict.fromkeys(missing))
            return Prediction(seconds=None, lower_bound=bound, missing=lacking)
        assert frame.outside is not None
        total = frame.overhead + frame.outside + fsum(term.corrected for term in terms)
        return Prediction(seconds=total, lower_bound=bound)

    def terms(self, layout: Layout, load: Load) -> dict[str, float] | None:
        """Uncorrected seconds of the outside and of each layer; None where an entry lacks."""
        frame = self._frame(layout, load.phase, load.batch_size, load.length)
        if frame.outside is None:
            return None
        sums = {OUTSIDE: frame.outside}
        for term in frame.terms(layout):
            if term.seconds is None:
                return None
            sums[term.layer] = sums.get(term.layer, 0.0) + term.seconds
        return sums

    def _frame(self, layout: Layout, phase: Phase, batch_size: int, length: int) -> _Frame:
        key = (
            *(phase, batch_size, length, layout.d_model, layout.vocab_size),
            *(layout.norm, layout.residual_multiplier, layout.tie_embeddings),
        )
        if key not in self._frames:
            load = Load(phase=phase, batch_size=batch_size, length=length)
            self._frames[key] = _Frame(self, self._parts, layout, load)
        return self._frames[key]


@dataclasses.dataclass(slots=True)
class _Term:
    """What one block adds."""

    layer: str
    seconds: float | None
    corrected: float
    bytes: float
    flops: float
    missing: str


class _Frame:
    """All that one load asks of layouts of one width: blocks that were seen are only looked up."""

    def __init__(self, model: LatencyModel, parts: Parts, layout: Layout, load: Load) -> None:
        self.model, self.parts, self.load = model, parts, load
        correction = model.corrections[load.phase]
        self.overhead, self.scale = correction.overhead, correction.scale
        self.outside_part = outside_part(layout)
        self._terms: dict[tuple[object, ...], _Term] = {}
        self._version = 0
        roofline = model.roofline
        self.outside_work = Work()
        if roofline is not None:
            self.outside_work = outside_work(layout, load, roofline.element)

    @property
    def outside(self) -> float | None:
        found = self.model.table.find(self.outside_part, self.load, "")
        return None if found is None else found.seconds

    def terms(self, layout: Layout) -> list[_Term]:
        """A term a block, from the input up."""
        if self._version != self.model.table.version:  # what lacked may be there now
            self._version = self.model.table.version
            self._terms.clear()
        terms = []
        for block in layout.blocks:
            key = _key(block)
            term = self._terms.get(key)
            if term is None:
                if self.parts.linked(block.layer):
                    return self._linked_terms(layout)
                alone = layout.replace(blocks=(block,))
                part = self.parts.alone(layout, block)
                term = self._terms[key] = self._term(part, block, self._costs(alone)[0])
            terms.append(term)
        return terms

    def _linked_terms(self, layout: Layout) -> list[_Term]:
        """The slow way, for layouts with blocks that build on others: nothing is looked up."""
        _, *parts = self.parts.of(layout)
        costs = self._costs(layout)
        blocks = zip(parts, layout.blocks, costs, strict=True)
        return [self._term(part, block, work) for part, block, work in blocks]

    def _term(self, part: Part, block: Block, work: Work) -> _Term:
        found = self.model.table.find(part, self.load, self.parts.sources(part))
        seconds = None if found is None else found.seconds
        return _Term(
            layer=block.layer,
            seconds=seconds,
            corrected=self.scale(block.layer) * (seconds or 0.0),
            bytes=work.bytes,
            flops=work.flops,
            missing=label(part) if found is None else "",
        )

    def _costs(self, layout: Layout) -> list[Work]:
        """The least work of each block; none where no roofline asks for it."""
        roofline = self.model.roofline
        if roofline is None:
            return [Work()] * len(layout.blocks)
        costs = roofline.builder.costs(
            layout, length=self.load.length, bytes_per_element=roofline.element
        )
        return [block_work(block, self.load) for block in costs.blocks]


def _key(block: Block) -> tuple[object, ...]:
    """Equal for equal blocks; quicker than canonical JSON. Other spellings are only found again."""
    quantizer = block.quantizer
    stored = None if quantizer is None else (quantizer.name, repr(quantizer.config))
    values = tuple(block.config.items())
    try:
        hash(values)
    except TypeError:  # a field that holds a list
        return block.layer, repr(values), stored
    return block.layer, values, stored
