"""Sweeps of quantlab's own jobs on the clusters as they are; skipped where their daemons do not run."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from quantlab.running.attempts import has_ended
from quantlab.running.far import NAME
from quantlab.running.handing import JOBS
from tests.support.engines import require_slurm
from tests.support.shell import digits_words
from tests.support.stores import ROOT

pytestmark = pytest.mark.slow
WORDS = (
    "-m",
    *digits_words(
        "backend=quanto,torchao", "dtype=int8", "evaluation.num_samples=10", "tracking.save_checkpoint=false"
    ),
)
TORCH_FREE = """
import sys
from quantlab.cli import main
try:
    main(sys.argv[1:])
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""


def submitted(shell, *words):
    """The rows of a sweep whose process must not have imported torch."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TORCH_FREE, *WORDS, *words, "--json"],
        cwd=shell.folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "False", "torch was imported"
    return {row["name"]: row for row in json.loads(done.stdout)}


def serial(shell):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "quantlab", *WORDS, "sweep.force=true", "--json"],
        cwd=shell.folder,
        env=env,
        capture_output=True,
        text=True,
        check=True,
        timeout=900,
    )
    return {row["name"]: row for row in json.loads(done.stdout)}


def numbers(rows):
    of = ("quality/", "quantization/", "memory/weights_bytes")
    return {name: {k: v for k, v in row["metrics"].items() if k.startswith(of)} for name, row in rows.items()}


def test_a_sweep_on_slurm_gives_the_rows_of_the_serial_run(shell):
    require_slurm()
    slurm = ("launcher=slurm", "launcher.settings.gpus_per_node=null", "launcher.settings.cpus_per_task=1")
    rows = submitted(shell, *slurm, "launcher.settings.array_parallelism=1")
    assert list(rows) == ["reference", "floor_bf16", "floor_batch", "quanto int8", "torchao int8"]
    assert {row["status"] for row in rows.values()} == {"FINISHED"}
    (lines,) = (shell.folder / "outputs" / "runs").glob(f"*/{JOBS}")
    told = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [one["name"] for one in told] == [NAME, "quanto int8", "torchao int8"]
    assert {has_ended(shell.folder / one["folder"]) for one in told} == {"FINISHED"}
    again = submitted(shell, *slurm, "launcher.settings.array_parallelism=1")
    assert all(row["resumed"] for row in again.values())
    assert numbers(serial(shell)) == numbers(rows) == numbers(again)


def test_a_sweep_that_left_slurm_is_taken_over(shell):
    """Its jobs wait behind the reference's; given again, the command computes nothing twice."""
    require_slurm()
    slurm = ("launcher=slurm", "launcher.settings.gpus_per_node=null", "launcher.settings.cpus_per_task=1")
    left = submitted(shell, *slurm, "launcher.detach=true")
    assert {row["status"] for row in left.values()} == {"SUBMITTED"}
    said = subprocess.run(
        ["squeue", "--noheader", "--array", "--format=%r"], capture_output=True, text=True, check=True
    )
    assert said.stdout.split().count("Dependency") == len(left) == 2
    rows = submitted(shell, *slurm)
    assert list(rows) == ["reference", "floor_bf16", "floor_batch", "quanto int8", "torchao int8"]
    assert {row["status"] for row in rows.values()} == {"FINISHED"}
    lines = [one for file in (shell.folder / "outputs" / "runs").glob(f"*/{JOBS}") for one in file.open()]
    assert len(lines) == 3, "none is submitted twice"
    assert rows["torchao int8"]["metrics"]["quality/floor_batch/latent_rel_mse"] >= 0
