"""Commands that look for a sweep where there is none, or only a single run: what is there, and the way out."""

from __future__ import annotations

import re
import shlex

from quantlab.errors import ConfigError, in_words
from quantlab.vocabulary.reports import RunReport
from tests.support.shell import Shell, digits_words


def test_a_status_of_nothing_says_how_to_begin(shell: Shell) -> None:
    code, _, err = shell("status")
    assert code == 2
    assert err.startswith("quantlab: status: there is no sweep in ")
    assert "run one (quantlab -m ..., or recipe=NAME)" in err


def test_a_single_run_is_compared_by_its_id(shell: Shell) -> None:
    shell.rows(*digits_words("backend=quanto", "dtype=int8"))
    code, _, err = shell("compare", "latest")
    assert code == 2
    pasted = re.search(r"quantlab (compare \w+)\)", err)
    assert pasted is not None, err
    code, out, err = shell(*shlex.split(pasted[1]))
    assert code == 0, err
    assert "quanto int8" in out


def test_an_error_in_words_is_of_the_key_or_of_the_library() -> None:
    assert in_words(ConfigError("dtype=x: no")) == "dtype=x: no"
    assert in_words(KeyError("x")) == "KeyError: 'x'"
    assert in_words(RuntimeError()) == "RuntimeError"
    assert in_words(KeyboardInterrupt()) == "interrupted by its user"


def test_sentences_of_a_report_are_told_and_not_counted() -> None:
    told = RunReport(name="x", status="FINISHED", protocol="module", unquantized=("a: much", "b: all"))
    assert "unquantized: a: much; b: all" in repr(told)
