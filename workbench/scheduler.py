"""The loop of a study: suggest, judge in as many workers as there are, record, tell.

Workers only judge; whatever is written about a trial is written here. With one worker everything
happens in the order of the suggestions.
"""

from __future__ import annotations

import dataclasses
import time
from functools import partial
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

from workbench import storage
from workbench.errors import WorkbenchError
from workbench.executors import Executor, Task
from workbench.files import write_json
from workbench.guard import guarded
from workbench.identity import trial_provenance, used_plugins
from workbench.layout import Layout
from workbench.ledger import UNBUILDABLE, Ledger
from workbench.records import Study, Trial
from workbench.refusals import Refusals
from workbench.reporter import Reporter
from workbench.rungs import STOP, Peers, Rungs, peer_of
from workbench.sampler import View, exact_figures, look
from workbench.space import Space
from workbench.stages import first_dear_stage
from workbench.trial import Workplace, judge_static
from workbench.verdict import PAUSED, Verdict, verdict_of

MAX_STALE = 100  # suggestions in a row without a new layout before the space counts as exhausted
HOPELESS = 40  # the same where none was ever feasible: a mistake in the file, most likely
KILLED = ("crashed", "timeout", "interrupted")  # in a stage that tells nothing of itself
STAGES_OF_PHASES = {
    "measuring": "measured",
    "practising": "synthetic",
    "training": "training",
    "quantizing": "quantized",
}
MAX_WAITING = storage.STALE  # trials that may wait for others of the same layout
LOOK_AROUND = 60.0  # seconds between looks at what other processes on the study left
POLL = 1.0  # the same while this one can only wait for them


@dataclasses.dataclass
class _Flight:
    """A trial that was suggested and is not finished.

    Attributes:
        record: as far as it is known.
        verdict: what its stages found so far.
        judging: whether it is in the executor.
        layout: None until one came about; with one and not in the executor, it waits for another
            trial of the same layout.
        stage: what the executor is at: `measured`, `synthetic`, `training`, `trained` or
            `quantized`.
        seconds: worked on it before `since`; what it waited is not in it.
        since: when the present work on it began, on `time.monotonic`; None while it waits.
    """

    trial: optuna.Trial
    record: dict[str, Any]
    verdict: Verdict = dataclasses.field(default_factory=Verdict)
    judging: bool = False
    layout: Layout | None = None
    stage: str = "training"
    seconds: float = 0.0
    since: float | None = dataclasses.field(default_factory=time.monotonic)

    @property
    def number(self) -> int:
        return self.trial.number

    def rest(self) -> None:
        """Stop the clock."""
        if self.since is not None:
            self.seconds += time.monotonic() - self.since
            self.since = None


class Scheduler:
    """One run of a study whose books are open.

    Args:
        executor: judges what the static stage lets pass.
    """

    def __init__(
        self,
        place: Workplace,
        space: Space,
        ledger: Ledger,
        rungs: Rungs,
        reporter: Reporter,
        executor: Executor,
    ) -> None:
        self.place = place
        self.config = place.config
        self.space = space
        self.ledger = ledger
        self.rungs = rungs
        self.peers = Peers(ledger.folder)
        self.reporter = reporter
        self.executor = executor
        self.plugins = used_plugins(self.config, place.builder)
        self.view = View(space, partial(exact_figures, place), [o.name for o in ledger.objectives])
        self.refusals = Refusals()
        trials = Study(ledger.folder).trials()
        self.hopeless = all(trial.outcome == "infeasible" for trial in trials)  # nothing feasible
        self.flights: dict[int, _Flight] = {}
        self.earlier = ledger.stale  # suggestions of earlier runs: this one tries afresh
        self.started = time.monotonic()

    def run(self) -> None:
        """Judge trials until the budget is reached or the space holds nothing new.

        Raises:
            KeyboardInterrupt, WorkbenchError: the run cannot go on; what was in flight is
                recorded and runs again.
        """
        try:
            while True:
                self.ledger.refresh()
                self._settle_waiting()
                self._fill()
                self._take_over()
                if self._is_over():
                    break
                patience = LOOK_AROUND if self._judging() else POLL
                for number, verdict in self.executor.wait(self._heard, patience):
                    self._ended(self.flights[number], verdict)
            self._put_back("the trial of the same layout did not end in time")
        except KeyboardInterrupt:
            self._put_back("stopped by the user")
            raise
        except WorkbenchError as error:
            self._put_back(str(error))
            raise

    def _put_back(self, reason: str) -> None:
        """Record everything in flight as interrupted: it runs again."""
        self.executor.cancel()
        for flight in list(self.flights.values()):
            known = flight.verdict
            self._record(flight, dataclasses.replace(known, outcome="interrupted", reason=reason))

    def _is_over(self) -> bool:
        """Whether nothing is left to do or to wait for."""
        if self._judging():
            return False
        if self.ledger.judged >= self.config.budget.trials or self._is_late():
            return True
        return not self._waiting() and not self.ledger.elsewhere

    def _is_late(self) -> bool:
        seconds = self.config.budget.seconds
        return seconds is not None and time.monotonic() - self.started >= seconds

    def _judging(self) -> int:
        return sum(flight.judging for flight in self.flights.values())

    def _waiting(self) -> list[_Flight]:
        """Trials that wait for another one of the same layout."""
        return [flight for flight in self.flights.values() if not flight.judging]

    def _settle_waiting(self) -> None:
        """End the waiting trials whose layout is judged by now."""
        for flight in self._waiting():
            known = self.ledger.duplicate(flight.record)
            if known is not None:
                self._finish(flight, known)

    def _fill(self) -> None:
        """Suggest until every slot is taken, as far as the budget goes."""
        while self._has_room() and self._worth_asking():
            self._one()

    def _take_over(self) -> None:
        """Judge the waiting trials whose original is gone for good: its process died, say."""
        for flight in self._waiting():
            if self._has_slot():
                self._claim(flight)

    def _has_room(self) -> bool:
        # A sampler that only repeats what is being judged will know more once that is done.
        return self._has_slot() and (len(self._waiting()) < MAX_WAITING or self._has_queued())

    def _has_slot(self) -> bool:
        """Whether the budget and the executor allow for one more trial."""
        judging = self._judging()
        begun = self.ledger.judged + judging + len(self.ledger.elsewhere)
        free = judging < self.executor.slots
        return free and begun < self.config.budget.trials and not self._is_late()

    def _has_queued(self) -> bool:
        queued = (TrialState.WAITING,)
        return bool(self.ledger.optuna.get_trials(deepcopy=False, states=queued))

    def _worth_asking(self) -> bool:
        """Whether to suggest more; False where trials in flight may still change the answer.

        Raises:
            WorkbenchError: more would hardly find anything new; says what refused the
                suggestions, and what to change.
        """
        self.earlier = min(self.earlier, self.ledger.stale)
        stale = self.ledger.stale - self.earlier
        name = self.config.name
        lines = self.refusals.lines(self.config.space)
        if self.hopeless and stale >= min(HOPELESS, MAX_STALE):
            text = f"none of {stale} suggestions is feasible. What refused them:"
            advice = (
                "Change that in the study's file and give the study another name; the same "
                f"command tries {stale} more."
            )
        elif stale >= MAX_STALE:
            text = (
                f"the last {stale} suggestions held no new feasible layout: the space is "
                "exhausted, or its constraints are too tight."
                + (" What refused suggestions:" if lines else "")
            )
            advice = "A study with more to choose from needs another name."
        else:
            return True
        if self._judging():
            return False
        recorded = f"What was found is recorded: workbench show {name} --all."
        raise WorkbenchError("\n".join([text, *lines, f"{advice} {recorded}"]))

    def _one(self) -> None:
        """One suggestion, from asking to the executor, or to its end if it need not go there."""
        sampler, seed = self.config.sampler, self.config.seed
        stale = self.ledger.stale + len(self._waiting())
        with self.ledger.parent.exclusive():  # or another process takes the budget's last trial
            self.ledger.refresh()
            if not self._has_room():
                return
            trial = storage.ask(self.ledger.optuna, sampler, seed, stale)
            record = self.ledger.start(trial, seed=seed, plugins=self.plugins)
        flight = self.flights[trial.number] = _Flight(trial, record)
        verdict = self._suggest(flight)
        if flight.layout is not None:
            verdict = self.ledger.duplicate(record) or self._static(flight)
        if verdict is not None:
            self._finish(flight, verdict)
        else:
            self._claim(flight)

    def _suggest(self, flight: _Flight) -> Verdict | None:
        """Give a flight its layout; the verdict on suggestions that make none."""
        trial, record = flight.trial, flight.record
        folder = self.ledger.path(trial.number)
        try:
            with storage.suggesting(trial.study):
                look(trial.study, self.view, self.place.guard)
                with guarded("a placement policy or layer", guard=self.place.guard):
                    layout = self.space.suggest(trial)
        except (StorageInternalError, SQLAlchemyError, KeyboardInterrupt):
            raise
        except BaseException as error:  # a policy or layer of a plugin may raise anything
            return verdict_of(error, folder)
        finally:
            record["params"] = dict(trial.params)
        record["pattern"] = self.place.builder.pattern(layout)
        record["layout_hash"] = layout.hash
        placement = trial.params.get("placement", self.config.space.placements[0])
        record["provenance"] = trial_provenance(self.config, self.place.builder, layout, placement)
        write_json(folder / "layout.json", layout.to_dict())
        flight.layout = layout
        return None

    def _static(self, flight: _Flight) -> Verdict | None:
        """Judge a new layout by what it alone tells; the verdict if it goes no further."""
        assert flight.layout is not None
        found = judge_static(self.place, flight.layout, self.ledger.path(flight.number))
        if found.outcome != "complete":
            return found
        flight.verdict = found
        return None

    def _claim(self, flight: _Flight) -> None:
        """Send a flight to the executor, unless another trial is judging the same layout.

        That one may be of this process or of another; the flight then waits for it.
        """
        if self.ledger.claims.take(flight.record["layout_hash"], flight.number) is not None:
            flight.rest()
            return
        flight.since = flight.since or time.monotonic()
        self._take_rungs(flight)
        flight.stage = "training" if flight.verdict.rungs else first_dear_stage(self.place.metrics)
        flight.record["stage"] = flight.stage
        self.ledger.write(flight.record)
        self.ledger.take_checkpoint(flight.record)  # after its rungs are on record: it is past them
        self.reporter.trial_started(flight.number, flight.record["pattern"])
        self._submit(flight)

    def _take_rungs(self, flight: _Flight) -> None:
        """What the trials that a flight repeats had passed, the flight has passed."""
        for before in self.ledger.attempts(flight.record) if self.rungs.steps else ():
            if before.get("rungs"):
                names = ("metrics", "extras", "notes", "constraints", "rungs", "details")
                flight.verdict.update(Verdict(**{name: before[name] for name in names}))
                carried = {"carried_rungs": len(before["rungs"])}
                flight.record.update(flight.verdict.to_dict(), outcome="running", **carried)
                return

    def _submit(self, flight: _Flight) -> None:
        assert flight.layout is not None
        flight.judging = True
        passed = flight.verdict.rungs
        self.executor.submit(
            Task(
                number=flight.number,
                layout=flight.layout,
                folder=self.ledger.path(flight.number),
                begun=flight.verdict.to_dict() if passed else None,
                stop=self.rungs.next_step(passed),
            )
        )

    def _heard(self, number: int, message: dict[str, Any]) -> None:
        if "phase" in message:
            self._note_stage(self.flights[number], message["phase"])
            self.reporter.trial_phase(number, message["phase"])
        else:
            steps = self.place.training.steps
            step = round(message["progress"] * steps)
            self.reporter.trial_progress(number, step, steps, message["loss"])

    def _note_stage(self, flight: _Flight, phase: str) -> None:
        if phase in STAGES_OF_PHASES:
            flight.stage = STAGES_OF_PHASES[phase]
        elif phase == "evaluating" and self.rungs.next_step(flight.verdict.rungs) is None:
            flight.stage = "quantized" if flight.stage == "quantized" else "trained"

    def _ended(self, flight: _Flight, verdict: Verdict) -> None:
        """What follows when a flight comes back from the executor."""
        flight.verdict.update(verdict)
        if verdict.outcome != PAUSED:
            self._finish(flight, flight.verdict)
            return
        decision = self._decide(flight)
        if decision == STOP:
            self._finish(flight, flight.verdict)
        else:
            self._submit(flight)

    def _decide(self, flight: _Flight) -> str:
        """Whether a flight goes on from the rung that it reached; either way it is on record."""
        verdict, record = flight.verdict, flight.record
        own = peer_of({**record, **verdict.to_dict()})
        share = self.config.rungs.at[len(verdict.rungs) - 1]
        facts = self.rungs.decide(own, self.peers.now())
        verdict.rungs[-1] = rung = {"share": share, **verdict.rungs[-1], **facts}
        if rung["decision"] == STOP:
            verdict.outcome = "stopped"
            verdict.reason = (
                f"trial {rung['dominated_by']} dominated it at step {rung['step']:,} "
                f"({share:.0%} of the training)"
            )
        else:
            flight.stage = "training"
            record.update(verdict.to_dict(), outcome="running", stage=flight.stage)
            self.ledger.write(record)
        self.reporter.trial_rung(flight.number, rung)
        return str(rung["decision"])

    def _finish(self, flight: _Flight, verdict: Verdict) -> None:
        """Put a trial's end on record; a fault of the machine ends the run."""
        done = self._record(flight, verdict)
        if done.outcome == "interrupted":
            raise WorkbenchError(f"{done.reason}. Mend that and run the study again.")

    def _record(self, flight: _Flight, verdict: Verdict) -> Trial:
        if verdict.outcome == "infeasible" and max(verdict.constraints.values(), default=0.0) <= 0:
            verdict.constraints[UNBUILDABLE] = 1.0
        flight.rest()
        flight.record.pop("stage", None)
        if flight.judging and verdict.outcome in KILLED:
            flight.record["stage"] = flight.stage
        flight.record["seconds"] = round(flight.seconds, 3)
        del self.flights[flight.number]
        done = self.ledger.finish(flight.record, verdict)
        if done.outcome == "infeasible":
            self.refusals.add(done)
        else:
            self.hopeless = False
        self.reporter.trial_finished(done)
        return done
