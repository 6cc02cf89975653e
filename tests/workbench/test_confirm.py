"""`confirm`: other seeds through the same judge, on record once, refused where a resume is."""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
from pathlib import Path

import pytest

from tests.workbench.conftest import STUDY
from tests.workbench.studies import run
from workbench import WorkbenchError
from workbench.confirm import confirm, other_seeds
from workbench.errors import DiskError
from workbench.executors.inline import InlineExecutor
from workbench.records import Study


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("confirm") / "runs"
    run(STUDY, runs, **{"budget.trials": 3})
    return runs


@pytest.fixture
def runs(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "runs"))


def stamps(study: Study) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in study.path.glob("confirmed/*/*/trial.json")}


def change_identity(study: Path, **facts: object) -> None:
    data = json.loads((study / "study.json").read_text())
    data["identity"].update(facts)
    (study / "study.json").write_text(json.dumps(data))


def test_seeds_are_the_studys_own_and_more_of_them_begin_with_the_same():
    assert other_seeds(0, 5)[:2] == other_seeds(0, 2)
    assert len({*other_seeds(0, 50), *other_seeds(1, 50), 0, 1}) == 102
    assert all(0 <= seed < 2**32 for seed in other_seeds(7, 50))


def test_finalists_are_trained_again_and_never_twice(runs):
    before = {p: p.read_bytes() for p in (runs / "toys" / "trials").rglob("*") if p.is_file()}
    study = confirm("toys", runs, seeds=3)
    front = [trial.number for trial in study.front_trials()]
    points = study.confirmed()
    assert [point.number for point in points] == sorted(front)
    for point in points:
        assert point.seeds == tuple(sorted(other_seeds(0, 2)))
        assert len(set(point.values["toy_loss"])) == 3  # another seed, another loss
        assert point.values["toy_loss"][0] == study.trial(point.number).metrics["toy_loss"]
        assert set(point.intervals) == {"toy_loss"}  # weights are static: the same for every seed
    assert not list(study.path.rglob("checkpoint.safetensors"))
    assert all(path.read_bytes() == content for path, content in before.items())
    first = stamps(study)
    said: list[str] = []
    assert stamps(confirm("toys", runs, seeds=3, say=said.append)) == first
    assert said == []
    more = stamps(confirm("toys", runs, seeds=4))
    assert first.items() <= more.items()
    assert len(more) == 3 * len(front)


def test_a_confirmation_is_what_a_study_of_that_seed_would_find(runs, tmp_path):
    """The same figures, to the bit, as of the only layout of a study of that seed."""
    layout = Study(runs / "toys").trial(2).layout
    point = confirm("toys", runs, seeds=2, trials=[2]).confirmed()[0]
    assert point.number == 2
    space = {"d_model": 16, "num_layers": 1, "mixers": ["other"], "placements": ["alternate"]}
    changes = {"space": space, "seed": point.seeds[0], "budget": {"trials": 1}}
    other = run(STUDY, tmp_path / "other", **changes).trial(0)
    assert other.layout.hash == layout.hash
    assert other.metrics["toy_loss"] == point.values["toy_loss"][1]


def test_processes_find_what_this_process_finds(runs, tmp_path):
    inline = confirm("toys", runs, seeds=2).confirmed()
    shutil.rmtree(runs / "toys" / "confirmed")
    workers = {"executor": "process", "workers": 2}
    assert confirm("toys", runs, seeds=2, runtime=workers).confirmed() == inline


def test_a_stop_is_recorded_and_the_next_call_goes_on(runs, monkeypatch):
    settled: list[Path] = []
    real = InlineExecutor.wait

    def wait(self, heard, timeout=None):
        if len(settled) == 1:
            raise KeyboardInterrupt
        ended = real(self, heard, timeout)
        settled.extend(Path("x") for _ in ended)
        return ended

    monkeypatch.setattr(InlineExecutor, "wait", wait)
    with pytest.raises(KeyboardInterrupt):
        confirm("toys", runs, seeds=2)
    study = Study(runs / "toys")
    outcomes = [json.loads(path.read_text())["outcome"] for path in stamps(study)]
    assert sorted(outcomes) == ["complete", "interrupted"]
    done = {
        path: stamp
        for path, stamp in stamps(study).items()
        if json.loads(path.read_text())["outcome"] == "complete"
    }
    monkeypatch.undo()
    confirm("toys", runs, seeds=2)
    after = stamps(study)
    assert done.items() <= after.items()
    assert len(after) == len(study.front_trials())
    assert {json.loads(path.read_text())["outcome"] for path in after} == {"complete"}


def test_a_record_that_was_damaged_is_made_again(runs):
    study = confirm("toys", runs, seeds=2, trials=[2])
    (path,) = stamps(study)
    before = json.loads(path.read_text())["metrics"]
    path.write_text("{")
    assert study.confirmed()[0].failed == {other_seeds(0, 1)[0]: "damaged"}
    confirm("toys", runs, seeds=2, trials=[2])
    assert json.loads(path.read_text())["metrics"] == before


def test_a_crash_is_recorded_and_tried_again_as_in_a_study(runs):
    """A layer that kills its process, put in the place of a finalist's."""
    path = runs / "toys" / "trials" / "00002" / "layout.json"
    path.write_text(path.read_text().replace('"other"', '"dies"'))
    data = json.loads((runs / "toys" / "study.json").read_text())
    data["config"]["budget"]["retries"] = 1
    (runs / "toys" / "study.json").write_text(json.dumps(data))
    workers = {"executor": "process", "workers": 1}
    said: list[str] = []
    study = confirm("toys", runs, seeds=2, trials=[2, 0], runtime=workers, say=said.append)
    assert sum("crashed" in line for line in said) == 2  # once, and one retry
    two, zero = (next(p for p in study.confirmed() if p.number == n) for n in (2, 0))
    assert list(two.failed.values()) == ["crashed"]
    assert two.intervals["toy_loss"].half is None
    assert not zero.failed
    said.clear()
    confirm("toys", runs, seeds=2, trials=[2, 0], runtime=workers, say=said.append)
    assert said == []  # given up


def test_constraints_drop_no_figure(tmp_path):
    """A figure that violates a constraint with another seed still counts."""
    loose = {"constraints": {"toy_loss": {"max": 100.0}}, "budget.trials": 2}
    run(STUDY, tmp_path, **loose)
    data = json.loads((tmp_path / "toys" / "study.json").read_text())
    for table in ("config", "identity"):
        data[table]["constraints"]["toy_loss"]["max"] = 0.001
    (tmp_path / "toys" / "study.json").write_text(json.dumps(data))
    study = confirm("toys", tmp_path, seeds=2)
    assert all(not point.failed for point in study.confirmed())
    records = [json.loads(path.read_text()) for path in stamps(study)]
    assert all(record["constraints"]["toy_loss"] > 0 for record in records)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"torch": "1.0"}, "torch: '1.0' then"),
        ({"plugins": {"toys": "0"}}, "plugins.toys: '0' then"),
        ({"data_facts": {"vocab_size": 9}}, "data_facts.vocab_size: 9 then"),
    ],
)
def test_what_a_resume_refuses_is_refused(runs, facts, words):
    change_identity(runs / "toys", **facts)
    with pytest.raises(WorkbenchError, match=words):
        confirm("toys", runs)
    assert not (runs / "toys" / "confirmed").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"seeds": 1}, "seeds: must be at least 2"),
        ({"trials": [1]}, "trial toys:1 is duplicate: name 0"),
        ({"trials": [99]}, "has no trial 99"),
        ({"runtime": {"workers": 2}}, "runtime.workers: executor = 'inline'"),
    ],
)
def test_mistakes_are_refused(runs, arguments, words):
    with pytest.raises(WorkbenchError, match=words):
        confirm("toys", runs, **arguments)


def test_more_workers_keep_the_threads_of_a_study_that_did_not_say(tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    run(STUDY, tmp_path, **{"budget.trials": 1, "runtime": {"device": "cpu", "executor": "inline"}})
    seen = []

    class RefusedError(WorkbenchError):
        pass

    def opened(place, cache_dir):
        seen.append((place.config.runtime.workers, place.threads))
        raise RefusedError("far enough")

    monkeypatch.setattr("workbench.confirm.open_executor", opened)
    for workers in (1, 2):
        with pytest.raises(RefusedError):
            confirm("toys", tmp_path, runtime={"executor": "process", "workers": workers})
    assert seen == [(1, 2), (2, 2)]


def test_a_study_on_a_cluster_may_be_confirmed_here(runs):
    path = runs / "toys" / "study.json"
    data = json.loads(path.read_text())
    data["config"]["runtime"].update(executor="ray", address="far:6379")
    path.write_text(json.dumps(data))
    assert confirm("toys", runs, trials=[0], runtime={"executor": "inline"}).confirmed()


def test_a_folder_that_cannot_be_written_or_locked_is_a_message(runs, monkeypatch):
    folder = runs / "toys" / "confirmed"
    (folder / ".lock").mkdir(parents=True)
    with pytest.raises(DiskError, match="cannot write to"):
        confirm("toys", runs)
    (folder / ".lock").rmdir()

    def unable(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unable)
    with pytest.raises(DiskError, match=r"cannot lock .*: No locks available"):
        confirm("toys", runs)


def test_static_objectives_need_no_confirmation(tmp_path):
    run(STUDY, tmp_path, **{"budget.trials": 1, "objectives": ["toy_weights"]})
    with pytest.raises(WorkbenchError, match="is static, the same for every seed"):
        confirm("toys", tmp_path)
    assert not (tmp_path / "toys" / "confirmed").exists()


def test_two_processes_do_not_confirm_one_study(runs):
    folder = runs / "toys" / "confirmed"
    folder.mkdir()
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(WorkbenchError, match="another process confirms this study"):
            confirm("toys", runs)
