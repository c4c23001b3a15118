"""An interval over many powers of ten does not press the points of the plot into a line; that it goes on is told."""

from __future__ import annotations

import pytest

from quantlab.report.html import write_page
from tests.support.browser import boxes, find, look, texts

ARROW = "; one with an arrow goes on beyond the plot"


def places(browser):
    """Scheme -> height of its point."""
    return {p.get_attribute("data-name"): p.rect["y"] for p in find(browser, ".figure.screen svg.plot .point")}


@pytest.mark.parametrize("low", [0.0, 1.2e-26])
def test_a_bar_that_goes_on_ends_in_an_arrow(browser, data, tmp_path, low):
    write_page(data, tmp_path / "page.html")
    look(browser, tmp_path / "page.html")
    before = places(browser)
    assert ARROW not in browser.page_source.partition("<script")[0] + find(browser, "#main, main")[0].text
    group = data["groups"][0]
    row = next(row for row in group["rows"] if row["name"] in before and row["role"] == "candidate")
    row["metrics"][group["metric"]] |= {"ci_lo": low, "ci_hi": 2.3e11}
    write_page(data, tmp_path / "page.html")
    look(browser, tmp_path / "page.html")
    after = places(browser)
    assert [p.get_attribute("data-goes-on") for p in find(browser, ".figure.screen [data-goes-on]")] == [row["name"]]
    assert ARROW in find(browser, "#main, main")[0].text
    spread = [max(found.values()) - min(found.values()) for found in (before, after)]
    assert spread[1] > spread[0] / 4
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", [390, 1200])
def test_no_two_numbers_of_an_axis_read_the_same(browser, data, tmp_path, width):
    group = data["groups"][0]
    group["views"][group["metric"]]["floor"] = None
    for i, row in enumerate(group["rows"]):
        row["metrics"][group["metric"]] |= {"value": 0.999991 + i * 1e-6, "ci_lo": 0.99999, "ci_hi": 0.9999995}
    write_page(data, tmp_path / "page.html")
    look(browser, tmp_path / "page.html", width)
    plot = ".figure.screen svg.plot"
    lefts = [place[0] for place in boxes(browser, f"{plot} .tick[text-anchor=end]")]
    said = texts(browser, f"{plot} .tick[text-anchor=end]")
    assert len({*said}) == len(said) >= 3, said
    assert min(lefts) > boxes(browser, plot)[0][0] + 20, "beside the axis' name"
