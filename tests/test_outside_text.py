"""Text from outside (names, patterns, a library's words) is text: never markup, an escape, an element or a path."""

from __future__ import annotations

import ast
import contextlib
import csv
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from quantlab import cli, commands, progress
from quantlab.errors import ConfigError, QuantlabError
from quantlab.planning.data import check_data
from quantlab.planning.listing import LISTS
from quantlab.planning.plan import plan
from quantlab.progress import file_name, plain, printable, progress_bars, say
from quantlab.report.comparison_data import write_csv
from quantlab.report.html import page
from quantlab.report.reproduction import Check, Reproduction, reproduction_sheets
from quantlab.report.table import markdown, rows_sheet
from quantlab.report.terminal import Sheet, show
from quantlab.tracking import find_runs
from quantlab.tracking.values import flatten
from quantlab.vocabulary.reports import RunReport
from tests.support.shell import digits_words

PACKAGE = Path(__file__).parent.parent / "quantlab"
VISIBLE = [
    "[/.]",
    "[red]not red[/red]",
    "[bold",
    "[/]",
    "a[0] and b[1]",
    ":smile: :x:",
    "\\[x]",
    "{a} %s {{}}",
    "<b>&amp;",
]
UNSEEN = {
    "\x1b[31mred\x1b[0m": "\\x1b[31mred\\x1b[0m",
    "\x1b]0;taken\x07": "\\x1b]0;taken\\x07",
    "a\x00b\x08c\x9bd": "a\\x00b\\x08c\\x9bd",
    "a\u202eb\u2066c": "a\\u202eb\\u2066c",
    "half \ud800 of one": "half \\ud800 of one",
    "a\rb": "a\\rb",
}
LONG = "x" * 10_000
HOSTILE = [*VISIBLE, *UNSEEN, LONG]


def seen(text: str) -> str:
    """How ``text`` may stand on a terminal."""
    return UNSEEN.get(text, text)


def is_clean(out: str) -> bool:
    return not any(c in out for c in "\x1b\x00\x07\x08\x9b\u202e\u2066") and out.encode(errors="strict") is not None


@pytest.fixture
def shown(monkeypatch):
    """What the console of the bars has written."""
    out = io.StringIO()
    console = Console(file=out, width=300, markup=False, highlight=False, emoji=False)
    monkeypatch.setattr(progress, "console", console)
    return out


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: ascii(t)[:20])
@pytest.mark.parametrize("kind", ["", "failed", "warning", "launcher", "out of memory"])
def test_a_line_beside_the_bars(shown, text, kind):
    say(f"x {text}", kind)
    out = shown.getvalue()
    assert is_clean(out)
    assert out == (f"{kind}: " if kind else "") + f"x {printable(f'x {text}', lines=True)[2:]}\n"
    assert text == LONG or seen(text) in out


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: ascii(t)[:20])
def test_a_bar(shown, text):
    with progress_bars() as advance:
        advance(text, 1, 3, text)
        advance(text, 2, 3, f"2 {text}")
    assert is_clean(shown.getvalue())
    assert text == LONG or text == "a\rb" or seen(text) in shown.getvalue()


def rendered(*what) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        console = commands.terminal(400)
        for one in what:
            show(console, one) if isinstance(one, Sheet) else console.print(one)
    return out.getvalue()


def row(name):
    return {
        "name": name,
        "status": "FAILED",
        "protocol": "diffusion",
        "metrics": {},
        "error": name,
        "failed_stage": name,
    }


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: ascii(t)[:20])
def test_tables(text):
    check = Check(name=text, was=1.0, now=2.0, ci_lo=None, ci_hi=None, status="different")
    found = Reproduction.__new__(Reproduction)
    object.__setattr__(found, "checks", (check,))
    object.__setattr__(found, "times", (check,))
    for out in (
        rendered(rows_sheet([row(text)], "diffusion", text)),
        rendered(*reproduction_sheets(found)),
        rendered(plain(text)),
    ):
        assert is_clean(out)
        assert text == LONG or seen(text) in out
    assert max(map(len, out.splitlines())) <= 400


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: ascii(t)[:20])
def test_lists_and_results_of_a_request(monkeypatch, capsys, text):
    monkeypatch.setitem(LISTS, "recipes", lambda: [{"recipe": text, "question": text}])
    monkeypatch.setenv("COLUMNS", "400")
    cli.show_list(["recipes"], set())
    report = RunReport(name=text, status="FAILED", protocol="diffusion", error=text, failed_stage="load")
    skipped = RunReport(name=text, status="SKIPPED", protocol="diffusion", error=text)
    monkeypatch.setattr("quantlab.running.sweep.run_plan", lambda *args, **kwargs: [report, skipped])
    assert cli.run(plan(["backend=quanto"]), {"--quiet"}) == 1
    said = capsys.readouterr()
    assert is_clean(said.out)
    assert is_clean(said.err)
    assert text == LONG or said.out.count(seen(text)) >= 3


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: ascii(t)[:20])
def test_an_error(monkeypatch, capsys, text):
    monkeypatch.setattr(
        cli, "dispatch", lambda words, **_: (_ for _ in ()).throw(QuantlabError(f"key: {text}\n  more"))
    )
    with pytest.raises(SystemExit):
        cli.main(["x"])
    err = capsys.readouterr().err
    assert is_clean(err)
    assert seen(text) in err
    assert err.endswith("\n  more\n"), "its own lines stay"


@pytest.mark.parametrize("text", [*HOSTILE, "../../x", "/etc/passwd", "a|b", "..", ""], ids=lambda t: ascii(t)[:20])
def test_a_name_is_never_a_path_and_never_ends_a_cell(text):
    made = file_name(text)
    assert "/" not in made
    assert len(made.encode()) <= 60
    lines = markdown([row(text)], "diffusion").splitlines()
    assert len(lines) == 3
    assert lines[2].replace("\\\\", "").replace("\\|", "").count("|") == lines[0].count("|")


def test_every_printed_text_goes_through_one_door():
    """Consoles take no markup; what stands in tables is made by ``plain`` (or is a word of ours)."""

    def is_ours(node):
        if isinstance(node, ast.Starred):
            return is_ours(node.value)
        if isinstance(node, ast.GeneratorExp):
            return is_ours(node.elt)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            first = node.args[0] if node.args else None
            return node.func.id in ("plain", "_number") or (
                node.func.id == "map" and isinstance(first, ast.Name) and first.id == "plain"
            )
        if isinstance(node, ast.JoinedStr):
            return all(isinstance(v, ast.Constant) or "len(" in ast.unparse(v) for v in node.values)
        return isinstance(node, ast.Constant) or (isinstance(node, ast.Name) and node.id.isupper())

    bad = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            said = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name == "add_row" and not all(is_ours(a) for a in node.args):
                bad.append(f"{file.name}:{node.lineno}: add_row")
            if name == "TextColumn" and "{" in ast.unparse(node.args[0]) and said.get("markup") != "False":
                bad.append(f"{file.name}:{node.lineno}: {name}")
            if name in ("Console", "Terminal") and (said.get("markup"), said.get("emoji")) != ("False", "False"):
                bad.append(f"{file.name}:{node.lineno}: {name}")
    assert bad == []


# -- the store and the page


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: ascii(t)[:20])
def test_a_run_of_any_name_reaches_the_store(store, runs, text):
    folder = runs / "one"
    params = {"quantization": {"tensor_types": {text: "q8_0"}, "n": 1}}
    run = store.start_run(text, folder, params, {"quantlab.kind": "job"})
    run.log_json({"name": text}, "rows.json")
    run.finish("FAILED", f"RuntimeError: {text}")
    [found] = find_runs(store, status="FAILED")
    assert found["name"]
    assert len(found["name"]) <= 250
    assert is_clean(found["name"].replace("\n", ""))
    told = found["tags"]["quantlab.failure"]
    assert told.startswith("RuntimeError: ")
    assert is_clean(told)
    assert text == LONG or seen(text).replace("\\r", "") in told.replace("\\r", "")
    assert found["params"]["quantization.n"] == "1"


def test_a_mapping_by_patterns_is_one_parameter():
    assert flatten({"a": {"blk.*": 1}, "b": {"c": 2}}) == {"a": '{"blk.*": 1}', "b.c": "2"}


@pytest.mark.parametrize("text", [*HOSTILE, "</script><script>x"], ids=lambda t: ascii(t)[:20])
def test_the_page_holds_it_as_data(text):
    data = {"title": text, "groups": [], "failed": [{"name": text, "error": text}], "created": ""}
    made = page(data)
    held = made.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    shown = "".join(
        f"\\u{ord(c):04x}" if c in "\u202e\u2066" else c for c in text
    )  # marks that turn words are written out
    assert json.loads(held)["failed"][0]["error"] == shown
    assert "<" not in held
    assert "<script>x" not in made


SCRIPTS = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function")


def test_the_pages_script_writes_text_only():
    script = "".join(p.read_text() for p in sorted((PACKAGE / "report" / "page").glob("*.js")))
    assert "createElement" in script
    assert [word for word in SCRIPTS if word in script] == []


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", '=HYPERLINK("x"),\'a\n'])
def test_no_cell_of_a_csv_file_is_a_formula(tmp_path, text):
    failed = {"name": text, "run_id": "a", "status": "FAILED", "stage": text, "error": text}
    write_csv([], [failed], tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(newline="") as file:
        [line] = csv.DictReader(file)
    assert line == {"name": f"'{text}", "run_id": "a", "status": "FAILED", "stage": f"'{text}", "error": f"'{text}"}


# -- a request


ENTRIES = ["re:[/.]", *(pytest.param(text, marks=pytest.mark.slow) for text in ("re:x[/red]", "*[/]*"))]


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_pattern_with_brackets_ends_no_sweep(shell, entry):
    words = digits_words(
        "sweep.floors=false", "backend=quanto,torchao", f"quantization.modules_to_not_convert.own=['{entry}']"
    )
    code, out, err = shell("-m", *words)
    assert code == 1
    assert err.count(entry) >= 2
    assert "MarkupError" not in out + err
    assert "Traceback" not in err


@pytest.mark.parametrize("text", [t for t in UNSEEN if t != "a\rb"], ids=lambda t: ascii(t)[:20])
@pytest.mark.parametrize("key", ["name", "output_dir", "model.path", "quantization.modules_to_not_convert.own"])
def test_what_no_name_has_is_refused(key, text):
    if "\u202e" in text:
        pytest.skip("a mark, not a control character: it is shown written out")
    value = f"['{text}']" if key.startswith("quant") else f"'{text}'"
    with pytest.raises(ConfigError, match=rf"^{key}"):
        plan(["backend=quanto", f"{key}={value}"])


def test_what_a_pipeline_is_told_may_have_lines():
    words = ["backend=quanto", "model=sdxl", "+model.call.lyrics='[verse]\nSoft rain'"]
    assert plan(words).jobs[0].config.model.call == {"lyrics": "[verse]\nSoft rain"}
    with pytest.raises(ConfigError, match="control character"):
        check_data({"ly\nrics": "a"}, "model.call")


@pytest.mark.parametrize(
    "word",
    [
        f"name={LONG}",
        f"tracking.experiment={LONG}",
        f"output_dir={LONG}",
        f"quantization.modules_to_not_convert.{LONG}=[a]",
        "quantization.modules_to_not_convert.a/b=[a]",
    ],
)
def test_a_name_has_a_length(word):
    with pytest.raises(ConfigError, match=rf"^{word[:10]}"):
        plan(["backend=quanto", word])


def test_a_long_scheme_has_a_name_that_fits():
    words = [
        "backend=gguf",
        "dtype=q4_k",
        f"quantization.tensor_types={{{','.join(f'layer{i}:q8_0' for i in range(400))}}}",
    ]
    (job,) = plan(words).jobs
    assert len(job.name) <= 200
    assert job.name != plan([*words[:2], words[2].replace("layer0", "layer_0")]).jobs[0].name
