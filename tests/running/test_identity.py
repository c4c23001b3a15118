"""A model whose configuration was edited in place: nothing of the old one is used again, and the change is named."""

from __future__ import annotations

import json

import pytest

from tests.support.tiny_text_models import TEXT, save_llama


@pytest.fixture
def words(shell):
    """A tiny language model and its text in the shell's folder."""
    save_llama(shell.folder / "model")
    (shell.folder / "text.txt").write_text(TEXT)
    return [
        "model=causal_lm",
        "model.path=model",
        "dataset=text",
        "dataset.path=text.txt",
        "evaluation.num_samples=10",
        "evaluation.context_length=64",
        "evaluation.num_bootstrap=50",
    ]


def test_an_edited_configuration_is_another_model(shell, words):
    sweep = ["-m", *words, "backend=quanto", "dtype=int8,int4", "sweep.floors=false"]
    before = shell.rows(*sweep)
    assert {r["resumed"] for r in shell.rows(*sweep).values()} == {True}
    config = shell.folder / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_act": "relu"}))
    after = shell.rows(*sweep)
    assert {r["resumed"] for r in after.values()} == {False}
    costs = [rows["quanto int8"]["metrics"]["quality/kld_mean"] for rows in (before, after)]
    assert max(costs) < 0.01, "each model against its own reference"
    ids = [rows["quanto int8"]["run_id"] for rows in (before, after)]
    code, _, err = shell("compare", *ids)
    assert code == 2
    assert "the model's model.config: " in err
    code, out, err = shell("reproduce", ids[0])
    assert code == 1, err
    assert "changed: the model's model.config: " in out
    assert "model and inputs are those of the run" not in out
