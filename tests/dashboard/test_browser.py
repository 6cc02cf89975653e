"""The dashboard in a real browser: what AppTest cannot click, and what a user sees."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from tests.dashboard.conftest import ROOT
from tests.dashboard.records import FIGURES, write_curve, write_study, write_trial, write_zoo

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

pytestmark = [
    pytest.mark.xdist_group("dashboard-browser"),
    pytest.mark.skipif(not shutil.which("chromium"), reason="there is no chromium here"),
]
SCRIPT = ROOT / "docs" / "make_screenshots.py"


@pytest.fixture(scope="module")
def screenshots() -> ModuleType:
    """The script that takes the README's pictures: it knows how to serve and to browse."""
    spec = importlib.util.spec_from_file_location("make_screenshots", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with a finished study and a running one."""
    folder = tmp_path_factory.mktemp("runs")
    write_zoo(folder)
    running = write_study(folder, "live")
    write_trial(running, 0, metrics=FIGURES[0])
    write_curve(write_trial(running, 1, "running"), steps=4)
    return folder


@pytest.fixture(scope="module")
def address(screenshots, runs) -> Iterator[str]:
    """A dashboard that nobody has opened yet."""
    with screenshots.serving(runs) as address:
        yield address


@pytest.fixture(scope="module")
def page(screenshots) -> Iterator[playwright.Page]:
    with screenshots.browser_page(scale=1) as page:
        yield page


def open_link(screenshots, page, link: str) -> None:
    page.goto(link)
    screenshots.wait_until_drawn(page)
    assert_no_exception(page)


def assert_no_exception(page) -> None:
    assert page.locator("[data-testid=stException]").count() == 0


def colours_in(png: bytes) -> int:
    with Image.open(io.BytesIO(png)) as image:
        return len(np.unique(np.asarray(image.convert("RGB"))[::5, ::5].reshape(-1, 3), axis=0))


def test_a_link_to_a_study_works_as_the_first_thing_that_is_opened(screenshots, page, address):
    open_link(screenshots, page, f"{address}/study?study=tiny")
    assert page.locator("h1").inner_text() == "tiny"
    assert page.get_by_role("link", name="Studies").is_visible()
    assert page.locator(".js-plotly-plot .scatterlayer .point").count() == 4
    assert page.evaluate("document.documentElement.scrollWidth") <= 1400


def test_a_page_is_no_wider_than_its_window_and_not_blank(screenshots, page, address):
    for link in ("", "/trial?study=tiny&trial=0"):
        open_link(screenshots, page, address + link)
        assert page.evaluate("document.documentElement.scrollWidth") <= 1400
        assert colours_in(page.screenshot()) > 200


def test_a_click_on_a_front_point_opens_its_trial(screenshots, page, address):
    open_link(screenshots, page, f"{address}/study?study=tiny")
    # The traces: the staircase, the dominated point, the front by number.
    box = page.locator(".js-plotly-plot .scatterlayer .point").nth(3).bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    playwright.expect(page.locator("h1")).to_have_text("tiny : 2", timeout=30_000)
    playwright.expect(page).to_have_url(re.compile("study=tiny&trial=2"))
    page.wait_for_selector(".js-plotly-plot .js-line")
    assert_no_exception(page)


def test_a_click_on_a_row_opens_its_trial_and_back_works(screenshots, page, address):
    open_link(screenshots, page, f"{address}/study?study=tiny")
    table = page.locator("[data-testid=stDataFrame]").first
    table.scroll_into_view_if_needed()
    box = table.bounding_box()
    page.mouse.click(box["x"] + 300, box["y"] + 35 * 4 + 17)  # the fourth row under the header
    playwright.expect(page.locator("h1")).to_have_text("tiny : 3", timeout=30_000)
    page.get_by_role("link", name="Study", exact=True).click()
    playwright.expect(page.locator("h1")).to_have_text("tiny", timeout=30_000)
    screenshots.wait_until_drawn(page)
    assert_no_exception(page)


def test_a_running_study_refreshes_itself(screenshots, page, address, runs):
    open_link(screenshots, page, f"{address}/study?study=live")
    playwright.expect(page.get_by_text("1 running").first).to_be_visible()
    folder = runs / "live" / "trials" / "00001"
    record = json.loads((folder / "trial.json").read_text())
    done = {**record, "outcome": "complete", "metrics": FIGURES[1]}
    (folder / "trial.json").write_text(json.dumps(done))
    playwright.expect(page.get_by_text("2 complete").first).to_be_visible(timeout=30_000)
    playwright.expect(page.get_by_text("1 running")).to_have_count(0, timeout=30_000)
    points = page.locator(".js-plotly-plot .scatterlayer .point")
    playwright.expect(points).to_have_count(2, timeout=30_000)
    assert_no_exception(page)


def test_the_readmes_pictures_show_something(screenshots, page, address, tmp_path):
    screenshots.take_pictures(page, f"{address}/study?study=tiny", tmp_path)
    for name in ("dashboard.png", "pareto.png"):
        assert colours_in((tmp_path / name).read_bytes()) > 50
