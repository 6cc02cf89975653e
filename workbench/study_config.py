"""StudyConfig: a study's TOML file as typed data, checked before any work. No torch, no Optuna."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from workbench import config as configs
from workbench.errors import FieldError, UnknownNameError, WorkbenchError
from workbench.space import SpaceConfig
from workbench.storage_url import PATIENCE, has_password

EXECUTORS = {  # the modules of executors, by the name that `[runtime] executor` gives
    "process": "workbench.executors.process",
    "inline": "workbench.executors.inline",
    "ray": "workbench.executors.ray",
}
STUDY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """The `[budget]` table: how much a study may spend.

    Trials that a constraint rejects before training, and duplicates, do not count.
    """

    trials: Annotated[int, "judged trials to reach; raise it to continue a study"]
    seconds: Annotated[float | None, "stop asking for trials after this long, this run"] = None
    trial_timeout: Annotated[float | None, "seconds after which one trial is killed"] = None
    memory_gb: Annotated[float | None, "address space a CPU worker may take"] = None
    retries: Annotated[int, "runs again after a worker died or was interrupted"] = 2

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise FieldError("trials", f"must be at least 1, got {self.trials}")
        if self.retries < 0:
            raise FieldError("retries", f"must not be negative, got {self.retries}")
        for name in ("seconds", "trial_timeout", "memory_gb"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise FieldError(name, f"must be above 0, got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """The `[runtime]` table: where a study runs, and on whose kernels (`workbench.kernels`)."""

    device: Annotated[str, "auto, cpu, cuda or cuda:N"] = "auto"
    threads: Annotated[int | None, "CPU threads of a worker; by default all share the cores"] = None
    executor: Annotated[str, "process: on this machine; ray: a cluster; inline: to debug"] = (
        "process"
    )
    workers: Annotated[int | None, "trials at a time; by default 1 on CPU, or one a device"] = None
    address: Annotated[str | None, "of a Ray cluster: auto, host:port or ray://host:port"] = None
    storage: Annotated[str | None, "URL of Optuna's storage, without a password"] = None
    storage_patience: Annotated[float, "seconds that a storage may be away"] = PATIENCE
    backends: Annotated[dict[str, str], "operation = backend, on a CUDA device"] = (
        dataclasses.field(default_factory=dict)
    )

    def __post_init__(self) -> None:
        if self.storage is not None and has_password(self.storage):
            raise FieldError(
                "storage",
                "a study's file is no place for a password: give the URL by WORKBENCH_STORAGE or "
                "--storage, or leave the password to ~/.pgpass",
            )
        if self.storage_patience < 0:
            raise FieldError(
                "storage_patience", f"must not be negative, got {self.storage_patience}"
            )
        for name, backend in self.backends.items():
            if not isinstance(backend, str):
                raise FieldError(f"backends.{name}", f"expected a backend's name, got {backend!r}")
        if self.executor not in EXECUTORS:
            raise UnknownNameError("executor", self.executor, EXECUTORS)
        for name in ("threads", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise FieldError(name, f"must be at least 1, got {value}")
        if self.address is not None and self.executor != "ray":
            raise FieldError("address", "is of a Ray cluster: it needs executor = 'ray'")

    def threads_on(self, device: str) -> int:
        """CPU threads of each worker: as many as given, or its share of the cores.

        A Ray worker has one, as clusters count CPUs; a process that feeds a GPU may use them all.
        """
        if self.threads is not None:
            return self.threads
        cores = os.cpu_count() or 1
        if device.startswith("cuda"):
            return cores
        return 1 if self.executor == "ray" else max(1, cores // (self.workers or 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RungsConfig:
    """The `[rungs]` table: where trainings pause, and which of them go on.

    At a rung a trial goes on unless a trial that was there before it dominates it (`rungs`).
    """

    at: Annotated[tuple[float, ...], "shares of the training steps, ascending; none: no rungs"] = ()
    margin: Annotated[float, "by what share a peer must be better in what training yields"] = 0.0
    min_peers: Annotated[int, "trials that must have reached a rung before any is stopped"] = 1

    def __post_init__(self) -> None:
        for index, share in enumerate(self.at):
            if not 0 < share < 1:
                raise FieldError(f"at[{index}]", f"is a share between 0 and 1, got {share}")
        if list(self.at) != sorted(set(self.at)):
            raise FieldError("at", f"must be ascending, got {list(self.at)}")
        if self.margin < 0:
            raise FieldError("margin", f"must not be negative, got {self.margin}")
        if self.min_peers < 1:
            raise FieldError("min_peers", f"must be at least 1, got {self.min_peers}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a constraint demands of a metric: `{max = …}`, `{min = …}` or both."""

    min: float = -math.inf
    max: float = math.inf

    def violation(self, value: float) -> float:
        """How far `value` is outside; 0 or below is inside, as Optuna's `set_constraint` wants.

        NaN is infinitely far outside.
        """
        return math.inf if math.isnan(value) else max(self.min - value, value - self.max)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """A whole study file.

    Attributes:
        name: of its folder under `runs/`.
        objectives: metric names, each in the direction that its plugin declares.
        report: metrics recorded beside them.
        constraints: bounds by metric name.
        metrics: Config values by metric name.
        space, training, budget, runtime, rungs: the tables of those names.
        data: `source` names a data source, the other keys are its Config.
        sampler: `class` is an import string of an Optuna sampler, the other keys its arguments.
        seed: of weights, data order and sampler.
        plugin_dirs: folders whose `.py` files are plugins too.
    """

    name: str
    objectives: tuple[str, ...]
    space: SpaceConfig
    data: dict[str, Any]
    training: dict[str, Any]
    budget: BudgetConfig
    description: str = ""
    seed: int = 0
    report: tuple[str, ...] = ()
    constraints: dict[str, Bounds] = dataclasses.field(default_factory=dict)
    metrics: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    sampler: dict[str, Any] = dataclasses.field(default_factory=dict)
    runtime: RuntimeConfig = dataclasses.field(default_factory=RuntimeConfig)
    rungs: RungsConfig = dataclasses.field(default_factory=RungsConfig)
    plugin_dirs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not STUDY_NAME.fullmatch(self.name):
            raise FieldError("name", f"{self.name!r}: use letters, digits, '_', '-' and '.'")
        if not self.objectives:
            raise FieldError("objectives", "name at least one metric")
        if len(set(self.objectives)) != len(self.objectives):
            raise FieldError("objectives", f"a metric is there twice: {list(self.objectives)}")
        if not 0 <= self.seed < 2**32:
            raise FieldError("seed", f"must be between 0 and 2**32 - 1, got {self.seed}")
        for name in self.metrics:
            if name not in self.metric_names:
                raise UnknownNameError("metric under [metrics]", name, self.metric_names)
        if not isinstance(self.data.get("source"), str):
            raise FieldError("data.source", 'name a data source, such as source = "stdlib"')

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Every metric that a trial records, each once: objectives, report, constraints."""
        return tuple(dict.fromkeys([*self.objectives, *self.report, *self.constraints]))

    def to_dict(self) -> dict[str, Any]:
        """The TOML's data with every default of the core's tables written out."""
        data = dataclasses.asdict(self)
        data["constraints"] = {
            name: {
                end: value for end in ("min", "max") if math.isfinite(value := getattr(bounds, end))
            }
            for name, bounds in self.constraints.items()
        }
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StudyConfig:
        """The study in TOML or JSON data.

        Raises:
            FieldError, UnknownNameError: names the table and the field.
        """
        values = dict(data)
        _refuse_non_finite(values, "")
        for name, kind in (
            ("space", SpaceConfig),
            ("budget", BudgetConfig),
            ("runtime", RuntimeConfig),
            ("rungs", RungsConfig),
        ):
            if name in values:
                values[name] = _table(kind, values[name], name)
        for name in ("data", "training", "sampler", "metrics", "constraints"):
            if not isinstance(values.get(name, {}), Mapping):
                raise FieldError(name, f"expected a table, got {values[name]!r}")
        for name, table in values.get("metrics", {}).items():
            if not isinstance(table, Mapping):
                raise FieldError(f"metrics.{name}", f"expected a table, got {table!r}")
        values["constraints"] = {
            name: _bounds(name, bounds) for name, bounds in values.get("constraints", {}).items()
        }
        declared = configs.fields_of(cls)
        for name in values:
            if name not in declared:
                raise UnknownNameError("field of the study", name, declared)
        for name, field in declared.items():
            if field.required and name not in values:
                raise FieldError(name, "is required in a study file")
        for name in ("name", "description", "seed", "objectives", "report", "plugin_dirs"):
            if name in values:
                values[name] = configs.coerce(values[name], declared[name].type, name)
        return cls(**values)

    @classmethod
    def read(cls, path: str | Path) -> StudyConfig:
        """The study in a TOML file; relative `plugin_dirs` are taken from the file's folder.

        Raises:
            WorkbenchError: the file cannot be read, is no TOML, or holds a mistake; names the file.
        """
        path = Path(path)
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise WorkbenchError(f"cannot read the study file {path}: {error}") from None
        except tomllib.TOMLDecodeError as error:
            raise WorkbenchError(f"{path} is not TOML: {error}") from None
        try:
            study = cls.from_dict(data)
        except WorkbenchError as error:
            raise WorkbenchError(f"{path}: {error}") from None
        folders = tuple(str((path.parent / folder).resolve()) for folder in study.plugin_dirs)
        return dataclasses.replace(study, plugin_dirs=folders)


def _refuse_non_finite(data: Any, where: str) -> None:
    """TOML knows nan and inf; no field of a study means anything by them."""
    if isinstance(data, Mapping):
        for name, value in data.items():
            _refuse_non_finite(value, f"{where}.{name}" if where else str(name))
    elif isinstance(data, list | tuple):
        for index, value in enumerate(data):
            _refuse_non_finite(value, f"{where}[{index}]")
    elif isinstance(data, float) and not math.isfinite(data):
        raise FieldError(where, f"{data} is no finite number")


def _table(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise FieldError(where, f"expected a table, got {data!r}")
    declared = configs.fields_of(kind)
    try:
        if kind is SpaceConfig:
            return _space(data, declared)
        if kind is RuntimeConfig:
            return _runtime(data)
        return configs.from_dict(kind, data)
    except WorkbenchError as error:
        raise error.within(where) from None


def _space(data: Mapping[str, Any], declared: Mapping[str, configs.Field]) -> SpaceConfig:
    values = dict(data)
    for name, field in declared.items():
        if name not in values:
            if field.required:
                raise FieldError(name, "is required")
        elif name in ("layers", "placement", "quantizer"):
            if not isinstance(values[name], Mapping):
                raise FieldError(name, f"expected a table, got {values[name]!r}")
        elif name not in ("d_model", "num_layers"):
            values[name] = configs.coerce(values[name], field.type, name)
    for name in values:
        if name not in declared:
            raise UnknownNameError("field", name, declared)
    return SpaceConfig(**values)


def _runtime(data: Mapping[str, Any]) -> RuntimeConfig:
    values = dict(data)
    backends = values.pop("backends", {})
    if not isinstance(backends, Mapping):
        raise FieldError("backends", f"expected a table, operation = backend, got {backends!r}")
    runtime: RuntimeConfig = configs.from_dict(RuntimeConfig, values)
    return dataclasses.replace(runtime, backends=dict(backends))


def _bounds(name: str, data: Any) -> Bounds:
    try:
        if not isinstance(data, Mapping) or not data:
            raise WorkbenchError(f"expected {{max = …}} or {{min = …}}, got {data!r}")
        bounds: Bounds = configs.from_dict(Bounds, data)
    except WorkbenchError as error:
        raise error.within(f"constraints.{name}") from None
    if bounds.min > bounds.max:
        raise FieldError(f"constraints.{name}", f"min {bounds.min} is above max {bounds.max}")
    return bounds
