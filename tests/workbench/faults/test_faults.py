"""A real study under more than a hundred faults: nothing is lost, and nothing is done twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.workbench.faults.accounts import account, best_again
from tests.workbench.faults.disk import LimitedFiles, small_disk
from tests.workbench.faults.driver import Campaign, run_campaign
from tests.workbench.faults.schedule import OUTCOMES, PLACES, RUNG_POINTS, draw
from tests.workbench.postgres import running

# What it costs to start a process again decides how often each kind can be had in a test.
COUNTS = {
    "worker killed": 8, "worker exits": 4, "sys.exit": 3, "hang": 3, "out of memory": 7,
    "NaN": 18, "plugin raises": 10, "worker's clock jumps": 14, "parent killed": 6,
    "disk full": 2, "storage away": 14, "parent's clock jumps": 8, "idle worker killed": 4,
    "checkpoint damaged": 3, "checkpoint gone": 3,
}  # fmt: skip
COUNTS_POSTGRESQL = {"storage away": 4, "worker killed": 1, "parent killed": 1, "NaN": 2}


def check(campaign: Campaign) -> None:
    accounts = account(campaign)
    assert accounts.wrong == [], campaign.log
    assert campaign.orphans == []
    on_record, again = best_again(campaign)
    assert again == pytest.approx(on_record, rel=1e-6)


def test_a_schedule_is_drawn_from_its_seed_and_holds_every_kind():
    assert draw(3, COUNTS) == draw(3, COUNTS)
    assert draw(3, COUNTS) != draw(4, COUNTS)
    faults = draw(0, COUNTS)
    assert len(faults) >= 100
    kinds = {fault.kind for fault in faults}
    assert kinds == set(PLACES) == OUTCOMES.keys() | {"parent's clock jumps"}
    assert all(fault.place in PLACES[fault.kind] for fault in faults)
    places = {(fault.kind, fault.place) for fault in faults}
    assert ("worker killed", "rung") in places
    assert places & {("parent killed", point) for point in RUNG_POINTS}


@pytest.mark.slow
def test_a_study_survives_its_faults(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        check(run_campaign(tmp_path, draw(0, COUNTS), disk))


@pytest.mark.slow
@pytest.mark.xdist_group("postgresql")
def test_a_study_on_postgresql_survives_its_faults(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    with running() as server:
        disk = LimitedFiles(tmp_path / "disk")
        faults = draw(1, COUNTS_POSTGRESQL)
        check(run_campaign(tmp_path, faults, disk, url=server.url(), server=server))
