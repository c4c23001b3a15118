"""What is said beside the rows of a run: once on a screen, and to people where the table is for programs."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from quantlab import commands, progress
from quantlab.report.terminal import tell
from tests.support.shell import Shell
from tests.support.tiny_text_models import TEXT, save_llama

SENTENCE = "stay unquantized"


@pytest.fixture
def words(shell: Shell) -> list[str]:
    folder = save_llama(shell.folder / "model", hidden_size=64, intermediate_size=64)
    (shell.folder / "text.txt").write_text(TEXT)
    words = ["model=causal_lm", f"model.path={folder}", "dataset=text", "dataset.path=text.txt", "device=cpu"]
    words += ["evaluation.num_samples=4", "evaluation.context_length=32", "evaluation.num_bootstrap=50"]
    return [*words, "sweep.floors=false", "-m", "backend=quanto,gguf", "dtype=int8", "sweep.on_invalid=skip"]


def test_a_plain_table_is_all_that_stands_on_stdout(shell: Shell, words: list[str], monkeypatch) -> None:
    monkeypatch.setattr(progress, "_told", [])
    code, out, err = shell(*words, "--plain")
    assert code == 0, err
    titles, *rows = out.splitlines()
    assert {line.count("\t") for line in rows} == {titles.count("\t")}
    assert err.count(SENTENCE) == 1, "as it came up"
    assert "skipped: backend=gguf: dtype=int8: " in err
    assert "skipped: 1 of 2 combinations is impossible; " in err
    monkeypatch.setattr(progress, "_told", [])
    code, out, err = shell(*words, "--plain")
    assert out.splitlines()[0] == titles
    assert err.count(SENTENCE) == 1, "a resumed sweep has not said it"


def test_on_one_screen_a_sentence_stands_once(monkeypatch) -> None:
    sentence = "model: 44 % of its weights stay unquantized; the largest are a, b; so they are taken"
    monkeypatch.setattr(progress, "_told", [f"quanto int8: {sentence}"])
    brief = "model: 44 % of its weights stay unquantized (as told above)"
    assert commands._unsaid([sentence, "other: x; y"], is_on_screen=True, is_plain=False) == [brief, "other: x; y"]
    assert commands._unsaid([sentence, "other"], is_on_screen=True, is_plain=True) == ["other"]
    assert commands._unsaid([sentence], is_on_screen=False, is_plain=False) == [sentence]


@pytest.mark.parametrize("columns", ["", "60"])
def test_a_sentence_keeps_to_the_columns_that_were_asked_for(monkeypatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    file = io.StringIO()
    line = "smallest without measurable loss (inside the floor): bitsandbytes nf4 (0.40 MiB, 1.48x) " * 2
    tell(Console(file=file, width=60, markup=False), line.strip())
    told = file.getvalue().splitlines()
    assert " ".join(told) == line.strip()
    assert (len(told) == 1) if not columns else all(0 < len(part) <= 60 for part in told)


def test_a_failure_is_told_by_its_beginning_and_then_whole(shell: Shell, words: list[str]) -> None:
    words = [w for w in words if not w.startswith(("backend", "dtype"))]
    code, _, err = shell(*words, "backend=gguf", "dtype=q4_k", "--plain")
    assert code == 1
    first, whole = [line for line in err.splitlines() if line.startswith("failed: ")]
    assert first.startswith("failed: gguf q4_k at quantize: dtype=q4_k: "), "with the key, as it was typed"
    assert first.endswith(" …")
    assert len(first) < 250 < len(whole)
    assert whole.startswith(first.removesuffix(" …"))
