"""A real browser for the tests that look at pages: headless Chromium, driven by selenium."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextmanager
def chromium(profile: Path, downloads: Path | None = None) -> Iterator[Any]:
    """The browser; its console is kept. The test is skipped where there is none."""
    binary = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
    driver = shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("no chromium with chromedriver here: the page is not looked at")
    webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium here: the page is not looked at")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    if downloads is not None:
        started.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(downloads)})
    try:
        yield started
    finally:
        started.quit()


def look(browser: Any, path: Path, width: int = 1200, *, dark: bool = False, media: str = "", end: str = "") -> None:
    """Load the page of a file, this wide, in light or dark colours, on a screen or (``media="print"``) on paper."""
    features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get("about:blank")  # another ending of the same address would load nothing
    browser.get(path.as_uri() + end)


def find(browser: Any, css: str) -> list[Any]:
    """The elements of a selector."""
    return list(browser.find_elements("css selector", css))


def scroll_to(browser: Any, element: Any) -> None:
    """Bring it into the middle; returns once the page has heard of it: a frame later, when it hides what floats."""
    script = """arguments[0].scrollIntoView({block: "center"});
        requestAnimationFrame(() => requestAnimationFrame(arguments[1]))"""
    browser.execute_async_script(script, element)


def texts(browser: Any, css: str) -> list[str]:
    """Their texts, also of SVG elements and of those that are scrolled away."""
    return list(
        browser.execute_script("return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", css)
    )


def boxes(browser: Any, css: str) -> list[tuple[float, float, float, float]]:
    """Left, top, right, bottom of each element, in pixels of the document."""
    script = """return [...document.querySelectorAll(arguments[0])].map(e => { const b = e.getBoundingClientRect();
        return [b.left + scrollX, b.top + scrollY, b.right + scrollX, b.bottom + scrollY]; })"""
    return [tuple(box) for box in browser.execute_script(script, css)]


def choose(browser: Any, css: str, value: str) -> None:
    """Choose an option of a ``select``."""
    from selenium.webdriver.support.select import Select

    Select(find(browser, css)[0]).select_by_value(value)


def row_names(browser: Any) -> list[str]:
    """The names of the table of schemes, from the top."""
    return list(
        browser.execute_script(
            "const s = [...document.querySelectorAll('section')].find(s => s.querySelector('h2')?.textContent === 'All schemes');"
            "return [...s.querySelectorAll('tbody tr[data-name]')].map(r => r.dataset.name)"
        )
    )


def saved(downloads: Path, ending: str) -> str:
    """What the browser saved: it makes the file empty, writes beside it, and renames when it is done."""
    for _ in range(200):
        names = list(downloads.iterdir())
        files = [f for f in names if f.name.endswith(ending) and f.stat().st_size]
        if files and len(names) == 1:
            content = files[0].read_text(encoding="utf-8")
            files[0].unlink()
            return content
        time.sleep(0.05)
    raise AssertionError(f"nothing that ends in {ending} was saved: {[f.name for f in downloads.iterdir()]}")
