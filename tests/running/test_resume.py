"""What a job is known by: the code that makes its numbers, and no other."""

import shutil

import pytest

from quantlab.running.resume import PACKAGE, WINGS, code_digest


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
    "report/page.js",
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
