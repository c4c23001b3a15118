"""Schemes that name each component's own have long names: what is said of them, their tables, and the page."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace
from types import SimpleNamespace

import pytest

from quantlab.progress import unbroken
from quantlab.report.attribution import attribution_sheet
from quantlab.report.compare import compare
from quantlab.report.comparison_data import group_data
from quantlab.report.comparison_markdown import comparison_markdown
from quantlab.report.html import write_page
from quantlab.report.reading import open_reader
from quantlab.report.selection import parse_request, select
from quantlab.report.terminal import tab_separated
from quantlab.report.views import kinds
from quantlab.tracking.tags import UNQUANTIZED
from quantlab.vocabulary.numbers import ALONE, ON_TOP
from tests.support.browser import boxes, choose, find, look, saved, texts
from tests.support.many_schemes import with_components

PARTS = ("transformer", "text_encoder_3")
METRIC = "latent_rel_mse"
SENTENCE = "transformer: 40 % of its weights stay unquantized; the largest are " + ", ".join(
    ["time_embed.linear_1"] * 12
)


def measured(name, cost):
    metrics = {"memory/weights_bytes": 3 * 2.0**20, f"quality/{METRIC}": cost * 3, f"quality/{METRIC}/n": 4}
    for part in PARTS:
        metrics |= {f"memory/{part}/weights_bytes": 2.0**20, f"memory/{part}/saved_bytes": 3 * 2.0**20}
        metrics |= {f"{ALONE}/{part}/{METRIC}": cost, f"{ON_TOP}/{part}/{METRIC}": -cost}
    return {"name": name, "status": "FINISHED", "metrics": metrics}


def test_a_plain_table_says_on_each_line_whose_component_it_is():
    sheet = attribution_sheet([measured("a + b", 1e-3), measured("a + c", 2e-3)], [METRIC, "psnr_db"], is_plain=True)
    lines = [line.split("\t") for line in tab_separated(sheet)]
    assert lines[0][:2] == ["scheme", "component"]
    assert not any("psnr" in title for title in lines[0]), "no scheme has it"
    found = [(line[0], line[1]) for line in lines[1:]]
    assert found == [(name, part) for name in ("a + b", "a + c") for part in ("all together", *PARTS)]
    assert lines[2][-2:] == ["0.001", "-0.001"]


def test_a_component_that_is_stored_wider_than_its_dtype_says_is_marked():
    row = measured("a + b", 1e-3)
    row["metrics"] |= {"memory/is_simulated": 1.0, f"memory/{PARTS[0]}/is_simulated": 1.0}
    row["metrics"] |= {f"memory/{PARTS[1]}/is_simulated": 0.0}
    sheet = attribution_sheet([row], [METRIC])
    assert [line[1] for line in sheet.rows] == ["~3.00", "~1.00", "1.00"]
    assert "~ simulated: stored wider than the dtype says" in " ".join(sheet.caption)


def test_rows_that_were_not_measured_apart_have_no_table():
    row = {"name": "a", "status": "FINISHED", "metrics": {f"quality/{METRIC}": 1.0}}
    assert attribution_sheet([row], [METRIC]) is None
    assert attribution_sheet([measured("a + b", 1.0)], ["psnr_db"]) is None


@pytest.fixture
def compared(sweep):
    """Its candidates measured apart, and with a sentence of what stays unquantized."""
    request = parse_request(["sweep=latest"])
    reader = open_reader(request.tracking, sweep.folder)
    selection = select(request, reader)
    [group] = compare(request, selection, reader)
    runs = []
    for run in group.runs:
        is_scheme = "quantization/coverage" in run.metrics
        own = {k: v for k, v in measured("", 1e-3)["metrics"].items() if k.startswith((ALONE, ON_TOP, "memory/t"))}
        tags = {**run.tags, UNQUANTIZED: f'["{SENTENCE}"]'}
        runs.append(replace(run, metrics={**run.metrics, **own}, tags=tags) if is_scheme else run)
    return replace(group, runs=tuple(runs)), selection


def test_markdown_and_json_have_what_each_component_costs(compared):
    group, selection = compared
    text = comparison_markdown([group], selection)
    assert "**which component costs what**" in text
    lines = [line for line in text.splitlines() if "| text\\_encoder" in line or "| text_encoder_3 |" in line]
    assert len(lines) == len(group.candidates)
    costs = group_data(group)["costs"]
    assert len(costs) == 2 * len(group.candidates)
    assert {c["component"] for c in costs} == set(PARTS)


def test_a_sentence_is_said_once_of_all_schemes_and_is_whole(compared):
    group, selection = compared
    text = comparison_markdown([group], selection)
    assert text.startswith(f"all {len(group.candidates)} schemes: {unbroken(SENTENCE)}.")


def scheme_run(name, **params):
    return SimpleNamespace(name=name, params={k.replace("__", "."): v for k, v in params.items()}, metrics={})


def of_components(name, first, second):
    own = {"components__transformer__backend": "bitsandbytes", "components__transformer__dtype": first}
    return scheme_run(
        name, quantization__backend="none", components__vae__backend="quanto", components__vae__dtype=second, **own
    )


def test_colours_tell_component_schemes_apart_by_the_component_that_has_most():
    found = kinds(
        [of_components("a", "nf4", "int8"), of_components("b", "nf4", "int4"), of_components("c", "fp4", "int2")]
    )
    assert list(found) == ["vae", "transformer"], "the library is one for all"
    assert found["vae"] == {"a": "quanto int8", "b": "quanto int4", "c": "quanto int2"}
    whole = scheme_run("d", quantization__backend="gguf", quantization__dtype="q8_0")
    kept = scheme_run("e", quantization__backend="gguf", quantization__dtype="q8_0", components__vae__backend="none")
    mixed = kinds([of_components("a", "nf4", "int8"), whole, kept])
    assert list(mixed) == ["vae", "transformer", "backend"]
    assert mixed["vae"] == {"a": "quanto int8", "d": "gguf q8_0", "e": "none"}
    assert mixed["transformer"] == {"a": "bitsandbytes nf4", "d": "gguf q8_0", "e": "gguf q8_0"}


def test_colours_are_the_librarys_or_of_what_differs_where_that_does_not():
    def one(name, backend, dtype, algorithm="max", **more):
        own = {"backend": backend, "dtype": dtype, "algorithm": algorithm}
        return scheme_run(name, **{f"quantization__{k}": v for k, v in own.items()}, **more)

    assert list(kinds([one("a", "quanto", "int8"), one("b", "gguf", "q8_0")])) == ["backend", "dtype"]
    assert list(kinds([one("a", "quanto", "int8"), one("b", "quanto", "int4")])) == ["dtype"]
    assert list(kinds([one("a", "modelopt", "int4"), one("b", "modelopt", "int4", "awq_lite")])) == ["algorithm"]
    foreign = one("b", "none", "", resolved__checkpoint_method="bitsandbytes")
    assert kinds([one("a", "quanto", "int8"), foreign])["backend"] == {"a": "quanto", "b": "bitsandbytes"}
    assert kinds([one("a", "quanto", "int8")]) == {"backend": {"a": "quanto"}}


def test_the_legend_and_the_points_have_a_colour_for_each_scheme_of_the_chosen_component(browser, data, tmp_path):
    write_page(with_components(data), tmp_path / "page.html")
    look(browser, tmp_path / "page.html")

    def colours():
        fill = "return [...document.querySelectorAll('.point')].map(e => [e.dataset.name, getComputedStyle(e).fill])"
        return {name: fill for name, fill in browser.execute_script(fill) if name.startswith("transformer")}

    assert texts(browser, "#legend button") == ["bitsandbytes int4", "bitsandbytes int8"]
    first = colours()
    assert len(first) == 5
    assert len({*first.values()}) == 2
    find(browser, '#legend button[data-kind="bitsandbytes int4"]')[0].click()
    assert len(colours()) == 2
    choose(browser, "#kind", "text_encoder_3")
    assert texts(browser, "#legend button") == ["quanto int4", "quanto int8"]
    assert len(colours()) == 5, "another choice of colours hides nothing"
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("which", ["layers", "plot"])
def test_a_figure_that_is_saved_has_its_list_its_scale_and_its_colours_words(browser, data, tmp_path, downloads, which):
    made = with_components(data)
    write_page(made, tmp_path / "page.html")
    look(browser, tmp_path / "page.html", 390)
    numbers = texts(browser, ".plot .label") if which == "plot" else list("ABCDE")
    browser.execute_script("arguments[0].click()", find(browser, f"[data-save={which}]")[0])
    text = saved(downloads, f"{which}.svg")
    said = ["".join(e.itertext()) for e in ET.fromstring(text).iter("{http://www.w3.org/2000/svg}text")]
    names = [row["name"] for row in made["groups"][0]["rows"] if row["role"] == "candidate"]
    listed = [words.partition("  ") for words in said if "  " in words]
    assert {name for _, _, name in listed} <= {*names, "floor_bf16"}
    assert {n for n, _, _ in listed} == {n for n in numbers if len(n) < 3}
    assert "text_encoder" in " ".join(said)
    if which == "layers":
        assert len(listed) == 5
        assert set(made["groups"][0]["layers"]["rows"]) <= {*said}, "the rows' names are whole"
        assert any("darker is worse" in words for words in said)
    else:
        assert {"transformer:", "bitsandbytes int4", "bitsandbytes int8"} <= {*said}
    (tmp_path / "alone.svg").write_text(text)
    browser.get((tmp_path / "alone.svg").as_uri())
    whole = boxes(browser, "svg")[0]
    assert all(b[0] >= -1 and b[2] <= whole[2] + 1 and b[3] <= whole[3] + 1 for b in boxes(browser, "svg text"))


@pytest.mark.parametrize("width", [1200, 800, 390, 320])
def test_no_column_and_no_word_of_the_page_lies_beyond_its_edge(browser, data, tmp_path, width):
    write_page(with_components(data), tmp_path / "page.html")
    look(browser, tmp_path / "page.html", width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    told = """return [...document.querySelectorAll('.warning, .answer, td, .numbered')].filter(e => e.scrollWidth > e.clientWidth + 1)
        .map(e => e.textContent.slice(0, 60))"""
    assert browser.execute_script(told) == []
    if width == 1200:
        tables = "return [...document.querySelectorAll('.wide')].map(e => e.scrollWidth - e.clientWidth)"
        assert max(browser.execute_script(tables)) <= 1, "the verdicts are seen without scrolling"
    assert browser.get_log("browser") == []


def test_on_a_phone_the_cells_of_a_map_are_seen_and_its_long_names_are_listed(browser, data, tmp_path):
    write_page(with_components(data), tmp_path / "page.html")
    look(browser, tmp_path / "page.html", 390)
    [frame] = [f for f in find(browser, "section") if "Where in the model" in f.text]
    browser.execute_script("arguments[0].id = 'layers-map'", frame)
    seen = """const f = document.querySelector('#layers-map .map-frame').getBoundingClientRect();
        return [...document.querySelectorAll('#layers-map .heat')].filter(e => e.getBoundingClientRect().right <= f.right + 1).length"""
    assert browser.execute_script(seen) == 30 * 5, "of all layers and schemes"
    assert texts(browser, "#layers-map .map-head text") == list("ABCDE")
    listed = texts(browser, "#layers-map .numbered li")
    assert listed == [f"transformer: bitsandbytes {n} + text_encoder_3: quanto {n}" for n in
                      ("int4 a", "int4 b", "int8 a", "int8 b", "int4 c")]  # fmt: skip
    names = texts(browser, "#layers-map .map-names text")
    assert all(name.startswith("…") and name.endswith(f"wi_{i}") for i, name in enumerate(names))
