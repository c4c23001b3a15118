"""The page between a phone and a wide screen: columns of the table of schemes give way in an order, and come back."""

from __future__ import annotations

import re

import pytest

from quantlab.report.html import write_page
from tests.support.browser import boxes, find, look, texts

ORDER = ["bits in quantized layers", "temporal_rel_error", "frame_psnr_db", "saving", "bits per weight"]
"""Of a table with three metrics, the first to go first."""
OVER = "return [...document.querySelectorAll('.wide')].map(e => e.scrollWidth - e.clientWidth)"
HEADS = "return [...document.querySelector('.wide').querySelectorAll('th')].filter(e => e.offsetWidth).map(e => e.textContent)"


def wide(data):
    """Three metrics with long intervals, and runs that have an address, as videos on a server have them."""
    group = data["groups"][0]
    group["headline"] = ["latent_rel_mse", "frame_psnr_db", "temporal_rel_error"]
    for row in group["rows"]:
        long = {**row["metrics"]["latent_rel_mse"], "value": 0.01234, "ci_lo": 0.01123, "ci_hi": 0.01345}
        row["metrics"] |= dict.fromkeys(group["headline"], long)
        row["link"] = "http://localhost/#/runs/1"
    return data


def opened(browser, data, tmp_path, width, **how):
    write_page(data, tmp_path / "page.html")
    look(browser, tmp_path / "page.html", width, **how)


@pytest.mark.parametrize("width", [1280, 1024, 900, 768, 650])
def test_no_table_scrolls_sideways_and_what_is_hidden_is_named_in_an_order(browser, data, tmp_path, width):
    opened(browser, wide(data), tmp_path, width)
    assert max(browser.execute_script(OVER)) == 0
    heads = " ".join(browser.execute_script(HEADS))
    assert all(word in heads for word in ("scheme", "MiB", "latent_rel_mse", "verdict", "front", "again"))
    told = texts(browser, ".hidden-columns")
    if not told:
        assert width == 1280
        return
    num, _, names = told[0].removesuffix("): show all").partition(" hidden (")
    assert names.split(", ") == ORDER[: len(names.split(", "))]
    assert num.split()[0] == str(len(names.split(", ")))
    assert browser.get_log("browser") == []


def test_hidden_columns_come_back_on_a_press_and_are_on_paper_and_on_a_phone(browser, data, tmp_path):
    opened(browser, wide(data), tmp_path, 768)
    few = len(browser.execute_script(HEADS))
    assert not find(browser, ".wide.over"), "no shadow of what is not there"
    find(browser, ".hidden-columns button")[0].click()
    assert len(browser.execute_script(HEADS)) > few
    assert find(browser, ".wide.over td.away")
    assert texts(browser, ".hidden-columns") == ["The table goes on to the right: hide what has no room"]
    find(browser, ".hidden-columns button")[0].click()
    assert len(browser.execute_script(HEADS)) == few
    find(browser, ".wide th button")[0].click()  # sorted, the columns stay as they are
    assert len(browser.execute_script(HEADS)) == few
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert not any(e.is_displayed() for e in find(browser, ".hidden-columns"))
    assert not any("gone" in e.get_attribute("class") and not e.is_displayed() for e in find(browser, ".wide td.num"))
    opened(browser, wide(data), tmp_path, 390)
    assert texts(browser, ".hidden-columns") == []


@pytest.mark.parametrize("width", [1280, 768])
def test_an_opened_recipe_makes_its_table_no_wider(browser, data, tmp_path, width):
    group = data["groups"][0]
    group["recipes"] = {row["run_id"]: "model:\n  path: " + "a-name-without-end-" * 20 for row in group["rows"]}
    opened(browser, data, tmp_path, width)
    find(browser, ".again")[0].click()
    assert find(browser, "tr.detail pre")
    assert max(browser.execute_script(OVER)) == 0


@pytest.mark.parametrize("width", [1280, 768])
def test_a_p_value_stands_in_one_line(browser, data, tmp_path, width):
    opened(browser, wide(data), tmp_path, width)
    heights = {bottom - top for _, top, _, bottom in boxes(browser, ".wide td.text .interval")}
    assert heights
    assert max(heights) < 25


@pytest.mark.parametrize("width", [1280, 768, 390])
@pytest.mark.parametrize("place", [0.02, 0.5, 0.98])
def test_what_is_said_of_the_floor_keeps_off_the_points(browser, data, tmp_path, width, place):
    group = data["groups"][0]
    sizes = [r["axes"]["weights_bytes"] for r in group["rows"] if r["role"] == "candidate"]
    for row in group["rows"]:
        if row["name"] == group["views"]["latent_rel_mse"]["floor_name"]:
            row["axes"]["weights_bytes"] = min(sizes) + place * (max(sizes) - min(sizes))
    opened(browser, data, tmp_path, width)
    (said,) = boxes(browser, ".figure .plot .soft")
    for left, top, right, bottom in boxes(browser, ".figure .plot .point"):
        assert right <= said[0] or left >= said[2] or bottom <= said[1] + 2 or top >= said[3] - 2


def test_a_map_of_one_column_of_calibration_says_nothing_of_denoising_steps(browser, data, tmp_path):
    """A language model has none."""
    group = data["groups"][0]
    layers = {"rows": ["layers.0", "layers.1"], "columns": ["0"], "values": [[20.0], [21.0]]}
    group["calibrated"] = [{**layers, "name": group["rows"][1]["name"], "metric": "output SQNR", "title": "a map"}]
    opened(browser, data, tmp_path, 1200)
    (section,) = (e for e in find(browser, "section") if "Which layer hurts" in e.text)
    assert "step" not in section.text
    assert "when" not in section.text
    (tip, _) = (
        e.get_attribute("data-tip")
        for e in find(browser, "section rect[data-tip]")
        if "layers." in e.get_attribute("data-tip") and "SQNR" in e.get_attribute("data-tip")
    )
    assert "step" not in tip


def test_on_a_phone_what_stays_unquantized_is_said_without_a_broken_name(browser, data, tmp_path):
    line = "transformer: 19 % of its weights stay unquantized; the largest are time_text_embed.timestep_embedder.linear_1 (6 %): "
    data["groups"][0]["unquantized"] = [line + "quantization.replace_default_exclusions=true takes it"]
    opened(browser, data, tmp_path, 390)
    broken = """const found = [];
        for (const node of document.querySelector('.warning').childNodes) {
            if (node.nodeType !== 3) continue;
            for (const word of node.textContent.matchAll(/[^ ]+/g)) {
                const range = document.createRange();
                range.setStart(node, word.index); range.setEnd(node, word.index + word[0].length);
                if (new Set([...range.getClientRects()].map(r => r.top)).size > 1) found.push(word[0]);
            }
        }
        return found"""
    assert browser.execute_script(broken) == []
    assert texts(browser, ".warning")[0].replace("\u00a0", " ").startswith(line)


def test_no_paragraph_of_the_page_ends_a_line_between_a_number_and_its_percent_sign(browser, data, tmp_path):
    opened(browser, data, tmp_path, 390)
    said = " ".join(texts(browser, "p"))
    assert "95\u00a0%" in said
    assert "95 %" not in said


@pytest.mark.parametrize("deep", ["", "a_very_long_name_of_a_part_that_holds_all_blocks."])
def test_on_a_phone_no_two_layers_of_a_map_have_one_name(browser, data, tmp_path, deep):
    kinds = [f"{deep}{kind}transformer_blocks" for kind in ("", "single_")]
    rows = [
        f"{kind}.{i}.{part}" for kind in kinds for i in range(22) for part in ("attn.to_q", "ff_context.net.0.proj")
    ]
    group = data["groups"][0]
    group["layers"] |= {"rows": rows, "values": [group["layers"]["values"][0]] * len(rows)}
    group["steps"] = []
    opened(browser, data, tmp_path, 390)
    names = texts(browser, ".map-names text")
    assert len(names) == len(rows) == len(set(names))
    if deep:
        assert texts(browser, ".numbered li")[: len(rows)] == rows
    else:
        assert names[0] == rows[0]
        assert re.fullmatch(r"sin…\w*\.0\.ff_context\.net\.0\.proj", names[45])
