"""A cast that was asked for (``backend=none dtype=float16``) is a candidate like any other; reference and floors are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantlab.errors import TrackingError
from quantlab.report.compare import answers, compare
from quantlab.report.comparison_data import group_data
from quantlab.report.html import page_data
from quantlab.report.reading import open_reader
from quantlab.report.selection import is_candidate, is_quantized, parse_request, select
from quantlab.report.table import cells, inside_floor, rows_sheet
from quantlab.report.verdicts import IN_FLOOR
from quantlab.running.overview import best_rows
from tests.support.comparison_store import N, Sweep, add_run, errors
from tests.support.shell import Shell, digits_words

CAST = "none float16"


@pytest.fixture
def cast(own_sweep: Sweep) -> Sweep:
    add_run(own_sweep, CAST, errors(1e-8, 8), size=8_000_000, parent=own_sweep.parent)
    return own_sweep


def compared(sweep: Sweep, *words: str):
    request = parse_request(list(words) or ["sweep=latest"])
    reader = open_reader(request.tracking, sweep.folder)
    selection = select(request, reader)
    return compare(request, selection, reader), selection, reader


def test_it_has_a_verdict_is_weighed_for_the_front_and_is_an_answer(cast: Sweep):
    (group,), selection, reader = compared(cast)
    assert CAST in {run.name for run in group.candidates}
    assert group.verdicts[CAST].text == IN_FLOOR
    told = "not on the front, since no better than a smaller scheme by more than the floor, as far as can be told: "
    assert CAST in next(note for note in group.notes if note.startswith(told))
    assert dict(answers(group))["closest to the reference"] == CAST
    roles = {row["name"]: row["role"] for row in group_data(group)["rows"]}
    assert roles[CAST] == "candidate"
    assert (roles["reference"], roles["floor_bf16"]) == ("reference", "floor")
    assert CAST in str(page_data([group], selection, reader))


def test_two_runs_of_which_one_is_a_cast(cast: Sweep):
    (group,), _, _ = compared(cast, cast.runs[CAST], cast.runs["int8 a"])
    assert {v.a for v in group.pairs} | {v.b for v in group.pairs} == {CAST, "int8 a"}


def test_what_is_exported_or_named_latest_is_quantized(cast: Sweep):
    (group,), _, _ = compared(cast)
    kinds = {run.name: (is_candidate(run), is_quantized(run)) for run in group.runs}
    assert kinds[CAST] == (True, False)
    assert kinds["int8 a"] == (True, True)
    assert kinds["reference"] == kinds["floor_bf16"] == (False, False)


def test_the_mark_of_the_floor_in_a_runs_table():
    value = {"": 1e-8, "/ci_lo": 0.9e-8, "/ci_hi": 1.1e-8, "/n": 20, "/se": 1e-9}
    metrics = {f"quality/latent_rel_mse{k}": v for k, v in value.items()}
    metrics |= {f"quality/floor_bf16/latent_rel_mse{k}": 1000 * v if k != "/n" else v for k, v in value.items()}
    assert inside_floor("latent_rel_mse", metrics)

    def row(name: str) -> dict:
        told = {"resumed": False, "params": {}, "protocol": "diffusion"}
        return {"name": name, "status": "FINISHED", "metrics": metrics, **told}

    shown = {name: "°" in "".join(cells(row(name), ["latent_rel_mse"])) for name in (CAST, "floor_batch", "reference")}
    assert shown == {CAST: True, "floor_batch": False, "reference": False}
    assert rows_sheet([row("reference"), row(CAST)], "diffusion").styles == {0: "dim"}
    assert best_rows([row("floor_batch"), row(CAST)])["best"]["name"] == CAST


def test_a_sweep_of_references_says_how_a_cast_is_measured(own_sweep: Sweep, tmp_path: Path):
    with own_sweep.store.start_run("dtypes", tmp_path / "alone", {}, {"quantlab.kind": "sweep"}) as parent:
        add_run(own_sweep, "reference", errors(1e-9, 9) * 0, parent=parent.run_id, key="k2")
    with pytest.raises(TrackingError, match=r"backend=none dtype=bfloat16"):
        compared(own_sweep, f"sweep={parent.run_id}")


def test_from_the_shell(shell: Shell):
    words = digits_words("-m", "backend=none", "dtype=float16", f"evaluation.num_samples={N}")
    code, _, err = shell(*words)
    assert code == 0, err
    assert "quantlab compare sweep=" in err
    code, out, err = shell("compare", "sweep=latest")
    assert code == 0, err
    assert IN_FLOOR in out
