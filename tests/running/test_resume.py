"""What a job is known by: the code that makes its numbers, and no other."""

import json
import shutil

import pytest

from quantlab.tracking.provenance import PACKAGE, WINGS, code_digest
from tests.support.shell import digits_words


@pytest.fixture
def package(tmp_path):
    return shutil.copytree(PACKAGE, tmp_path / "quantlab", ignore=shutil.ignore_patterns("__pycache__"))


MAKE_NUMBERS = [
    "vocabulary/numbers.py",
    "modules/memory.py",
    "backends/quanto/quantize.py",
    "models/digits_dit.py",
    "datasets/prompts.py",
    "protocols/diffusion.py",
    "metrics/kl.py",
    "stages/evaluate.py",
]
MAKE_NONE = [
    "cli.py",
    "docs.py",
    "errors.py",
    "report/compare.py",
    "report/page/page.js",
    "tracking/run.py",
    "planning/listing.py",
    "running/engines.py",
    "README.md",
]


def test_each_wing_that_makes_numbers_has_a_case():
    assert {path.partition("/")[0] for path in MAKE_NUMBERS} == set(WINGS)


@pytest.mark.parametrize("path", MAKE_NUMBERS)
def test_a_change_of_what_makes_numbers_changes_the_key(package, path):
    before = code_digest.__wrapped__(package)
    with (package / path).open("a") as file:
        file.write("\n")
    assert code_digest.__wrapped__(package) != before


@pytest.mark.parametrize("path", MAKE_NONE)
def test_a_change_of_anything_else_does_not(package, path):
    before = code_digest.__wrapped__(package)
    with (package / path).open("a") as file:
        file.write("\n")
    assert code_digest.__wrapped__(package) == before


def test_where_the_package_lies_is_no_part_of_the_key(package):
    assert code_digest.__wrapped__(package) == code_digest.__wrapped__(PACKAGE)


@pytest.mark.slow
def test_a_report_that_was_changed_is_not_taken_over(shell):
    words = (
        "-m",
        *digits_words("backend=quanto", "dtype=int8,int4", "evaluation.num_samples=10", "sweep.floors=false"),
    )
    first = shell.rows(*words)["quanto int8"]
    assert shell.rows(*words)["quanto int8"]["resumed"]
    for file in (shell.folder / "outputs").rglob("report.json"):
        text = file.read_text()
        file.write_text(text.replace('"quality/psnr_db": ', '"quality/psnr_db": 1'))
    code, out, err = shell(*words, "--json")
    assert code == 0
    assert "report.json is not what the run wrote" in " ".join(err.split())
    (again,) = [r for r in json.loads(out) if r["name"] == "quanto int8"]
    assert not again["resumed"]
    assert again["metrics"]["quality/psnr_db"] == first["metrics"]["quality/psnr_db"]
