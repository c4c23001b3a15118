"""What the README says of adding something is all there is to it: done to a copy of the project, then run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.shell import digits_words, make_shell

ROOT = Path(__file__).resolve().parents[2]

METRIC = '''"""The largest change of a single value of the final latent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantlab.metrics.arrays import Values, paired_rows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def latent_max_change(candidate: Values, reference: Values) -> NDArray[np.float64]:
    """max |z_q - z_r| of final latents (n, ...): (n,), 0 for equal latents, in the latent's unit."""
    cand, ref = paired_rows(candidate, reference, "latent_max_change")
    return abs(cand - ref).max(axis=1)
'''
METRIC_ROW = """    Metric(
        name="latent_max_change",
        unit="1",
        higher_is_better=False,
        protocols=_DIFFUSION,
        of_reference=0.0,
        description="largest change of a single value of the final latent",
    ),
"""
DATASET = '''"""``dataset=digits_even``: the digits with the noise of another seed."""

from __future__ import annotations

from dataclasses import replace

from quantlab.datasets import digits_classes
from quantlab.models.loaded import LoadedModel
from quantlab.protocols.diffusion_inputs import DiffusionInputs
from quantlab.vocabulary.schema import DatasetConfig, EvaluationConfig


def load(config: DatasetConfig, evaluation: EvaluationConfig, model: LoadedModel) -> DiffusionInputs:
    """As ``digits_classes``, with twice the seed."""
    return digits_classes.load(replace(config, seed=2 * config.seed), evaluation, model)
'''
DATASET_ROW = """    Dataset(
        name="digits_even",
        protocols=("diffusion",),
        load=digits_even.load,
        load_calibration=None,
        read_file=None,
        check_rows=None,
        tell_rows=None,
        check_samples=None,
        conditions=None,
        own_files=None,
        seed_is_content=True,
    ),
"""


class Copy:
    """A copy of the project to which something is added; it remembers which files were touched."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.touched: set[str] = set()
        for name in ("quantlab", "conf", "recipes"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))

    def write(self, path: str, text: str) -> None:
        assert not (self.folder / path).exists()
        (self.folder / path).write_text(text)
        self.touched.add(path)

    def insert(self, path: str, before: str, text: str) -> None:
        file = self.folder / path
        assert file.read_text().count(before) == 1, f"{before!r} in {path}"
        file.write_text(file.read_text().replace(before, text + before))
        self.touched.add(path)

    def quantlab(self, where: Path, *words: str) -> str:
        env = {**os.environ, "PYTHONPATH": str(self.folder)}
        command = [sys.executable, "-m", "quantlab", *words]
        done = subprocess.run(command, cwd=where, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout


def said(what: str, name: str) -> set[str]:
    """The files that the README's table names for adding something, with the name put in."""
    row = re.search(rf"^\| {re.escape(what)} \|(.*)\|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert row, f"no row for {what}"
    return {p.replace("NAME", name) for p in re.findall(r"`([\w/.]+\.(?:py|yaml))`", row[1])}


@pytest.fixture
def copy(tmp_path):
    return Copy(tmp_path / "project")


@pytest.mark.slow
def test_a_metric_and_a_data_set_are_added_as_the_readme_says(copy, template, trained, tmp_path):
    copy.write("quantlab/metrics/latent_max_change.py", METRIC)
    copy.insert("quantlab/metrics/__init__.py", '    Metric(\n        name="latent_cosine"', METRIC_ROW)
    measured = "    steps: dict[str, NDArray[np.float64]] = {}\n    estimates"
    line = '    samples["latent_max_change"] = latent_max_change(latents, expected)\n'
    copy.insert("quantlab/protocols/diffusion.py", measured, line)
    imported = "from quantlab.metrics.latent_max_change import latent_max_change\n"
    copy.insert("quantlab/protocols/diffusion.py", "from quantlab.metrics.psnr import", imported)
    metric, copy.touched = copy.touched, set()
    known = said("a metric", "latent_max_change")
    protocols = {p for p in metric if p.startswith("quantlab/protocols/")}
    assert len(protocols) == 1, "a line in the protocol that measures it"
    assert metric - protocols == known

    copy.write("quantlab/datasets/digits_even.py", DATASET)
    option = "# @package dataset\n# The digits with the noise of another seed.\nname: digits_even\n"
    copy.write("conf/dataset/digits_even.yaml", option)
    copy.insert("quantlab/datasets/table.py", '    Dataset(\n        name="prompts"', DATASET_ROW)
    table = copy.folder / "quantlab/datasets/table.py"
    table.write_text(table.read_text().replace("import digits_classes, ", "import digits_classes, digits_even, "))
    assert copy.touched == said("a data set", "digits_even")

    work = make_shell(tmp_path / "work", template, trained).folder
    listed = {r["metric"]: r for r in json.loads(copy.quantlab(work, "list", "metrics", "--json"))}
    assert listed["quality/latent_max_change"]["better"] == "lower"
    assert "digits_even" in copy.quantlab(work, "list", "datasets")
    words = digits_words("evaluation.num_samples=10", "backend=quanto", "dtype=int8,int4", "dataset=digits_even")
    rows = {r["name"]: r["metrics"] for r in json.loads(copy.quantlab(work, "-m", *words, "--json"))}
    costs = [rows[name]["quality/latent_max_change"] for name in ("reference", "quanto int8", "quanto int4")]
    assert costs == sorted(costs)
    assert costs[0] == 0 < costs[1] < costs[2]
    assert rows["quanto int4"]["quality/latent_max_change/n"] == 10
    compared = json.loads(copy.quantlab(work, "compare", "sweep=latest", "metric=latent_max_change", "--json"))
    assert compared["groups"][0]["metric"] == "latent_max_change"
