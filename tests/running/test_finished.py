"""A sweep whose jobs have all finished before answers from its records: nothing is loaded."""

from __future__ import annotations

import json
import os

import pytest

from quantlab.planning.plan import plan
from quantlab.running import finished, known, sweep, workbench
from quantlab.running.known import recall
from tests.support.shell import digits_words

WORDS = ["-m", *digits_words("backend=quanto", "evaluation.num_samples=10", "tracking.save_checkpoint=false")]


def refuse(*_, **__):
    raise AssertionError("something is loaded")


def last_rows_json(shell):
    files = (shell.folder / "outputs" / "runs").rglob("rows.json")
    return json.loads(max(files, key=lambda file: file.stat().st_mtime_ns).read_text())


@pytest.mark.slow
def test_a_sweep_that_is_wholly_resumed_loads_nothing(shell, monkeypatch):
    first = shell.rows(*WORDS, "dtype=int8,int4")
    measured = last_rows_json(shell)
    assert not first["quanto int8"]["resumed"]
    with monkeypatch.context() as patch:
        patch.setattr(workbench, "load_placed", refuse)
        patch.setattr(sweep, "prepare_device", refuse)
        again = shell.rows(*WORDS, "dtype=int4,int8")  # another sweep of these jobs
        patch.setattr(sweep, "open_session", refuse)
        same = shell.rows(*WORDS, "dtype=int8,int4")
    assert list(same) == list(first)
    assert set(again) == set(first)
    for rows in (again, same):
        assert all(row["resumed"] and row["metrics"] == first[name]["metrics"] for name, row in rows.items())
    assert last_rows_json(shell)["environment"] == measured["environment"]
    assert len(list((shell.folder / "outputs" / "runs").rglob("rows.json"))) == 2, "the first sweep's answer"
    # one more job: it is run, beside the others' rows and with their floors
    more = shell.rows(*WORDS, "dtype=int8,int4,float8_e4m3")
    assert [row["resumed"] for row in more.values()] == [True] * 5 + [False]
    metrics = more["quanto float8_e4m3"]["metrics"]
    assert metrics["quality/floor_bf16/latent_rel_mse"] == first["floor_bf16"]["metrics"]["quality/latent_rel_mse"]
    assert last_rows_json(shell)["environment"]["hardware"]


def test_what_is_known_is_looked_for_once_a_reference(monkeypatch):
    asked = []
    monkeypatch.setattr(known, "recall", lambda config, cache: asked.append(config) or len(asked))
    jobs = plan([*WORDS[1:], "dtype=int8,int4", "dataset.seed=1,2"], multirun=True).jobs
    assert sorted(finished.known_before(jobs, None).values()) == [1, 2]
    assert len(asked) == 2
    monkeypatch.setattr(known, "recall", lambda config, cache: None)
    assert finished.known_before(jobs, None) is None


@pytest.mark.parametrize("words", [["sweep.force=true"], ["sweep.search.num_trials=1"], ["launcher=slurm"]])
def test_what_is_run_anyway_is_not_looked_up(monkeypatch, words):
    monkeypatch.setattr(known, "recall", refuse)
    assert sweep._known_before(plan([*WORDS[1:], "dtype=int8,int4", *words], multirun=True)) is None


@pytest.mark.slow
def test_a_variable_that_an_import_sets_is_no_other_machine(shell, monkeypatch):
    monkeypatch.chdir(shell.folder)
    shell.rows(*WORDS, "dtype=int8", "sweep.floors=false")
    config = plan([*WORDS[1:], "dtype=int8", "sweep.floors=false"], multirun=True).jobs[0].config
    cache = shell.folder / "outputs" / "cache"
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TORCHAO_FORCE_SKIP_LOADING_SO_FILES"):
        for value in ("elsewhere", None):
            monkeypatch.setitem(os.environ, name, value) if value else monkeypatch.delenv(name, raising=False)
            assert recall(config, cache) is not None
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert recall(config, cache) is None
