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


def test_printed_it_is_a_light_report_without_controls(browser, data, tmp_path):
    write_page(data, tmp_path / "page.html")
    look(browser, tmp_path / "page.html", 720, dark=True, media="print")
    assert browser.execute_script("return getComputedStyle(document.documentElement).colorScheme") == "light"
    assert not any(e.is_displayed() for e in find(browser, ".save, button.again, #theme, input[type=range], td.away"))
    assert all(e.is_displayed() for e in find(browser, "h2, .plot, .strips img"))
    assert "Click" not in browser.execute_script("return document.body.innerText"), "nobody clicks on paper"
    assert browser.execute_script(
        "return [...document.querySelectorAll('.wide, .map-frame')].every(e => getComputedStyle(e).overflow === 'visible')"
    )
    assert browser.execute_script("return getComputedStyle(document.querySelector('.pill')).color") != ""


def pages_on_paper(browser, made, tmp_path):
    """The text of each page of A4."""
    if not shutil.which("pdftotext"):
        pytest.skip("no pdftotext here: what stands on which page is not read")
    write_page(made, tmp_path / "page.html")
    look(browser, tmp_path / "page.html")
    paper = {"printBackground": True, "paperWidth": 8.27, "paperHeight": 11.69}
    (tmp_path / "a.pdf").write_bytes(base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", paper)["data"]))
    words = ["pdftotext", "-layout", str(tmp_path / "a.pdf"), "-"]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.split("\f")


@pytest.mark.parametrize("layers", [30, 60])
def test_on_paper_a_map_has_its_names_on_its_page_and_a_table_its_head_on_each(browser, data, tmp_path, layers):
    pages = pages_on_paper(browser, with_many_schemes(data, layers), tmp_path)
    with_map = [text for text in pages if "transformer_blocks.0.attn.to_q" in text]
    assert len(with_map) == 1
    assert f"transformer_blocks.{(layers - 1) // 3}.attn.to_v" in with_map[0], "to its last row"
    assert "darker is worse" in with_map[0], "with its scale"
    assert "Where in the model" in with_map[0], "and its heading"
    rows = [
        text
        for text in pages
        if re.search(r"^\s*(torchao|gguf|quanto|modelopt|bitsandbytes) \S+.*\d\.\d\d .*\d\.\d\d", text, re.M)
    ]
    assert len(rows) >= 2, "a long table"
    assert all("scheme" in text and "verdict" in text for text in rows)


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
        zoom = float(
            browser.execute_script(f"return {STEPS}.querySelector('.map-grid').style.getPropertyValue('--print-zoom')")
        )
        assert 12 * zoom >= 9, "pixels of the letters on paper"
        assert width < 400 or grid <= frame, "nothing to scroll on a desktop"
        assert ("is the worst of" in browser.execute_script(f"return {STEPS}.innerText")) == (len(cells) < 24 * num)
