"""What a sweep's own run shows; and that it costs the sweep nothing where it cannot be made."""

from __future__ import annotations

import json

import pytest

from quantlab.running import job, overview
from quantlab.running.overview import best_rows
from tests.support.shell import digits_words


@pytest.fixture
def client(shell):
    from quantlab.tracking import open_store
    from quantlab.vocabulary.schema import TrackingConfig

    return lambda: open_store(TrackingConfig(), shell.folder)


def runs_of(store):
    found = {run.info.run_name: run for run in store.search("")}
    return found.pop("sweep"), found


def test_a_sweeps_run_has_settings_best_rows_table_and_page_and_its_jobs_their_data(shell, client):
    code, _, err = shell("-m", *digits_words("backend=quanto", "dtype=int8,int4"))
    assert code == 0, err
    store = client()
    parent, jobs = runs_of(store)
    assert parent.data.params["best.dtype"] == "int8"
    assert parent.data.params["evaluation.num_inference_steps"] == "2"
    assert "quantization.dtype" not in parent.data.params
    own = jobs["quanto int8"].data
    assert parent.data.metrics["best/latent_rel_mse"] == own.metrics["quality/latent_rel_mse"]
    note = parent.data.tags["mlflow.note.content"]
    assert "| quanto int4 |" in note
    ids = f"{parent.info.experiment_id}/runs/{parent.info.run_id}"
    link = f"(#/experiments/{ids}/artifacts/reports/overview.html)"
    assert link in note.splitlines()[0], "MLflow shows the first lines of a description"
    name = f"quantlab-{parent.info.run_id[:12]}"
    view = f"(#/experiments/{parent.info.experiment_id}/runs?viewStateShareKey={name}&compareRunsMode=CHART)"
    assert view in note.splitlines()[0]
    saved = json.loads(store.client.get_experiment(store.experiment_id).tags[f"mlflow.sharedViewState.{name}"])
    assert parent.info.run_id in saved["searchFilter"], "its own runs, and not those of later sweeps"
    asked = {name.split("`")[1] for name in saved["selectedColumns"]}
    assert {"quality/latent_rel_mse", "quality/psnr_db", "memory/weights_bytes"} <= asked
    assert asked <= set(own.metrics), "no empty chart, no empty column"
    (images,) = (chart for chart in saved["compareRunCharts"] if chart["type"] == "IMAGE")
    logged = [a.path for a in store.client.list_artifacts(jobs["quanto int8"].info.run_id, "images")]
    assert {path.removeprefix("images/").partition("+")[0] for path in logged} == {*images["imageKeys"]}
    assert [a.path for a in store.client.list_artifacts(parent.info.run_id, "reports")] == ["reports/overview.html"]
    assert own.tags["mlflow.note.content"].startswith("quanto int8 of digits_dit on digits_classes")
    assert not [k for k in own.metrics if "/floor" in k]
    assert [i.dataset.name for i in jobs["quanto int8"].inputs.dataset_inputs] == ["digits_classes"]
    assert own.tags["mlflow.loggedImages"] == "True"
    assert len(own.params) < 40


@pytest.mark.slow
def test_an_overview_that_cannot_be_made_is_told_and_costs_no_row(shell, monkeypatch):
    def broken(*_):
        raise RuntimeError("no page today")

    monkeypatch.setattr(overview, "compare", broken)
    code, out, err = shell("-m", *digits_words("backend=quanto", "dtype=int8,int4", "sweep.floors=false"))
    assert code == 0
    assert "no page today" in err
    assert "quantlab compare sweep=" in err
    assert "quanto int4" in out


def test_a_sweep_of_which_no_job_finished_has_no_page_and_nothing_is_told_of_it(shell, monkeypatch):
    """It was told to compare what cannot be compared, in a sentence that ended within a word."""

    def broken(*_):
        raise RuntimeError("no numbers today")

    monkeypatch.setattr(job, "evaluate", broken)
    code, out, err = shell("-m", *digits_words("backend=quanto", "dtype=int8,int4", "sweep.floors=false"))
    assert code == 1
    assert out.count("FAILED") == 2
    assert "no numbers today" in err
    assert "overview" not in err


@pytest.mark.parametrize("order", [1, -1])
def test_of_schemes_of_one_size_the_smallest_is_the_closer_one(order):
    floor = {"quality/floor_bf16/latent_rel_mse": 1e-3, "quality/floor_bf16/latent_rel_mse/ci_hi": 1e-3}
    rows = [
        {
            **{"name": name, "status": "FINISHED", "protocol": "diffusion", "params": {}},
            "metrics": {
                **floor,
                **{"quantization/coverage": 1.0, "memory/weights_bytes": 8.0, "quality/latent_rel_mse": error},
                **{f"quality/latent_rel_mse/{k}": error for k in ("ci_lo", "ci_hi")},
                **{"quality/latent_rel_mse/n": 20, "quality/latent_rel_mse/se": 0.0},
                "quality/floor_bf16/latent_rel_mse/n": 20,
            },
        }
        for name, error in (("far", 2e-5), ("near", 1e-5))
    ]
    assert best_rows(rows[::order])["smallest_in_floor"]["name"] == "near"


def test_of_a_sweep_whose_runs_a_later_one_took_over_that_is_said(shell, client, monkeypatch):
    """Its view is of its own runs, of which the one that failed is left."""
    words, real = ["-m", *digits_words("backend=quanto", "dtype=int8,int4", "sweep.floors=false")], job.evaluate

    def failing(candidate, *args):
        if any(
            type(part).__name__ == "QLinear" and part.weight_qtype.name == "qint4"
            for part in candidate.components["transformer"].modules()
        ):
            raise RuntimeError("not today")
        return real(candidate, *args)

    monkeypatch.setattr(job, "evaluate", failing)
    for _ in range(3):
        assert shell(*words)[0] == 1
    sweeps = sorted(
        (run for run in client().search("") if run.info.run_name == "sweep"), key=lambda run: run.info.start_time
    )
    first, second, last = (run.data.tags["mlflow.note.content"] for run in sweeps)
    for note in (first, second):
        assert note.startswith("What had finished is by now among the runs of [a later sweep]")
        assert note.count("[a later sweep]") == 1
        assert f"runs/{sweeps[2].info.run_id})" in note.splitlines()[0]
        assert "overview.html" in note
    assert "later sweep" not in last
