"""`benchmarks/search.py`: a table of real trainings, and searchers that pay for what they train."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import optuna
import pytest

from benchmarks.search import compare, histories, own, plain, race, rung_lines
from benchmarks.search_table import BUDGET, Table, Trainings, tabulate
from tests.workbench.conftest import TOYS
from workbench.builder import default_builder
from workbench.enumeration import enumerate_space
from workbench.oracle import Oracle
from workbench.space import Space
from workbench.study_config import StudyConfig

ROOT = Path(__file__).parents[2]
TOY = f"""
name = "toys"
objectives = ["toy_loss", "toy_weights"]
plugin_dirs = ["{TOYS}"]
[space]
d_model = [8, 12]
num_layers = [1, 2]
mixers = ["toy", "other"]
placements = ["alternate"]
[data]
source = "counting"
[training]
tokens = 512
batch_size = 4
seq_len = 16
lr = 0.01
[rungs]
at = [0.25, 0.5]
[budget]
trials = 4
[runtime]
device = "cpu"
executor = "inline"
threads = 1
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The table of twelve toy layouts, as it is after a round through JSON."""
    folder = tmp_path_factory.mktemp("search")
    (folder / "toys.toml").write_text(TOY)
    return json.loads(json.dumps(tabulate(folder / "toys.toml", folder / "runs")))


def test_a_table_has_every_layout_with_its_rungs(data):
    assert len(data["layouts"]) == 12
    assert data["steps"] == 8
    for row in data["layouts"]:
        assert row["outcome"] == "complete"
        assert [rung["step"] for rung in row["rungs"]] == [2, 4]
        losses = [rung["metrics"]["toy_loss"] for rung in row["rungs"]]
        assert losses[0] > losses[1] > row["metrics"]["toy_loss"]
        assert row["params"].keys() >= {"d_model", "num_layers"}


def test_a_plain_searcher_pays_for_every_training_known_or_not(data):
    table = Table(data)
    assert table.budget == BUDGET * 12 * 8
    history = plain(table, default_builder((str(TOYS),)), optuna.samplers.RandomSampler(seed=0))
    assert [spent for spent, _ in history] == [8, 16, 24]
    assert table.regret_at(history, 0.0) == 1
    assert table.regret_at(history, BUDGET) < 1
    everything = [(0, name) for name in table.rows]
    assert table.regret_at(everything, 0.0) == 0


def test_the_own_loop_trains_nothing_twice_and_stops_at_rungs(data, tmp_path):
    data = copy.deepcopy(data)
    for row in data["layouts"]:  # at the same cost, and worse: a rung can tell
        worse = float("o" in row["pattern"])
        for figures in (row["metrics"], *(rung["metrics"] for rung in row["rungs"])):
            figures["toy_loss"] += worse
    table = Table(data)
    table.budget = 12 * table.steps  # all that training every layout takes
    history = own(table, default_builder((str(TOYS),)), 0, tmp_path)
    trained = [name for _, name in history]
    assert len(set(trained)) == len(trained)
    spent = [steps for steps, _ in history]
    assert spent == sorted(spent)
    assert spent[-1] < table.budget
    assert len(trained) < 12  # the others were stopped
    assert table.regret_at(history, 1.0) < 0.5


def test_the_comparison_is_a_markdown_table(data):
    lines = list(compare(Table(data), range(5), ["random", "TPE (multivariate, group)"]))
    assert len(lines) == 4
    assert lines[2].startswith("| random | ")
    assert lines[3].count("±") == 3
    assert lines[3].count("%") == 3  # it comes to where it ends
    assert len({line.count("|") for line in lines}) == 1


def test_what_is_asked_for_is_trained_once_as_the_table_has_it(data, tmp_path):
    study = tmp_path / "toys.toml"
    study.write_text(TOY)
    trainings = Trainings(study, tmp_path / "runs", trainings=5)
    names = ["TPE (multivariate, group)", "workbench, TPE", "workbench, surrogate"]
    found = dict(histories(lambda: trainings, range(2), names, jobs=1))
    assert {len(history) for history in found[names[0]]} == {5}
    assert all(history for history in found[names[1]])
    known = {row["layout_hash"]: row for row in data["layouts"]}
    kept = [json.loads(path.read_text()) for path in trainings.folder.glob("*.json")]
    assert {name for histories in found.values() for h in histories for _, name in h} <= {
        row["layout_hash"] for row in kept
    }
    for row in kept:
        assert row["metrics"] == known[row["layout_hash"]]["metrics"]
        assert row["rungs"] == known[row["layout_hash"]]["rungs"]


def test_a_race_compares_with_tpe(tmp_path):
    study = tmp_path / "toys.toml"
    study.write_text(TOY)
    trainings = Trainings(study, tmp_path / "runs", trainings=4)
    names = ["random", "TPE (multivariate, group)", "workbench, TPE"]
    lines = list(race(trainings, lambda: trainings, range(2), names))
    assert len(lines) == 5
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[0] for row in cells] == names
    assert cells[1][3] == "1.000"
    assert cells[1][4] != "–"  # it comes to where it ends


def test_the_study_that_is_tabulated(tmp_path):
    """Its space has at least 200 layouts; nine of them, trained for a moment."""
    config = StudyConfig.read(ROOT / "studies" / "oracle_tiny.toml")
    space = Space(config.space, default_builder(), 256)
    assert 200 <= len(enumerate_space(space).layouts) <= 500
    runtime = dataclasses.replace(config.runtime, executor="inline")
    small = dataclasses.replace(
        config,
        space=dataclasses.replace(config.space, d_model=16, num_layers=1),
        training={**config.training, "tokens": 2048},
        runtime=runtime,
    )
    truth = Oracle(small, tmp_path).tabulate()
    assert [trial.outcome for trial in truth.trials()] == ["complete"] * 9
    assert all(len(trial.data["rungs"]) == 1 for trial in truth.trials())
    assert 1 < len(truth.front_trials()) < 9


def test_the_shipped_table_is_of_the_study():
    """Every layout of the space as it is now, with the study's rungs; searchers can use it."""
    config = StudyConfig.read(ROOT / "studies" / "oracle_tiny.toml")
    table = Table(json.loads((ROOT / "benchmarks/tables/oracle_tiny.json").read_text()))
    for name in ("space", "data", "training", "rungs", "objectives", "seed"):
        assert getattr(table.config, name) == getattr(config, name)
    builder = default_builder()
    space = Space(config.space, builder, table.vocab_size)
    layouts = enumerate_space(space).layouts
    assert {one.layout.hash for one in layouts} == table.rows.keys()
    history = plain(table, builder, optuna.samplers.RandomSampler(seed=0))
    assert 0 < table.regret_at(history, BUDGET) < 0.3
    page = (ROOT / "docs" / "search.md").read_text()
    said = list(rung_lines(table))
    assert len(said) == 3
    for line in said:
        assert line in page
