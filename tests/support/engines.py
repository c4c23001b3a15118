"""Jobs that need no model, for tests of engines: a folder says what its process does. And an engine that misbehaves."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from quantlab.running import handing
from quantlab.running.attempts import ATTEMPT, END, LOG, begin, write
from quantlab.running.engines.protocol import State
from tests.support.stores import ROOT

JOB = """
import json, os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
data = json.loads((folder / "job.json").read_text())
attempt = json.loads((folder / "attempt.json").read_text())["attempt"]
for path in data.get("reads", ()):
    (folder / Path(path).name).write_bytes((Path(data["output_dir"]) / path).read_bytes())
for path, text in data.get("makes", {}).items():
    place = Path(data["output_dir"]) / path
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text)
print("at", folder)
with (folder.parent / "began.txt").open("a") as file:
    file.write(f"{folder.name} {attempt} {os.getpid()}\\n")
what = data["does"].get(str(attempt), data["does"].get("0", "finish"))
def note(status, error=""):
    (folder / "run.json").write_text(json.dumps({"status": status, "error": error}))
note("RUNNING")
if what == "die":
    os.kill(os.getpid(), signal.SIGSEGV)
if what == "sleep":
    time.sleep(600)
if what == "fail":
    note("FAILED", "ValueError: no"); sys.exit(1)
if what == "quit":
    os._exit(7)
time.sleep(data.get("seconds", 0))
note("FINISHED")
"""
"""What stands in for the work of a job's process."""
SITE = f"""
import sys
argv = " ".join(sys.orig_argv)
if "quantlab.running.worker" in argv or "quantlab.running.forked" in argv:
    from quantlab.running import forked, worker

    forked.PRELOADED = ()

    def work(folder):
        sys.argv = ["job", str(folder)]
        try:
            exec(compile({JOB!r}, "job", "exec"), {{}})
        except SystemExit as ended:
            return ended.code
        return 0

    worker.work = work
"""


def require_slurm() -> None:
    """Skip where no SLURM runs on this machine."""
    pytest.importorskip("submitit")
    if shutil.which("sbatch") is None:
        pytest.skip("SLURM is not installed: there is no sbatch")
    done = subprocess.run(["sinfo", "--noheader"], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode or not any(word in done.stdout for word in ("idle", "mix", "alloc")):
        pytest.skip(f"SLURM does not run here: {done.stdout}{done.stderr}")


QUICK = f"""
import sys
if "quantlab.running.worker" in " ".join(sys.orig_argv):
    import types

    def main(words):
        sys.argv = ["job", *words]
        exec(compile({JOB!r}, "job", "exec"), {{}})

    sys.modules["quantlab.running.worker"] = types.ModuleType("quantlab.running.worker")
    sys.modules["quantlab.running.worker"].main = main
"""
"""The same without an import of quantlab in the processes that a node begins."""


def stand_in(folder: Path, monkeypatch, is_quick: bool = False) -> None:
    """From here on the processes of jobs do what their ``job.json`` says, and import no library."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(QUICK if is_quick else SITE)
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{ROOT}")


def make_job(folder: Path, name: str, does: Mapping[str, str] | None = None, **more: object) -> Path:
    """The folder of a job; ``does``: attempt -> finish, fail, die, sleep or quit (``"0"``: all others)."""
    made = folder / name
    made.mkdir(parents=True)
    (made / "job.json").write_text(json.dumps({"does": dict(does or {}), **more}))
    return made


def run_here(folder: Path, timeout_s: float | None = None) -> str:
    """What a node does with a job, without the process."""
    code, said = 0, io.StringIO()
    if not begin(folder):
        return "it was over already"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(sys, "argv", ["job", str(folder)])
        try:
            exec(compile(JOB, "job", "exec"), {})
        except SystemExit as ended:
            code = int(ended.code or 0)
    (folder / LOG).write_text(said.getvalue())
    write(folder, END, {"code": code, "timed_out": False})
    return f"exit code {code}"


def began(folder: Path) -> list[tuple[str, int]]:
    """(job, attempt) of each process that began, in order."""
    file = folder / "began.txt"
    lines = file.read_text().splitlines() if file.exists() else []
    return [(name, int(attempt)) for name, attempt, _ in map(str.split, lines)]


class Simulated:
    """An engine that loses, delays, repeats and preempts jobs as a seeded script says; nothing is computed."""

    outlives = True
    settle_s = 0.0

    def __init__(
        self, seed: int, num_at_once: int = 64, lost=0.05, preempted=0.02, repeated=0.02, killed=0.0, lazy=False
    ):
        self.random = random.Random(seed)
        self.num_at_once = num_at_once
        self.rates = {"lost": lost, "preempted": preempted, "repeated": repeated, "killed": killed}
        self.waiting: dict[str, Path] = {}
        self.running: dict[str, Path] = {}
        self.over: dict[str, State] = {}
        self.num_submitted = self.num_asked = self.num_polls = 0
        self.computed: dict[Path, int] = {}
        self.cancelled: list[str] = []
        self.lazy = lazy
        self.is_adopted = True

    def submit(self, folders: Sequence[Path], after: Sequence[str] = ()) -> list[str]:
        ids = [f"j{self.num_submitted + i}" for i in range(len(folders))]
        self.num_submitted += len(folders)
        self.waiting |= dict(zip(ids, folders, strict=True))
        return ids

    def poll(self, ids: Sequence[str]) -> Mapping[str, State]:
        self.num_polls += 1
        self.num_asked += len(ids)
        for job_id in list(self.running):
            self._step(job_id)
        for job_id in list(self.waiting)[: max(0, self.num_at_once - len(self.running))]:
            self.running[job_id] = self.waiting.pop(job_id)
        return {i: self._state(i) for i in ids}

    def _state(self, job_id: str) -> State:
        if job_id in self.waiting:
            return State("queued", reason="Resources")
        if job_id in self.running:
            return State("running", "node1")
        return self.over.pop(job_id, State("lost", reason="never heard of"))

    def _step(self, job_id: str) -> None:
        folder, chance = self.running[job_id], self.random.random()
        if chance < 0.5 and not self.lazy:  # delayed
            return
        del self.running[job_id]
        fate = self.random.random()
        if fate < self.rates["lost"]:
            if self.random.random() < 0.5:  # it had begun
                begin(folder)
                write(folder, "run.json", {"status": "RUNNING"})
            self.over[job_id] = State("lost", "node1", "NODE_FAIL")
            return
        fate -= self.rates["lost"]
        if fate < self.rates["preempted"]:
            if begin(folder):
                write(folder, END, {"code": -15, "preempted": True})
            self.over[job_id] = State("preempted", "node1", "preempted by SLURM")
            return
        for _ in range(1 + (self.random.random() < self.rates["repeated"])):  # the engine itself began it again
            if begin(folder):
                self.computed[folder] = self.computed.get(folder, 0) + 1
                write(folder, "run.json", {"status": "FINISHED"})
                write(folder, END, {"code": 0})
        self.over[job_id] = State("ended", "node1")

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    def cancel(self, ids: Sequence[str]) -> None:
        self.cancelled += ids
        for job_id in ids:
            self.waiting.pop(job_id, None)
            self.running.pop(job_id, None)

    def adopt(self, jobs: Mapping[str, Path]) -> set[str]:
        return {i for i in jobs if i in self.waiting or i in self.running or i in self.over}

    def close(self) -> None:
        pass


class Inline:
    """A cluster whose only node is this process: a job is run whole when it is asked for, one at a time."""

    outlives = True
    settle_s = 0.0

    def __init__(self):
        self.waiting: dict[str, Path] = {}
        self.after: dict[str, list[str]] = {}
        self.submitted: list[str] = []
        self.over: set[str] = set()

    def submit(self, folders: Sequence[Path], after: Sequence[str] = ()) -> list[str]:
        ids = [f"i{len(self.submitted) + i}" for i in range(len(folders))]
        self.submitted += [json.loads((folder / "job.json").read_text())["name"] for folder in folders]
        self.waiting |= dict(zip(ids, folders, strict=True))
        self.after |= {i: list(after) for i in ids}
        return ids

    def poll(self, ids: Sequence[str]) -> Mapping[str, State]:
        if self.waiting:
            self.run_one()
        return {i: State("queued" if i in self.waiting else "ended", "here") for i in ids}

    def run_one(self) -> None:
        from quantlab.running import worker

        job_id = next(i for i in self.waiting if not set(self.after[i]) & set(self.waiting))
        folder = self.waiting.pop(job_id)
        if begin(folder):
            with contextlib.chdir(os.getcwd()):
                write(folder, END, {"code": worker._work(folder)})
        self.over.add(job_id)

    def wait(self, seconds: float) -> None:
        pass

    def cancel(self, ids: Sequence[str]) -> None:
        for job_id in ids:
            self.waiting.pop(job_id, None)

    def adopt(self, jobs: Mapping[str, Path]) -> set[str]:
        return {i for i in jobs if i in self.waiting or i in self.over}

    def close(self) -> None:
        pass


def attempt_of(folder: Path) -> int:
    """The number of the attempt that a folder is at."""
    return int(json.loads((folder / ATTEMPT).read_text())["attempt"])


def hand_overs(monkeypatch, look=lambda job: None) -> list[dict]:
    """What would be run in processes of their own, as it was handed over; nothing is run, and all of it is lost."""
    found: list[dict] = []

    class Nobody(Simulated):
        def submit(self, folders, after=()):
            for folder in folders:
                job = json.loads((folder / "job.json").read_text())
                look(job)
                found.append(job)
                write(folder, END, {"code": 1})
            return super().submit(folders, after)

    def open_engine(config, folder, always_apart=False):
        return Nobody(0, lost=0, preempted=0, repeated=0, lazy=True)

    monkeypatch.setattr(handing, "open_engine", open_engine)
    return found
