"""What a notebook shows of an error of ours: the user's own lines and the message."""

from __future__ import annotations

import sys
import traceback
from types import ModuleType, SimpleNamespace, TracebackType
from typing import Any

import pytest
import torch
from torch import nn

import quantlab
from quantlab.errors import ConfigError, NotFinite, QuantlabError


@pytest.fixture(autouse=True)
def ipython(monkeypatch: pytest.MonkeyPatch) -> None:
    """IPython's own drawing, as Python's: of what it is given, and of what that came from."""

    def drawn(kind: type, error: BaseException, tb: TracebackType | None, tb_offset: int | None = None) -> list[str]:
        assert type(error) is kind
        return traceback.format_exception(kind, error, tb)

    fake: Any = ModuleType("IPython")
    fake.get_ipython = lambda: SimpleNamespace(InteractiveTB=SimpleNamespace(structured_traceback=drawn))
    monkeypatch.setitem(sys.modules, "IPython", fake)


def shown(call: Any) -> str:
    with pytest.raises(QuantlabError) as told:
        call()
    return "".join(told.value._render_traceback_())


def test_the_users_own_lines_and_the_message():
    text = shown(lambda: quantlab.run("digits_backend"))
    assert 'quantlab.run("digits_backend")' in text
    assert "quantlab/api.py" not in text
    assert "_called.py" not in text
    assert "recipe=digits_backend: no such recipe; did you mean digits_backends?" in " ".join(text.split())
    assert text.rstrip().endswith("QUANTLAB_TRACEBACK=1 shows where in quantlab")


def test_what_an_error_came_from_is_in_its_message_and_not_shown_before_it():
    text = shown(lambda: quantlab.evaluate(nn.Linear(4, 4), []))  # type: ignore[call-arg]
    assert text.count("missing a required argument: 'inputs'") == 1
    assert "TypeError" not in text


class Stops(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("no such thing")


def test_what_happened_in_the_users_own_code_is_shown():
    def call() -> None:
        try:
            Stops()(torch.zeros(1))
        except ValueError as error:
            raise ConfigError("inputs: they do not fit") from error

    text = shown(call)
    assert 'raise ValueError("no such thing")' in text
    assert text.index("no such thing") < text.index("inputs: they do not fit")


def test_all_of_it_where_it_is_asked_for(monkeypatch):
    monkeypatch.setenv("QUANTLAB_TRACEBACK", "1")
    text = shown(lambda: quantlab.run("digits_backend"))
    assert "quantlab/api.py" in text
    assert "shows where" not in text


def test_an_error_with_more_than_a_message_and_one_that_was_never_raised():
    def call() -> None:
        raise NotFinite("sample 3 is NaN", "sample 3")

    assert "NotFinite: sample 3 is NaN" in shown(call)
    assert "ConfigError: x" in "".join(ConfigError("x")._render_traceback_())


def test_an_interrupt_says_what_is_kept(monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("quantlab.api.run_plan", interrupted)
    with pytest.raises(KeyboardInterrupt) as told:
        quantlab.run(overrides=["backend=quanto", "dtype=int8"])
    text = "".join(told.value._render_traceback_())  # type: ignore[attr-defined]
    assert "finished jobs are kept" in text
    assert "quantlab/api.py" not in text


def test_a_long_message_is_folded_between_words():
    """A notebook would break it wherever its line ends."""
    text = shown(lambda: quantlab.run(overrides=["backend=quanto", "dtype=nf4"]))
    message = text[text.index("ConfigError: ") :].splitlines()
    assert len(message) > 2
    assert max(map(len, message)) <= 75
    assert " ".join(message).startswith("ConfigError: dtype=nf4: quanto offers int8, int4, int2, float8_e4m3")
    assert not any(line.endswith("-") for line in message)
