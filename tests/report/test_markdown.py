"""quantlab compare --markdown: a table for issues and model cards, in which no name is markup."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from quantlab.report.compare import compare
from quantlab.report.comparison_markdown import comparison_markdown
from quantlab.report.comparison_table import answer_lines
from quantlab.report.reading import open_reader
from quantlab.report.selection import parse_request, select
from tests.support.comparison_store import SCHEMES

HOSTILE = "a | b <img src=x> [link](http://x) *c* `d`\n# e"


@pytest.fixture
def compared(sweep):
    request = parse_request(["sweep=latest", "--markdown"])
    assert request.as_markdown
    reader = open_reader(request.tracking, sweep.folder)
    selection = select(request, reader)
    return compare(request, selection, reader), selection


def tables(text):
    return [line for line in text.splitlines() if line.startswith("|")]


def test_each_row_has_its_numbers_its_verdict_and_its_place_on_the_front(compared):
    text = comparison_markdown(*compared)
    found = tables(text)
    assert len({line.replace(r"\|", "").count("|") for line in found}) == 1
    assert len(found) == 2 + len(SCHEMES) + 2
    own = next(line for line in found if line.startswith("| int8 a |"))
    assert "inside the floor" in own
    assert "★" in own
    assert "1.00" in text
    assert "- smallest without measurable loss (inside the floor): int8 a" in text
    assert "n = 40" in text
    assert "- nf4 at quantize: MemoryError: 12 GiB wanted" in text


def test_a_simulated_size_is_marked_in_the_answers_too(compared):
    (group,), selection = compared
    (told,) = [line for line in answer_lines(group) if line.startswith("closest to the reference")]
    assert "~" not in told
    runs = tuple(replace(r, metrics={**r.metrics, "memory/is_simulated": 1.0}) for r in group.runs)
    said = [line for line in answer_lines(replace(group, runs=runs)) if "MiB" in line]
    assert [" (~" in line for line in said] == [True, True, True]
    text = comparison_markdown([replace(group, runs=runs)], selection)
    assert len(re.findall(r"- .* \(\\?~\d", text)) == 3, text


def test_names_from_outside_are_text(compared):
    groups, selection = compared
    [group] = groups
    runs = tuple(replace(r, name=HOSTILE) if r.name == "int4 c" else r for r in group.runs)
    verdicts = {HOSTILE if k == "int4 c" else k: v for k, v in group.verdicts.items()}
    failed = tuple(replace(r, name=HOSTILE) for r in selection.failed)
    text = comparison_markdown([replace(group, runs=runs, verdicts=verdicts)], replace(selection, failed=failed))
    assert len(tables(text)) == 2 + len(SCHEMES) + 2
    for taken in ("<img", "[link](", "\n# e", " `d`", " *c*"):
        assert taken not in text.replace("\\" + taken.strip()[0], "")
