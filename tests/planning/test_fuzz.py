"""Command lines made at random from the schema: exit 0 or 2, a message that begins with a typed key, no traceback, quickly."""

from __future__ import annotations

import contextlib
import io
import os
import re
import time

import pytest
from hypothesis import HealthCheck, given, settings

from quantlab import cli
from quantlab.progress import printable
from tests.support.command_lines import FIELDS, command_lines, keys_of

NAMED = [
    ["group=null"],
    ["backend=null"],
    ["dtype=null"],
    ["model=null"],
    ["launcher=null"],
    ["tracking=null"],
    ["modules_to_not_convert=null"],
    ["sweep.grid.dtype=[{a:1}]"],
    ["sweep.candidates=[{foo:1}]"],
    ["sweep.candidates=[{}]"],
    ["sweep.candidates=[{dtype:null}]"],
    ["sweep.candidates=[{dtype:[]}]"],
    ["sweep.candidates=[{dtype:{a:1}}]"],
    ["sweep.grid.dtype=[]"],
    ["sweep.grid.dtype=[null]"],
    ["sweep.grid={dtype:[]}"],
    ["sweep.grid.dtype=int8"],
    ["sweep.grid.output_dir=[[a]]"],
    ["evaluation.num_bootstrap=1"],
    ["model.num_layers=0"],
    ["num_threads=1000"],
    ["evaluation.guidance_scale=nan"],
    ["evaluation.guidance_scale=inf"],
    ["sweep.timeout_s=nan"],
    ["dtype=glob(int*)"],
    ["-m", "dtype=glob(int*)"],
    ["-m", "evaluation.guidance_scale=interval(0,1)"],
    ["evaluation.guidance_scale=interval(0,1)"],
    ["-m", "modules_to_not_convert=[],[norms]"],
    ["-m", "evaluation.num_samples=range(10,30,10)"],
    ["-m", "sweep.on_invalid=skip", "dtype=nf4,fp4", "sweep.dry_run=false"],
]


def checked(line: list[str]) -> None:
    """Run a command line as far as a dry run, and check how it ends, and how soon: a second time where it was slow,
    since what else a machine does is not the command's."""
    limit = 6 if "-m" in line else 2  # CPU seconds; a sweep composes each of its jobs
    assert ended(line) < limit or ended(line) < limit


def ended(line: list[str]) -> float:
    """Check how a command line ends; its CPU seconds."""
    out, err = io.StringIO(), io.StringIO()
    began = time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "run", lambda *args: 0)  # what is no dry run by a word of the line
        patch.delenv("QUANTLAB_TRACEBACK", raising=False)
        with pytest.raises(SystemExit) as end:
            cli.main(line)
    seconds = time.process_time() - began
    message = err.getvalue()
    assert end.value.code in (0, 2), message
    assert "Traceback" not in message
    if end.value.code == 0:
        assert [line for line in message.splitlines() if not line.startswith("warning: ")] == []
        return seconds
    assert message.startswith("quantlab: ")
    said = message.removeprefix("quantlab: ")
    starts = tuple(printable(key, 20_000, lines=True)[:100] for key in keys_of(line))
    sweep = re.match(r"\d+ of \d+ combinations? (are|is) impossible", said)
    assert said.startswith(starts) or sweep, said
    assert len(said.strip()) > 5
    return seconds


@pytest.mark.parametrize("line", NAMED, ids=" ".join)
def test_command_lines_that_went_wrong(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checked(["backend=quanto", *line] if not any(w.startswith("backend") for w in line) else line)


QUIET = settings(
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)


@settings(QUIET, max_examples=20)
@given(command_lines())
def test_a_few_command_lines_at_random(line):
    checked(line)


@pytest.mark.slow
@settings(QUIET, max_examples=int(os.environ.get("QUANTLAB_COMMAND_LINES", "2000")))
@given(command_lines())
def test_two_thousand_command_lines_at_random(line):
    checked(line)


def test_every_number_of_the_schema_has_its_range():
    """Numbers without one: those of a backend's own settings, which its config checks."""
    numbers = {k: f for k, f in FIELDS.items() if re.fullmatch(r"(int|float)( \| None)?", str(f.type))}
    assert len(numbers) > 25
    assert [k for k, f in numbers.items() if "least" not in f.metadata and "kind" not in f.metadata] == []
