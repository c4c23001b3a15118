"""quantlab compare: which runs, which statistics, which verdicts, and what is said of a bad request."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from quantlab.backends.table import backends, said_of
from quantlab.errors import ConfigError
from quantlab.metrics import METRICS
from quantlab.metrics.significance import holm, t_test
from quantlab.metrics.statistics import mean_interval
from quantlab.report.compare import Comparison, _Common, _paired, _test, answers, compare, front_of
from quantlab.report.comparison_data import group_data
from quantlab.report.comparison_table import (
    MANY,
    MAX_PAIRS,
    method_of_p,
    pair_text,
    show_groups,
)
from quantlab.report.reading import ServerReader, StoredRun, open_reader, read_json
from quantlab.report.selection import ComparisonRequest, parse_request, select
from quantlab.report.verdicts import SAME, Verdict, pair_said
from quantlab.vocabulary.schema import TrackingConfig
from tests.support.comparison_store import FLOOR, SCHEMES, N, Sweep, add_run, errors, shared_sweep
from tests.support.shell import Shell, digits_words
from tests.support.stores import ROOT

# -- the front and the verdicts


def stored(name, size, value):
    metrics = {"memory/weights_bytes": size, "quality/latent_rel_mse": value, "quality/latent_cosine": -value}
    return StoredRun(
        run_id=name, name=name, status="FINISHED", start_ms=0, experiment_id="1", artifact_uri="", metrics=metrics
    )


@pytest.mark.parametrize("metric", ["latent_rel_mse", "latent_cosine"])
@settings(deadline=None, max_examples=60)
@given(points=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=12))
def test_the_front_holds_exactly_the_runs_that_nothing_dominates(metric, points):
    runs = [stored(f"r{i}", *p) for i, p in enumerate(points)]
    undominated = {
        f"r{i}" for i, (s, v) in enumerate(points) if not any(t <= s and w <= v and (t, w) != (s, v) for t, w in points)
    }
    front = front_of(runs, metric)
    assert {r.name for r in front} == undominated
    sizes = [r.metrics["memory/weights_bytes"] for r in front]
    assert sizes == sorted(sizes)


def test_of_a_long_front_twenty_spread_over_the_sizes_are_paired():
    runs = [stored(f"r{i}", i, 100 - i) for i in range(45)]
    kept, notes = _paired(ComparisonRequest(sweep="latest"), runs, runs)
    assert [r.name for r in kept[:2]] == ["r0", "r2"]
    assert kept[-1].name == "r44"
    assert len({r.name for r in kept}) == 20
    assert notes == ["pairs are compared among 20 of 45 candidates, spread over the sizes"]
    assert _paired(ComparisonRequest(sweep="latest"), runs, runs[:20]) == (runs[:20], [])


def test_the_reference_values_are_of_metrics_with_a_direction_or_around_zero():
    for metric in METRICS.values():
        if metric.of_reference is not None:
            assert metric.of_reference in ((1.0, 100.0) if metric.higher_is_better else (0.0,)), metric.name


# -- a tracked sweep


@pytest.fixture
def sweep(template) -> Sweep:
    return shared_sweep(template)


def compared(sweep, *words):
    request = parse_request(words)
    reader = open_reader(request.tracking, sweep.folder)
    selection = select(request, reader)
    return compare(request, selection, reader), selection


@pytest.mark.parametrize(("num", "said"), [(1, "over 1 comparison"), (2, "over 2 comparisons")])
def test_the_comparisons_are_counted_in_words(sweep, num, said):
    d = mean_interval([1.0] * 6)
    found = {str(i): Verdict(a=str(i), b="b", difference=d, test="t", p=1.0, p_holm=1.0) for i in range(num)}
    group = compared(sweep, "sweep=latest")[0][0]
    group = replace(group, verdicts=found, pairs=(), twins=())
    assert method_of_p(group).endswith(said)


def test_verdicts_front_and_pairs_of_a_sweep(sweep):
    (group,), selection = compared(sweep, "sweep=latest")
    assert group.metric == "latent_rel_mse"
    assert group.n == N
    assert group.front == ("int4 a", "int8 a")  # the others on it are no better as far as can be told
    texts = {name: v.text for name, v in group.verdicts.items()}
    assert texts == {
        "int8 a": "inside the floor",
        "int8 b": "inside the floor",
        "int4 a": "worse",
        "int4 b": "worse",
        "int4 c": "worse",
    }
    pairs = {(v.a, v.b): v.text for v in group.pairs}
    assert pairs[("int4 a", "int4 b")] == "not distinguishable"
    assert pairs[("int4 a", "int8 a")] == "worse"
    assert pairs[("int8 a", "int8 b")] == "inside the floor"
    assert len(pairs) == 6
    assert [r.name for r in selection.failed] == ["nf4"]
    assert selection.skipped[0]["reason"] == "gguf has no nf4"


def test_the_p_values_are_holm_adjusted_over_all_comparisons_of_the_group(sweep):
    (group,), _ = compared(sweep, f"sweep={sweep.parent}")
    family = [*group.verdicts.values(), *group.pairs]
    assert len(family) == 5 + 6
    assert [v.p_holm for v in family] == holm([v.p for v in family])
    a, b = SCHEMES["int4 a"][2], SCHEMES["int4 b"][2]
    pair = next(v for v in group.pairs if (v.a, v.b) == ("int4 a", "int4 b"))
    expected = mean_interval(np.subtract(a, b), None, np.arange(N) % 4)
    assert pair.difference.value == pytest.approx(expected.value)
    assert pair.difference.ci_lo == pytest.approx(expected.ci_lo)
    assert pair.p == pytest.approx(t_test(expected, N - 4))


def test_pairing_makes_the_interval_of_a_difference_far_smaller_than_its_parts(sweep):
    (group,), _ = compared(sweep, "sweep=latest")
    pair = next(v for v in group.pairs if (v.a, v.b) == ("int4 a", "int4 b")).difference
    alone = group.verdicts["int4 a"].difference
    assert pair.ci_hi - pair.ci_lo < 0.5 * (alone.ci_hi - alone.ci_lo)


def test_a_binary_metric_is_tested_by_mcnemar_and_against_the_reference_s_own_samples(sweep):
    (group,), _ = compared(sweep, "sweep=latest", "metric=class_accuracy")
    v = group.verdicts["int4 c"]
    assert v.test == "McNemar"
    assert v.p == pytest.approx(2 * 0.5**4)  # 4 of the 8 changed samples were right before
    assert v.difference.value == pytest.approx(-4 / N)
    (group,), _ = compared(sweep, "sweep=latest", "metric=judge_agreement")
    assert group.verdicts["int4 c"].p == pytest.approx(2 * 0.5**8)


def test_the_interval_of_a_difference_ends_where_that_of_two_values_does(sweep):
    common = _Common("judge_agreement", [[0, 0, 0, 0, 1], [1] * 5], None, None, None)
    (found,) = _test(["a", "b"], common, [(0, 1)])
    assert (found.difference.value, found.difference.ci_lo) == (-0.8, -1.0)
    assert -0.8 < found.difference.ci_hi < 0
    common = _Common("psnr_db", [[100.0] * 4 + [10.0], [0.0] * 5], [[0.0] * 4 + [0.1], [1.0] * 5], None, None)
    (found,) = _test(["a", "b"], common, [(0, 1)])
    assert found.difference.ci_hi <= 100
    assert found.in_error.ci_lo >= -1
    (group,), _ = compared(sweep, "sweep=latest", "metric=judge_agreement")
    assert all(v.difference.ci_hi <= 0 for v in group.verdicts.values()), "none agrees more than the reference itself"


def test_a_margin_takes_in_what_is_real_but_small(sweep):
    (group,), _ = compared(sweep, "sweep=latest", "margin=0.0006")
    assert group.verdicts["int4 a"].text == "inside the margin"
    assert group.verdicts["int4 c"].text == "worse"


def test_both_readers_find_the_same_runs(sweep):
    reader = open_reader(TrackingConfig(), sweep.folder)
    server = ServerReader(sweep.store)
    number = reader.experiments()["quantlab"]
    assert server.experiments() == reader.experiments()
    tags = {"mlflow.parentRunId": sweep.parent}
    ours, theirs = (sorted(r.of_experiment(number, tags), key=lambda r: r.run_id) for r in (reader, server))
    assert len(ours) == 8
    assert ours == theirs
    ids = [sweep.runs["int4 a"], "0" * 32, sweep.runs["int8 a"]]
    assert reader.by_id(ids) == server.by_id(ids)
    assert [r.name for r in reader.by_id(ids)] == ["int4 a", "int8 a"]
    run = ours[0]
    assert reader.read_artifact(run, "samples.json") == server.read_artifact(run, "samples.json")
    assert reader.read_artifact(run, "no.json") is server.read_artifact(run, "no.json") is None


def test_run_ids_are_compared_pair_by_pair(sweep):
    (group,), _ = compared(sweep, sweep.runs["int4 a"], sweep.runs["int4 c"])
    assert [(v.a, v.b) for v in group.pairs] == [("int4 a", "int4 c")]
    assert group.pairs[0].text == "better"
    assert group.front == ("int4 a",)


# -- runs that do not belong together


def test_unlike_runs_are_refused_by_id_and_stand_apart_in_an_experiment(own_sweep):
    other = add_run(own_sweep, "int4 a", errors(4e-4, 9)[:20], size=2_000_000, backend="quanto", key="k2")
    with pytest.raises(ConfigError) as refused:
        compared(own_sweep, own_sweep.runs["int8 a"], other)
    text = str(refused.value)
    assert text.startswith(f"{own_sweep.runs['int8 a']} {other}: not comparable")
    assert "evaluation.num_samples: 40 / 20" in text
    groups, _ = compared(own_sweep, "experiment=quantlab")
    assert [(g.n, g.label) for g in groups] == [(40, "evaluation.num_samples=40"), (20, "evaluation.num_samples=20")]
    assert all(len({r.tags["quantlab.reference_key"] for r in g.runs}) == 1 for g in groups)


def test_a_repetition_replaces_the_older_run_and_a_retried_failure_is_none(own_sweep):
    again = add_run(own_sweep, "int8 a", errors(2e-6, 11), size=4_000_000, backend="quanto")
    asked = {"quantization": {"backend": "bitsandbytes", "dtype": "nf4"}, "model": {}, "dataset": {}, "evaluation": {}}
    add_run(own_sweep, "nf4", errors(5e-4, 12), size=2_050_000, backend="bitsandbytes", params=asked)
    (group,), selection = compared(own_sweep, "experiment=quantlab")
    assert [r.run_id for r in group.runs if r.name == "int8 a"] == [again]
    assert [r.name for r in selection.failed if r.params == {}] == []


TWO_ASKED = {
    "calibration data": [{"calibration": {"source": "digits_trajectories", "num_samples": n}} for n in (8, 64)],
    "files of others": [{"checkpoint": f"{folder}/model.gguf"} for folder in "ab"],
}


@pytest.mark.parametrize("case", TWO_ASKED)
@pytest.mark.parametrize("words", [("experiment=quantlab",), ()])
def test_what_was_asked_for_otherwise_is_no_repetition(own_sweep, case, words):
    """Both have one name, as runs that no sweep told apart."""
    asked = [{**more, "quantization": {"backend": "modelopt", "algorithm": "awq_lite"}} for more in TWO_ASKED[case]]
    ids = [
        add_run(own_sweep, "int4", errors(4e-4, 9 + i), size=2_000_000, backend="modelopt", params=more)
        for i, more in enumerate(asked)
    ]
    (group,), _ = compared(own_sweep, *(words or ids))
    assert [r.run_id for r in group.runs if r.run_id in ids] == ids


def test_runs_that_were_named_are_all_compared(own_sweep):
    first = own_sweep.runs["int8 a"]
    again = add_run(own_sweep, "int8 a", errors(2e-6, 11), size=4_000_000, backend="quanto")
    (group,), _ = compared(own_sweep, first, again)
    assert [(v.a.split(" #")[0], v.b.split(" #")[0]) for v in group.pairs] == [("int8 a", "int8 a")]
    assert {r.run_id for r in group.runs} == {first, again}


def test_a_resumed_sweep_takes_over_the_runs_it_found_finished(own_sweep):
    folder = own_sweep.folder / "outputs" / "runs" / "second"
    with own_sweep.store.start_run("small grid", folder, {}, {"quantlab.kind": "sweep"}) as parent:
        new = add_run(own_sweep, "int6", errors(5e-5, 13), size=3_000_000, backend="gguf", parent=parent.run_id)
        old = [own_sweep.runs[n] for n in ("reference", "int4 a", "int8 a")]
        parent.log_json({"rows": [{"run_id": i} for i in [*old, new]], "skipped": []}, "rows.json")
    (group,), _ = compared(own_sweep, "sweep=latest")
    assert {r.name for r in group.runs} == {"reference", "int4 a", "int8 a", "int6"}


@pytest.mark.parametrize("name", [name for name, row in backends().items() if row.elsewhere])
def test_what_programs_do_otherwise_is_also_said_of_files_that_others_made(own_sweep, name, monkeypatch):
    said = backends()[name].elsewhere
    typed = [own_sweep.runs["int8 a"]]
    asked = {"quantization": {"backend": "none"}, "resolved": {"checkpoint_method": name}, "checkpoint": "theirs"}
    theirs = add_run(own_sweep, "theirs", errors(5e-5, 15), size=3_000_000, backend="theirs", params=asked)
    assert not {*said} & {*compared(own_sweep, *typed, theirs)[0][0].notes}, "these are diffusion's rows"
    monkeypatch.setattr("quantlab.report.elsewhere.said_of", lambda names, protocol: said_of(names, "language"))
    assert not {*said} & {*compared(own_sweep, *typed)[0][0].notes}
    assert {*said} <= {*compared(own_sweep, *typed, theirs)[0][0].notes}


def test_runs_without_common_samples_are_refused(own_sweep):
    ids = [f"t{i}" for i in range(N)]
    other = add_run(own_sweep, "int2", errors(1e-3, 14), size=1_000_000, backend="gguf", ids=ids)
    typed = [own_sweep.runs["int8 a"], other]
    with pytest.raises(ConfigError, match="no sample in common") as refused:
        compared(own_sweep, *typed)
    assert str(refused.value).startswith(" ".join(typed))


def test_only_common_samples_are_paired_and_in_one_order(own_sweep):
    ids = [f"s{i}" for i in reversed(range(N))]
    other = add_run(own_sweep, "int4 d", SCHEMES["int4 a"][2][::-1] + 1e-6, size=2_000_001, backend="gguf", ids=ids)
    (group,), _ = compared(own_sweep, own_sweep.runs["int4 a"], other)
    assert group.pairs[0].difference.value == pytest.approx(-1e-6)
    assert group.pairs[0].difference.se == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("num", [MANY - 1, MANY, MAX_PAIRS + 3])
def test_few_pairs_are_sentences_many_a_table_and_what_is_left_out_is_told(own_sweep, num):
    (group,), _ = compared(own_sweep, own_sweep.runs["int4 a"], own_sweep.runs["int4 b"])
    (pair,) = group.pairs
    pairs = tuple(replace(pair, a=f"scheme {i}", p_rank=0.02, share_worse=0.75) for i in range(num))
    console = Console(file=io.StringIO(), width=100)
    show_groups(console, [replace(group, pairs=pairs)], [])
    said = console.file.getvalue()
    as_sentences = [pair_text(v, group.metric) for v in pairs if pair_text(v, group.metric) in " ".join(said.split())]
    assert len(as_sentences) == (num if num < MANY else 0)
    named = {v.a for v in pairs if re.search(rf"{v.a}\b", said)}
    assert len(named) == min(num, MAX_PAIRS)
    assert (f"{num - MAX_PAIRS} more pairs are in --json" in said) == (num > MAX_PAIRS)
    assert pair_said(pairs[0]) in said.rpartition("against")[2]
    assert ("75 %, p 0.020" in said) == (num >= MANY)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("worse", "int4 b is better"),
        ("better", "int4 a is better"),
        ("worse by rank", "int4 b is better by rank"),
        ("better by rank", "int4 a is better by rank"),
        ("not distinguishable", "not distinguishable"),
    ],
)
def test_of_a_pair_everything_says_which_one_is_better(own_sweep, text, said):
    (group,), _ = compared(own_sweep, own_sweep.runs["int4 a"], own_sweep.runs["int4 b"])
    pair = replace(group.pairs[0], a="int4 a", b="int4 b", text=text)
    (told,) = group_data(replace(group, pairs=(pair,)))["pairs"]
    assert (told["said"], told["verdict"]) == (said, text), "what the page shows; the verdict is on a"
    for console in (Console(file=io.StringIO(), width=80), Console(file=io.StringIO(), width=200)):
        show_groups(console, [replace(group, pairs=(pair,) * MANY)], [])
        cells = [
            line.rpartition("\u2502")[0].rpartition("\u2502")[2].strip()
            for line in console.file.getvalue().splitlines()
        ]
        assert cells.count(said) == MANY, console.file.getvalue()
    sentence = pair_text(pair, group.metric)
    better = said.removesuffix(" by rank")
    assert sentence.startswith((f"{better} than", f"int4 a and int4 b: {said}"))


def test_a_run_whose_samples_are_gone_is_compared_with_the_reference_alone(own_sweep):
    lost = own_sweep.runs["int4 a"]
    for file in own_sweep.folder.rglob("samples.json"):
        if lost in file.parts:
            file.unlink()
    (group,), _ = compared(own_sweep, "sweep=latest")
    assert group.verdicts["int4 a"].text == "worse"
    assert all("int4 a" not in (v.a, v.b) for v in group.pairs)


# -- the command


BAD = [
    (["sweep=abc"], "sweep=abc: no such run in "),
    (["abc"], "abc: no such run in "),
    (["experiment=quantlap"], "experiment=quantlap: no such experiment"),
    (["experiment=empty"], "experiment=empty: holds no job"),
    (["sweep=latest", "tracking.experiment=empty"], "sweep=latest: no sweep in experiment empty"),
    ([], "compare: nothing given"),
    (["sweep=latest", "experiment=quantlab"], "compare: sweep and experiment given"),
    (["sweep="], "sweep=: not a key of compare"),
    (["swep=latest"], "swep=latest: not a key of compare; did you mean sweep?"),
    (["sweep=latest", "--cvs", "x"], "--cvs: no such option of compare; did you mean --csv?"),
    (["sweep=latest", "--csv"], "--csv: a file is missing"),
    (["sweep=latest", "margin=wide"], "margin=wide: give a number"),
    (["sweep=latest", "metric=psn"], "metric=psn: these runs have no such metric"),
    (["sweep=latest", "metric=step_sqnr_db"], "metric=step_sqnr_db: these runs have no such metric"),
    (["sweep=latest", "tracking.uri=sqlite:///no.db"], "tracking.uri=sqlite:///no.db: no such file"),
    (["sweep=latest", "tracking.uri=folder"], "tracking.uri=folder: MLflow's file store"),
    (["sweep=latest", "--html", "outputs/mlflow.db/x.html"], "--html outputs/mlflow.db/x.html: cannot be written"),
    (["sweep=latest", "--csv", "outputs/mlflow.db/x.csv"], "--csv outputs/mlflow.db/x.csv: cannot be written"),
]


@pytest.mark.parametrize(("words", "begins"), BAD, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_a_bad_request_is_told_so(sweep, words, begins):
    if "empty" in " ".join(words):
        from quantlab.tracking import open_store

        open_store(replace(TrackingConfig(), experiment="empty"), sweep.folder)
    code, out, err = Shell(sweep.folder)("compare", *words)
    assert code == 2
    assert out == ""
    assert err.startswith(f"quantlab: {begins}")
    assert err.count("\n") == 1


def test_a_job_is_no_sweep_and_a_sweep_is_no_job(sweep):
    shell = Shell(sweep.folder)
    code, _, err = shell("compare", f"sweep={sweep.runs['int8 a']}")
    assert code == 2
    assert f"is the job 'int8 a' and not a sweep; give its id without sweep=, or sweep={sweep.parent}" in err
    code, _, err = shell("compare", sweep.parent)
    assert code == 2
    assert f"quantlab compare sweep={sweep.parent}" in err
    code, _, err = shell("compare", sweep.runs["reference"])
    assert code == 2
    assert "no finished run of a quantized model" in err


def test_the_command_prints_a_table_and_writes_csv_json_and_the_page(own_sweep):
    shell = Shell(own_sweep.folder)
    code, out, err = shell("compare", "sweep=latest", "--csv", "rows.csv")
    assert code == 0, err
    assert "verdict on latent_rel_mse" in out
    assert "smallest without measurable loss (inside the floor): int8 a" in out
    assert "failed: nf4 at quantize: MemoryError: 12 GiB wanted" in out
    with (own_sweep.folder / "rows.csv").open() as file:
        rows = {r["name"]: r for r in csv.DictReader(file)}
    assert rows["int4 c"]["verdict"] == "worse"
    assert float(rows["int4 c"]["latent_rel_mse"]) == pytest.approx(SCHEMES["int4 c"][2].mean())
    assert float(rows["int4 c"]["latent_rel_mse/floor"]) == pytest.approx(FLOOR.mean())
    assert rows["nf4"]["status"] == "FAILED"
    page = own_sweep.folder / "outputs" / "reports" / f"small grid-{own_sweep.parent[:8]}.html"
    assert page.is_file()
    logged = own_sweep.folder / "outputs" / "mlartifacts" / own_sweep.parent / "artifacts" / "reports" / page.name
    assert logged.read_bytes() == page.read_bytes()
    code, out, _ = shell("compare", "sweep=latest", "--json", "--html", "page.html")
    assert code == 0
    assert json.loads(out)["groups"][0]["front"] == ["int4 a", "int8 a"]
    assert (own_sweep.folder / "page.html").is_file()
    code, _, err = shell("compare", "sweep=latest", "output_dir=else where", "--plain", "-q")
    assert (code, err) == (0, ""), "quiet"
    assert (own_sweep.folder / "else where" / "reports" / page.name).is_file(), "beside the other files of that folder"


def test_reading_needs_neither_torch_nor_mlflow(sweep):
    import subprocess
    import sys

    code = (
        "import sys; from quantlab.cli import dispatch; dispatch(['compare', 'sweep=latest'])\n"
        "print([m for m in ('torch', 'mlflow', 'sklearn') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=sweep.folder,
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )
    assert done.stderr.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_a_real_sweep_is_compared_from_what_it_tracked(shell):
    code, _, err = shell("-m", "backend=quanto,gguf", "dtype=int8,int4,q8_0", "sweep.on_invalid=skip", *digits_words())
    assert code == 0, err
    code, out, err = shell("compare", "sweep=latest", "--json")
    assert code == 0, err
    data = json.loads(out)
    rows = {r["name"]: r for r in data["groups"][0]["rows"]}
    tracked = shell.tracked()
    assert data["skipped"]
    for name, row in rows.items():
        assert row["metrics"]["latent_rel_mse"]["value"] == tracked[name]["metrics"]["quality/latent_rel_mse"]
    assert rows["quanto int4"]["verdict"] == "worse"
    assert rows["quanto int4"]["on_front"]
    assert "Which scheme" in next((shell.folder / "outputs" / "reports").glob("*.html")).read_text()


def test_samples_that_were_changed_are_left_out_with_a_word(own_sweep, capsys):
    """Another valid file, where a number was changed by hand or by a fault."""
    for run_id in own_sweep.runs.values():
        for file in own_sweep.folder.rglob(f"{run_id}/artifacts/samples.json"):
            text = file.read_text()
            assert '"latent_rel_mse": [' in text
            if run_id == own_sweep.runs["int4 a"]:
                file.write_text(text.replace('"latent_rel_mse": [', '"latent_rel_mse": [ 0.5, ', 1))
    reader = open_reader(TrackingConfig(), own_sweep.folder)
    by_name = {r.name: r for r in reader.by_id([*own_sweep.runs.values()])}
    assert read_json(reader, by_name["int4 a"], "samples.json") == {}
    assert "samples.json is not what the run wrote" in " ".join(capsys.readouterr().err.split())
    assert len(read_json(reader, by_name["int4 b"], "samples.json")["latent_rel_mse"]) == N


def test_the_closest_is_the_best_value_also_off_the_front(sweep):
    (group,), _ = compared(sweep, "sweep=latest")
    assert group.front[-1] == "int8 a"
    assert dict(answers(group))["closest to the reference"] == "int8 b"


@pytest.mark.parametrize(("p", "is_told"), [(0.007, True), (0.3, False)])
def test_a_small_p_beside_not_distinguishable_is_explained(p, is_told):
    difference = mean_interval([-1.0, 2.0, 0.5, 1.0, -0.5, 1.5])
    pair = Verdict(a="a", b="b", difference=difference, test="t", p_holm=p, text=SAME)
    known = {"request": ComparisonRequest(), "label": "", "protocol": "language", "metric": "kld_mean"}
    group = Comparison(**known, margin=0, n=6, floor=None, runs=(), pairs=(pair,))
    assert (f"{SAME} at any p where the interval holds 0" in method_of_p(group)) == is_told
