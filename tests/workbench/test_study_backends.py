"""Whose kernels a study runs on: demanded before it begins, recorded, and part of what it is."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.workbench.conftest import TOYS, make_config
from tests.workbench.studies import run
from workbench import Block, Layout, WorkbenchError, kernels
from workbench.builder import Builder
from workbench.executors import Job
from workbench.model import backends_of
from workbench.study_config import StudyConfig

NOTING = """
from workbench import Metric, hookimpl


class Noting(Metric):
    stage = "static"

    def measure(self, subject):
        subject.notes["how"] = "by hand"
        return 1.0


class Silent(Noting):
    stage = "measured"

    def measure(self, subject):
        return float(len(subject.notes))


@hookimpl
def register_metrics(register):
    register("noting", Noting)
    register("silent", Silent)
"""


@pytest.fixture(autouse=True)
def no_preferences_left(monkeypatch):
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    yield
    kernels.prefer({})


@pytest.mark.parametrize(
    ("backends", "words"),
    [
        ({"sdd": "torch"}, "unknown operation in runtime.backends 'sdd'. Did you mean 'ssd'"),
        ({"ssd": "tirton"}, "unknown backend in runtime.backends.ssd 'tirton'. Did you mean 'tri"),
        ({"ssd": "triton"}, "runtime.backends.ssd: 'triton' needs a CUDA device, and this runs on"),
        ({"ssd": 1}, "runtime.backends.ssd: expected a backend's name, got 1"),
        ("triton", "runtime.backends: expected a table, operation = backend, got 'triton'"),
    ],
)
def test_a_demand_that_cannot_be_met_is_refused_before_the_study_begins(
    study_data, runs, backends, words
):
    with pytest.raises(WorkbenchError) as caught:
        run(study_data, runs, **{"runtime.backends": backends})
    assert words in str(caught.value)
    assert not (runs / "toys").exists()


def test_a_slip_in_the_environment_is_refused_before_the_study_begins(
    study_data, runs, monkeypatch
):
    monkeypatch.setenv(kernels.VARIABLE, "ssd=tirton")
    with pytest.raises(WorkbenchError, match=r"WORKBENCH_BACKENDS\.ssd 'tirton'"):
        run(study_data, runs)
    assert not (runs / "toys").exists()


def test_a_backend_that_is_not_installed_is_refused_with_the_command_that_installs_it(
    study_data, runs, monkeypatch
):
    """A CUDA device is planted; the library is missing here for real."""
    Builder.load()
    ssd = kernels.operations()["ssd"]
    monkeypatch.setattr("workbench.study.resolve_device", lambda name: "cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("workbench.trial.use_kernel_caches", lambda cache_dir, device: None)
    monkeypatch.setitem(ssd._reasons, "mamba-ssm", "ModuleNotFoundError: No module 'mamba_ssm'")
    with pytest.raises(WorkbenchError) as caught:
        run(study_data, runs, **{"runtime.backends": {"ssd": "mamba-ssm"}})
    assert "No module 'mamba_ssm'. Install it with: pip install" in str(caught.value)
    assert not (runs / "toys").exists()


def test_backends_reach_the_worker(study_data):
    config = make_config(study_data, **{"runtime.backends": {"ssd": "torch", "attention": "cudnn"}})
    job = Job(config=config, device="cuda", cache_dir=TOYS, plugins={})
    sent = Job.from_dict(json.loads(json.dumps(job.to_dict()))).config
    assert sent.runtime.backends == {"ssd": "torch", "attention": "cudnn"}
    assert StudyConfig.from_dict(config.to_dict()) == config


def test_a_study_prefers_what_it_says_and_the_next_one_does_not(study_data, runs):
    run(study_data, runs, **{"runtime.backends": {"ssd": "torch"}, "budget.trials": 1})
    assert kernels.preference("ssd") == "torch"
    run(study_data, runs, **{"budget.trials": 2})  # all runs on torch here: the same study
    assert kernels.preference("ssd") is None


def test_a_study_resumed_with_other_kernels_is_refused(study_data, runs, monkeypatch):
    def in_use(device, packages):
        assert {"workbench", "workbench_plugin_toys"} <= packages
        return dict(now)

    monkeypatch.setattr(kernels, "in_use", in_use)
    now = {"ssd": ["triton", "torch"], "scan": ["torch"]}
    study = run(study_data, runs, **{"budget.trials": 1})
    assert study.data["identity"]["backends"] == now
    run(study_data, runs, **{"budget.trials": 2})
    now["ssd"] = ["torch"]
    with pytest.raises(WorkbenchError) as caught:
        run(study_data, runs, **{"budget.trials": 3})
    assert "backends.ssd: ['triton', 'torch'] then, ['torch'] now" in str(caught.value)
    assert "scan" not in str(caught.value)


def test_the_loss_and_few_rows_are_operations_that_a_study_may_name():
    code = "from workbench.builder import Builder; from workbench import kernels; "
    code += "kernels.prefer({'cross_entropy': 'torch', 'linear_step': 'torch'}); "
    code += "found = kernels.operations(); print(*{found[n].package for n in found})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["workbench"]  # whatever plugins are loaded, or none


def test_a_study_from_before_there_were_backends_goes_on(study_data, runs):
    study = run(study_data, runs, **{"budget.trials": 1})
    data = study.data
    assert data["identity"].pop("backends") == {}
    (study.path / "study.json").write_text(json.dumps(data))
    assert len(run(study_data, runs, **{"budget.trials": 2}).trials()) >= 2


def test_records_say_what_each_layer_ran_on_and_how_training_ran(study_data, runs):
    changes = {"space.mixers": ["toy", "mamba2"], "budget.trials": 1, "space.d_model": 16}
    changes["space.layers"] = {"mamba2": {"headdim": 16, "d_state": 8}}
    study = run(study_data, runs, **changes)
    found = {}
    for trial in study.trials():
        details = trial.data["details"]
        assert details["training"] == {"mode": "eager", "note": ""}
        assert details["measured_backend"] == details["backend"]
        found |= details["backend"]
    assert (
        found.items()
        <= {
            "toy": {},
            "mamba2": {"ssd": "torch", "causal_conv1d": "torch"},
        }.items()
    )
    assert found


def test_blocks_of_a_type_that_run_on_different_kernels_are_both_named(monkeypatch):
    builder = Builder.load()
    blocks = [Block(layer="attention", config={"num_heads": heads}) for heads in (1, 2, 4)]
    model = builder.build(
        Layout(d_model=32, vocab_size=16, blocks=(*blocks, Block(layer="swiglu"))), device="meta"
    )
    found = backends_of(model)
    assert set(found["attention"].values()) == {"torch"}
    assert found["swiglu"] == {}
    seen = []

    def backends(self, dtype):
        seen.append(str(dtype))
        return {"attention": "slow" if self.heads.dim == 16 else "fast"}

    monkeypatch.setattr(type(model.layers[0]), "backends", backends)
    assert backends_of(model, half=True)["attention"] == {"attention": "fast, slow"}
    assert set(seen) == {"torch.bfloat16"}


def test_notes_of_metrics_are_recorded_beside_their_figures(study_data, runs, tmp_path):
    folder = tmp_path / "noting"
    folder.mkdir()
    (folder / "noting.py").write_text(NOTING)
    changes = {"plugin_dirs": [str(TOYS), str(folder)], "report": ["noting", "silent"]}
    study = run(study_data, runs, **changes, **{"budget.trials": 1})
    data = study.trials()[0].data
    assert data["notes"] == {"noting.how": "by hand"}
    assert data["metrics"]["silent"] == 0  # a metric's notes are its own
    assert data["details"]["measured_backend"] == data["details"]["backend"]
