"""What is shown while work goes on: a terminal moves, a log is told, and who wants quiet hears what is wrong alone."""

from __future__ import annotations

import io
import re
import time
import warnings

import pytest
import torch
from rich.console import Console

import quantlab
from quantlab import progress
from quantlab.tracking.run import WARNINGS
from tests.support.shell import digits_words


class Terminal(io.StringIO):
    """A stream on which a bar can be drawn over itself."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def shown(monkeypatch) -> Terminal:
    file = Terminal()
    console = Console(file=file, force_terminal=True, width=80, markup=False, emoji=False, color_system=None)
    monkeypatch.setattr(progress, "console", console)
    return file


def test_a_terminal_shows_what_no_bar_counts(shown):
    with progress.progress_bars():
        time.sleep(0.3)
        progress.under_way("gguf q4_0: compile")
        time.sleep(1.5)
    drawn = [line.strip() for line in shown.getvalue().splitlines() if "gguf q4_0: compile" in line]
    assert "starting" in shown.getvalue()
    assert any("0:00:00" in line for line in drawn)
    assert any("0:00:01" in line for line in drawn), "nothing moves"
    assert not any("/" in line or "left" in line for line in drawn), "an end is told that nobody knows"


@pytest.mark.parametrize("width", [60, 80])
def test_a_long_name_leaves_the_numbers_of_its_bar_whole(monkeypatch, shown, width):
    progress.console.width = width
    with progress.progress_bars() as advance:
        progress.under_way("modelopt int8 a-int8 per-tensor static smoothquant: evaluate")
        advance("modelopt int8 a-int8 per-tensor static smoothquant", 3, 8)
        advance("jobs", 9, 10, "2 running, 0 failed")
        time.sleep(0.5)
    drawn = [line.rpartition("\r")[2] for line in shown.getvalue().splitlines()]
    jobs = [" ".join(line.split()) for line in drawn if "jobs" in line]
    whole = r"[09]/10 0:00:0\d left -:--:-- 2 running, 0 failed"
    assert [line for line in jobs if re.search(whole, line)] == jobs != []
    named = [line for line in drawn if "modelopt" in line]
    assert [line for line in named if "0:00:0" in line] == named != []


def test_bars_within_bars_are_the_same(shown):
    with progress.progress_bars() as outer, progress.progress_bars() as inner:
        assert inner is outer
    with progress.progress_bars(), progress.progress_bars(quiet=True) as inner:
        assert inner("evaluate", 1, 2) is None


def test_a_log_is_told_once_how_jobs_stand(monkeypatch):
    """A cluster is asked each second; its sweep's log had a line each time."""
    log = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=log, width=80, markup=False))
    with progress.progress_bars() as advance:
        for done, note in ((1, "2 running"), (1, "2 running"), (1, "1 running"), (1, "1 running"), (2, "1 running")):
            advance("jobs", done, 3, note)
    told = [line.partition(", less")[0] for line in log.getvalue().splitlines()]
    assert told == [f"jobs: {done} of 3 done, {num} running" for done, num in ((1, 2), (1, 1), (2, 1))]


def test_who_wants_quiet_hears_what_is_wrong(shown):
    with progress.progress_bars(quiet=True):
        progress.say("run once, as these are one scheme")
        with progress.progress_bars():
            progress.say("still")
        progress.say("the tokenizer is another", "warning")
    assert shown.getvalue().split() == ["warning:", "the", "tokenizer", "is", "another"]
    progress.say("again")
    assert "again" in shown.getvalue()


@pytest.mark.parametrize("words", [(), ("-m", "dtype=int8,nf4", "sweep.on_invalid=skip")], ids=["one", "sweep"])
def test_a_quiet_run_leaves_nothing_on_stderr(shell, words):
    code, _, err = shell(*digits_words("backend=quanto", *(words or ("dtype=int8",)), "-q"))
    assert (code, err) == (0, "")


def test_what_libraries_warn_of_is_in_the_runs_folder_and_not_on_the_screen(shell, monkeypatch):
    import quantlab.running.job as job

    real = job.evaluate

    def warns(*args, **kwargs):
        warnings.warn("Dynamo does not know how to trace the builtin", UserWarning, stacklevel=1)
        return real(*args, **kwargs)

    monkeypatch.setattr(job, "evaluate", warns)
    code, _, err = shell(*digits_words("backend=quanto", "dtype=int8"))
    assert code == 0
    assert "Dynamo" not in err
    run = shell.tracked()["quanto int8"]
    (kept,) = (shell.folder / "outputs" / "runs").glob(f"*/{WARNINGS}")
    assert "UserWarning: Dynamo does not know" in kept.read_text()
    assert (shell.folder / "outputs" / "mlartifacts" / run["run_id"] / "artifacts" / WARNINGS).is_file()


@pytest.mark.slow
def test_a_run_leaves_no_empty_folder(shell):
    before = {p for p in (shell.folder / "outputs").rglob("*")}
    code, _, err = shell(*digits_words("backend=quanto", "dtype=int8", "tracking=none", "output_dir=other"))
    assert code == 0, err
    assert before == {p for p in (shell.folder / "outputs").rglob("*")}
    empty = [p for p in (shell.folder / "other").rglob("*") if p.is_dir() and not list(p.iterdir())]
    assert empty == []


class Slow(torch.nn.Module):
    """Takes long enough that something is to be seen of it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.15)
        out: torch.Tensor = self.linear(x)
        return out


@pytest.mark.parametrize("quiet", [False, True])
def test_python_shows_what_is_under_way(shown, quiet):
    config = quantlab.QuantoConfig("int8")
    quantlab.evaluate(Slow(), [config, config], [torch.ones(2, 64)], floors=False, num_bootstrap=10, quiet=quiet)
    told = shown.getvalue()
    assert ("quanto int8 (1 of 2)" in told) == ("configs" in told) == ("1/2" in told) == (not quiet)
