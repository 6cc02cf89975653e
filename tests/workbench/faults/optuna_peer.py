"""The same trials under plain Optuna: `python -m …faults.optuna_peer STUDY.json URL`.

What Optuna offers against faults is all on: heartbeats, their callback that queues a stale trial
again, and `catch`. Several of these processes share one study. Nothing else of the workbench but
what trains and evaluates a model is used.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import optuna
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.study import MaxTrialsCallback
from optuna.trial import TrialState

from workbench.builder import default_builder
from workbench.space import Space
from workbench.study_config import StudyConfig
from workbench.training import save_weights, train
from workbench.trial import Workplace

HEARTBEAT, GRACE = 1, 3  # seconds


def storage_at(url: str, retries: int) -> RDBStorage:
    """Optuna's storage with its answer to processes that die."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return RDBStorage(
            url,
            heartbeat_interval=HEARTBEAT,
            grace_period=GRACE,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=retries),
        )


class Objective:
    """Suggest a layout, train it, evaluate it: the stages of a trial in their order."""

    def __init__(self, config: StudyConfig, folder: Path) -> None:
        builder = default_builder(config.plugin_dirs)
        self.place = Workplace(config, builder, "cpu", folder / ".cache")
        self.space = Space(config.space, builder, self.place.data.vocab_size)
        self.folder = folder

    def __call__(self, trial: optuna.Trial) -> tuple[float, float]:
        folder = self.folder / "trials" / f"{trial.number:05d}"
        folder.mkdir(parents=True)
        with (folder / "log.txt").open("a") as log:
            os.dup2(log.fileno(), 1)
        layout = self.space.suggest(trial)
        trial.set_user_attr("layout", layout.hash)
        place, metrics = self.place, self.place.metrics
        model = place.builder.build(layout, device="cpu", seed=0)
        metrics["measured"].measure(place.subject(layout, model))
        train(model, place.data, place.training, checkpoint=folder / "checkpoint.safetensors")
        save_weights(model, folder / "model.safetensors")
        trained = place.subject(layout, model.eval())
        metrics["trained"].measure(trained)
        return metrics["loss"].measure(trained), metrics["weights"].measure(trained)


def main() -> None:
    config = StudyConfig.from_dict(json.loads(Path(sys.argv[1]).read_text()))
    storage = storage_at(sys.argv[2], config.budget.retries)
    directions = ["minimize", "minimize"]
    study = optuna.create_study(
        study_name=config.name, storage=storage, directions=directions, load_if_exists=True
    )
    enough = MaxTrialsCallback(config.budget.trials, states=(TrialState.COMPLETE,))
    objective = Objective(config, Path(sys.argv[1]).parent)
    study.optimize(objective, catch=(Exception,), callbacks=[enough])


if __name__ == "__main__":
    main()
