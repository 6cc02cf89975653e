"""The contract suite on a counter of our own, the real counters' arithmetic, and the refusals."""

from __future__ import annotations

import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import lm_joules_metric
import pytest
import torch
from lm_joules_metric import (
    POWERCAP,
    JoulesPerToken,
    NvmlCounter,
    RaplCounter,
    decode_energy,
    open_counter,
)

from workbench.errors import FieldError, WorkbenchError
from workbench.study import run_study
from workbench.study_config import StudyConfig
from workbench.testing import MetricContract
from workbench.testing.toys import toy_builder, toy_layout

HERE = Path(__file__).parent
WATTS = 40.0


class Steady:
    """A device that always draws `WATTS`."""

    name = "steady"

    def joules(self) -> float:
        return WATTS * time.perf_counter()


class Tally:
    """A counter that moves by 2 J between readings."""

    name = "tally"

    def __init__(self) -> None:
        self.readings = 0

    def joules(self) -> float:
        self.readings += 1
        return 100.0 + 2.0 * self.readings


class TestJoulesPerToken(MetricContract):
    metric = JoulesPerToken
    configs = (
        JoulesPerToken.Config(context=4, tokens=4, seconds=0.02),
        JoulesPerToken.Config(batch_size=3, context=2, tokens=2, seconds=0.02),
    )

    @pytest.fixture(autouse=True)
    def counter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lm_joules_metric, "open_counter", lambda device: Steady())


def make_subject(folder: Path):
    return TestJoulesPerToken().subject(folder)


# Arithmetic


def test_joules_are_divided_among_all_tokens(monkeypatch, tmp_path: Path) -> None:
    """One round of 5 steps of 3 sequences, 2 J between the readings around it."""
    monkeypatch.setattr(lm_joules_metric, "open_counter", lambda device: Tally())
    subject = make_subject(tmp_path)
    config = JoulesPerToken.Config(batch_size=3, context=2, tokens=5, seconds=1e-9)
    assert JoulesPerToken(config).measure(subject) == pytest.approx(2.0 / 15)
    assert subject.extras["joules"] == 2.0
    assert subject.extras["steps"] == 5
    assert subject.extras["watts"] == pytest.approx(2.0 / subject.extras["seconds"])


def test_a_steady_device_draws_its_power_and_nothing_is_subtracted() -> None:
    builder = toy_builder()
    model = builder.build(builder.resolve(toy_layout()))
    config = JoulesPerToken.Config(context=4, tokens=8, seconds=0.2)
    used = decode_energy(model, Steady(), config)
    assert used.seconds >= 0.2
    assert used.steps % 8 == 0
    assert used.joules / used.seconds == pytest.approx(WATTS, rel=0.01)


def test_a_counter_that_stands_still_is_refused(monkeypatch, tmp_path: Path) -> None:
    still = SimpleNamespace(name="still", joules=lambda: 7.0)
    monkeypatch.setattr(lm_joules_metric, "open_counter", lambda device: still)
    config = JoulesPerToken.Config(context=2, tokens=2, seconds=1e-3)
    with pytest.raises(WorkbenchError, match=r"still.* stood still.*larger value"):
        JoulesPerToken(config).measure(make_subject(tmp_path))


# RAPL


def add_zone(root: Path, zone: str, name: str, energy: int, size: int = 1_000_000) -> Path:
    folder = root / zone
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{energy}\n")
    (folder / "max_energy_range_uj").write_text(f"{size}\n")
    return folder / "energy_uj"


def test_rapl_adds_packages_and_memory_and_nothing_twice(tmp_path: Path) -> None:
    counted = [
        add_zone(tmp_path, "intel-rapl:0", "package-0", 10),
        add_zone(tmp_path, "intel-rapl:1", "package-1", 20),
        add_zone(tmp_path, "intel-rapl:0:2", "dram", 30),
    ]
    others = [
        add_zone(tmp_path, "intel-rapl:0:0", "core", 40),
        add_zone(tmp_path, "intel-rapl:2", "psys", 50),
        add_zone(tmp_path, "intel-rapl-mmio:0", "package-0", 60),
    ]
    (tmp_path / "intel-rapl").mkdir()
    counter = RaplCounter(tmp_path)
    assert counter.joules() == 0.0
    for index, file in enumerate([*counted, *others]):
        file.write_text(f"{100_000 * (index + 1)}\n")
    assert counter.joules() == pytest.approx((100_000 + 200_000 + 300_000 - 60) / 1e6)


def test_rapl_goes_on_where_its_counter_starts_again(tmp_path: Path) -> None:
    first = add_zone(tmp_path, "intel-rapl:0", "package-0", 900_000)
    second = add_zone(tmp_path, "intel-rapl:1", "package-1", 0)
    counter = RaplCounter(tmp_path)
    first.write_text("100000\n")  # 0.2 J on, past its range of 1 J
    assert counter.joules() == pytest.approx(0.2)
    first.write_text("950000\n")
    second.write_text("500000\n")
    assert counter.joules() == pytest.approx(0.2 + 0.85 + 0.5)
    first.write_text("0\n")
    assert counter.joules() == pytest.approx(1.55 + 0.05)


def test_rapl_that_only_root_may_read_says_how_to_allow_it(monkeypatch, tmp_path: Path) -> None:
    file = add_zone(tmp_path, "intel-rapl:0", "package-0", 1)
    read_text = Path.read_text

    def refuse(path: Path, *args, **kwargs) -> str:
        if path == file:
            raise PermissionError(13, "Permission denied")
        return read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(WorkbenchError, match=r"may not be read.*sudo chmod a\+r .*/\*/energy_uj"):
        RaplCounter(tmp_path)


def test_rapl_that_is_no_number_is_refused(tmp_path: Path) -> None:
    add_zone(tmp_path, "intel-rapl:0", "package-0", 1).write_text("much\n")
    with pytest.raises(WorkbenchError, match="energy_uj cannot be read"):
        RaplCounter(tmp_path)


# NVML


class FakeNvml:
    """As much of `pynvml` as is used; every reading is 1.5 J above the one before."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, counts: bool = True) -> None:
        self.millijoules, self.counts = 10_000, counts

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        return f"handle of {uuid}"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        assert handle == "handle of GPU-1"
        if not self.counts:
            raise self.NVMLError("Not Supported")
        self.millijoules += 1500
        return self.millijoules


def test_nvml_counts_in_millijoules() -> None:
    counter = NvmlCounter(FakeNvml(), "GPU-1")
    assert counter.joules() - counter.joules() == -1.5


def test_a_gpu_that_does_not_count_is_refused() -> None:
    with pytest.raises(WorkbenchError, match=r"cannot be read \(NVML: Not Supported\).*Volta"):
        NvmlCounter(FakeNvml(counts=False), "GPU-1")


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(WorkbenchError, match="no energy counter is known for meta"):
        open_counter(torch.device("meta"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_gpu_draws_plausible_power(tmp_path: Path) -> None:
    subject = make_subject(tmp_path)
    subject.built.cuda()
    figure = JoulesPerToken(JoulesPerToken.Config(context=64, seconds=2.0)).measure(subject)
    assert figure > 0
    assert 10 < subject.extras["watts"] < 2000


# Refusals and studies, for real


def readable() -> bool:
    try:
        RaplCounter()
    except WorkbenchError:
        return False
    return True


@pytest.mark.skipif(readable(), reason="this machine's CPU has a counter")
def test_a_cpu_without_a_counter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkbenchError, match=r"energy counter|may not be read"):
        JoulesPerToken(JoulesPerToken.Config()).measure(make_subject(tmp_path))


def test_there_are_no_zones_in_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(WorkbenchError, match="no readable energy counter: no RAPL package under"):
        RaplCounter(tmp_path)
    assert str(POWERCAP) == "/sys/class/powercap"


@pytest.mark.parametrize("field", ["batch_size", "context", "tokens", "seconds"])
def test_sizes_are_positive(field: str) -> None:
    with pytest.raises(FieldError, match=f"{field}: must be"):
        JoulesPerToken.Config(**{field: 0})


def study(name: str) -> StudyConfig:
    """The README's study, made small."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    block = text.split("```toml\n")[1].split("```")[0]
    data = tomllib.loads(block)
    data["name"] = name
    data["plugin_dirs"] = [str(HERE)]
    data["space"] = {**data["space"], "d_model": 16, "num_layers": 1}
    data["metrics"]["joules_per_token"] = {"context": 4, "tokens": 4, "seconds": 0.02}
    data["data"]["validation_examples"] = 4
    data["training"] = {"tokens": 128, "batch_size": 2, "seq_len": 32}
    data["budget"] = {"trials": 1}
    data["runtime"] = {"device": "cpu", "executor": "inline", "threads": 1}
    return StudyConfig.from_dict(data)


@pytest.mark.skipif(readable(), reason="this machine's CPU has a counter")
def test_in_a_study_the_refusal_is_the_trials_outcome(tmp_path: Path) -> None:
    (trial,) = run_study(study("none"), tmp_path).trials()
    assert trial.outcome == "error"
    assert "energy counter" in trial.reason or "may not be read" in trial.reason
    assert "joules_per_token" not in trial.metrics


def test_in_a_study_the_figure_is_recorded(monkeypatch, tmp_path: Path) -> None:
    from workbench.builder import default_builder

    metric = default_builder((str(HERE),)).metrics["joules_per_token"]
    monkeypatch.setitem(metric.measure.__globals__, "open_counter", lambda device: Steady())
    (trial,) = run_study(study("steady"), tmp_path).trials()
    assert trial.outcome == "complete", trial.reason
    watts = trial.data["extras"]["joules_per_token.watts"]
    assert watts == pytest.approx(WATTS, rel=0.05)
    assert trial.metrics["joules_per_token"] > 0
