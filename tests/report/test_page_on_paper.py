"""The page on paper: a light report, whole, in which nothing is cut, illegible or apart from its heading."""

from __future__ import annotations

import base64
import itertools
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET

import pytest

from quantlab.report.html import write_page
from tests.support.browser import find, look, saved
from tests.support.many_schemes import with_many_schemes

pytestmark = pytest.mark.slow  # a browser prints many a page


def test_printed_it_is_a_light_report_without_controls(browser, data, tmp_path):
    write_page(data, tmp_path / "page.html")
    look(browser, tmp_path / "page.html", 720, dark=True, media="print")
    assert browser.execute_script("return getComputedStyle(document.documentElement).colorScheme") == "light"
    assert not any(e.is_displayed() for e in find(browser, ".save, button.again, #theme, input[type=range], td.away"))
    assert all(e.is_displayed() for e in find(browser, "h2, .on-paper.upright .plot, .strips img"))
    assert find(browser, ".on-paper.upright .plot")
    assert find(browser, ".on-paper.upright .map-table")
    assert "Click" not in browser.execute_script("return document.body.innerText"), "nobody clicks on paper"
    assert browser.execute_script(
        "return [...document.querySelectorAll('.wide, .map-table')].every(e => getComputedStyle(e).overflow === 'visible')"
    )
    assert browser.execute_script("return getComputedStyle(document.querySelector('.pill')).color") != ""


PAPERS = {"A4": (8.27, 11.69), "A4 landscape": (11.69, 8.27), "Letter": (8.5, 11), "Letter landscape": (11, 8.5)}
"""Width and height in inches."""


def pages_on_paper(browser, made, tmp_path, paper="A4", how="-layout"):
    """The text of each page, or of one of pdftotext's other outputs the whole."""
    if not shutil.which("pdftotext"):
        pytest.skip("no pdftotext here: what stands on which page is not read")
    write_page(made, tmp_path / "page.html")
    look(browser, tmp_path / "page.html")
    width, height = PAPERS[paper]
    words = {"printBackground": True, "paperWidth": width, "paperHeight": height}
    (tmp_path / "a.pdf").write_bytes(base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", words)["data"]))
    return text_of(tmp_path / "a.pdf", how)


def text_of(file, how="-layout"):
    words = ["pdftotext", how, str(file), "-"]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.split("\f")


@pytest.mark.parametrize("layers", [30, 60])
def test_on_paper_a_map_has_its_names_on_its_page_and_a_table_its_head_on_each(browser, data, tmp_path, layers):
    made = with_many_schemes(data, layers)
    made["groups"][0]["layers"]["columns"] = ["int8", "int4", "nf4"]
    pages = pages_on_paper(browser, made, tmp_path)
    with_map = [text for text in pages if "transformer_blocks." in text]
    assert "darker is worse" in with_map[0], "with its scale"
    assert "Where in the model" in with_map[0], "and its heading"
    assert len(with_map) == 1 or layers == 60
    rows = [
        text
        for text in pages
        if re.search(r"^\s*(torchao|gguf|quanto|modelopt|bitsandbytes) \S+.*\d\.\d\d .*\d\.\d\d", text, re.M)
    ]
    assert len(rows) >= 2, "a long table"
    assert all("scheme" in text and "verdict" in text for text in rows)


@pytest.mark.parametrize("paper", PAPERS)
def test_a_map_of_many_schemes_can_be_read_on_any_paper(browser, data, tmp_path, paper):
    made = with_many_schemes(data, 60)
    pages = pages_on_paper(browser, made, tmp_path, paper)
    with_map = [text for text in pages if "transformer_blocks." in text]
    assert "Where in the model" in with_map[0], "the heading is where the map begins"
    assert "darker is worse" in with_map[0]
    bands = [[tuple(map(int, found)) for found in re.findall(r"schemes (\d+)\S(\d+) of 44", text)] for text in with_map]
    assert all(bands), "the heads of its columns are on each page"
    every = sorted({band for found in bands for band in found})
    assert every[0][0] == 1
    assert every[-1][1] == 44
    assert all(b[0] == a[1] + 1 for a, b in itertools.pairwise(every)), "each scheme once"
    rows = re.findall(r"transformer_blocks\.\d+\.attn\.to_\w", "".join(with_map))
    assert rows == made["groups"][0]["layers"]["rows"] * len(every)
    for text in pages:
        last = [line.strip() for line in text.splitlines() if line.strip()][-3:]
        assert not any(line.endswith("?") for line in last), "no heading ends a page"
    on_each = [len(re.findall(r"transformer_blocks", text)) for text in with_map]
    assert min(on_each) >= 3, "no row alone"
    found = text_of(tmp_path / "a.pdf", "-bbox")[0]
    (width, height), margin = (72 * inches for inches in PAPERS[paper]), 12 / 25.4 * 72
    sizes = {tuple(map(float, page)) for page in re.findall(r'<page width="([\d.]+)" height="([\d.]+)"', found)}
    assert all(abs(w - width) < 2 and abs(h - height) < 2 for w, h in sizes), "as the reader has laid the paper"
    words = re.findall(r'xMin="(\S+)" yMin="(\S+)" xMax="(\S+)" yMax="(\S+)">(.*?)<', found)
    assert all(margin - 1 <= float(word[0]) and float(word[2]) <= width - margin + 1 for word in words)
    names = [float(word[3]) - float(word[1]) for word in words if word[4].startswith("transformer_blocks")]
    assert min(names) > 7, "points"
    assert not find(browser, ".on-paper *, details[open]"), "the screen is as it was"


def test_a_map_too_tall_for_paper_goes_on_with_its_headings_and_loses_no_row(browser, data, tmp_path):
    layers = 240
    made = with_many_schemes(data, layers)
    schemes = made["groups"][0]["layers"]["columns"] = ["int8", "int4", "nf4"]
    made["groups"][0]["layers"]["values"] = [[0.1, 0.2, None]] * layers
    with_map = [text for text in pages_on_paper(browser, made, tmp_path) if "transformer_blocks." in text]
    assert len(with_map) >= 3
    rows = re.findall(r"transformer_blocks\.\d+\.attn\.to_\w", "".join(with_map))
    assert rows == made["groups"][0]["layers"]["rows"], "each row once, in order"
    for text in with_map:
        assert all(name in text.partition("transformer_blocks")[0] for name in schemes), "headings above its rows"
    assert "Where in the model" in with_map[0]
    assert "darker is worse" in with_map[0]
    assert "At which step" not in "".join(with_map[:-1]), "nothing stands over it"


def test_a_tall_map_is_whole_on_the_screen_and_in_its_file(browser, data, tmp_path, downloads):
    made = with_many_schemes(data, 240)
    write_page(made, tmp_path / "page.html")
    look(browser, tmp_path / "page.html")
    section = "[...document.querySelectorAll('section')].find(s => s.querySelector('[data-save=layers]'))"
    at = browser.execute_script(
        f"return [...{section}.querySelectorAll('.map-names text')].map(t => t.getBoundingClientRect().top)"
    )
    steps = [b - a for a, b in itertools.pairwise(at)]
    assert len(at) == 240
    assert max(steps) - min(steps) < 0.5, "no gap where a page of paper ends"
    assert browser.execute_script(f"return [...{section}.querySelectorAll('.map-head')].filter(e => e.offsetHeight).length") == 1  # fmt: skip
    browser.execute_script("document.querySelector('[data-save=layers]').click()")
    root = ET.fromstring(saved(downloads, "layers.svg"))
    rows = made["groups"][0]["layers"]["rows"]
    said = [e.text for e in root.iter() if (e.text or "").startswith("transformer_blocks")]
    assert said == rows
    cells = [e for e in root.iter() if e.tag.endswith("rect") and e.find("{*}title") is not None]
    assert len(cells) == 240 * len(made["groups"][0]["layers"]["columns"])
    groups = [e for e in root if e.tag.endswith("}g")]
    assert max(float(re.search(r"translate\(\S+ (\S+)\)", g.get("transform"))[1]) for g in groups) < float(root.get("height"))  # fmt: skip


def test_on_paper_no_name_number_or_token_is_broken_and_pictures_stay_with_their_heading(browser, data, tmp_path):
    made = with_many_schemes(data)
    group = made["groups"][0]
    for row in group["rows"]:
        row["name"] = row["name"].replace("torchao", "bitsandbytes")
    group["views"]["latent_rel_mse"]["verdicts"] = {
        row["name"]: {**next(iter(group["views"]["latent_rel_mse"]["verdicts"].values())), "p_holm": 1e-5}
        for row in group["rows"]
    }
    worst = [{"window": 0, "position": 9, "before": "in ", "token": "Lux", "reference": " Luxembourg", "candidate": " B", "kld_nats": 2}]  # fmt: skip
    group["texts"] = {"schemes": [{"name": group["rows"][-1]["name"], "continuations": [], "worst": worst}]}
    group["layers"] = None
    with_pictures = [page for page in pages_on_paper(browser, made, tmp_path) if "What does it look like" in page]
    assert "difference" in with_pictures[0]
    look(browser, tmp_path / "page.html", 703, media="print")  # A4 less its margins
    broken = browser.execute_script(
        """return [...document.querySelectorAll('tbody td.name span span, tbody td code, tbody td .interval')].filter(e => {
            const whole = e.matches('code, .interval'), words = whole ? [e.textContent] : e.textContent.split(' ');
            const range = document.createRange(), node = e.firstChild;
            return words.some(w => { const at = node.data.indexOf(w); range.setStart(node, at); range.setEnd(node, at + w.length);
                return range.getClientRects().length > 1; }); }).map(e => e.textContent)"""
    )
    assert broken == []
    assert too_wide(browser) == 0


def too_wide(browser):
    return browser.execute_script(
        "return [...document.querySelectorAll('table')].filter(t => t.scrollWidth > 703).length"
    )


def test_on_paper_a_name_without_end_takes_no_column_from_its_page(browser, data, tmp_path):
    text = json.dumps(data)
    for name in ("int4 a", "int8 a"):
        text = text.replace(f'"{name}"', f'"{name.replace(" ", "_") * 20}"')
    write_page(json.loads(text), tmp_path / "page.html")
    look(browser, tmp_path / "page.html", 703, media="print")
    assert too_wide(browser) == 0


def with_steps(data, num):
    """A map of ``num`` steps and layers with long names, of which one step is by far the worst."""
    made = with_many_schemes(data)
    names = [f"transformer_blocks.{i}.norm1.emb.timestep_embedder.linear_{k}" for i in range(12) for k in (1, 2)]
    values = [[-5.0 if j == num - 2 else 30.0 + j % 7 for j in range(num)] for _ in names]
    group = made["groups"][0]
    first = next(row["name"] for row in group["rows"] if row["role"] == "candidate")
    whole = {"name": first, "metric": "output SQNR", "title": "by step", "rows": names, "values": values}
    group["calibrated"] = [{**whole, "columns": [str(j) for j in range(num)]}]
    return made


STEPS = "[...document.querySelectorAll('section')].find(e => e.innerText.startsWith('Which layer hurts'))"


@pytest.mark.parametrize("num", [30, 60, 200, 1000])
def test_a_map_of_many_steps_can_be_read_on_paper_and_screen(browser, data, tmp_path, num):
    write_page(with_steps(data, num), tmp_path / "page.html")
    for width in (390, 1200):
        look(browser, tmp_path / "page.html", width)
        frame, grid, cells = browser.execute_script(f"""const map = {STEPS};
            return [map.querySelector('.map-frame').clientWidth, map.querySelector('.map-grid').offsetWidth,
                    [...map.querySelectorAll('rect.heat')].map(e => e.dataset.tip)]""")
        heads = browser.execute_script(f"""const map = {STEPS};
            return [...map.querySelectorAll('.map-head text')].map(e => {{ const r = e.getBoundingClientRect();
                const s = e.closest('svg').getBoundingClientRect(); return [e.textContent, r.left - s.left, r.right - s.left]; }})""")
        assert heads[0][0] == "0"
        assert heads[0][1] >= 0, "the first is whole"
        assert all(b[1] - a[2] >= 4 for a, b in itertools.pairwise(heads)), "none touches the next"
        assert len(cells) % 24 == 0
        assert any(re.search("[-\u2212]5", tip) for tip in cells), "the worst step is in no mean lost"
        assert width < 400 or grid <= frame, "nothing to scroll on a desktop"
        assert ("is the worst of" in browser.execute_script(f"return {STEPS}.innerText")) == (len(cells) < 24 * num)
    look(browser, tmp_path / "page.html", 703, media="print")
    rows = "[...document.querySelectorAll('.upright .map-table tbody tr')].filter(e => e.offsetHeight)"
    assert browser.execute_script(f"return {rows}.length") >= 24, "on paper"
    assert browser.execute_script(f"return Math.max(...{rows}.map(e => e.getBoundingClientRect().right))") <= 703
