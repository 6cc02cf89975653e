"""`workbench audit`: how far cheap signals agree with the full training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from workbench.cli.common import Json, Runs, count, print_json, print_table, say
from workbench.errors import FieldError
from workbench.figures import figure
from workbench.records import load_study
from workbench.text_table import Column

if TYPE_CHECKING:
    from workbench.audit import Agreement, Audit, Flip

EXAMPLES = """\
  workbench audit quickstart
  workbench audit quickstart --flips 10   more of the pairs in the wrong order
  workbench audit quickstart --json"""


def audit(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="Its name.")],
    flips: Annotated[
        int, typer.Option(metavar="N", help="Pairs in the wrong order to list, of each signal.")
    ] = 3,
    resamples: Annotated[
        int, typer.Option(metavar="N", help="Of the bootstrap, for the intervals; 1,000 or more.")
    ] = 2000,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the bootstrap.")] = 0,
    runs: Runs = None,
    json: Json = False,
) -> None:
    """Compare cheap signals with full trainings.

    Kendall's rank correlation (tau-b) of static and measured metrics, of the figures at rungs and
    of other recorded metrics with each objective of training, over the trials that have both.
    """
    from workbench.audit import LEAST_RESAMPLES
    from workbench.audit import audit as audited

    if flips < 0:
        raise FieldError("--flips", f"must not be negative, got {flips}")
    if resamples < LEAST_RESAMPLES:
        raise FieldError("--resamples", f"must be at least {LEAST_RESAMPLES:,}, got {resamples}")
    if seed < 0:
        raise FieldError("--seed", f"must not be negative, got {seed}")
    found = audited(load_study(study, runs), flips=flips, resamples=resamples, seed=seed)
    if json:
        print_json(found.to_dict())
        return
    _report(found)


def _report(found: Audit) -> None:
    say(f"Study {found.study}: {count(found.trials, 'trial')} trained to the end")
    if not found.agreements:
        say("It records nothing beside its objectives that could be compared with them.")
    else:
        print()
        print_table(_agreement_columns(found.agreements))
        say(f"tau: Kendall's tau-b; 95 % bootstrap interval, {found.resamples:,} resamples.")
        say("flips: pairs that the signal, read as its tau says, puts in the wrong order.")
    listed = [(one, flip) for one in found.agreements for flip in one.flips]
    if listed:
        print()
        print_table(_flip_columns(listed))
    for warning in found.warnings:
        say(warning)


def _agreement_columns(rows: tuple[Agreement, ...]) -> list[Column]:
    intervals = [
        "–" if row.low is None or row.high is None else f"{row.low:+.2f} to {row.high:+.2f}"
        for row in rows
    ]
    return [
        Column(heading="signal", cells=[row.signal for row in rows]),
        Column(heading="stage", cells=[row.kind for row in rows], rank=3),
        Column(heading="objective", cells=[row.objective for row in rows]),
        Column(
            heading="tau",
            cells=["–" if row.tau is None else f"{row.tau:+.2f}" for row in rows],
            right=True,
        ),
        Column(heading="interval", cells=intervals, right=True),
        Column(heading="trials", cells=[f"{row.trials:,}" for row in rows], right=True, rank=2),
        Column(heading="pairs", cells=[f"{row.pairs:,}" for row in rows], right=True),
        Column(heading="flips", cells=[f"{row.flipped:,}" for row in rows], right=True, rank=1),
    ]


def _flip_columns(rows: list[tuple[Agreement, Flip]]) -> list[Column]:
    return [
        Column(heading="flips of", cells=[row.signal for row, _ in rows]),
        Column(heading="in", cells=[row.objective for row, _ in rows]),
        Column(heading="chosen", cells=[str(flip.chosen) for _, flip in rows], right=True),
        Column(heading="better", cells=[str(flip.better) for _, flip in rows], right=True),
        Column(
            heading="loss", cells=[figure(flip.loss, row.unit) for row, flip in rows], right=True
        ),
    ]
