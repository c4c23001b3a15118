"""What a reader of the page chooses: metric, axis, schemes, questions; what is saved; names on a crowded plot."""

from __future__ import annotations

import csv
import io
import itertools
import time
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import pytest

from quantlab.report.html import run_address, write_page
from quantlab.report.table import cells
from quantlab.report.views import axes, costs
from quantlab.running.workbench import RUNNING
from tests.support.browser import boxes, choose, find, look, row_names, saved, texts
from tests.support.comparison_store import SCHEMES
from tests.support.many_schemes import with_many_schemes


@pytest.fixture
def opened(browser, data, tmp_path):
    write_page(data, tmp_path / "page.html")
    look(browser, tmp_path / "page.html")
    yield browser
    assert browser.get_log("browser") == []


def crowded(browser, data, tmp_path, width=1200):
    path = tmp_path / "many.html"
    write_page(with_many_schemes(data), path)
    look(browser, path, width)
    return browser


def overlap(a, b, slack=1.0):
    return a[0] < b[2] - slack and b[0] < a[2] - slack and a[1] < b[3] - slack and b[1] < a[3] - slack


# -- what can be chosen


def test_every_metric_with_a_direction_is_a_view_with_its_own_verdicts(data):
    found = data["groups"][0]["views"]
    assert next(iter(found)) == "latent_rel_mse"
    assert {"latent_rel_mse", "judge_agreement", "class_accuracy"} <= set(found)
    assert set(found["judge_agreement"]["verdicts"]) == set(SCHEMES)
    assert found["judge_agreement"]["verdicts"]["int4 c"]["verdict"] != found["latent_rel_mse"]["verdicts"]["int4 c"]


def run_with(**metrics):
    return SimpleNamespace(metrics={k.replace("__", "/"): v for k, v in metrics.items()})


def test_how_long_a_stage_of_the_run_took_is_no_axis():
    stages = {*RUNNING, "load", "quantize", "track", "export"} - {"evaluate"}
    a, b = (run_with(**{f"perf__{stage}_s": s for stage in stages}, memory__weights_bytes=s) for s in (1, 2))
    assert [axis["key"] for axis in axes([a, b])] == ["weights_bytes"]


def test_axes_are_what_the_candidates_have_and_do_not_share():
    a = run_with(memory__weights_bytes=10, perf__decode_tokens_per_s=3, perf__load_s=1, perf__representative=0)
    b = run_with(memory__weights_bytes=20, perf__decode_tokens_per_s=5, perf__load_s=2, perf__representative=0)
    found = {axis["key"]: axis for axis in axes([a, b])}
    assert set(found) == {"weights_bytes", "decode_tokens_per_s"}
    assert found["decode_tokens_per_s"]["unit"] == "tokens/s"
    assert found["decode_tokens_per_s"]["higher_is_better"]
    assert "CPU" in found["decode_tokens_per_s"]["note"]
    assert "CPU" not in found["weights_bytes"]["note"]


def test_a_rate_is_better_higher_at_its_percentile_too():
    a, b = (run_with(memory__weights_bytes=s, perf__decode_tokens_per_s_p90=s, perf__step_ms_p90=s) for s in (1, 2))
    found = {axis["key"]: axis for axis in axes([a, b])}
    assert found["decode_tokens_per_s_p90"]["higher_is_better"]
    assert found["decode_tokens_per_s_p90"]["title"] == "decode, 90th percentile of times"
    assert not found["step_ms_p90"]["higher_is_better"]
    assert found["step_ms_p90"]["title"] == "step, 90th percentile"


def test_another_metric_changes_plot_table_verdicts_and_pairs(opened):
    assert "latent_rel_mse" in find(opened, ".plot")[0].get_attribute("aria-label")
    choose(opened, "#metric", "judge_agreement")
    assert "judge_agreement" in find(opened, ".plot")[0].get_attribute("aria-label")
    assert any("judge_agreement" in text for text in texts(opened, "th .title"))
    assert "Verdicts compare judge_agreement" in find(opened, "main")[0].text
    assert any("smallest with judge_agreement at least" in text for text in texts(opened, ".question"))


def test_another_axis_moves_the_points_and_says_what_it_is(browser, data, tmp_path):
    crowded(browser, data, tmp_path)
    keys = [e.get_attribute("value") for e in find(browser, "#axis option")]
    assert keys[0] == "weights_bytes"
    assert texts(browser, "#axis option") == ["size of the weights", "denoise step [ms]"]
    before = boxes(browser, ".point")
    choose(browser, "#axis", "denoise_step_ms")
    assert boxes(browser, ".point") != before
    assert "denoise step [ms]" in texts(browser, ".axis-title")[0]
    assert "denoise step" in " ".join(texts(browser, "th .title"))
    assert "no other one beats in both" in find(browser, "main")[0].text
    assert browser.get_log("browser") == []


# -- what is shown


def test_the_legend_hides_and_shows_a_librarys_schemes_everywhere(opened):
    assert "library" not in " ".join(texts(opened, ".toolbar, .answers, h2, .hint, th")), "one word for one thing"
    find(opened, "#legend button[data-kind=quanto]")[0].click()
    left = {n for n, (backend, _, _) in SCHEMES.items() if backend != "quanto"}
    assert set(row_names(opened)) == left | {"reference", "floor_bf16"}
    assert {p.get_attribute("data-name") for p in find(opened, ".point")} == left | {"floor_bf16"}
    assert {o.text for o in find(opened, "#scheme option")} == left
    assert texts(opened, "#told") == [f"{len(left)} of {len(SCHEMES)} schemes"]
    assert not any(" a" in text for text in texts(opened, ".map-head text"))
    find(opened, "#legend button[data-kind=quanto]")[0].click()
    assert len(row_names(opened)) == len(SCHEMES) + 2


@pytest.mark.parametrize(
    ("words", "left"),
    [("int4", {"int4 a", "int4 b", "int4 c"}), ("INT4 !b", {"int4 a", "int4 c"}), ("nothing", set()), ("<b>", set())],
)
def test_words_choose_schemes(opened, words, left):
    find(opened, "#filter")[0].send_keys(words)
    assert set(row_names(opened)) - {"reference", "floor_bf16"} == left
    if not left:
        assert "No scheme is shown" in find(opened, "main")[0].text


def test_the_reader_sets_the_questions(opened):
    from selenium.webdriver.common.keys import Keys

    def answer(i):
        return find(opened, ".answer")[i].text

    def ask(css, value):
        field = find(opened, css)[0]
        field.send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.DELETE, str(value))

    ask("#under", 2.0)  # MiB: int4 a has 1.91, int4 b 2.003
    assert "int4 a" in answer(0)
    ask("#under", 1.0)
    assert "none: the smallest has 1.91 MiB" in answer(0)
    ask("#under", "")
    assert "int8 b" in answer(0)
    assert "int8 a" in answer(1)
    ask("#quality", 1e-5)
    assert "int8 a" in answer(2)
    find(opened, "#filter")[0].send_keys("!int8")
    assert "none of those shown" in answer(1)


# -- addresses


@pytest.mark.parametrize(
    ("uri", "link"),
    [
        ("http://host:5000", "http://host:5000/#/experiments/7/runs/abc"),
        ("https://name:word@host/mlflow/", "https://host/mlflow/#/experiments/7/runs/abc"),
        ("https://***@host", "https://host/#/experiments/7/runs/abc"),
        ("sqlite:////x/mlflow.db", None),
        ("javascript:alert(1)//http://host", None),
        ("file:///etc", None),
        ("", None),
    ],
)
def test_only_a_server_of_the_web_has_an_address(uri, link):
    run = SimpleNamespace(experiment_id="7", run_id="abc")
    assert run_address(uri, run) == link


def test_a_row_links_to_its_run_and_a_script_is_no_link(browser, data, tmp_path):
    rows = data["groups"][0]["rows"]
    for row, link in zip(
        rows, ["http://h:5000/#/experiments/1/runs/a", "javascript:document.title='taken'", "data:text/html,x", " jAvascript:1"],
        strict=False,
    ):  # fmt: skip
        row["link"] = link
    write_page(data, tmp_path / "page.html")
    look(browser, tmp_path / "page.html")
    links = find(browser, "a.run")
    assert [a.get_attribute("href") for a in links] == ["http://h:5000/#/experiments/1/runs/a"]
    assert "noopener" in links[0].get_attribute("rel")
    assert all(a.get_attribute("href").startswith(("http:", "file:")) for a in find(browser, "a"))


def test_each_scheme_has_an_address_that_leads_to_its_row(browser, data, tmp_path):
    write_page(data, tmp_path / "page.html")
    look(browser, tmp_path / "page.html", end="#scheme-int4-c")
    assert texts(browser, "tr.target td.name") == ["int4 c#"]
    top = browser.execute_script("return document.querySelector('tr.target').getBoundingClientRect().top")
    assert 0 < top < 900
    find(browser, "#filter")[0].send_keys("int8")  # it is hidden now, and its address shows it again
    browser.execute_script("location.hash = 'scheme-int4-b'")
    time.sleep(0.1)
    assert texts(browser, "tr.target td.name") == ["int4 b#"]
    ids = [e.get_attribute("id") for e in find(browser, "tr[id]")]
    assert len(ids) == len(set(ids)) == len(SCHEMES) + 2


# -- what is saved


def test_the_rows_that_are_shown_are_saved_as_csv(browser, data, tmp_path, downloads):
    data["groups"][0]["rows"][2]["name"] = '=HYPERLINK("http://x"), a'
    write_page(data, tmp_path / "page.html")
    look(browser, tmp_path / "page.html")
    find(browser, "#legend button[data-kind=torchao]")[0].click()
    find(browser, "[data-save=csv]")[0].click()
    rows = list(csv.DictReader(io.StringIO(saved(downloads, ".csv"))))
    names = {r["scheme"] for r in rows}
    assert '\'=HYPERLINK("http://x"), a' in names  # no formula of a spreadsheet's
    assert "int4 c" not in names
    own = next(r for r in rows if r["scheme"] == "int8 b")
    assert float(own["latent_rel_mse"]) == pytest.approx(SCHEMES["int8 b"][2].mean())
    assert (float(own["weights_bytes"]), bool(own["verdict on latent_rel_mse"])) == (4_200_000, True)
    assert {r["role"] for r in rows} == {"reference", "floor", "candidate"}
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("which", ["plot", "layers", "step_sqnr_db"])
@pytest.mark.parametrize("dark", [False, True])
def test_each_figure_is_saved_as_svg_that_stands_alone(browser, data, tmp_path, downloads, which, dark):
    write_page(data, tmp_path / "page.html")
    look(browser, tmp_path / "page.html", dark=dark)
    button = find(browser, f"[data-save={which}]")[0]
    browser.execute_script("arguments[0].click()", button)
    text = saved(downloads, f"{which}.svg")
    root = ET.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "var(" not in text
    assert "class=" not in text
    said = " ".join(root.itertext())
    assert "int8 b" in said or which != "plot"
    legend = [float(e.get("x")) for e in root.iter() if (e.text or "") in ("gguf", "quanto", "torchao")]
    assert which != "plot" or (len(legend) == 3 and legend == sorted(legend) and legend[-1] < float(root.get("width")))
    fills = {e.get("fill") for e in root.iter() if e.get("fill")}
    assert (fills & {"rgb(26, 32, 39)"} != set()) == dark  # the ground is the page's
    (tmp_path / "alone.svg").write_text(text)
    browser.get((tmp_path / "alone.svg").as_uri())
    assert float(root.get("width")) > 200


# -- a crowded plot


@pytest.mark.parametrize("width", [1200, 800, 390, 320])
def test_every_one_of_44_points_has_a_name_or_a_number_and_none_overlap(browser, data, tmp_path, width):
    crowded(browser, data, tmp_path, width)
    shown = texts(browser, ".plot .label")
    points = find(browser, ".point")
    assert len(points) == 45
    assert len(shown) == 45
    numbers = {t for t in shown if t.isdigit()}
    listed = find(browser, ".numbered li")
    assert numbers == {str(i + 1) for i in range(len(listed))}
    own = boxes(browser, ".plot .label")
    assert [pair for pair in itertools.combinations(own, 2) if overlap(*pair)] == []
    frame = boxes(browser, ".plot")[0]
    assert all(b[0] >= frame[0] and b[2] <= frame[2] + 1 for b in own)
    root = "document.documentElement"
    assert browser.execute_script(f"return {root}.scrollWidth - {root}.clientWidth") == 0
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("shift", [1.001, 1.02, 1.05])
def test_a_name_is_not_crossed_by_another_rows_interval(browser, data, tmp_path, shift):
    """A tall interval close behind a point is where its name would stand."""
    rows = {row["name"]: row for row in data["groups"][0]["rows"]}
    point, tall = rows["int8 b"], rows["floor_bf16"]
    tall["axes"]["weights_bytes"] = tall["weights_bytes"] = point["weights_bytes"] * shift
    tall["metrics"]["latent_rel_mse"] |= {"ci_lo": 1e-7, "ci_hi": 1e-3}
    write_page(data, tmp_path / "page.html")
    look(browser, tmp_path / "page.html")
    bars, names = boxes(browser, ".plot .bar"), boxes(browser, ".plot .label")
    assert len(bars) >= 2
    assert not [(bar, name) for bar in bars for name in names if overlap(bar, name)]


@pytest.mark.parametrize("width", [1200, 390])
def test_a_heat_maps_names_are_whole_and_its_numbers_fit_their_cells(browser, data, tmp_path, width):
    crowded(browser, data, tmp_path, width)
    frame = next(f for f in find(browser, "section") if "Where in the model" in f.text)
    browser.execute_script("arguments[0].id = 'layers-map'", frame)
    assert "transformer_blocks.9.attn.to_v" in texts(browser, "#layers-map .map-names text")
    headings = boxes(browser, "#layers-map .map-head text")
    assert len(headings) == 44
    cells = boxes(browser, "#layers-map .heat")
    assert min(b[2] - b[0] for b in cells) >= 17  # a heading has room
    for number in boxes(browser, "#layers-map .cell"):
        assert any(c[0] <= number[0] and number[2] <= c[2] and c[1] - 2 <= number[1] for c in cells)
    head = boxes(browser, "#layers-map .map-head")[0]
    assert all(h[0] >= head[0] - 2 and h[2] <= head[2] + 2 for h in headings)


def test_numbers_in_cells_have_contrast(browser, data, tmp_path):
    write_page(data, tmp_path / "page.html")
    look(browser, tmp_path / "page.html")
    ratios = browser.execute_script(
        """const lum = c => luminance(c.match(/\\d+/g).slice(0, 3).map(Number));
        return [...document.querySelectorAll('.cell')].map(t => { const a = lum(getComputedStyle(t).fill);
            const b = lum(getComputedStyle(t.previousSibling).fill); return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); })"""
    )
    assert ratios
    assert min(ratios) >= 4.5


# -- dark, narrow


def test_dark_colours_follow_the_system_or_the_button_and_are_readable(browser, data, tmp_path):
    write_page(data, tmp_path / "page.html")
    look(browser, tmp_path / "page.html", dark=True)
    ground = "return getComputedStyle(document.body).backgroundColor"
    assert browser.execute_script(ground) == "rgb(17, 21, 26)"
    poor = browser.execute_script(
        """const nums = c => c.match(/[\\d.]+/g).map(Number);
        const ground = n => { while (n) { const c = nums(getComputedStyle(n).backgroundColor); if (c.length < 4 || c[3] > 0.5) return c; n = n.parentElement; } return [17, 21, 26]; };
        return [...document.querySelectorAll('p, td > div, th .title, .pill, h1, h2, .question, .cost, label, button, small, dd')].filter(e => e.textContent.trim()).map(e => {
            const [a, b] = [nums(getComputedStyle(e).color), ground(e)].map(c => luminance(c.slice(0, 3)));
            return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.textContent.slice(0, 30)]; }).filter(x => x[0] < 4.5)"""
    )
    assert poor == []
    button = find(browser, "#theme")[0]
    button.click()
    assert button.text == "colours: light"
    assert browser.execute_script(ground) == "rgb(245, 247, 249)"


def test_the_page_rounds_as_the_terminal_does_and_has_its_words(browser, data, tmp_path):
    row = next(r for r in data["groups"][0]["rows"] if r["role"] == "candidate")
    row |= {"bits_per_weight_model": 8.625, "bits_per_weight_quantized": 4.125, "compression": 1.855}
    row |= {"weights_bytes": 18432, "is_simulated": False}
    write_page(data, tmp_path / "page.html")
    look(browser, tmp_path / "page.html")
    shown = texts(browser, f"tr[data-name='{row['name']}'] td")
    assert shown[1:3] == [f"{8.625:.2f}", f"{4.125:.2f}"]
    assert shown[3] == cells({"name": "", "status": "FINISHED", "metrics": {"memory/weights_bytes": 18432}}, [])[2]
    assert shown[4] == f"{1.855:.2f}\u00d7"
    assert "front" in texts(browser, "th .title")
    look(browser, tmp_path / "page.html", 390)
    assert "front" in browser.execute_script("return [...document.querySelectorAll('td')].map(e => e.dataset.label)")


def test_of_too_few_samples_no_front_is_sure(browser, data, tmp_path):
    for verdict in data["groups"][0]["views"]["latent_rel_mse"]["verdicts"].values():
        verdict |= {"verdict": "too few samples", "p_holm": None}
    write_page(data, tmp_path / "page.html")
    look(browser, tmp_path / "page.html")
    assert "surely" not in find(browser, "main")[0].text
    shown = texts(browser, "tr[data-name] td:has(.pill)")
    assert {text for text in shown if text} == {"too few samples"}, "no p stands beside it"


def test_a_small_bound_is_written_as_the_values_beside_it(browser, data, tmp_path):
    for row in data["groups"][0]["rows"]:
        row["metrics"]["latent_rel_mse"]["value"] *= 1e-4
    write_page(data, tmp_path / "page.html")
    look(browser, tmp_path / "page.html")
    assert "e-" in find(browser, "#quality")[0].get_attribute("value")


@pytest.mark.parametrize(("middle", "asked"), [(0.99993, "0.99993"), (0.9999876, "0.999987"), (0.993, "0.993")])
def test_the_bound_that_is_asked_first_of_a_rate_near_1_is_near_its_values(browser, data, tmp_path, middle, asked):
    view = data["groups"][0]["views"]["judge_agreement"]
    data["groups"][0] |= {"metric": "judge_agreement", "views": {"judge_agreement": view}}
    for row in data["groups"][0]["rows"]:
        row["metrics"]["judge_agreement"]["value"] = middle
    write_page(data, tmp_path / "page.html")
    look(browser, tmp_path / "page.html")
    assert find(browser, "#quality")[0].get_attribute("value") == asked
    assert "none of those shown" not in find(browser, ".answer")[2].text


def test_a_bound_below_0_is_written_as_it_is_typed_and_can_be_asked(browser, data, tmp_path):
    for row in data["groups"][0]["rows"]:
        row["metrics"]["latent_rel_mse"] |= {"value": -5.25, "ci_lo": None, "ci_hi": None}
    write_page(data, tmp_path / "page.html")
    look(browser, tmp_path / "page.html")
    assert find(browser, "#quality")[0].get_attribute("value") == "-5.2"
    assert browser.execute_script("return document.querySelector('#quality').checkValidity()")


def test_what_a_point_tells_has_single_spaces(opened):
    tips = [point.get_attribute("data-tip") for point in find(opened, ".point")]
    assert not [line for tip in tips for line in tip.split("\n") if "  " in line or line != line.strip()]


@pytest.mark.parametrize("width", [390, 320])
def test_on_a_phone_no_text_lies_beyond_the_edge_or_is_cut(browser, data, tmp_path, width):
    data["groups"][0]["rows"][2]["name"] = "torchao int4 group 64 with awq and a name that is very long indeed"
    write_page(data, tmp_path / "page.html")
    look(browser, tmp_path / "page.html", width)
    out = browser.execute_script(
        """return [...document.querySelectorAll('h1, h2, p, td > div, button, label, select, .answer, .plot text, li, dt, dd, footer')].filter(e => {
            const b = e.getBoundingClientRect(); return b.width && !e.closest('.map-frame') && (b.left < 0 || b.right > innerWidth + 1); }).map(e => e.textContent.slice(0, 40))"""
    )
    assert out == []
    cut = browser.execute_script(
        """return [...document.querySelectorAll('td, .answer, section')].filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.textContent.slice(0, 40))"""
    )
    assert cut == []


def with_texts(data):
    """The page of language models: two schemes, one of which says the same as the reference."""
    hostile = "<img src=x onerror=document.title='taken'>"
    said = {"prompt": "Once\n  upon <b>", "reference": [" a", " time", "."]}
    worst = [{"window": 0, "position": 9, "before": "the quick ", "token": "fox", "reference": " fox", "candidate": hostile, "kld_nats": k} for k in (2.5, 0.1)]  # fmt: skip
    data["groups"][0]["texts"] = {
        "schemes": [
            {"name": "int8 a", "continuations": [{**said, "candidate": said["reference"]}], "worst": worst[1:]},
            {"name": "int4 c", "continuations": [{**said, "candidate": [" a", hostile, "!"]}], "worst": worst},
        ]
    }
    return data


@pytest.mark.parametrize("width", [1200, 390])
def test_continuations_stand_side_by_side_and_what_differs_is_marked(browser, data, tmp_path, width):
    write_page(with_texts(data), tmp_path / "page.html")
    look(browser, tmp_path / "page.html", width)
    assert texts(browser, ".texts mark") == []
    choose(browser, "#texts", "1")
    hostile = "<img src=x onerror=document.title='taken'>"
    assert texts(browser, ".texts mark") == [" time", ".", hostile, "!"]
    assert len(find(browser, ".texts mark.first")) == 2
    ours, theirs = boxes(browser, ".texts .side")
    assert (ours[1] == theirs[1]) == (width > 640)
    assert texts(browser, ".texts .prompt") == ["Once\n  upon <b>"]
    assert [t for t in texts(browser, "td.quote b")] == ["fox", "fox"]
    assert "2.50" in find(browser, "main")[0].text
    assert browser.title != "taken"
    find(browser, "#filter")[0].send_keys("int8")
    assert [o.text for o in find(browser, "#texts option")] == ["int8 a"]
    assert browser.get_log("browser") == []


def test_a_page_without_texts_has_no_section_for_them(opened):
    assert "What does it say?" not in find(opened, "main")[0].text


def test_components_that_were_measured_apart_have_a_table_under_each_metric(browser, data, tmp_path):
    metrics = {
        "quality/alone/text_encoder/latent_rel_mse": 0.001,
        "quality/alone/text_encoder/latent_rel_mse/ci_lo": 0.0008,
        "quality/alone/text_encoder/latent_rel_mse/ci_hi": 0.002,
        "quality/on_top/text_encoder/latent_rel_mse": 0.003,
        "quality/alone/transformer/latent_rel_mse": 0.004,
        "memory/text_encoder/weights_bytes": 2.0**20,
        "memory/text_encoder/saved_bytes": 3 * 2.0**20,
        "memory/text_encoder/is_simulated": 1.0,
    }
    run = SimpleNamespace(name="int4 c", metrics=metrics)
    found = costs([run], "latent_rel_mse")
    assert [(c["component"], c["alone"]["value"]) for c in found] == [("text_encoder", 0.001), ("transformer", 0.004)]
    assert costs([run], "psnr_db") == []
    data["groups"][0]["views"]["latent_rel_mse"]["costs"] = found
    write_page(data, tmp_path / "page.html")
    look(browser, tmp_path / "page.html")
    section = next(s for s in find(browser, "section") if "Which component costs what?" in s.text)
    assert "text_encoder int4 c ~1.00 3.00 0.00100 8.0e\u22124 to 0.00200 +0.00300" in " ".join(section.text.split())
    choose(browser, "#metric", "judge_agreement")
    assert "Which component costs what?" not in find(browser, "main")[0].text
    assert browser.get_log("browser") == []


@pytest.mark.parametrize(("metric", "value"), [("latent_rel_mse", 7.04e-4), ("psnr_db", 39.56), ("psnr_db", 39.64)])
def test_a_single_scheme_answers_what_the_page_asks_first(browser, data, tmp_path, metric, value):
    group = data["groups"][0]
    first = next(row for row in group["rows"] if row["role"] == "candidate")
    group["rows"] = [first, *(row for row in group["rows"] if row["role"] != "candidate")]
    first["metrics"][metric] = {"value": value, "ci_lo": None, "ci_hi": None, "floor": None}
    group["images"]["schemes"] = group["images"]["schemes"][:1]
    view = group["views"]["latent_rel_mse"]
    group["views"][metric] = {**view, "metric": metric, "higher_is_better": metric == "psnr_db"}
    write_page(data, tmp_path / "page.html")
    look(browser, tmp_path / "page.html", 390)
    choose(browser, "#metric", metric)
    answers = find(browser, ".answer")
    assert first["name"] in answers[2].text, "its own number, rounded, is one that it keeps to"
    assert find(browser, "#told")[0].text == "1 scheme"
    assert not find(browser, "#scheme-slider")
    card = find(browser, "td.long")[0]
    assert card.rect["width"] > 250, "a reason has the whole card of a phone"


def test_of_schemes_of_one_size_the_smallest_is_the_better_one(browser, data, tmp_path):
    group = data["groups"][0]
    worse, best = [row for row in group["rows"] if row["role"] == "candidate" and row["weights_bytes"]][:2]
    for row, value in ((worse, 3e-9), (best, 1e-9)):
        row["weights_bytes"] = 1
        row["metrics"]["latent_rel_mse"] = {"value": value, "ci_lo": None, "ci_hi": None, "floor": None}
    write_page(data, tmp_path / "page.html")
    look(browser, tmp_path / "page.html", 1280)
    assert find(browser, ".answer")[2].text.splitlines()[1] == best["name"]
