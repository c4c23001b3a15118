"""A dry run for programs: what its text says, as JSON on stdout; and ``--json`` where a command has none."""

from __future__ import annotations

import json
import shlex

import pytest

from tests.support.shell import Shell, digits_words

GRID = ("-m", "backend=quanto,torchao", "dtype=int8,nf4", "sweep.dry_run=true")


def test_it_says_what_the_text_says(shell: Shell):
    words = digits_words(*GRID)
    code, text, _ = shell(*words)
    json_code, out, err = shell(*words, "--json")
    assert (code, json_code) == (2, 2)
    data = json.loads(out)
    assert [one["combination"] for one in data["impossible"]] == ["backend=quanto dtype=nf4"]
    assert data["impossible"][0]["reason"].startswith("dtype=nf4: quanto offers int8")
    assert [job["name"] for job in data["jobs"]] == ["quanto int8", "torchao int8", "torchao nf4"]
    assert all(job["command"] in text for job in data["jobs"])
    assert not any(job["resumed"] or job["comes_along"] for job in data["jobs"])
    *fitting, too_small = (job["fails_here"] for job in data["jobs"])
    assert fitting == [None, None]
    assert too_small.startswith("dtype=nf4: 1 layer of transformer cannot be stored as torchao nf4: proj_out_2")
    assert "the run refuses 1 of 4 combinations" in err


def test_its_commands_run_and_what_has_finished_is_resumed(shell: Shell):
    words = digits_words("-m", "backend=none,quanto", "dtype=auto", "evaluation.num_samples=10")
    shell.rows(*words)
    code, out, _ = shell(*words, "sweep.dry_run=true", "--json", "--columns", "quality/kld_mean")
    assert code == 0
    jobs = {job["name"]: job for job in json.loads(out)["jobs"]}
    assert jobs["reference"]["comes_along"]
    assert jobs["quanto int8"]["resumed"]
    own = shlex.split(jobs["quanto int8"]["command"])
    assert own[:2] == ["quantlab", "-m"]
    assert json.loads(shell(*own[1:], "--json")[1])[-1]["resumed"]


@pytest.mark.parametrize(
    "words", [("--cfg", "job", "backend=quanto"), ("init", "x.yaml", "model.path=a"), ("reference", "export", "x")]
)
def test_where_there_is_no_json_that_is_said(shell: Shell, words: tuple[str, ...]):
    code, out, err = shell(*words, "--json")
    assert (code, out) == (2, "")
    assert err.startswith("quantlab: --json: no such option of ")
