"""Which layer goes where at another depth: by the trial's placement policy, or by its pattern.

A policy places mixers. Where blocks chose on their own (`[space] per_block`), a mixer has several
kinds of layers: the places that the policy gives it are filled with them in their order, each as
often as its share, as `stretched` does.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from workbench import config as configs
from workbench.errors import WorkbenchError
from workbench.scaling_pattern import Kinds, Pattern, stretched, tiled

if TYPE_CHECKING:
    from workbench.builder import Builder
    from workbench.layout import Layout
    from workbench.placement import Placement
    from workbench.records import Trial
    from workbench.study_config import StudyConfig

Mixers = tuple[str, ...]  # their names, from the input up

FAR = 64  # depths further on, where a policy that follows the depth has placed more of each mixer


class Policy:
    """A placement policy with the parameters of a trial, as the kinds of its pattern.

    Args:
        name: of the policy.
        policy: its class.
        values: its Config's fields.
        mixers: what the study offered.
        pattern: the trial's.
        mixer_of: the mixer of each of the pattern's kinds.
    """

    def __init__(
        self,
        name: str,
        policy: type[Placement],
        values: Mapping[str, Any],
        mixers: Sequence[str],
        pattern: Pattern,
        mixer_of: Sequence[str],
    ) -> None:
        self.name = name
        self._policy, self._values, self._mixers = policy, dict(values), tuple(mixers)
        self._own: dict[str, list[int]] = {}  # kinds of each mixer's layers, from the input up
        for kind in pattern.kinds:
            self._own.setdefault(mixer_of[kind], []).append(kind)
        self._placed = tuple(mixer_of[kind] for kind in pattern.kinds)
        self.follows_depth = self._follows_depth()

    def place(self, num_layers: int) -> tuple[Kinds, str] | None:
        """The kinds at a depth, and in words how; None where the policy cannot keep the shares."""
        if self.follows_depth:
            placed = self.at(num_layers, self._values)
            said = f"{self.name} with the trial's parameters"
            found = None if placed is None else (placed, said)
        else:
            found = self._grown(num_layers)
        return None if found is None else self._filled(*found)

    def _filled(self, placed: Mixers, said: str) -> tuple[Kinds, str]:
        """The places of each mixer filled with its kinds of layers."""
        filling = {
            mixer: iter(stretched(tuple(self._own[mixer]), placed.count(mixer)))
            for mixer in set(placed)
        }
        if any(len(set(own)) > 1 for own in self._own.values()):
            said += ", each mixer's different layers in their order"
        return tuple(next(filling[mixer]) for mixer in placed), said

    def at(self, num_layers: int, values: Mapping[str, Any]) -> Mixers | None:
        """The mixers that the policy places, or None if it cannot."""
        try:
            config: Any = configs.from_dict(self._policy.Config, values)
            names = self._policy.place(num_layers, self._mixers, config)
        except WorkbenchError:  # it says of most depths that they do not fit
            return None
        return tuple(names) if set(names) <= self._own.keys() else None

    @property
    def explains(self) -> bool:
        """Whether it places at the trial's own depth what the trial has."""
        return self.at(len(self._placed), self._values) == self._placed

    def _follows_depth(self) -> bool:
        far = self.at(FAR * len(self._placed), self._values)
        return far is not None and all(
            far.count(mixer) > len(own) for mixer, own in self._own.items()
        )

    def _grown(self, num_layers: int) -> tuple[Mixers, str] | None:
        """With its whole numbers, which count layers, grown as the depth; shares within a layer."""
        names = [name for name, value in self._values.items() if type(value) is int]
        options = []
        for name in names:
            low, rest = divmod(self._values[name] * num_layers, len(self._placed))
            options.append([low, low + 1] if rest else [low])
        best: tuple[float, Mixers, str] | None = None
        for numbers in itertools.product(*options):
            grown = dict(zip(names, numbers, strict=True))
            placed = self.at(num_layers, {**self._values, **grown})
            if placed is None or (error := self._share_error(placed)) > 1:
                continue
            if best is None or error < best[0]:
                said = ", ".join(f"{name} {self._values[name]} → {grown[name]}" for name in names)
                best = (error, placed, f"{self.name}, counts grown with the depth ({said})")
        return None if best is None else best[1:]

    def _share_error(self, placed: Mixers) -> float:
        """Layers by which the worst mixer is away from its share in the original."""
        ratio = len(placed) / len(self._placed)
        return max(abs(placed.count(mixer) - len(own) * ratio) for mixer, own in self._own.items())


class Placer:
    """Kinds at any depth, each computed once.

    Args:
        pattern: the original's.
        policy: what placed it, if a record says.
    """

    def __init__(self, pattern: Pattern, policy: Policy | None = None) -> None:
        self.pattern = pattern
        self.policy = policy
        self._known: dict[int, tuple[Kinds, str]] = {}

    @property
    def fewest(self) -> int:
        """The least depth from which on every kind of layer of the original has its place."""
        wanted = set(self.pattern.kinds)
        depth = len(self.pattern.kinds)
        while depth > len(wanted) and wanted <= set(self.place(depth - 1)[0]):
            depth -= 1
        return depth

    def place(self, num_layers: int) -> tuple[Kinds, str]:
        """The kinds at a depth, and in words how they were placed."""
        if num_layers not in self._known:
            self._known[num_layers] = self._place(num_layers)
        return self._known[num_layers]

    def _place(self, num_layers: int) -> tuple[Kinds, str]:
        kinds = self.pattern.kinds
        if num_layers == len(kinds):
            return kinds, "as in the original"
        if self.policy is not None and (by_policy := self.policy.place(num_layers)):
            return by_policy
        if (tiles := tiled(kinds, num_layers)) is not None:
            return tiles, "the original's repeating pattern continued"
        return stretched(kinds, num_layers), "the original's pattern stretched"


def trial_policy(
    trial: Trial, study: StudyConfig, builder: Builder, layout: Layout, pattern: Pattern
) -> Policy | None:
    """The policy that placed a trial's mixers; None where its record does not tell.

    Raises:
        UnknownNameError, FieldError: the study's space names what is no longer there.
    """
    name = trial.params.get("placement")
    if name is None and len(study.space.placements) == 1:
        name = study.space.placements[0]
    if name is None:
        return None
    values = _values(name, trial, study, builder, layout)
    mixer_of = _mixers(pattern, builder)
    if values is None or mixer_of is None:
        return None
    policy = Policy(name, builder.placements[name], values, study.space.mixers, pattern, mixer_of)
    return policy if policy.explains else None


def _values(
    name: str, trial: Trial, study: StudyConfig, builder: Builder, layout: Layout
) -> dict[str, Any] | None:
    """The policy's Config fields: suggested ones from the record, fixed ones from the study."""
    from workbench.space import Space

    space = Space(study.space, builder, layout.vocab_size).to_dict()
    values = {}
    for field, source in space["placement"].get(name, {}).items():
        if f"{name}.{field}" in trial.params:
            values[field] = trial.params[f"{name}.{field}"]
        elif isinstance(source, list) and len(source) == 1:
            values[field] = source[0]  # a choice of one is not suggested
        elif isinstance(source, list | dict):
            return None
        else:
            values[field] = source
    return values


def _mixers(pattern: Pattern, builder: Builder) -> list[str] | None:
    """The mixer of each kind of layer; None where a layer has several, or none."""
    result = []
    for blocks in pattern.layers:
        mixers = [block.layer for block in blocks if builder.layers[block.layer].kind != "mlp"]
        if len(mixers) != 1:
            return None
        result += mixers
    return result
