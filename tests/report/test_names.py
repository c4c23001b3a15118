"""Rows of one name in one table: the references of several seeds, and their floors."""

from __future__ import annotations

import contextlib

import pytest

import quantlab
from quantlab.errors import ConfigError
from tests.support.shell import Shell, digits_words

WORDS = ["backend=quanto", "dtype=int8", "dataset.seed=7,8"]
BARE = ["reference", "floor_bf16", "floor_batch"]
NAMES = [f"{name} (dataset.seed={seed})" for seed in (7, 8) for name in (*BARE, "quanto int8")]


@pytest.mark.slow
def test_references_of_several_seeds_are_told_apart(shell: Shell) -> None:
    with contextlib.chdir(shell.folder):
        here = quantlab.run(overrides=digits_words(*WORDS), quiet=True)
        assert list(here.rows.index) == NAMES
        told = repr(here)
        assert [name for name in NAMES if f"│{name} " in told] == NAMES
        assert [*dict.fromkeys(here.samples.index.get_level_values(0))] == NAMES, "none of them is lost"
    assert here["reference (dataset.seed=8)"] is here[4]
    assert here["quanto int8 (dataset.seed=7)"] is here[3]
    with pytest.raises(ConfigError, match=r"^results\['reference'\]: several rows are called so; choose 'reference"):
        here["reference"]


def test_a_run_that_several_jobs_share_stands_there_once(shell: Shell) -> None:
    """Of a text each seed is the same windows."""
    from tests.support.tiny_text_models import TEXT, save_llama

    folder = save_llama(shell.folder / "model")
    (shell.folder / "text.txt").write_text(TEXT)
    words = ["model=causal_lm", f"model.path={folder}", "dataset=text", "dataset.path=text.txt", "device=cpu"]
    words += ["evaluation.num_samples=5", "evaluation.context_length=32", "evaluation.num_bootstrap=50", *WORDS]
    schemes = ["quanto int8 (dataset.seed=7)", "quanto int8 (dataset.seed=8)"]
    with contextlib.chdir(shell.folder):
        here = quantlab.run(overrides=words, quiet=True)
        layers = here.layers
    rows = [line for line in repr(here).splitlines() if line.startswith("│")]
    told = [line[1:].partition("│")[0].strip().removesuffix(" (resumed)") for line in rows]
    assert told[:5] == [*BARE, *schemes]
    assert {*layers.index.get_level_values(0)} == {*schemes}, "a row that is another's run has its layers, too"
