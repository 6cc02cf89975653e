"""Every page as a user sees it, over records written by hand."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest

from tests.dashboard.conftest import PAGES, Open
from tests.dashboard.records import FIGURES, write_curve, write_study, write_trial
from workbench.figures import figure
from workbench.records import OUTCOMES


def texts(elements) -> str:
    return "\n".join(str(element.value) for element in elements)


def badges(app) -> list[str]:
    return [element.value for element in app.markdown if "-badge[" in element.value]


@pytest.mark.parametrize("page", ["studies", "study", "trial"])
def test_without_studies_every_page_says_what_to_run(runs, open_page: Open, page):
    app = open_page(page)
    assert str(runs) in texts(app.info)
    assert "workbench run studies/quickstart.toml" in texts(app.code)


def test_a_missing_runs_folder_is_an_empty_one(runs, open_page: Open, monkeypatch):
    monkeypatch.setenv("WORKBENCH_RUNS", str(runs / "nowhere"))
    assert "nowhere" in texts(open_page().info)


def test_studies_lists_counts_and_objectives(zoo, runs, open_page: Open):
    write_study(runs, "empty")
    table = open_page().dataframe[0].value.set_index("study")
    assert table.loc["tiny", "objectives"] == "loss, speed, size"
    assert table.loc["tiny", "on the front"] == 3
    assert table.loc["tiny", "complete"] == 4
    assert "1 out of memory" in table.loc["tiny", "other outcomes"]
    assert table.loc["empty", "complete"] == 0


def test_a_button_opens_a_study(zoo, runs, open_page: Open):
    write_study(runs, "other")
    app = open_page()
    app.button(key="open-tiny").click().run()
    assert app.title[0].value == "tiny"
    assert app.query_params["study"] == "tiny"


def test_a_study_shows_what_came_to_each_stage(zoo, open_page: Open):
    app = open_page("study", study="tiny")
    funnel = app.table[0].value
    assert list(funnel.index)[:1] + list(funnel.index)[-2:] == ["static", "trained", "quantized"]
    assert funnel.loc["static", "entered"] == 13
    assert "1 stopped" in funnel.loc["rung 0.5", "left"]


def test_a_stopped_trial_shows_its_rungs(zoo, open_page: Open):
    app = open_page("trial", study="tiny", trial="12")
    (rungs,) = [frame.value for frame in app.dataframe if "decision" in frame.value]
    assert rungs.to_dict("records") == [{"step": 10, "loss": 4.5, "decision": "stop"}]


def test_the_command_lines_study_opens_first_and_only_then(zoo, runs, open_page: Open, monkeypatch):
    write_study(runs, "other")
    monkeypatch.setenv("WORKBENCH_STUDY", "tiny")
    app = open_page()
    assert app.title[0].value == "tiny"
    app.switch_page(f"{PAGES}/studies.py").run()
    assert app.title[0].value == "Studies"


def test_a_study_shows_every_trial_with_its_outcome(zoo, open_page: Open):
    app = open_page("study", study="tiny")
    table = app.dataframe[0].value.set_index("trial")
    assert set(table["outcome"]) == {name.replace("_", " ") for name in OUTCOMES} - {
        "running",
        "damaged",
    }
    assert list(table.index[table["front"] == "◆"]) == [0, 1, 2]
    assert table.loc[1, "size [MiB]"] == 2.0
    assert table.loc[4, "reason"].startswith("periodic.offset")
    assert table.loc[0, "layout"].startswith("data:image/svg+xml;base64,")
    shown = "\n".join(badges(app))
    assert all(name.replace("_", " ") in shown for name in set(table["outcome"]))


def test_the_filter_keeps_the_outcomes_asked_for(zoo, open_page: Open):
    app = open_page("study", study="tiny")
    app.pills[0].set_value(["infeasible", "crashed"]).run()
    table = app.dataframe[0].value
    assert list(table["trial"]) == [4, 10]
    assert "size [MiB]" not in table, "a column that no trial has"
    app.pills[0].set_value(["Pareto front"]).run()
    assert list(app.dataframe[0].value["trial"]) == [0, 1, 2]


def figure_of(app) -> dict:
    return json.loads(app.get("plotly_chart")[0].proto.spec)


def test_the_front_shows_complete_trials_only_on_the_axes_picked(zoo, open_page: Open):
    app = open_page("study", study="tiny")
    traces = {trace["name"]: trace for trace in figure_of(app)["data"]}
    points = traces["Pareto front"]["customdata"] + traces["dominated"]["customdata"]
    assert sorted(number for number, _ in points) == [0, 1, 2, 3]
    app.selectbox(key="Horizontal axis").set_value("parameters").run()
    assert not app.exception
    assert figure_of(app)["layout"]["xaxis"]["title"]["text"] == "parameters [parameters]"


@pytest.mark.parametrize("how", ["point", "row", "cell", "best"])
def test_ways_from_a_study_to_a_trial(zoo, open_page: Open, how):
    app = open_page("study", study="tiny")
    if how == "point":
        selection = {"points": [{"customdata": [2, "A-A-"]}]}
        app.session_state["front-speed-loss-size"] = {"selection": selection}
    elif how == "best":
        app.button(key="best-size").click()
    else:
        chosen = (
            {"rows": [2], "cells": []} if how == "row" else {"rows": [], "cells": [(2, "loss")]}
        )
        app.session_state["trials-"] = {"selection": {**chosen, "columns": []}}
    app.run()
    assert not app.exception
    assert app.title[0].value == "tiny : 2"
    assert app.query_params["trial"] == "2"


def test_a_study_without_a_complete_trial_says_so(runs, open_page: Open):
    study = write_study(runs)
    assert "No trial has begun" in texts(open_page("study", study="tiny").info)
    write_trial(study, 0, "running", pattern="M-")
    app = open_page("study", study="tiny")
    assert "No trial is complete yet" in texts(app.info)
    assert list(app.dataframe[0].value["outcome"]) == ["running"]


def test_a_running_study_shows_new_trials_at_the_next_run(runs, open_page: Open):
    study = write_study(runs)
    write_trial(study, 0, "running", pattern="M-")
    app = open_page("study", study="tiny")
    (study / "trials" / "00000" / "trial.json").unlink()
    (study / "trials" / "00000").rename(runs / "moved")
    write_trial(study, 0, metrics=FIGURES[0])
    app.run()
    assert list(app.dataframe[0].value["outcome"]) == ["complete"]
    assert "1 complete" in "\n".join(badges(app))


def test_one_objective_is_drawn_over_the_trials(runs, open_page: Open):
    objective = {"name": "loss", "unit": "bits/byte", "direction": "minimize"}
    study = write_study(runs, objectives=[objective], units={"loss": "bits/byte"})
    for number in range(3):
        write_trial(study, number, metrics={"loss": 3.0 - number})
    figure = figure_of(open_page("study", study="tiny"))
    assert figure["layout"]["xaxis"]["title"]["text"] == "trial"


def test_a_trial_shows_figures_curve_blocks_and_machine(zoo, open_page: Open):
    app = open_page("trial", study="tiny", trial="0")
    cards = {metric.label.removeprefix("◆ "): metric for metric in app.metric}
    assert cards["size"].value == figure(3 * 2**20, "bytes")
    assert cards["loss"].value == "2 bits/byte"
    assert "spread: 0.125" in cards["speed"].help
    captions = texts(app.caption)
    assert "Exact, from the layout" in captions
    assert "Measured on Test Processor (cpu, CPU threads: 1), torch 2.13.0" in captions
    assert figure_of(app)["layout"]["yaxis"]["title"]["text"] == "training loss [nats/token]"
    blocks = app.table[0].value
    assert list(blocks.index) == ["0", "1, 3", "2"]
    stored = [text.replace("\N{NO-BREAK SPACE}", " ") for text in blocks["stored"]]
    assert stored == ["int8 group_size=128", "as trained", "int8 group_size=128"]
    facts = {tuple(row) for frame in app.dataframe for row in frame.value.to_numpy()}
    assert {("d_model", "16"), ("device_name", "Test Processor"), ("training", "1.25")} <= facts


def test_a_trial_offers_its_layout_and_its_commands(zoo, runs, open_page: Open):
    app = open_page("trial", study="tiny", trial="0")
    assert app.get("download_button")[0].label == "Layout as JSON"
    lines = texts(app.code).splitlines()
    assert f"export WORKBENCH_RUNS={runs}" in lines
    assert "workbench export tiny:0 exported/tiny-0" in lines


def test_every_outcome_has_a_page_that_says_why(zoo, open_page: Open):
    app = open_page("trial", study="tiny", trial="0")
    assert [button.label for button in app.button] == ["Export and prove"]
    for number in range(4, 12):
        app.query_params["trial"] = str(number)
        app.run()
        assert not app.exception
        record = json.loads((zoo / "trials" / f"{number:05d}" / "trial.json").read_text())
        assert record["outcome"].replace("_", " ") in badges(app)[0]
        assert record["reason"] in texts(app.markdown)
        assert "left no weights" in texts(app.info)
        assert "Export and prove" not in [button.label for button in app.button]
        assert "workbench export" not in texts(app.code)


def test_a_trial_without_a_layout_says_why(zoo, open_page: Open):
    app = open_page("trial", study="tiny", trial="4")
    assert "has no layout: periodic.offset: 3 is beyond 2 layers" in texts(app.info)
    assert "was not trained" in texts(app.info)
    assert not app.get("download_button")


def test_a_duplicate_leads_to_its_original(zoo, open_page: Open):
    app = open_page("trial", study="tiny", trial="5")
    next(button for button in app.button if button.label == "Open trial 1").click().run()
    assert app.title[0].value == "tiny : 1"


def test_a_failed_trial_shows_its_log(zoo, open_page: Open):
    assert "ValueError: planted fault" in texts(open_page("trial", study="tiny", trial="7").code)


def test_pickers_lead_to_another_trial_and_study(zoo, runs, open_page: Open):
    write_study(runs, "other")
    app = open_page("trial", study="tiny", trial="0")
    app.selectbox(key="pick-trial-tiny:0").set_value(3).run()
    assert app.title[0].value == "tiny : 3"
    app.switch_page(f"{PAGES}/study.py").run()
    assert app.title[0].value == "tiny", "the study of the trial just seen"
    app.selectbox(key="pick-study-tiny").set_value("other").run()
    assert app.title[0].value == "other"


@pytest.mark.parametrize(
    ("page", "query", "words"),
    [
        ("study", {"study": "tinny"}, "no study 'tinny'"),
        ("study", {"study": "../runs/tiny"}, "no study '../runs/tiny'"),
        ("trial", {"study": "tinny", "trial": "0"}, "There is: other, tiny"),
        ("trial", {"study": "tiny", "trial": "99"}, "no trial 99: known are 0 to 12"),
        ("trial", {"study": "tiny", "trial": "-1"}, "'-1' is no trial"),
        ("trial", {"study": "tiny", "trial": "seven"}, "'seven' is no trial"),
    ],
)
def test_a_bad_link_is_a_message_with_a_way_on(zoo, runs, open_page: Open, page, query, words):
    write_study(runs, "other")
    app = open_page(page, **query)
    assert words in texts(app.error)
    app.button(key="choose-tiny" if query["study"] != "tiny" else "choose-0").click().run()
    assert not app.exception
    assert app.title[0].value in ("tiny", "tiny : 0")


def test_nothing_chosen_offers_what_there_is(zoo, runs, open_page: Open):
    write_study(runs, "other")
    app = open_page("study")
    assert {button.label for button in app.button} == {"other", "tiny"}
    app.button(key="choose-tiny").click().run()
    app.switch_page(f"{PAGES}/trial.py").run()
    assert {"Trial 0", "Trial 1", "Trial 2"} < {button.label for button in app.button}


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"outcome": "compl',
        "[]",
        "{}",
        '{"outcome": "splendid"}',
        '{"outcome": "complete", "metrics": 3}',
        '{"outcome": "complete", "metrics": {}}',
        b"\xff\xfe",
    ],
)
def test_a_damaged_trial_is_named_and_hides_no_other(zoo, open_page: Open, content):
    file = zoo / "trials" / "00001" / "trial.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    app = open_page("study", study="tiny")
    table = app.dataframe[0].value.set_index("trial")
    assert list(table["outcome"])[:4] == ["complete", "damaged", "complete", "complete"]
    assert str(file) in table.loc[1, "reason"]
    assert table.loc[1, ["loss [bits/byte]", "size [MiB]"]].isna().all()
    app.session_state["trial"] = ("tiny", 1)
    app.switch_page(f"{PAGES}/trial.py").run()
    assert not app.exception
    assert "damaged" in badges(app)[0]
    assert str(file) in texts(app.markdown)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"name": "bad"}',
        '{"name": "bad", "objectives": [], "units": {}}',
        '{"name": "bad", "objectives": [{"x": 1}], "units": {}}',
    ],
)
def test_a_damaged_study_is_named_and_hides_no_other(zoo, runs, open_page: Open, content):
    file = write_study(runs, "bad") / "study.json"
    file.write_text(content)
    app = open_page()
    assert str(file) in texts(app.warning)
    assert list(app.dataframe[0].value["study"]) == ["tiny"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("layout.json", '{"d_model": '), ("curve.jsonl", '{"step": 1\n{"step": 2}\n')],
)
def test_a_damaged_file_of_a_trial_is_a_message(zoo, open_page: Open, name, content):
    file = zoo / "trials" / "00000" / name
    file.write_text(content)
    app = open_page("trial", study="tiny", trial="0")
    assert str(file) in texts(app.info) + texts(app.error)


def test_a_running_trial_shows_the_curve_so_far(zoo, open_page: Open):
    write_curve(write_trial(zoo, 13, "running"), steps=5)
    app = open_page("trial", study="tiny", trial="13")
    tokens = figure_of(app)["data"][0]["x"]
    shown = np.frombuffer(base64.b64decode(tokens["bdata"]), tokens["dtype"])
    assert list(shown) == [512, 1024, 1536, 2048, 2560]


def test_a_study_of_an_older_version_has_no_stages(zoo: Path, open_page: Open):
    data = json.loads((zoo / "study.json").read_text())
    del data["stages"]
    (zoo / "study.json").write_text(json.dumps(data))
    app = open_page("trial", study="tiny", trial="0")
    assert "Recorded" in texts(app.caption)
    assert len(app.metric) == 4
