"""Who runs a job: one process at a time, a dead one loses it, and what it left is found."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest

from quantlab.running import claims
from quantlab.running.claims import Claims, wait_for
from quantlab.tracking.tags import HOST, PID
from tests.support.stores import ROOT

OTHER = """
import sys, time
from pathlib import Path
from quantlab.running.claims import Claims
claims = Claims(Path(sys.argv[1]))
taken = claims.take("key", "job") is None
claims.note("key", Path("/there"), "slurm", "7_0")
print(taken, flush=True)
sys.stdin.read()
if sys.argv[2] == "release":
    claims.close()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that has claimed a job; it ends when its input does."""

    def begin(at_end="release"):
        process = subprocess.Popen(
            [sys.executable, "-c", OTHER, str(tmp_path), at_end],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert process.stdout.readline().strip() == "True"
        return process

    return begin


def test_a_job_of_a_live_process_is_its_own(tmp_path, other):
    process = other()
    mine = Claims(tmp_path)
    held = mine.take("key", "job")
    assert (held.name, held.owner[PID]) == ("job", str(process.pid))
    assert mine.take("another", "job") is None
    threading.Timer(0.5, process.stdin.close).start()
    began = time.monotonic()
    wait_for(mine, ["key"], 30.0)
    assert time.monotonic() - began < 20
    assert mine.take("key", "job") is None
    assert mine.mine["key"].job_id == "", "what was given back left nothing"
    process.wait()
    mine.close()
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("how", ["killed", "left"])
def test_what_a_dead_process_left_is_found(tmp_path, other, how):
    process = other("keep")
    if how == "killed":
        process.kill()
    else:
        process.stdin.close()
    process.wait()
    mine = Claims(tmp_path)
    assert mine.take("key", "job") is None
    left = mine.mine["key"]
    assert (left.folder, left.engine, left.job_id) == ("/there", "slurm", "7_0")
    mine.close()


def test_an_owner_elsewhere_is_dead_when_it_is_silent(tmp_path, monkeypatch):
    mine = Claims(tmp_path)
    tmp_path.mkdir(exist_ok=True)
    owner = {**mine._me, HOST: "elsewhere"}
    assert not mine.is_alive(owner)
    mine._beat_file(owner).touch()
    assert mine.is_alive(owner)
    old = time.time() - claims.DEAD_S - 1
    os.utime(mine._beat_file(owner), (old, old))
    assert not mine.is_alive(owner)


@pytest.mark.slow
def test_of_many_processes_at_once_one_has_the_job(tmp_path):
    command = [sys.executable, "-c", OTHER, str(tmp_path), "release"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    all_of_them = [subprocess.Popen(command, env=env, **pipes) for _ in range(4)]
    assert sorted(process.stdout.readline().strip() for process in all_of_them) == ["False", "False", "False", "True"]
    for process in all_of_them:
        process.communicate(timeout=60)
