"""What a run found out, in hand: DataFrames, arrays, and how it shows itself."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

import quantlab
from quantlab import Results, progress
from quantlab.errors import ConfigError, TrackingError
from quantlab.report.results import chosen_rows, next_steps
from quantlab.report.selection import parse_request
from quantlab.vocabulary import reports
from quantlab.vocabulary.schema import TrackingConfig
from tests.support.shell import digits_words, make_shell
from tests.support.stores import ROOT

WORDS = digits_words("backend=quanto", "dtype=int8,int4")


@pytest.fixture(scope="module")
def ran(tmp_path_factory, template, trained):
    """A sweep of two schemes, run from Python: its folder and what it returned."""
    shell = make_shell(tmp_path_factory.mktemp("results"), template, trained)
    with contextlib.chdir(shell.folder):
        return shell.folder, quantlab.run(overrides=WORDS, quiet=True)


@pytest.fixture
def here(ran, monkeypatch):
    monkeypatch.chdir(ran[0])
    return ran[1]


def same(a, b):
    assert list(a.columns) == list(b.columns)
    assert a.sort_index().equals(b.sort_index())


def test_rows_layers_samples_steps_and_images(here):
    names = ["reference", "floor_bf16", "floor_batch", "quanto int8", "quanto int4"]
    assert list(here.rows.index) == names
    int4 = here.rows.loc["quanto int4"]
    assert int4["status"] == "FINISHED"
    assert int4["quantization.dtype"] == "int4"
    assert int4["quality/latent_rel_mse"] == here[-1].quality["latent_rel_mse"].value
    layers = here.layers.loc["quanto int4"]
    assert set(layers.dtype[layers.status == "quantized"]) == {"int4"}
    samples = here.samples.loc["quanto int4"]
    assert samples["latent_rel_mse"].mean() == pytest.approx(int4["quality/latent_rel_mse"], rel=1e-9)
    assert len(here.steps.loc["quanto int8"]) == 2, "denoising steps"
    images = here.images["quanto int4"]
    assert images.dtype == np.uint8
    assert images.shape[1] == 3


def test_the_same_of_a_store_that_is_read_later(here):
    for what in ("latest", here.sweep_id, "quantlab"):
        later = quantlab.load(what)
        assert {r.name for r in later} == {r.name for r in here}
        same(later.layers, here.layers)
        same(later.samples, here.samples)
        old, new = (r.rows["quality/latent_rel_mse"].sort_index() for r in (here, later))
        assert old.equals(new)
    [one] = quantlab.load(here[-1].run_id)
    assert "(resumed)" not in repr(quantlab.load()), "it is what a request does, and nothing of a row that is read"
    assert one.name == "quanto int4"
    assert one.quality["latent_rel_mse"] == here[-1].quality["latent_rel_mse"]


@pytest.mark.parametrize("store", ["sqlite", "none"])
def test_a_single_run_is_loaded_with_the_rows_that_it_showed(store, tmp_path, template, trained, monkeypatch):
    monkeypatch.chdir(make_shell(tmp_path, template, trained).folder)
    shown = quantlab.run(overrides=digits_words("backend=quanto", "dtype=int8", f"tracking={store}"), quiet=True)
    uri = "none" if store == "none" else None
    for what in ("latest", shown[-1].run_id):
        found = quantlab.load(what, uri=uri)
        assert (
            list(found.rows.index)
            == list(shown.rows.index)
            == ["reference", "floor_bf16", "floor_batch", "quanto int8"]
        )
        assert found.rows["quality/latent_rel_mse"].equals(shown.rows["quality/latent_rel_mse"])
        assert repr(found) == repr(shown)
        same(found.layers, shown.layers)
        assert repr(found.compare()) == repr(shown.compare())


def test_a_cell_that_is_run_again_has_all_of_it(here):
    again = quantlab.run(overrides=WORDS, quiet=True)
    assert [r.is_resumed for r in again][-2:] == [True, True]
    same(again.layers, here.layers)
    same(again.samples, here.samples)
    same(again.steps, here.steps)
    assert set(again.images) == set(here.images)


def test_a_comparison_as_the_command_prints_it(here):
    text = here.compare(metric="psnr")
    assert repr(text) == text
    assert " less that of " in " ".join(text.split())
    with pytest.raises(ConfigError, match="metric=ppl"):
        here.compare(metric="ppl")


def test_what_a_notebook_shows(here):
    text = repr(here)
    assert len(text.splitlines()) <= 15
    assert "quanto int4" in text
    page = here._repr_html_()
    assert page.count("<tr>") == 6
    assert page.count("data:image/png;base64,") >= 2
    assert all(len(repr(report).splitlines()) <= 15 for report in here)
    assert all(len(repr(part).splitlines()) <= 15 for part in (here[-1].quantization, here[-1].measurements))
    assert "layers: " in repr(here[-1].quantization)


def test_in_a_notebook_too_it_is_text_and_nothing_is_shown_twice(here, monkeypatch):
    """rich takes a process of Jupyter for one whose tables are to be shown at once."""
    before, compared = repr(here), str(here.compare())
    shown = []
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("rich.jupyter.display", lambda *told: shown.append(told))
    assert repr(here) == before
    assert str(here.compare()) == compared
    assert not shown


def test_what_html_says_beside_the_table(here):
    page = here._repr_html_()
    assert "95\u00a0% interval" in page, "what the marks mean, of which no line ends before a percent sign"
    assert "95 %" not in page
    assert 'style="text-align:left">quanto int4' in page
    pictures = re.findall(r'alt="samples of ([^"]+)"', page)
    assert pictures == ["quanto int8", "quanto int4"], "schemes, not the reference beside itself"
    compared = here.compare()
    shown = compared._repr_html_()
    assert shown.count("<table>") == 1, "a table, whose room is the notebook's"
    assert "verdict on latent_rel_mse</th>" in shown
    assert "closest to the reference: quanto int8" in shown
    assert repr(pickle.loads(pickle.dumps(compared))) == str(compared)
    hostile = dataclasses.replace(here[-1], name="<img src=x>", run_id=None)
    assert "<img src=x" not in Results([hostile], lambda: None)._repr_html_()


def test_in_html_no_number_is_broken_and_the_table_scrolls_where_there_is_no_room(here):
    page = here._repr_html_()
    numbers = re.findall(r'<td style="([^"]*)">', page)
    assert {"white-space:nowrap" in style for style in numbers if "right" in style} == {True}
    assert '<div style="overflow-x:auto"><table>' in page
    assert "psnr [dB]\u00a0\u2191</th>" in page, "no arrow alone in a line"


def test_html_says_why_rows_failed(here):
    broken = dataclasses.replace(here[-1], status="FAILED", failed_stage="quantize", error="no <room>: " + "x" * 2000)
    page = Results([here[0], broken, *[broken] * 9], lambda: here._reader)._repr_html_()
    assert "<div>failed: quanto int4 at quantize: no &lt;room&gt;: x" in page
    assert "x" * 400 not in page
    assert "... and 4 more that failed: .rows has all" in page


def test_what_failed_is_loaded_in_its_place():
    """It has no numbers by which to be known as a scheme."""
    names = ["floor_bf16", "quanto int8", "gguf q4_k", "quanto int4", "reference"]
    runs = [
        SimpleNamespace(
            name=name,
            start_ms=i,
            tags={},
            status="FAILED" if "gguf" in name else "FINISHED",
            metrics={} if "gguf" in name or " " not in name else {"quantization/coverage": 1.0},
        )
        for i, name in enumerate(names)
    ]
    reader = SimpleNamespace(by_id=lambda ids: runs[::-1], read_artifact=lambda run, name: None)
    found = [run.name for run, _ in chosen_rows("x", reader, TrackingConfig())]
    assert found == ["floor_bf16", "reference", "quanto int8", "gguf q4_k", "quanto int4"]


def test_a_single_report_shows_its_row_and_its_images(here):
    page = here[-1]._repr_html_()
    assert page.count("<tr>") == 2
    assert re.findall(r'alt="samples of ([^"]+)"', page) == ["quanto int4"]
    assert f"run: {here[-1].run_id}" in page
    assert page.startswith(quantlab.load("latest")[-1]._repr_html_().rpartition("<div>run:")[0]), "read back, too"


def test_its_parts_show_tables(here):
    layers = here[-1].quantization._repr_html_()
    assert "<th" in layers
    assert ">int4</td>" in layers
    assert "more row" in layers or layers.count("<tr>") > 1
    assert "data:image/png;base64," in here[-1].measurements._repr_html_()
    assert "weights_bytes" in here[-1].memory["transformer"]._repr_html_()
    assert "seconds" in here[-1].stages[0]._repr_html_()


def test_a_report_that_is_copied_or_pickled_shows_its_fields(here):
    again = pickle.loads(pickle.dumps(here[-1]))
    assert dataclasses.replace(again, measurements=None) == dataclasses.replace(here[-1], measurements=None)
    page = again._repr_html_()
    assert "<b>RunReport</b>" in page
    assert "psnr_db" in page
    assert "StageReport" not in page, "stages are a table"
    assert copy.deepcopy(here[-1]).name == "quanto int4"


def test_no_report_shows_markup_of_its_content(here):
    hostile = "<img src=x onerror=alert(1)>\u202e"
    one = dataclasses.replace(here[-1], name=hostile, error=hostile, failed_stage=hostile, run_id=None, status="FAILED")
    layers = tuple(dataclasses.replace(layer, name=hostile) for layer in here[-1].quantization.layers)
    told = dataclasses.replace(here[-1].quantization, layers=layers, resolved={hostile: hostile})
    for shown in (one, Results([one], lambda: None)[0], told):
        assert "<img src=x" not in shown._repr_html_()
        assert "\u202e" not in shown._repr_html_()
        assert "&lt;img" in shown._repr_html_()


def test_the_first_columns_of_the_rows_are_what_one_looks_for(here):
    assert list(here.rows.columns[:5]) == [
        "memory/weights_bytes", "memory/compression", "quality/latent_rel_mse", "quality/psnr_db", "status"
    ]  # fmt: skip


@pytest.mark.parametrize(("columns", "most"), [("80", 80), ("400", 132)])
def test_a_terminal_of_python_has_its_own_width(here, monkeypatch, columns, most):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    lines = repr(here).splitlines()
    assert max(map(len, lines)) <= most
    assert any("hidden" in line for line in lines) == (most == 80)
    assert not [line for line in (*lines, *here.compare().splitlines()) if line.endswith(": --wide")]


@pytest.mark.parametrize(
    "one",
    [c for c in vars(reports).values() if dataclasses.is_dataclass(c) and c.__name__.endswith(("Report", "Layer"))],
)
def test_each_report_is_short_and_exported(one):
    assert one.__repr__ is reports.brief
    assert one.__name__ == "CalibratedLayer" or getattr(quantlab, one.__name__) is one


@pytest.mark.parametrize(
    ("what", "more", "begins"),
    [
        ("0123", {}, r"load\('0123'\): no such run, sweep or experiment .* is the newest of quantlab \("),
        ("latest", {"experiment": "other"}, "tracking.experiment=other: no such experiment"),
        ("latest", {"uri": "sqlite:///no.db"}, "tracking.uri=sqlite:///no.db: no such file"),
    ],
)
def test_what_is_not_there_is_told(here, what, more, begins):
    with pytest.raises(TrackingError, match=begins):
        quantlab.load(what, **more)


def test_the_next_step_after_a_run(here):
    lines = next_steps(here, "outputs", TrackingConfig())
    assert len(lines) == 4
    folder = Path(lines[0].removeprefix(f"sweep {here.sweep_id} in "))
    assert (folder / "rows.json").is_file()
    commands = [line.partition("quantlab ")[2].split() for line in lines[1:3]]
    assert parse_request(commands[0][1:]).sweep == here.sweep_id
    assert commands[1] == ["reproduce", here[-1].run_id]
    assert lines[3].endswith("mlflow ui --backend-store-uri sqlite:///outputs/mlflow.db")
    assert next_steps(here, "outputs", TrackingConfig(uri="http://h:5000"))[3].endswith(" http://h:5000")
    assert next_steps(Results([], lambda: None), "outputs", TrackingConfig()) == []
    for uri in ("none", "sqlite:///else where/mlflow.db", "http://h:5000"):  # where these commands look, too
        told = next_steps(here, "outputs", TrackingConfig(uri=uri))
        typed = [shlex.split(line.partition("quantlab ")[2])[1:] for line in told[1:3]]
        assert [f"tracking.uri={uri}" in words for words in typed] == [True, True], told
    assert ["look at all" in line for line in told] == [False, False, False, True]
    ui = next_steps(here, "outputs", TrackingConfig(uri="sqlite:///else where/mlflow.db"))[3].partition("mlflow ")[2]
    assert shlex.split(ui) == ["ui", "--backend-store-uri", "sqlite:///else where/mlflow.db"], "it can be pasted"


def test_the_next_step_has_room_in_a_narrow_terminal(here):
    """An id and a folder are longer than 80 columns: the id is in the command below."""
    lines = next_steps(here, "outputs", TrackingConfig(), 80)
    assert max(map(len, lines)) <= 80
    assert Path(lines[0].removeprefix("sweep in ")).is_dir()
    assert here.sweep_id in lines[1]


def test_the_next_step_after_a_run_of_the_unquantized_model(here):
    """There is nothing to compare, and the run has its id, its folder and its place in the store."""
    bare = Results([row for row in here if row.quantization is None], lambda: None)
    lines = next_steps(bare, "outputs", TrackingConfig())
    assert lines[0].startswith(f"sweep {here.sweep_id} in ")
    reference = next(row for row in bare if row.name == "reference")
    assert lines[1].endswith(f"quantlab reproduce {reference.run_id}")
    assert lines[2].startswith("look at all:")
    assert len(lines) == 3


def test_the_next_step_is_about_the_sweep_of_just_these_rows(here, tmp_path):
    """A later sweep took them over, and has one more; and one has a combination that was skipped."""
    (own,) = Path("outputs/runs").glob("*/rows.json")
    name = own.parent.name
    rows = json.loads(own.read_text())["rows"]
    runs = tmp_path / "outputs" / "runs"
    for other, more in ((f"{name}-a", [{"run_id": None}]), ("99999999-later", [{"run_id": "another"}])):
        shutil.copytree(own.parent, runs / other)
        (runs / other / "rows.json").write_text(json.dumps({"rows": [*rows, *more]}))
    first = next_steps(here, str(tmp_path / "outputs"), TrackingConfig())[0]
    assert first.endswith(f"{name}-a")


def test_a_log_is_told_what_is_under_way(monkeypatch, capsys):
    monkeypatch.setattr(progress, "BEAT_S", 0.05)
    monkeypatch.setattr(progress, "console", Console(stderr=True, markup=False, emoji=False))
    with progress.progress_bars() as advance:
        advance("evaluate", 3, 8)
        time.sleep(0.4)
        progress.under_way("quanto int8: weigh")
        time.sleep(0.4)
    said = capsys.readouterr().err
    assert re.search(r"^\d+ s: evaluate: 3 of 8$", said, re.MULTILINE)
    assert re.search(r"^\d+ s: quanto int8: weigh$", said, re.MULTILINE)
    assert said.count(" s: ") <= 20
    with progress.progress_bars(quiet=True):
        time.sleep(0.2)
    assert capsys.readouterr().err == ""


def test_a_notebook_whose_output_is_coloured_is_told_what_a_log_is(monkeypatch, capsys):
    """Each bar there would be lines that stay: nothing is drawn over itself."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # as Jupyter's kernel does
    monkeypatch.setattr(progress, "BEAT_S", 0.05)
    monkeypatch.setattr(progress, "console", Console(stderr=True, markup=False, emoji=False, force_jupyter=False))
    assert progress.console.is_terminal
    with progress.progress_bars() as advance:
        for done in range(8):
            advance("evaluate", done, 8)
            time.sleep(0.05)
    said = capsys.readouterr().err
    assert "evaluate: 7 of 8" in said
    assert "\u2501" not in said


def test_the_time_left_is_told_by_the_jobs_and_not_by_what_came_before_them(monkeypatch, capsys):
    """Loading, training and the reference come before the first job ends; 400 s of them are no job's pace."""
    clock = iter([0.0, 400.0, 410.0, 420.0, 600.0, 610.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock, 610.0))
    monkeypatch.setattr(progress, "_beating", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(progress, "say", lambda text, *_: print(text))
    monkeypatch.setattr(progress, "console", Console(stderr=True, markup=False, emoji=False))
    with progress.progress_bars() as advance:
        for done in range(6):
            advance("jobs", done, 5, "0 failed" if done else "")
    told = [line.partition(", 0 failed")[2] for line in capsys.readouterr().out.splitlines()]
    assert told == ["", ", less than a minute left", ", less than a minute left", ", about 1 min left", ""]


@pytest.mark.slow
def test_one_override_may_stand_alone(monkeypatch):
    seen = []
    monkeypatch.setattr("quantlab.api.run_plan", lambda plan, **_: seen.append(plan) or [])
    quantlab.run("digits_backends", "evaluation=quick")
    quantlab.run("digits_backends", ["evaluation=quick"])
    first, second = ([(job.name, job.overrides, job.config.evaluation.num_samples) for job in p.jobs] for p in seen)
    assert first == second
    assert first[0][2] < 100


def test_the_package_says_its_version_and_that_it_is_typed():
    from importlib import resources

    assert quantlab.__version__[0].isdigit()
    assert resources.files("quantlab").joinpath("py.typed").is_file()
    assert json.dumps(quantlab.__version__)


USER = """
import torch
from torch import nn

import quantlab

results = quantlab.run("digits_backends", "evaluation=quick")
print([report.quality["psnr_db"].value for report in results], results.sweep_id, results["quanto int8"].run_id)
text: str = results.compare(metric="psnr")
later: quantlab.Results = quantlab.load("latest")
module, report = quantlab.quantize(nn.Linear(4, 4), quantlab.QuantoConfig(weights_dtype="int8"))
quantlab.evaluate(nn.Linear(4, 4), [quantlab.TorchAoConfig("int4wo", group_size=64)], inputs=[torch.zeros(1, 4)])
quantlab.GGUFQuantizationConfig(gguf_type="q4_k", algorithm="imatrix", compute_dtype=torch.float16)
quantlab.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=["a"])
quantlab.NVIDIAModelOptConfig("NVFP4", modules_to_not_convert=["a"])
quantlab.QuantoConfig(wieghts_dtype="int8")  # wrong
quantlab.run(3)  # wrong
results.compare(metrc="psnr")  # wrong
"""


@pytest.mark.slow
def test_a_type_checker_takes_what_the_documents_show_and_names_what_is_wrong(tmp_path):
    (tmp_path / "user.py").write_text(USER.lstrip())
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "user.py"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    told = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False).stdout
    wrong = [i for i, line in enumerate(USER.lstrip().splitlines(), 1) if line.endswith("# wrong")]
    assert [int(line.split(":")[1]) for line in told.splitlines() if ": error:" in line] == wrong, told


def test_what_is_evaluated_in_python_shows_itself_and_gives_tables_too(monkeypatch):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    batches = [torch.randn(6, 64), torch.randn(6, 64)]
    found = quantlab.evaluate(module, [quantlab.QuantoConfig(weights_dtype="int8")], batches, num_bootstrap=50)
    assert len(repr(found).splitlines()) <= 15
    monkeypatch.setenv("COLUMNS", "70")
    assert max(map(len, repr(found).splitlines())) <= 70
    assert "quanto int8" in repr(found)
    assert "<table" in found._repr_html_()
    assert found.rows.loc["quanto int8", "quality/output_rel_error"] > 0
    layers = found.layers.loc["quanto int8"]
    assert set(layers[layers.status == "quantized"].dtype) == {"int8"}
    assert len(layers) == len(found[-1].quantization.layers)
    samples = found.samples.loc["quanto int8"]
    assert samples["output_rel_error"].mean() == pytest.approx(
        found.rows.loc["quanto int8", "quality/output_rel_error"]
    )
    assert found.steps.empty
    assert found.images == {}
    with pytest.raises(TrackingError, match="quantlab.run"):
        found.compare()


def test_schemes_whose_images_a_notebook_leaves_out_are_counted(here, monkeypatch):
    monkeypatch.setattr("quantlab.report.results.MAX_PICTURES", 1)
    found = quantlab.load("latest")
    with_images = [name for name in found.images if "quantization/coverage" in found[name].stored_metrics]
    left = len(with_images) - 1
    assert left > 0
    text = found._repr_html_()
    assert text.count("<figure") == 1
    assert f"... and {left} more scheme{'s' if left > 1 else ''} with images: .images has all" in text


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_report_breaks_no_number_and_shows_none_as_one_that_is_not(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    stored = {f"quality/metric_{i}/se": 1.178078132836494e-06 / 3**i for i in range(30)}
    report = reports.RunReport(
        name="quanto int8",
        status="FINISHED",
        quality={"latent_cosine": reports.MetricValue(value=0.9999971, n=8, ci_lo=0.99999, ci_hi=1.0)},
        stored_metrics=stored,
        unquantized=("model: 17 % of its weights stay unquantized; the largest are model.embed_tokens, lm_head",),
    )
    text = repr(report)
    assert max(map(len, text.splitlines())) <= width
    numbers = {float(number) for number in re.findall(r"metric_\d+/se=([^\s,]+?)(?=,|\.\.\.|$)", text)}
    assert numbers <= {float(f"{value:.4g}") for value in stored.values()}
    assert "latent_cosine=0.999997 (0.99999..1)" in text
    told = next(line for line in text.splitlines() if "unquantized" in line).split(": ", 1)[1].removesuffix(" …")
    assert set(told.split()) <= set(report.unquantized[0].split())
