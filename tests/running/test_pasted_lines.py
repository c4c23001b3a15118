"""What a dry run and a run print to be pasted does what they say."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest

from tests.support.shell import Shell, digits_words


def _typed(told: str) -> list[list[str]]:
    return [shlex.split(line)[1:] for line in told.splitlines() if line.startswith("      quantlab ")]


def test_the_line_of_a_resumed_job_is_resumed(shell: Shell) -> None:
    grid = digits_words("-m", "backend=quanto", "dtype=int8,int4")
    first = shell.rows(*grid)
    code, out, err = shell(*grid, "sweep.dry_run=true")
    assert code == 0, err
    assert out.count("(resumed)") == 2
    lines = _typed(out)
    for name, words in zip(["quanto int8", "quanto int4"], lines, strict=True):
        again = shell.rows(*words)
        assert again[name]["resumed"]
        assert again[name]["run_id"] == first[name]["run_id"]
    code, out, _ = shell(*grid, "sweep.dry_run=true", "sweep.force=true")
    assert [words[0] for words in _typed(out)] == ["model.num_train_steps=20"] * 2, "a job that runs is a single run"


@pytest.mark.parametrize("asked", [["recipe=mine.yaml"], ["-m", "dtype=int8,int4", "sweep.search.num_trials=2"]])
def test_the_line_of_a_job_of_a_search_is_of_a_single_run(shell: Shell, asked: list[str]) -> None:
    """It is one job, among which nothing is to be searched."""
    search = "sweep:\n  search: {num_trials: 2, seed: 3}\n  grid:\n    dtype: [int8, int4]\n"
    (shell.folder / "mine.yaml").write_text(f"# @package _global_\n# A search\n{search}")
    code, out, err = shell(*asked, "backend=quanto", "sweep.dry_run=true")
    assert code == 0, err
    lines = _typed(out)
    assert len(lines) == 2
    for words in lines:
        code, out, err = shell(*words, "sweep.dry_run=true")
        assert (code, out.splitlines()[0]) == (0, "1 job:"), err


def test_a_word_of_any_key_needs_no_quotes_in_quotes(shell: Shell) -> None:
    schemes = "{components.transformer.backend: none}, {components.transformer: {backend: quanto, dtype: int8}}"
    schemes += ", {backend: quanto, dtype: int8, name: 'null'}, {backend: quanto, dtype: int4, name: 'a b'}"
    code, out, err = shell("-m", f"sweep.candidates=[{schemes}]", "sweep.dry_run=true")
    assert code == 0, err
    ends = [words[-1] for words in _typed(out)]
    assert ends[0] == "components.transformer.backend=none"
    assert ends[2:] == ["name='null'", "name='a b'"]
    for words in _typed(out):
        code, out, err = shell(*words, "sweep.dry_run=true")
        assert (code, out.splitlines()[0]) == (0, "1 job:"), err


def test_a_single_run_is_compared_by_itself(shell: Shell) -> None:
    """The experiment holds every run of the store."""
    shell.rows(*digits_words("backend=quanto", "dtype=int4"))
    _, _, err = shell(*digits_words("backend=quanto", "dtype=int8"))
    (line,) = [line for line in err.splitlines() if line.startswith("which is better:")]
    words = shlex.split(line.partition("quantlab ")[2])
    code, out, _ = shell(*words, "--json")
    assert code == 0
    compared: dict[str, Any] = json.loads(out)
    assert [[row["name"] for row in group["rows"]] for group in compared["groups"]] == [["quanto int8"]]
