"""Takes the README's pictures from a runs folder: docs/images/dashboard.png and pareto.png.

    python docs/make_screenshots.py runs quickstart

Needs playwright (`pip install playwright`) and a Chromium (`apt-get install chromium`).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from playwright.sync_api import Page, sync_playwright

IMAGES = Path(__file__).parent / "images"
SIZE = {"width": 1400, "height": 900}
FLAGS = [
    "--no-sandbox",  # Chromium refuses to run as root, as containers do, with one
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# Streamlit's own buttons for developers are no part of the pictures.
SETTINGS = {"STREAMLIT_CLIENT_TOOLBAR_MODE": "viewer", "STREAMLIT_SERVER_FILE_WATCHER_TYPE": "none"}
READY_SECONDS = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="folder of all studies")
    parser.add_argument("study", help="the study to show")
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder for the pictures")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with serving(arguments.runs, arguments.study) as address, browser_page() as page:
        take_pictures(page, f"{address}/study?study={arguments.study}", arguments.out)


def take_pictures(page: Page, link: str, out: Path) -> None:
    """Write both pictures of a study's page to the folder `out`."""
    page.goto(link)
    wait_until_drawn(page)
    page.screenshot(path=out / "dashboard.png")
    page.locator(".js-plotly-plot").first.screenshot(path=out / "pareto.png")


@contextlib.contextmanager
def serving(runs: Path, study: str | None = None) -> Iterator[str]:
    """The address of a dashboard over a runs folder, served until the block ends."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", "from workbench.cli import main; main()", "dashboard"]
    command += [*([study] if study else []), "--headless", f"--port={port}", f"--runs={runs}"]
    # The command line starts Streamlit as its child: they are stopped as one group.
    server = subprocess.Popen(
        command, env={**os.environ, **SETTINGS}, start_new_session=True, stdout=subprocess.DEVNULL
    )
    address = f"http://localhost:{port}"
    try:
        _wait_for_server(address, server)
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):  # it never started
            os.killpg(server.pid, signal.SIGTERM)
        server.wait()


@contextlib.contextmanager
def browser_page(scale: float = 2) -> Iterator[Page]:
    """A page of a headless Chromium: the system's, else the one that playwright installed.

    Args:
        scale: pixels of a picture for each pixel of the page.
    """
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        yield browser.new_page(viewport=SIZE, device_scale_factor=scale)
        browser.close()


def wait_until_drawn(page: Page) -> None:
    """Wait until the app has run, every element is there, and the charts have their points."""
    page.wait_for_selector("h1", timeout=1000 * READY_SECONDS)
    page.wait_for_function(
        "!document.querySelector('[data-testid=stSkeleton], [data-testid=stStatusWidget]')"
    )
    page.wait_for_selector(".js-plotly-plot .trace", state="attached")
    page.wait_for_timeout(500)  # tables are drawn on canvases, which tell nobody


def _wait_for_server(address: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            sys.exit("the dashboard did not start: its message is above")
        with contextlib.suppress(URLError, ConnectionError), urlopen(f"{address}/_stcore/health"):
            return
        time.sleep(0.2)
    sys.exit(f"the dashboard did not answer within {READY_SECONDS} s")


if __name__ == "__main__":
    main()
