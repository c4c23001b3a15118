"""Pictures of the page and of MLflow for documents: ``python -m tests.screenshots [SWEEP]``, in the project's folder.

Takes a finished sweep (the newest) of the store in ``outputs/``, makes its page, starts MLflow's own server on it, and
writes what a browser shows of both to ``recipes/screens/``, each below 150 kB. Needs Chromium with chromedriver, selenium
and the whole of MLflow.
"""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from quantlab.report.compare import Comparison, compare
from quantlab.report.html import page_data, write_page
from quantlab.report.reading import StoredRun, open_reader
from quantlab.report.selection import parse_request, select
from quantlab.tracking.saved_view import view_name
from tests.support.browser import chromium, find, look

FOLDER = Path("recipes", "screens")
MAX_BYTES = 150_000
START_S = 600
"""How long MLflow's server may take until it answers."""
CLICKED = (
    "[data-component-id='mlflow.assistant.chat_panel.close']",
    "[data-testid='expander'], .ag-row [role=button], .ag-row button",  # the sweep's jobs
)
"""What is clicked where it is there, so that runs are seen and not MLflow's helpers."""


def main(sweep: str = "latest", root: Path = Path()) -> list[Path]:
    """Write all pictures below ``root``; returns their paths."""
    request = parse_request([f"sweep={sweep}"])
    reader = open_reader(request.tracking, root)
    selection = select(request, reader)
    groups = compare(request, selection, reader)
    made = []
    with tempfile.TemporaryDirectory() as scratch:
        page = Path(scratch, "page.html")
        write_page(page_data(groups, selection, reader), page)
        with chromium(Path(scratch, "profile")) as browser:
            browser.set_script_timeout(START_S)  # MLflow's pages are slow on a busy machine
            for name, width, height, dark in (
                ("page_desktop", 1200, 1180, False),
                ("page_dark", 1200, 1180, True),
                ("page_phone", 390, 1180, False),
            ):
                look(browser, page, width, dark=dark)
                made.append(taken(browser, root / FOLDER / f"{name}.webp", width, height))
            with mlflow_server(root) as address:
                for name, place, height in places(selection.parents[0], groups[0]):
                    look_at(browser, f"{address}/#/{place}", 1500, height)
                    made.append(taken(browser, root / FOLDER / f"mlflow_{name}.webp", 1500, height))
    return made


def places(parent: StoredRun, group: Comparison) -> Iterator[tuple[str, str, int]]:
    """Name, address and height of MLflow's views: the runs' table and charts as they are saved, the sweep's run, a
    job's, and jobs compared."""
    home, candidates = f"experiments/{parent.experiment_id}", group.candidates
    view = view_name(parent.run_id)
    yield "runs", f"{home}/runs?viewStateShareKey={view}", 720
    yield "charts", f"{home}/runs?viewStateShareKey={view}&compareRunsMode=CHART", 900
    yield "sweep", f"{home}/runs/{parent.run_id}", 1100
    yield "job", f"{home}/runs/{candidates[0].run_id}", 1100
    ids = json.dumps([run.run_id for run in candidates[:3]]).replace(" ", "")
    yield "compare", f'compare-runs?runs={ids}&experiments=["{parent.experiment_id}"]', 1000


@contextmanager
def mlflow_server(root: Path) -> Iterator[str]:
    """MLflow's server on the store of ``outputs/``, at a free port of this machine alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = f"sqlite:///{(root / 'outputs' / 'mlflow.db').absolute()}"
    words = ["ui", "--backend-store-uri", store, "--port", str(port), "--workers", "1"]
    address = f"http://127.0.0.1:{port}"
    alone = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # its job runners outlive it
    with subprocess.Popen(
        [sys.executable, "-m", "mlflow", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=alone
    ) as server:
        try:
            for _ in range(START_S):
                time.sleep(1)
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=5).close()
                    break
                except OSError:
                    continue
            yield address
        finally:
            server.terminate()


def look_at(browser: Any, address: str, width: int, height: int) -> None:
    """Open an address of a server and wait until its page has stopped changing."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get("about:blank")
    browser.get(address)
    _settled(browser)
    for css in CLICKED:
        for button in find(browser, css)[:1]:
            browser.execute_script("arguments[0].click()", button)
            _settled(browser)


def _settled(browser: Any) -> None:
    """Until nothing has changed for two seconds, and a table of runs has its rows."""
    before = ""
    for _ in range(60):
        time.sleep(2)
        now = browser.execute_script("return document.body.innerText + document.images.length")
        is_empty = bool(find(browser, ".ag-root")) and not find(browser, ".ag-row")
        if now == before and len(now) > 200 and not is_empty:
            return
        before = now


def taken(browser: Any, file: Path, width: int, height: int) -> Path:
    """What the browser shows, as a WebP picture of less than 150 kB."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    time.sleep(0.5)
    picture = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    file.parent.mkdir(parents=True, exist_ok=True)
    for quality in (90, 80, 70, 60, 40):
        picture.save(file, "webp", quality=quality, method=6)
        if file.stat().st_size < MAX_BYTES:
            break
    return file


if __name__ == "__main__":
    print("\n".join(map(str, main(*sys.argv[1:2]))))
