"""The study page's table: what training with other seeds found."""

from __future__ import annotations

import json

from tests.dashboard.conftest import Open
from workbench.records import Study


def test_a_confirmed_trial_shows_its_intervals_and_whom_it_cannot_be_ranked_with(
    zoo, open_page: Open
):
    assert "unresolved with" not in open_page("study", study="tiny").dataframe[0].value
    study = Study(zoo)
    front = study.front_trials()[:2]
    for trial in front:
        for seed in (5, 6):
            path = zoo / "confirmed" / f"{trial.number:05d}" / str(seed) / "trial.json"
            path.parent.mkdir(parents=True)
            shifted = {name: value * (1 + seed) for name, value in trial.metrics.items()}
            path.write_text(json.dumps({"outcome": "complete", "metrics": shifted}))
    table = open_page("study", study="tiny").dataframe[0].value.set_index("trial")
    points = study.confirmed()
    assert len(points) == 2
    for point in points:
        for name, found in point.intervals.items():
            shown = table.loc[point.number, f"{name}, confirmed"]
            assert shown == found.text(study.units.get(name, ""))
        assert table.loc[point.number, "unresolved with"] == point.unresolved_text != ""
    others = table.drop(index=[point.number for point in points])
    assert others["unresolved with"].isna().all()
