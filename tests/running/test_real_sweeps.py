"""Sweeps of quantlab's own jobs on the clusters as they are; skipped where their daemons do not run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from quantlab.running.attempts import has_ended
from quantlab.running.engines.forking import python_environment
from quantlab.running.far import NAME
from quantlab.running.handing import JOBS
from tests.support.engines import require_slurm
from tests.support.ray_nodes import two_nodes
from tests.support.shell import Shell, digits_words

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
    env = {**os.environ, **python_environment(), "OMP_NUM_THREADS": "1"}
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
    env = {**os.environ, **python_environment(), "OMP_NUM_THREADS": "1"}
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


ROWS = ["reference", "floor_bf16", "floor_batch", "quanto int8", "torchao int8"]
SLURM = ("launcher=slurm", "launcher.settings.gpus_per_node=null", "launcher.settings.cpus_per_task=1")


def check_rows(shell, *words):
    """A sweep's rows are those of the serial run, bit for bit, and are found again without asking a node."""
    rows = submitted(shell, *words)
    assert list(rows) == ROWS
    assert {row["status"] for row in rows.values()} == {"FINISHED"}
    (lines,) = (shell.folder / "outputs" / "runs").glob(f"*/{JOBS}")
    told = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [one["name"] for one in told] == [NAME, "quanto int8", "torchao int8"]
    assert {has_ended(shell.folder / one["folder"]) for one in told} == {"FINISHED"}
    again = submitted(shell, *words)
    assert all(row["resumed"] for row in again.values())
    assert len([*(shell.folder / "outputs" / "runs").glob(f"*/{JOBS}")]) == 1
    assert numbers(serial(shell)) == numbers(rows) == numbers(again)


def test_a_sweep_on_slurm_gives_the_rows_of_the_serial_run(shell):
    require_slurm()
    check_rows(shell, *SLURM, "launcher.settings.array_parallelism=1")


def test_a_sweep_on_two_ray_nodes_gives_the_rows_of_the_serial_run(shell, tmp_path, monkeypatch):
    """They see nothing of the sweep's folder."""
    pytest.importorskip("ray")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with two_nodes(tmp_path, monkeypatch) as address:
        here = Shell(shutil.copytree(shell.folder, tmp_path / "here" / "work"))
        address = f"launcher.settings.ray.init.address={address}"
        check_rows(here, "launcher=ray", address, "launcher.settings.ray.remote.num_gpus=0")


def test_a_sweep_that_left_slurm_is_taken_over(shell):
    """Its jobs wait behind the reference's; given again, the command computes nothing twice."""
    require_slurm()
    left = submitted(shell, *SLURM, "launcher.detach=true")
    assert {row["status"] for row in left.values()} == {"SUBMITTED"}
    said = subprocess.run(
        ["squeue", "--noheader", "--array", "--format=%E"], capture_output=True, text=True, check=True
    )  # what each waits for; its reason (%r) reads None until the scheduler has looked at it
    assert sum(one.startswith("after") for one in said.stdout.split()) == len(left) == 2
    rows = submitted(shell, *SLURM)
    assert list(rows) == ROWS
    assert {row["status"] for row in rows.values()} == {"FINISHED"}
    lines = [one for file in (shell.folder / "outputs" / "runs").glob(f"*/{JOBS}") for one in file.open()]
    submitted_as = {(row["engine"], row["id"]) for row in map(json.loads, lines)}  # a sweep notes what it takes over
    assert len(submitted_as) == 3, "none is submitted twice"
    assert rows["torchao int8"]["metrics"]["quality/floor_batch/latent_rel_mse"] >= 0
