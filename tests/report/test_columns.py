"""Further columns of the table: any tracked metric, by ``--columns``."""

from __future__ import annotations

import pytest

from quantlab import cli
from quantlab.commands import columns_of
from quantlab.report.table import rows_sheet


def row(name, **metrics):
    return {
        **{"name": name, "status": "FINISHED", "protocol": "language", "error": "", "failed_stage": "", "run_id": None},
        **{"resumed": False, "params": {}, "unquantized": [], "undefined": {}},
        "metrics": {f"perf/{k}": v for k, v in metrics.items()},
    }


ROWS = [row("reference", decode_tokens_per_s=12.3456), row("quanto int8"), row("b", decode_tokens_per_s=2e-7)]


def test_a_metric_has_its_column_and_what_no_row_has_is_told():
    sheet = rows_sheet(ROWS, "language", more=["perf/decode_tokens_per_s", "perf/decode_token_per_s"])
    assert [column.title for column in sheet.columns[-2:]] == ["perf/decode_tokens_per_s", "perf/decode_token_per_s"]
    assert [cells[-2:] for cells in sheet.rows] == [["12.35", ""], ["", ""], ["2e-07", ""]]
    told = "--columns perf/decode_token_per_s: no row has it; did you mean perf/decode_tokens_per_s?"
    assert told in sheet.caption
    assert all(len(cells) == len(sheet.columns) for cells in sheet.rows)


@pytest.mark.parametrize("words", [["--columns", "perf/a,quality/b"], ["--columns=perf/a,quality/b"]])
def test_the_option_takes_its_value_either_way(words):
    found = cli._with_its_value("--columns", ["-m", *words, "dtype=int8"])
    assert found == ["-m", "--columns=perf/a,quality/b", "dtype=int8"]
    assert columns_of(set(found)) == ["perf/a", "quality/b"]


def test_without_a_value_it_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["backend=quanto", "--columns"])
    assert ended.value.code == 2
    assert "quantlab: --columns: it needs a value" in capsys.readouterr().err
