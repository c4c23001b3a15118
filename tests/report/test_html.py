"""The page of quantlab compare: what is in the file, and what a real browser makes of it."""

from __future__ import annotations

import base64
import io
import json
import re
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from quantlab.report.figures import image_figure, layer_figure
from quantlab.report.html import page, write_page
from quantlab.report.reading import StoredRun
from quantlab.tracking.pictures import SAMPLE_ARRAYS, write_samples
from tests.support.browser import boxes, find, look, row_names, scroll_to, texts
from tests.support.comparison_store import SCHEMES

HOSTILE = "</script><img src=x onerror=document.title='taken'> & <b>"


# -- the file


def test_the_page_loads_nothing(data):
    text = page(data)
    outside = re.sub(r'<script type="application/json".*?</script>', "", text, flags=re.DOTALL)
    addresses = set(re.findall(r"https?://[^\s\"'`)]+", outside))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, which nothing loads
    assert not re.search(r"<link[^>]*href=\"(?!data:)|<script[^>]*src=|@import|fetch\(|XMLHttpRequest", outside)
    assert len(text) < 6_000_000


def test_the_page_holds_every_row_with_its_recipe(data):
    group = data["groups"][0]
    by_bytes = ["int4 a", "int4 b", "int8 a", "int8 b", "int4 c"]
    assert [r["name"] for r in group["rows"]] == ["reference", "floor_bf16", *by_bytes]
    assert set(group["recipes"]) == {r["run_id"] for r in group["rows"]}
    assert "quantlab reproduce ${row.run_id}" in page(data)
    assert "override /backend: gguf" in group["recipes"][group["rows"][3]["run_id"]]
    assert [s["name"] for s in group["images"]["schemes"]] == by_bytes
    assert group["layers"]["rows"] == ["blocks.0.to_q", "blocks.0.to_k", "blocks.1.to_q"]
    assert group["layers"]["values"][0][4] == pytest.approx(float(SCHEMES["int4 c"][2].mean()) ** 0.5, rel=1e-3)
    assert [(m["metric"], len(m["columns"])) for m in group["steps"]] == [("step_sqnr_db", 2), ("step_divergence", 2)]


def test_names_cannot_break_out_of_the_page(data):
    data["title"] = HOSTILE
    data["groups"][0]["rows"][2]["name"] = HOSTILE
    text = page(data)
    assert HOSTILE not in text
    assert text.count("</script>") == 2


class Pictures:
    """A reader whose runs have these pictures by name, as arrays (or, of an older run, as a PNG alone)."""

    def __init__(self, folder, images, ids=("s0", "s1")):
        self.files = {}
        for name, array in images.items():
            write_samples(array, ids, folder / "samples.npz")
            self.files[name] = (folder / "samples.npz").read_bytes()

    def read_artifact(self, run, name):
        return self.files.get(run.name) if name == SAMPLE_ARRAYS else b"\x89PNG"


def runs_named(*names):
    same = {"status": "", "start_ms": 0, "experiment_id": "", "artifact_uri": ""}
    return [StoredRun(run_id=name, name=name, **same) for name in names]


def tile(address, at, size):
    """One tile of a strip, with the strip's own gaps."""
    strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).convert("RGB"))
    begin = at * (size + max(1, size // 24))
    return strip[:, begin : begin + size]


def test_pictures_with_white_rows_are_shown_whole(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (2, 3, 64, 64, 3), dtype=np.uint8)
    images[:, :, :20] = images[:, :, 30:] = 255  # like the white lines between the tiles of the tracked PNG
    figure = image_figure(Pictures(tmp_path, {"a": images}), runs_named("a"))
    assert figure["tiles"] == 2
    assert figure["samples"] == ["s0", "s1"]
    for i in range(2):
        assert (tile(figure["reference"], i, 64) == images[i, 0]).all()
        assert (tile(figure["schemes"][0]["candidate"], i, 64) == images[i, 1]).all()
        assert (tile(figure["schemes"][0]["difference"], i, 64) == images[i, 2]).all()


def test_a_run_that_has_only_the_png_shows_no_pictures(tmp_path):
    images = np.zeros((2, 3, 8, 8, 1), np.uint8)
    figure = image_figure(Pictures(tmp_path, {"new": images}), runs_named("old", "new"))
    assert [s["name"] for s in figure["schemes"]] == ["new"]
    assert image_figure(Pictures(tmp_path, {}), runs_named("old")) is None


@pytest.mark.slow
def test_large_pictures_are_made_to_fit(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (2, 3, 600, 600, 3), dtype=np.uint8)
    names = [str(i) for i in range(12)]
    figure = image_figure(Pictures(tmp_path, dict.fromkeys(names, images)), runs_named(*names))
    assert sum(len(s["candidate"]) + len(s["difference"]) for s in figure["schemes"]) <= 3_000_000
    assert figure["pixels"] < 600


def test_videos_move(tmp_path):
    """A strip of videos is one animation; the small ones are exact."""
    videos = np.random.default_rng(0).integers(0, 255, (2, 3, 4, 64, 64, 3), dtype=np.uint8)
    figure = image_figure(Pictures(tmp_path, {"a": videos}), runs_named("a"))
    assert figure["tiles"] == 2
    kind, _, data = figure["schemes"][0]["candidate"].partition(",")
    assert kind == "data:image/webp;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as moving:
        assert moving.n_frames == 4
        moving.seek(2)
        assert (np.asarray(moving.convert("RGB"))[:64, :64] == videos[0, 1, 2]).all()


def test_layers_of_two_components_have_a_row_each(tmp_path):
    table = {
        "columns": ["component", "name", "weight_rel_error"],
        "data": [["transformer", "to_q", 0.1], ["transformer_2", "to_q", 0.2]],
    }
    reader = SimpleNamespace(read_artifact=lambda run, name: json.dumps(table).encode())
    figure = layer_figure(reader, runs_named("a"))
    assert figure["rows"] == ["transformer: to_q", "transformer_2: to_q"]
    assert figure["values"] == [[0.1], [0.2]]


# -- in a browser


@pytest.fixture
def opened(browser, data, tmp_path):
    """The page in the browser, without an error so far; :func:`look` loads it at a width."""
    path = tmp_path / "page.html"
    write_page(data, path)
    look(browser, path)
    assert browser.get_log("browser") == []
    yield browser
    assert browser.get_log("browser") == []


def test_a_click_on_a_heading_sorts_and_a_second_one_turns_the_order(opened):
    assert row_names(opened)[:3] == ["int4 a", "int4 b", "int8 a"]
    heading = next(b for b in find(opened, "th button") if b.text.startswith("latent_rel_mse"))
    heading.click()
    best_first = row_names(opened)
    assert best_first[:3] == ["reference", "int8 b", "int8 a"]
    heading.click()
    assert row_names(opened) == best_first[::-1]
    assert "descending" in [e.get_attribute("aria-sort") for e in find(opened, "th[aria-sort]")]


def test_hovering_shows_what_a_point_and_a_cell_are(opened):
    from selenium.webdriver import ActionChains

    tip = find(opened, "#tip")[0]
    assert not tip.is_displayed()
    point = next(p for p in find(opened, ".point") if p.get_attribute("data-name") == "int8 a")
    ActionChains(opened).move_to_element(point).perform()
    assert tip.is_displayed()
    assert tip.text.startswith("int8 a\n3.81 MiB")
    assert "inside the floor; on the Pareto front" in tip.text
    cell = find(opened, ".heat")[0]
    scroll_to(opened, cell)
    ActionChains(opened).move_to_element(cell).perform()
    assert tip.text.startswith("int4 a\nblocks.0.to_q\nweight error ")


def test_a_simulated_size_is_marked_wherever_it_is_said(browser, data, tmp_path):
    for row in data["groups"][0]["rows"]:
        row["is_simulated"] = row["role"] == "candidate"
    write_page(data, tmp_path / "page.html")
    look(browser, tmp_path / "page.html")
    assert (
        next(p for p in find(browser, ".point") if p.get_attribute("data-name") == "int8 a")
        .get_attribute("data-tip")
        .startswith("int8 a\n~3.81 MiB")
    )
    said = [t for t in texts(browser, ".answer .cost") if "MiB" in t]
    assert [t[0] for t in said] == ["~", "~", "~"]
    field = find(browser, "#under")[0]
    field.clear()
    field.send_keys("0.001")
    assert texts(browser, ".answer .none")[0].startswith("none: the smallest has ~")


def test_the_plot_has_the_floor_the_front_and_an_interval_a_point(opened):
    assert len(find(opened, "line.floor")) == 1
    assert find(opened, ".front-line")[0].get_attribute("d").count("V") == 1
    assert {p.get_attribute("data-name") for p in find(opened, ".point")} == {*SCHEMES, "floor_bf16"}


def test_selector_and_slider_switch_the_images(opened):
    from selenium.webdriver.support.select import Select

    image, slider = find(opened, "#candidate-image")[0], find(opened, "#scheme-slider")[0]
    first = image.get_attribute("src")
    assert opened.execute_script("return arguments[0].naturalWidth", image) > 0
    Select(find(opened, "#scheme")[0]).select_by_visible_text("int4 c")
    other = image.get_attribute("src")
    assert other != first
    assert slider.get_attribute("value") == "4"
    opened.execute_script("arguments[0].value = 0; arguments[0].dispatchEvent(new Event('input'))", slider)
    assert image.get_attribute("src") == first
    assert Select(find(opened, "#scheme")[0]).first_selected_option.text == "int4 a"


@pytest.mark.slow
def test_videos_beside_one_another_show_the_same_frame_whenever_they_are_switched(browser, data, tmp_path):
    numbers = np.arange(8, dtype=np.uint8) * 30
    videos = np.broadcast_to(numbers[None, None, :, None, None, None], (2, 3, 8, 64, 64, 3)).copy()
    videos[0, 1, :, :2] = 255  # of the candidates only: a strip that is shown twice is one animation anyway
    videos[0, 2, :, :4] = 255
    figure = image_figure(Pictures(tmp_path, {"a": videos, "b": videos ^ np.uint8(1)}), runs_named("a", "b"))
    group = {**data["groups"][0], "images": figure}
    write_page({**data, "groups": [group]}, tmp_path / "moving.html")
    look(browser, tmp_path / "moving.html")
    slider = find(browser, "#scheme-slider")[0]
    scroll_to(browser, slider)
    for i, delay in enumerate((0.31, 0.47, 0.23, 0.61)):
        time.sleep(delay)
        browser.execute_script(f"arguments[0].value = {i % 2}; arguments[0].dispatchEvent(new Event('input'))", slider)
        time.sleep(0.4)
        shot = np.asarray(Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("L")).astype(int)
        seen = []
        for image in find(browser, ".strips img"):
            box = browser.execute_script(
                "const r = arguments[0].getBoundingClientRect(); return [r.x, r.y, r.width, r.height]", image
            )
            seen.append(shot[int(box[1] + box[3] / 2), int(box[0] + box[2] / 4)])
        frames = [round(min(value, 210) / 30) for value in (seen[0], seen[1])]
        assert frames[0] == frames[1], (i, seen)
    assert browser.get_log("browser") == []


def test_a_row_shows_how_to_run_it_again(opened):
    button = find(opened, "tr[data-name='int4 b'] button.again")[0]
    button.click()
    detail = find(opened, "tr.detail")[0]
    assert "quantlab recipe=int4-b.yaml" in detail.text
    assert "override /backend: gguf" in detail.text
    find(opened, "button.copy")[0].click()
    assert find(opened, "button.copy")[0].text in ("copied", "copy recipe")


def test_failures_and_skipped_combinations_are_listed_with_their_reason(opened):
    text = find(opened, "main")[0].text
    assert "MemoryError: 12 GiB wanted" in text
    assert "gguf has no nf4" in text


@pytest.mark.parametrize("width", [1200, 800, 390, 320])
def test_the_body_does_not_scroll_sideways(browser, data, tmp_path, width):
    write_page(data, tmp_path / "page.html")
    look(browser, tmp_path / "page.html", width)
    root = "document.documentElement"
    assert browser.execute_script("return innerWidth") == width
    assert browser.execute_script(f"return {root}.scrollWidth - {root}.clientWidth") == 0
    assert find(browser, "h1")[0].text == "Which scheme for my model?"


@pytest.mark.parametrize("width", [1280, 1000, 700])
def test_recipe_and_run_are_seen_beside_three_metrics(browser, data, tmp_path, width):
    """As videos have them."""
    group = data["groups"][0]
    group["headline"] = ["latent_rel_mse", "frame_psnr_db", "temporal_rel_error"]
    for row in group["rows"]:
        wide = {**row["metrics"]["latent_rel_mse"], "value": 0.01234, "ci_lo": 0.01123, "ci_hi": 0.01345}
        row["metrics"] |= dict.fromkeys(group["headline"], wide)
        row["link"] = "http://localhost/#/runs/1"
    write_page(data, tmp_path / "page.html")
    look(browser, tmp_path / "page.html", width)
    (frame,) = (b for b, e in zip(boxes(browser, ".wide"), find(browser, ".wide"), strict=True) if "recipe" in e.text)
    for left, _, right, _ in [*boxes(browser, ".again"), *boxes(browser, "a.run")]:
        assert frame[0] <= left < right <= frame[2]
    over = browser.execute_script("const w = document.querySelector('.wide'); return w.scrollWidth - w.clientWidth")
    assert over == 0
    assert boxes(browser, ".wide + .hint")[0][1] - frame[3] >= 8


def test_hostile_names_are_text_in_the_browser(browser, data, tmp_path):
    for row in data["groups"][0]["rows"]:
        if row["name"] == "int4 c":
            row["name"] = HOSTILE
    write_page(data, tmp_path / "page.html")
    look(browser, tmp_path / "page.html")
    assert HOSTILE in row_names(browser)
    assert browser.title == "small grid-" + data["title"].partition("-")[2] + ": which scheme?"
    assert browser.get_log("browser") == []


def test_no_name_turns_the_words_of_the_page_around(browser, data, tmp_path):
    for row in data["groups"][0]["rows"]:
        if row["name"] == "int4 c":
            row["name"] = "int4 \u202ec3ni\u2066"
    data["title"] += "\u202e"
    write_page(data, tmp_path / "page.html")
    look(browser, tmp_path / "page.html")
    assert "int4 \\u202ec3ni\\u2066" in row_names(browser), "as the terminal writes it"
    assert not set("\u202e\u2066") & set(browser.page_source + browser.title)
    assert browser.get_log("browser") == []


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [
        (0.99987, 0.9997, 0.99995, "0.9999 0.9997 to 0.99995"),
        (0.986, 0.486, 1.0, "0.986 0.486 to 1.00"),
        (0.9999999, None, None, "1.00000 "),
        (4.06e-6, 4.05e-6, 4.07e-6, "4.06e\u22126 4.05e\u22126 to 4.07e\u22126"),
        (123.456, 123.41, 123.5, "123.46 123.41 to 123.50"),
        (39.6, 38.6, 40.6, "39.6 38.6 to 40.6"),
    ],
)
def test_a_number_has_the_digits_that_its_interval_and_its_distance_from_1_need(
    browser, data, tmp_path, value, low, high, text
):
    write_page(data, tmp_path / "page.html")
    look(browser, tmp_path / "page.html")
    m = {"value": value, "ci_lo": low, "ci_hi": high}
    found = browser.execute_script("const m = arguments[0]; return `${measured(m)} ${interval(m.ci_lo, m.ci_hi)}`", m)
    assert found == text
