"""Further columns of the table: any tracked metric, by ``--columns``."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from quantlab import cli
from quantlab.commands import columns_of
from quantlab.report.table import no_columns, rows_sheet
from quantlab.report.terminal import show
from tests.support.shell import digits_words


def row(name, **metrics):
    return {
        **{"name": name, "status": "FINISHED", "protocol": "language", "error": "", "failed_stage": "", "run_id": None},
        **{"resumed": False, "params": {}, "unquantized": [], "undefined": {}},
        "metrics": {f"perf/{k}": v for k, v in metrics.items()},
    }


ROWS = [row("reference", decode_tokens_per_s=12.3456), row("quanto int8"), row("b", decode_tokens_per_s=2e-7)]


def test_a_metric_has_its_column_and_what_no_row_has_is_told():
    sheet = rows_sheet(ROWS, "language", more=["perf/decode_tokens_per_s", "perf/decode_token_per_s"])
    assert [column.title for column in sheet.columns[-2:]] == ["s", "decode [tokens/s]"], "no empty column"
    plain = rows_sheet(ROWS, "language", more=["perf/decode_tokens_per_s"], is_plain=True)
    assert plain.columns[-1].title == "perf/decode_tokens_per_s", "other programs know it by its name"
    assert [cells[-1] for cells in sheet.rows] == ["12.35", "", "2.0e-7"]
    both = rows_sheet(ROWS, "language", more=["perf/decode_tokens_per_s", "nothing"], is_plain=True)
    assert [column.title for column in both.columns[-2:]] == ["perf/decode_tokens_per_s", "nothing"], (
        "as it was asked for"
    )
    told = "--columns perf/decode_token_per_s: no row has it; did you mean perf/decode_tokens_per_s?"
    assert told in sheet.caption
    assert all(len(cells) == len(sheet.columns) for cells in sheet.rows)


def test_what_was_asked_for_has_its_interval():
    asked = {"quality/image_mse": 2.31e-5, "quality/image_mse/ci_lo": 1.9e-5, "quality/image_mse/ci_hi": 2.6e-5}
    (one,) = [row("torchao int8")]
    one["metrics"].update(asked)
    assert rows_sheet([one], "diffusion", more=["image_mse"]).rows[0][-1] == "2.3e-5 ±0.4"
    assert rows_sheet([one], "diffusion", more=["quality/image_mse"], is_plain=True).rows[0][-1] == "2.31e-05"


def test_what_was_asked_for_is_seen_at_eighty_columns():
    names = ["time_to_first_token_ms", "prefill_tokens_per_s", "decode_tokens_per_s", "decode_tokens_per_s_p90"]
    rows = [row("torchao int8", **dict.fromkeys(names, 1234.5), representative=0.0)]
    file = io.StringIO()
    show(Console(file=file, width=80), rows_sheet(rows, "language", more=[f"perf/{name}" for name in names]))
    hidden = " ".join(file.getvalue().split()).partition("hidden")[2]
    assert hidden
    assert not any(word in hidden for word in ("first token", "prefill", "decode", "MiB"))
    assert "times on a CPU say nothing about a GPU" in file.getvalue()


@pytest.mark.parametrize("name", ["step_ms", "perf/sample_s", "perf/prefill_tokens_per_s_p90"])
def test_what_is_measured_only_on_request_says_by_which_key(name):
    told = rows_sheet(ROWS, "diffusion", more=[name]).caption
    assert f"--columns {name}: no row has it; evaluation.speed=true measures it" in told


def test_a_column_may_be_called_without_what_all_of_its_kind_begin_with():
    sheet = rows_sheet(ROWS, "language", more=["decode_tokens_per_s"])
    assert sheet.columns[-1].title == "decode [tokens/s]"
    assert not any("no row has it" in line for line in sheet.caption)


@pytest.mark.parametrize("words", [["--columns", "perf/a,quality/b"], ["--columns=perf/a,quality/b"]])
def test_the_option_takes_its_value_either_way(words):
    found = cli._with_columns(["-m", *words, "dtype=int8"])
    assert found == ["-m", "--columns=perf/a,quality/b", "dtype=int8"]
    assert columns_of(set(found)) == ["perf/a", "quality/b"]


def test_without_a_value_it_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["backend=quanto", "--columns"])
    assert ended.value.code == 2
    assert "quantlab: --columns: it needs a value" in capsys.readouterr().err


def test_a_dry_run_says_which_columns_no_row_could_have(shell):
    words = ["backend=quanto", "dtype=int8", "sweep.dry_run=true", *digits_words()]
    code, out, err = shell(*words, "--columns", "psnr_bd,nothing,perf/step_ms")
    assert code == 0, err
    said = " ".join(out.split())
    assert "--columns psnr_bd: no metric is called so; did you mean psnr_db?" in said
    assert "--columns nothing: no metric is called so; quantlab list metrics shows them" in said
    assert "step_ms:" not in said


@pytest.mark.slow
def test_every_metric_of_a_run_may_be_a_column(shell):
    row = shell.rows("backend=quanto", "dtype=int8", *digits_words())["quanto int8"]
    assert not no_columns(list(row["metrics"]))
    short = [name.partition("/")[2] for name in row["metrics"] if name.startswith(("perf/", "quality/"))]
    assert not no_columns([name for name in short if "/" not in name])


@pytest.mark.slow
def test_a_comparison_has_further_columns(shell):
    shell.rows("-m", "backend=quanto", "dtype=int8,int4", *digits_words())
    tracked = shell.tracked()
    code, out, err = shell("compare", "latest", "--plain", "--columns", "evaluate_s,image_mse,nothing")
    assert code == 0, err
    head, *lines = [line.split("\t") for line in out.splitlines()]
    assert head[-3:] == ["perf/evaluate_s", "quality/image_mse", "nothing"]
    for line in lines:
        values = tracked[line[0]]["metrics"]
        assert line[-3:-1] == [f"{values[name]:.4g}" if name in values else "" for name in head[-3:-1]]
    said = " ".join(shell("compare", "latest", "--columns=image_mse,nothing", "--wide")[1].split())
    assert "quality/image_mse" in said
    assert "--columns nothing: no row has it" in said
    for words in (["--columns"], ["--columns", "--json"], ["--columns", "metric=psnr"]):
        assert "--columns: it needs a value" in " ".join(shell("compare", "latest", *words)[2].split())
