"""Progress on standard error: lines that repeat are counted, phases shown, silence broken."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from workbench.cli.progress import RichReporter
from workbench.records import Study, Trial

SILENCE = 0.05


@pytest.fixture
def study(tmp_path: Path) -> Study:
    objectives = [{"name": "loss", "unit": "nats", "direction": "minimize"}]
    data = {"name": "small", "objectives": objectives, "units": {"loss": "nats"}, "config": {}}
    (tmp_path / "study.json").write_text(json.dumps(data))
    return Study(tmp_path)


def trial(study: Study, number: int, outcome: str, reason: str = "", **facts: Any) -> Trial:
    path = study.path / "trials" / f"{number:05d}"
    path.mkdir(parents=True)
    record = {"outcome": outcome, "reason": reason, "metrics": {"loss": 2.0}, "seconds": 1.0}
    (path / "trial.json").write_text(json.dumps({**record, **facts}))
    return Trial("small", path)


class Told:
    """A reporter at work and what it has written so far."""

    def __init__(self, reporter: RichReporter, file: io.StringIO) -> None:
        self.reporter, self._file = reporter, file

    @property
    def lines(self) -> list[str]:
        return self._file.getvalue().splitlines()[2:]


def reporting(study: Study, silence: float = 60.0, terminal: bool = False) -> Told:
    file = io.StringIO()
    console = Console(
        file=file, width=80, force_terminal=terminal, soft_wrap=True, highlight=False, markup=False
    )
    reporter = RichReporter(console, silence)
    reporter.__enter__()
    reporter.started(study, False, 0, 9)
    return Told(reporter, file)


@pytest.fixture
def told(study: Study) -> Iterator[Told]:
    found = reporting(study)
    yield found
    found.reporter.__exit__(None, None, None)


IMPOSSIBLE = "blocks[{}] (attention).head_dim: 48 does not divide d_model = 64"


def test_refusals_for_one_reason_are_one_line(told: Told, study: Study) -> None:
    for number in range(38):
        reason = IMPOSSIBLE.format(number % 3)
        told.reporter.trial_finished(trial(study, number, "infeasible", reason))
    assert told.lines == [f"trial   0  infeasible  {IMPOSSIBLE.format(0)}"]
    told.reporter.__exit__(None, None, None)
    assert told.lines[1:] == ["           … and 37 more like it"]


def test_a_judged_trial_comes_after_the_count(told: Told, study: Study) -> None:
    finish = told.reporter.trial_finished
    finish(trial(study, 0, "infeasible", "a.b: 1 is wrong"))
    finish(trial(study, 1, "infeasible", "a.b: 2 is wrong"))
    finish(trial(study, 2, "duplicate", "the same", duplicate_of=7))
    finish(trial(study, 3, "infeasible", "a.b: 3 is wrong"))
    finish(trial(study, 4, "duplicate", "the same", duplicate_of=7))
    finish(trial(study, 5, "complete"))
    finish(trial(study, 6, "infeasible", "a.b: 1 is wrong"))
    assert [line.split()[:2] for line in told.lines] == [
        ["trial", "0"], ["trial", "2"], ["…", "and"], ["trial", "5"], ["trial", "6"],
    ]  # fmt: skip
    assert told.lines[2].strip() == "… and 2 more refused by a.b, 1 more as trial 7"


def test_what_was_trained_is_always_a_line(told: Told, study: Study) -> None:
    for number in range(3):
        facts = {"stage_seconds": {"training": 1.0}, "constraints": {"loss": 1.0}}
        told.reporter.trial_finished(trial(study, number, "infeasible", "loss = 2", **facts))
    assert len(told.lines) == 3


def test_a_long_trial_is_not_silent_in_a_file(study: Study) -> None:
    told = reporting(study, SILENCE)
    told.reporter.trial_started(3, "M-A-")
    wait_for(lambda: told.lines)
    assert re.fullmatch(r"trial   3  starting, \d+ s", told.lines[0])
    told.reporter.trial_phase(3, "measuring")
    wait_for(lambda: "measuring" in told.lines[-1])
    assert re.fullmatch(r"trial   3  measuring, \d+ s", told.lines[-1])
    told.reporter.trial_phase(3, "training")
    told.reporter.trial_progress(3, 1200, 5000, 2.3456)
    wait_for(lambda: "training" in told.lines[-1])
    assert re.fullmatch(
        r"trial   3  training, step 1,200 of 5,000, loss 2.346, \d+ s", told.lines[-1]
    )
    told.reporter.trial_finished(trial(study, 3, "complete"))
    count = len(told.lines)
    time.sleep(4 * SILENCE)
    assert len(told.lines) == count  # nothing is in flight
    told.reporter.__exit__(None, None, None)
    assert not told.reporter.pulse.running


def test_a_quick_trial_is_its_line_alone(told: Told, study: Study) -> None:
    told.reporter.trial_started(0, "M-")
    told.reporter.trial_phase(0, "training")
    told.reporter.trial_progress(0, 1, 2, 3.0)
    told.reporter.trial_finished(trial(study, 0, "complete"))
    assert len(told.lines) == 1


def test_a_terminal_shows_the_phase_and_the_step(study: Study) -> None:
    told = reporting(study, SILENCE, terminal=True)
    reporter = told.reporter
    reporter.trial_started(3, "M-A-")
    shown = []
    for phase in ("measuring", "training", "evaluating"):
        reporter.trial_phase(3, phase)
        if phase == "training":
            reporter.trial_progress(3, 12, 500, 2.5)
        page = Console(file=io.StringIO(), width=80)
        with page.capture() as capture:
            page.print(reporter.progress.get_renderable())
        shown.append(capture.get().splitlines()[-1])
    reporter.__exit__(None, None, None)
    assert "measuring  M-A-" in shown[0]
    assert "12/500" in shown[1]
    assert "training, loss 2.500  M-A-" in shown[1]
    assert "evaluating  M-A-" in shown[2]
    assert max(map(len, shown)) <= 80


def test_trials_in_flight_have_a_row_each(study: Study) -> None:
    told = reporting(study, SILENCE, terminal=True)
    reporter = told.reporter
    for number in (3, 4):
        reporter.trial_started(number, "M-A-")
    reporter.trial_phase(3, "measuring")
    reporter.trial_phase(4, "training")
    reporter.trial_progress(4, 12, 500, 2.5)
    reporter.trial_progress(4, 13, 500, 2.25)
    reporter.trial_finished(trial(study, 5, "infeasible", "a.b: 1 is wrong"))  # never started
    page = Console(file=io.StringIO(), width=80)
    with page.capture() as capture:
        page.print(reporter.progress.get_renderable())
    first, second = capture.get().splitlines()[-2:]
    assert first.startswith("trial 3")
    assert "measuring" in first
    assert second.startswith("trial 4")
    assert "13/500" in second
    assert "training, loss 2.250" in second
    reporter.trial_finished(trial(study, 3, "stopped", "trial 1 dominated it at step 40"))
    with page.capture() as capture:
        page.print(reporter.progress.get_renderable())
    assert "trial 3" not in capture.get()
    reporter.__exit__(None, None, None)


def test_every_trial_in_flight_is_told_of_in_a_file(study: Study) -> None:
    told = reporting(study, SILENCE)
    told.reporter.trial_started(3, "M-A-")
    told.reporter.trial_started(4, "M-A-")
    told.reporter.trial_phase(4, "training")
    wait_for(lambda: len(told.lines) > 1)
    assert [re.sub(r"\d+ s", "s", line) for line in told.lines[:2]] == [
        "trial   3  starting, s", "trial   4  training, s",
    ]  # fmt: skip
    told.reporter.__exit__(None, None, None)


def wait_for(condition: Any, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(SILENCE / 5)
