"""Two `workbench run` on one study: every trial accounted for, none done twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.storages import RDBStorage
from sqlalchemy.engine import make_url

from tests.cli.conftest import TOY_STUDY, TOYS
from tests.workbench.postgres import PASSWORD, running
from workbench.records import Study, load_study

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("postgresql")]

COMMAND = str(Path(sys.executable).with_name("workbench"))
CHANGES = {
    "d_model = [8, 12, 16]": "d_model = {low = 4, high = 48, step = 4}",
    'mixers = ["toy", "other"]': 'mixers = ["slow"]',
    "tokens = 512": "tokens = 1280\ncheckpoint_seconds = 0.001",
}
TALKS = """
import os
from workbench import Metric, hookimpl

class Told(Metric):
    unit, direction, stage = "", "minimize", "trained"
    def measure(self, subject):
        print("environment", sorted(os.environ.items()))
        return 0.0

@hookimpl
def register_metrics(register):
    register("told", Told)
"""
SECRETS = (PASSWORD, "S3cr", "S3cr%25t", "%7Bx%7D")


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> Iterator[str | None]:
    if request.param == "sqlite":
        yield None
        return
    with running() as server:
        yield server.url()


def start(folder: Path, url: str | None, **changes: str) -> subprocess.Popen[str]:
    text = TOY_STUDY
    for old, new in {**CHANGES, **changes}.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "toys.toml").write_text(text)
    environment = {**os.environ, **({} if url is None else {"WORKBENCH_STORAGE": url})}
    return subprocess.Popen(
        [COMMAND, "run", "toys.toml"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> str:
    try:
        out, _ = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"still running: {process.communicate()[0]}") from None
    assert process.returncode == 0, out
    return out


def assert_accounted_for(study: Study, url: str | None, trials: int) -> None:
    storage = RDBStorage((url or f"sqlite:///{study.path / 'optuna.db'}").replace("{", "{{"))
    told = optuna.load_study(study_name="toys", storage=storage).get_trials()
    storage.remove_session()
    storage.engine.dispose()
    records = study.trials()
    states = {"complete": "COMPLETE", "interrupted": "FAIL"}
    assert [t.number for t in told if t.state.name != "WAITING"] == [r.number for r in records]
    for trial, record in zip(told, records, strict=False):
        outcome = record.data.get("duplicate_outcome") or record.outcome
        assert trial.state.name == states[outcome]
        assert trial.params == record.params
        assert trial.user_attrs["parent"] == record.data["parent"]
    trained = [r.data["layout_hash"] for r in records if r.outcome == "complete"]
    assert len(trained) == len(set(trained)) == trials
    suggested = [t.user_attrs["suggestion"] for t in told if "retry_of" not in t.user_attrs]
    assert suggested == list(range(len(suggested)))
    assert not list((study.path / "parents").glob("[!.]*"))
    assert all(r.weights.exists() for r in records if r.outcome == "complete")


def assert_secret(folder: Path, *outputs: str) -> None:
    contents = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    for text in (*contents, *(output.encode() for output in outputs)):
        for secret in SECRETS:
            assert secret.encode() not in text


def test_two_processes_finish_one_study(tmp_path, url):
    both = [start(tmp_path, url, **{"trials = 4": "trials = 6"}) for _ in range(2)]
    outputs = [finished(process) for process in both]
    study = load_study("toys", tmp_path / "runs")
    assert_accounted_for(study, url, 6)
    assert len({r.data["parent"] for r in study.trials()}) == 2
    assert any("Another process runs this study" in output for output in outputs)
    if url is not None:
        assert study.data["storage"] == make_url(url).render_as_string(hide_password=True)
        assert_secret(tmp_path, *outputs)


def test_the_survivor_takes_over_what_the_killed_one_had_in_flight(tmp_path, url):
    changes = {"trials = 4": "trials = 3", 'executor = "inline"': 'executor = "process"'}
    (tmp_path / "talks").mkdir()  # a plugin that tells all it knows, into each trial's log
    (tmp_path / "talks" / "talks.py").write_text(TALKS)
    changes[f'plugin_dirs = ["{TOYS}"]'] = f'plugin_dirs = ["{TOYS}", "talks"]'
    changes['report = ["toy_depth"]'] = 'report = ["told"]'
    first = start(tmp_path, url, **changes)
    runs = tmp_path / "runs"
    deadline = time.monotonic() + 60
    while not list(runs.glob("toys/trials/*/checkpoint.safetensors")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    second = start(tmp_path, url, **changes)
    while len(list((runs / "toys" / "parents").glob("[!.]*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first.kill()
    first.communicate()
    output = finished(second)
    study = load_study("toys", runs)
    assert_accounted_for(study, url, 3)
    complete = [trial for trial in study.trials() if trial.outcome == "complete"]
    assert any("environment" in (trial.path / "log.txt").read_text() for trial in complete)
    if url is not None:
        assert_secret(tmp_path, output)


def ended(trials: Path) -> int:
    """How many trials have a final record, which is written before the storage is told."""
    outcomes = [json.loads(path.read_text())["outcome"] for path in trials.glob("*/trial.json")]
    return outcomes.count("complete")


def test_a_study_outlives_an_outage_of_its_server(tmp_path):
    with running() as server:
        process = start(tmp_path, server.url())
        trials = tmp_path / "runs" / "toys" / "trials"
        deadline = time.monotonic() + 60
        while not list(trials.glob("*/curve.jsonl")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        server.stop()
        before, deadline = ended(trials), time.monotonic() + 30
        while ended(trials) == before and time.monotonic() < deadline:  # then it is missed
            time.sleep(0.1)
        time.sleep(5.0)
        server.start()
        output = finished(process)
        assert "Storage unreachable since" in output
        assert "Storage back after" in output
        study = load_study("toys", tmp_path / "runs")
        assert_accounted_for(study, server.url(), 4)
        assert "interrupted" not in [trial.outcome for trial in study.trials()]
    assert_secret(tmp_path, output)


def test_a_wrong_password_is_a_message_and_leaves_nothing(tmp_path):
    with running() as server:
        process = start(tmp_path, server.url(PASSWORD + "x"))
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert 'password authentication failed for user "me"' in out
    assert "nothing was changed" in out
    assert_secret(tmp_path, out)
    assert not (tmp_path / "runs" / "toys").exists()
