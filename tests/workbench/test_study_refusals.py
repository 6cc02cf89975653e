"""Studies that are refused: a mistake in the file, or another study under the same name."""

from __future__ import annotations

import pytest

from tests.workbench.conftest import TOYS
from tests.workbench.studies import run
from workbench import WorkbenchError


def test_forgotten_plugin_folders_are_named(study_data, runs, tmp_path):
    folder = tmp_path / "my plugins"
    folder.mkdir()
    (folder / "toys.py").write_text((TOYS / "toys.py").read_text())
    study_data["plugin_dirs"] = [str(folder)]
    run(study_data, runs, **{"budget.trials": 1})
    before = (runs / "toys" / "study.json").read_text()
    with pytest.raises(WorkbenchError) as caught:
        run(study_data, runs, plugin_dirs=[])
    assert f"made with the plugins of {folder}: add --plugin-dir '{folder}'." in str(caught.value)
    assert (runs / "toys" / "study.json").read_text() == before
    with pytest.raises(WorkbenchError) as caught:  # a study that was never made has forgotten none
        run(study_data, runs, plugin_dirs=[], name="other")
    assert "--plugin-dir" not in str(caught.value)


def test_an_edited_plugin_file_is_another_study(study_data, runs, tmp_path):
    folder = tmp_path / "plugins"
    folder.mkdir()
    source = (TOYS / "toys.py").read_text()
    (folder / "toys.py").write_text(source)
    study_data["plugin_dirs"] = [str(folder)]
    run(study_data, runs, **{"budget.trials": 1})
    (folder / "toys.py").write_text(source.replace("torch.relu", "torch.tanh"))
    from workbench.builder import default_builder

    default_builder.cache_clear()
    with pytest.raises(WorkbenchError, match=r"plugins\.toys"):
        run(study_data, runs)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"space.d_model": [8, 12]}, "space.d_model"),
        ({"space.mixers": ["toy", "full"]}, "space.mixers"),
        ({"training.lr": 0.5}, "training.lr"),
        ({"data.vocab_size": 8}, "vocab_size"),
        ({"seed": 1}, "seed"),
        ({"objectives": ["toy_loss"]}, "objectives"),
        ({"constraints": {"toy_weights": {"max": 9}}}, "constraints"),
    ],
)
def test_a_changed_study_is_refused_and_loses_nothing(study_data, runs, change, field):
    run(study_data, runs, **{"budget.trials": 1})
    before = (runs / "toys" / "study.json").read_text()
    with pytest.raises(WorkbenchError, match="started differently") as caught:
        run(study_data, runs, **change)
    assert field in str(caught.value)
    assert (runs / "toys" / "study.json").read_text() == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"objectives": ["toy_los"]}, "metric in objectives 'toy_los'. Did you mean 'toy_loss'"),
        ({"report": ["toy_dept"]}, "metric in report 'toy_dept'. Did you mean 'toy_depth'"),
        ({"constraints": {"toy": {"max": 1}}}, "metric in constraints 'toy'"),
        ({"metrics": {"toy": {}}}, r"metric under \[metrics\] 'toy'"),
        ({"data.source": "countin"}, "data source in data.source 'countin'. Did you mean 'count"),
        ({"data.vocab": 3}, "Did you mean 'vocab_size'"),
        ({"metrics": {"toy_loss": {"k": 1}}}, "field of metrics.toy_loss 'k'"),
        ({"training.tokens": 3}, "training.tokens"),
        ({"training.lr": float("nan")}, "training.lr: nan is no finite number"),
        ({"sampler": {"class": ".x.y"}}, "cannot be imported"),
        ({"training.optimizer": "sgd"}, "training.optimizer"),
        ({"sampler": {"class": "optuna.samplers.TPE"}}, "cannot be imported"),
        ({"sampler": {"class": "json.JSONDecoder"}}, "no optuna sampler"),
        ({"sampler": {"n_startup": 3}}, "refuses its arguments"),
        ({"runtime.device": "gpu"}, "runtime.device: 'gpu' is no device"),
    ],
)
def test_mistakes_leave_no_study_behind(study_data, runs, change, words):
    with pytest.raises(WorkbenchError, match=words):
        run(study_data, runs, **change)
    assert not (runs / "toys").exists()
