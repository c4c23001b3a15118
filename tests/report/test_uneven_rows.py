"""Comparisons of runs that do not all have everything: a number, samples, the same floors, the same layers."""

from __future__ import annotations

import io
import sqlite3
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from quantlab.metrics.significance import holm
from quantlab.report.compare import answers, compare
from quantlab.report.comparison_data import group_data
from quantlab.report.comparison_markdown import comparison_markdown
from quantlab.report.comparison_table import answer_lines, comparison_sheet, front_text, method_of_p, told_pairs
from quantlab.report.reading import open_reader
from quantlab.report.results import Results, chosen_rows
from quantlab.report.selection import Selection, parse_request, select
from quantlab.report.terminal import show
from quantlab.report.verdicts import IN_FLOOR
from quantlab.running.rows import finished_row
from quantlab.vocabulary.schema import TrackingConfig
from tests.support.comparison_store import FLOOR, SCHEMES, N, add_run, errors

METRIC = "latent_rel_mse"


def compared(sweep, *words):
    request = parse_request(words)
    reader = open_reader(request.tracking, sweep.folder)
    return compare(request, select(request, reader), reader)


def without(sweep, name, metric):
    with closing(sqlite3.connect(sweep.folder / "outputs" / "mlflow.db")) as database:
        like = f"quality/{metric}%"
        database.execute("DELETE FROM latest_metrics WHERE run_uuid = ? AND key LIKE ?", (sweep.runs[name], like))
        database.commit()


@pytest.mark.parametrize("lost", ["int4 a", "int8 b"])  # the smallest, and another one
@pytest.mark.parametrize("words", [(), (f"metric={METRIC}",)])
def test_a_row_without_the_number_is_left_out_and_named(own_sweep, lost, words):
    """Its perplexity was infinite, say; the others are compared."""
    without(own_sweep, lost, METRIC)
    (group,) = compared(own_sweep, "sweep=latest", *words)
    assert set(group.verdicts) == {*SCHEMES} - {lost}
    assert lost not in [r.name for r in group.runs]
    assert [n for n in group.notes if "left out" in n] == [f"left out, without {METRIC}: {lost}"]


def test_the_degrees_of_freedom_do_not_depend_on_whose_samples_are_gone(own_sweep):
    before = compared(own_sweep, "sweep=latest")[0].verdicts
    for file in own_sweep.folder.rglob("samples.json"):
        if own_sweep.runs["int4 a"] in file.parts:  # of the smallest
            file.unlink()
    after = compared(own_sweep, "sweep=latest")[0].verdicts
    assert {name: v.p for name, v in after.items()} == {name: v.p for name, v in before.items()}


def test_the_largest_floor_of_all_rows_counts(own_sweep):
    """Another sweep of the same reference measured a smaller one, and has the smallest scheme."""
    small = add_run(own_sweep, "int2", errors(4e-3, 21), size=1_000_000, backend="gguf")
    with closing(sqlite3.connect(own_sweep.folder / "outputs" / "mlflow.db")) as database:
        like = f"quality/floor_bf16/{METRIC}%"
        database.execute(
            "UPDATE latest_metrics SET value = value / 1000 WHERE run_uuid = ? AND key LIKE ? AND key NOT LIKE '%/n'",
            (small, like),
        )
        database.commit()
    (group,) = compared(own_sweep, "experiment=quantlab")
    assert group.floor.value == pytest.approx(FLOOR.mean())
    assert group.verdicts["int8 a"].text == "inside the floor"


def test_an_algorithm_is_paired_with_the_plain_one_on_the_same_layers(own_sweep):
    asked = {"backend": "modelopt", "dtype": "int4", "group_size": "128", "activation_dtype": "none"}
    runs = {
        "plain": {"algorithm": "max"},
        "plain, fewer": {"algorithm": "max", "modules_to_not_convert": {"own": ["blocks.0"]}},
        "plain, more": {"algorithm": "max", "layer_kinds": ["linear", "conv"]},
        "plain, rounded": {"algorithm": "max", "compute_dtype": "bfloat16"},
        "awq": {"algorithm": "awq_lite", "algorithm_settings": {"alpha_step": 0.1}},
        "awq, fewer": {"algorithm": "awq_lite", "modules_to_not_convert": {"own": ["blocks.0"]}},
    }
    for i, (name, own) in enumerate(runs.items()):
        params = {"quantization": {**asked, **own}}
        add_run(own_sweep, name, errors(4e-4, 30 + i), size=2_200_000 + i, backend="modelopt", params=params)
    (group,) = compared(own_sweep, "experiment=quantlab")
    assert {(v.a, v.b) for v in group.twins} == {("awq", "plain"), ("awq, fewer", "plain, fewer")}


def test_a_pair_that_is_also_a_twin_is_one_comparison_of_the_family_and_what_has_no_p_is_none(own_sweep):
    asked = {"backend": "modelopt", "dtype": "int4", "group_size": "128", "activation_dtype": "none"}
    ids = []
    for i, algorithm in enumerate(("max", "awq_lite", "mse")):
        params = {"quantization": {**asked, "algorithm": algorithm}}
        size = 2_200_000 + i
        ids.append(add_run(own_sweep, algorithm, errors(4e-4, 30 + i), size=size, backend="modelopt", params=params))
    (group,) = compared(own_sweep, *ids)
    assert (len(group.verdicts), len(group.pairs), len(group.twins)) == (3, 3, 2)
    family = [*group.verdicts.values(), *group.pairs]
    assert [v.p_holm for v in family] == holm([v.p for v in family])
    assert [v.p_holm for v in group.twins] == [v.p_holm for v in group.pairs if "max" in (v.a, v.b)]
    assert method_of_p(group).endswith("Holm-adjusted over 6 comparisons (3 with the reference, 3 of pairs)")
    assert group_data(group)["num_comparisons"] == 6
    told = [frozenset((v.a, v.b)) for v in (*told_pairs(group), *group.twins)]
    assert len(told) == len(set(told)) == 3, "each is one sentence: as twins, not the other way round as a pair, too"
    few = replace(group, pairs=tuple(replace(v, p=None) for v in group.pairs), twins=())
    assert method_of_p(few).endswith("Holm-adjusted over 3 comparisons")


def test_results_in_hand_are_compared_as_the_sweep_that_was_asked_for(own_sweep):
    """A later sweep took over all of its jobs and has one more."""
    first = own_sweep.parent
    folder = own_sweep.folder / "outputs" / "runs" / "second"
    from quantlab import tracking

    with own_sweep.store.start_run("larger grid", folder, {}, {"quantlab.kind": "sweep"}) as parent:
        new = add_run(own_sweep, "int6", errors(5e-5, 13), size=3_000_000, backend="gguf", parent=parent.run_id)
        old = [run_id for name, run_id in own_sweep.runs.items() if name != "int6"]
        for run_id in old:
            tracking.adopt(own_sweep.store, run_id, parent.run_id)
        parent.log_json({"rows": [{"run_id": i} for i in [*old, new]], "skipped": []}, "rows.json")
    reader = open_reader(TrackingConfig(), own_sweep.folder)
    rows = chosen_rows(first, reader, TrackingConfig())
    found = Results([finished_row(report, run.run_id) for run, report in rows if report], lambda: reader)
    assert "int6" not in found.rows.index
    assert "int6" not in found.compare()
    assert np.isclose(found.rows.loc["int4 a", f"quality/{METRIC}"], SCHEMES["int4 a"][2].mean())
    assert len(found.samples.loc["int4 a"]) == N


def test_a_job_that_was_taken_over_has_the_name_that_its_sweep_gave_it(own_sweep):
    """The table of the sweep says so, too."""
    folder = own_sweep.folder / "outputs" / "runs" / "second"
    with own_sweep.store.start_run("named", folder, {}, {"quantlab.kind": "sweep"}) as parent:
        names = {"reference": "reference", "int4 a": "mine", "int8 a": "int8 a"}
        rows = [{"run_id": own_sweep.runs[old], "name": new} for old, new in names.items()]
        parent.log_json({"rows": rows, "skipped": []}, "rows.json")
    (group,) = compared(own_sweep, "sweep=latest")
    assert set(group.verdicts) == {"mine", "int8 a"}
    (first,) = compared(own_sweep, f"sweep={own_sweep.parent}")
    assert "int4 a" in first.verdicts
    reader = open_reader(TrackingConfig(), own_sweep.folder)
    assert {run.name for run, _ in chosen_rows("latest", reader, TrackingConfig())} == {"reference", "mine", "int8 a"}


def test_a_value_beyond_the_reference_s_is_not_the_closest_to_it(own_sweep):
    """An accuracy, or a perplexity, may by chance be better than that of the unquantized model."""
    (group,) = compared(own_sweep, "sweep=latest")
    values = {"int4 a": 0.4, "int4 b": 0.41, "int4 c": 0.2, "int8 a": 0.49, "int8 b": 0.58}  # the reference's: 0.5
    runs = [replace(r, metrics={**r.metrics, "quality/class_accuracy": values.get(r.name, 0.5)}) for r in group.runs]
    verdicts = {
        name: replace(v, difference=replace(v.difference, value=values[name] - 0.5))
        for name, v in group.verdicts.items()
    }
    beyond = replace(group, metric="class_accuracy", runs=tuple(runs), verdicts=verdicts)
    assert dict(answers(beyond))["closest to the reference"] == "int8 a"


def test_of_schemes_of_one_size_the_smallest_is_the_closer_one(own_sweep):
    (group,) = compared(own_sweep, "sweep=latest")
    runs = [replace(r, metrics={**r.metrics, "memory/weights_bytes": 1.0}) for r in group.candidates]
    inside = {
        r.name: replace(group.verdicts[r.name], text=IN_FLOOR, difference=replace(v, value=1.0 / (i + 1)))
        for i, r in enumerate(runs)
        for v in [group.verdicts[r.name].difference]
    }
    same = replace(group, runs=tuple(runs), verdicts=inside)
    assert dict(answers(same))["smallest without measurable loss (inside the floor)"] == runs[-1].name


@pytest.mark.parametrize("last", ["large", "small"])
def test_of_two_runs_of_a_floor_the_larger_counts(own_sweep, last):
    """Sweeps of one reference may differ in evaluation.floor_batch_size; their rows have no floors of their own."""
    costs = {"small": 1e-8, "large": 3e-5}
    for size in sorted(costs, key=lambda size: size == last):
        asked = {"evaluation": {"floor_batch_size": size}}
        add_run(own_sweep, "floor_batch", errors(costs[size], 41), size=16_000_000, params=asked)
    with closing(sqlite3.connect(own_sweep.folder / "outputs" / "mlflow.db")) as database:
        database.execute("DELETE FROM latest_metrics WHERE key LIKE 'quality/floor%'")
        database.commit()
    (group,) = compared(own_sweep, "experiment=quantlab")
    assert group.floor.name == "floor_batch"
    assert group.floor.value == pytest.approx(errors(3e-5, 41).mean())
    assert group.floor.cost.ci_hi > group.floor.value


@pytest.mark.parametrize("width", [60, 80, 100, 400])
@pytest.mark.parametrize("num_pairs", [0, 3])
def test_p_is_explained_where_one_is_shown(own_sweep, width, num_pairs):
    (group,) = compared(own_sweep, "sweep=latest")
    group = replace(group, pairs=group.pairs[:num_pairs], twins=())
    console = Console(file=io.StringIO(), width=width)
    show(console, comparison_sheet(group))
    text = console.file.getvalue()
    is_shown = "< 0.001" in text or bool(num_pairs)  # of pairs below the table
    assert is_shown == (num_pairs > 0 or width > 80)
    assert ("Holm-adjusted" in " ".join(text.split())) == is_shown, text


def test_few_samples_give_no_verdict(own_sweep):
    few = [
        add_run(own_sweep, f"few {i}", errors(1e-4 * (i + 1), i)[:4], size=10 - i, backend="gguf", key="k3")
        for i in (0, 1)
    ]
    (group,) = compared(own_sweep, *few)
    assert {v.text for v in [*group.verdicts.values(), *group.pairs]} == {"too few samples"}
    assert {p for v in [*group.verdicts.values(), *group.pairs] for p in (v.p_holm, v.p_rank)} == {None}
    sheet = comparison_sheet(group)
    assert "p (Holm)" not in [c.title for c in sheet.columns], "no column without a number"
    markdown = comparison_markdown([group], Selection(title="", groups=(group.runs,)))
    assert "| too few samples |" in markdown
    assert "Holm" not in "\n".join([markdown, *sheet.caption, *(c.caption for c in sheet.columns)])
    assert told_pairs(group) == [], "it is one answer, and no sentence a pair"
    assert sum("too few samples" in line for line in answer_lines(group)) == 1
    assert "surely" not in front_text(group), "of so few samples nothing is sure"
    assert "as measured" in front_text(group)
