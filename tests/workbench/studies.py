"""Running toy studies in tests, and what must hold of the records of each."""

from __future__ import annotations

import optuna

from tests.workbench.conftest import make_config
from workbench.records import Study
from workbench.study import run_study


def run(base, runs, /, **changes):
    return run_study(make_config(base, **changes), runs)


def storage_trials(study: Study) -> list[optuna.trial.FrozenTrial]:
    url = f"sqlite:///{study.path / 'optuna.db'}"
    return optuna.load_study(study_name=study.name, storage=url).get_trials()


def assert_all_accounted_for(study: Study) -> None:
    """Every trial that Optuna knows has a record that agrees with it, and none is left running."""
    trials = {trial.number: trial for trial in study.trials()}
    states = {
        "complete": "COMPLETE", "infeasible": "PRUNED", "diverged": "FAIL", "error": "FAIL",
        "crashed": "FAIL", "timeout": "FAIL", "out_of_memory": "FAIL", "interrupted": "FAIL",
        "stopped": "PRUNED",
    }  # fmt: skip
    for frozen in storage_trials(study):
        if frozen.state.name == "WAITING":
            continue
        record = trials.pop(frozen.number)
        outcome = record.data.get("duplicate_outcome") or record.outcome
        assert frozen.state.name == states[outcome]
        assert record.params == frozen.params
        if frozen.state.name == "COMPLETE":
            names = [objective.name for objective in study.objectives]
            assert frozen.values == [record.metrics[name] for name in names]
    assert trials == {}
