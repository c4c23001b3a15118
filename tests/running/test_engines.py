"""Every engine does the same with the same jobs: what is lost is begun again, what kills is found, what is cancelled ends."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from quantlab.errors import ConfigError
from quantlab.planning.plan import plan
from quantlab.running import node, scheduler
from quantlab.running.attempts import END, LOST, begin, earlier_attempts, ending, has_ended, num_attempts, read, write
from quantlab.running.engines import slurm
from quantlab.running.engines.pool import Pool, SharingPool
from quantlab.running.engines.protocol import EngineError, State
from quantlab.running.engines.slurm import Slurm, parameters
from quantlab.running.engines.submitted import Submitted
from quantlab.running.engines.table import check_launcher
from quantlab.running.scheduler import Scheduler
from quantlab.running.sweep import run_plan
from quantlab.vocabulary.launching import (
    LAUNCHER_SETTINGS,
    LauncherConfig,
    RaySettings,
    SlurmSettings,
    SubmititSettings,
)
from tests.support.engines import Simulated, began, make_job, stand_in

BY_SUBMITIT = pytest.param("submitit_local", marks=pytest.mark.slow)  # three starts of Python a job
ENGINES = ["pool", "sharing", BY_SUBMITIT, "simulated"]


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """An engine by its name, whose processes run the jobs of :mod:`tests.support.engines`."""
    stand_in(tmp_path / "site", monkeypatch)
    made = []

    def open_one(name, timeout_s=None):
        if name == "submitit_local":
            pytest.importorskip("submitit")
        made.append(
            {
                "pool": lambda: Pool(2, timeout_s),
                "sharing": lambda: SharingPool(2, tmp_path / "queue"),
                "submitit_local": lambda: Submitted(SubmititSettings(), tmp_path / "submitit", 2, timeout_s),
                "simulated": lambda: Simulated(0, lazy=True),
            }[name]()
        )
        return made[-1]

    yield open_one
    for one in made:
        one.close()


def living(runs):
    """Pids of jobs' processes that are there."""
    pids = [int(line.split()[2]) for line in _lines(runs / "began.txt")]
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]


def run_all(engine, folders, max_attempts=3, **more):
    over = []
    one = Scheduler(engine, max_attempts, over.append, **more)
    one.add(folders)
    one.run()
    assert sorted(over) == sorted(folders), "each once"
    return one


@pytest.mark.parametrize("name", ENGINES)
def test_jobs_are_run_and_failures_are_rows(opened, tmp_path, name):
    engine = opened(name)
    folders = [make_job(tmp_path / "runs", f"job{i}") for i in range(4)]
    failing = [] if name == "simulated" else [make_job(tmp_path / "runs", "bad", {"0": "fail"})]
    counts = run_all(engine, [*folders, *failing]).counts
    assert [has_ended(folder) for folder in [*folders, *failing]] == ["FINISHED"] * 4 + ["FAILED"] * len(failing)
    assert (counts.ended, counts.failed) == (4 + len(failing), len(failing))
    if name != "simulated":
        assert sorted(began(tmp_path / "runs")) == sorted((f.name, 1) for f in [*folders, *failing])


@pytest.mark.parametrize("name", ["pool", BY_SUBMITIT])
def test_what_kills_its_process_twice_is_the_killer(opened, tmp_path, name):
    """The first death may be anybody's: the job is begun again, and the others are not touched."""
    runs = tmp_path / "runs"
    killer = make_job(runs, "killer", {"0": "die"})
    unlucky = make_job(runs, "unlucky", {"1": "die"})
    other = make_job(runs, "other")
    run_all(opened(name), [killer, unlucky, other])
    assert ending(killer).startswith("SIGSEGV: the job's process ended (a segmentation fault")
    assert ending(killer).endswith("so did attempt 1")
    assert [has_ended(f) for f in (killer, unlucky, other)] == ["FAILED", "FINISHED", "FINISHED"]
    ((attempt,),) = [earlier_attempts(unlucky)]
    assert (attempt["attempt"], attempt["reason"].split(":")[0]) == (1, "SIGSEGV")
    assert attempt["node"]
    assert sorted(began(runs)) == [("killer", 1), ("killer", 2), ("other", 1), ("unlucky", 1), ("unlucky", 2)]


@pytest.mark.parametrize("name", ["pool", BY_SUBMITIT])
def test_a_job_is_ended_at_its_timeout_with_all_that_it_began(opened, tmp_path, name):
    slow = make_job(tmp_path / "runs", "slow", {"0": "sleep"})
    run_all(opened(name, timeout_s=1.5), [slow, make_job(tmp_path / "runs", "quick")])
    assert ending(slow) == "timeout: longer than sweep.timeout_s=1.5"
    assert num_attempts(slow) == 1
    assert not living(tmp_path / "runs")


@pytest.mark.parametrize("name", ["pool", BY_SUBMITIT, "simulated"])
def test_an_interrupted_sweep_cancels_what_waits_and_runs(opened, tmp_path, name, monkeypatch):
    engine, said = opened(name), []
    monkeypatch.setattr(scheduler, "say", lambda text, kind="": said.append(text))
    folders = [make_job(tmp_path / "runs", f"job{i}", {"0": "sleep"}) for i in range(5)]

    def interrupt(counts):
        if counts.running == 2 or name == "simulated":
            raise KeyboardInterrupt

    one = Scheduler(engine, 3, lambda folder: None, progress=interrupt)
    one.add(folders)
    with pytest.raises(KeyboardInterrupt):
        one.run()
    before = time.monotonic()
    if name != "simulated":
        assert said == ["cancelled: 2 running jobs, 3 queued"]
        assert not any(state.is_open for state in engine.poll(list(one._open)).values())
        assert not living(tmp_path / "runs")
    assert time.monotonic() - before < 5


PARENT = """
import sys, time
from pathlib import Path
from quantlab.running.engines.pool import Pool
from quantlab.running.engines.submitted import Submitted
from quantlab.vocabulary.launching import SubmititSettings
base = Path(sys.argv[2])
engine = Pool(2) if sys.argv[1] == "pool" else Submitted(SubmititSettings(), base / "submitit", 2)
ids = engine.submit([base / "runs" / "a", base / "runs" / "b"])
while True:
    engine.poll(ids)
    time.sleep(0.1)
"""


@pytest.mark.parametrize("name", ["pool", BY_SUBMITIT])
def test_local_workers_end_with_their_parent(tmp_path, name, monkeypatch):
    stand_in(tmp_path / "site", monkeypatch)
    for job in "ab":
        make_job(tmp_path / "runs", job, {"0": "sleep"})
    parent = subprocess.Popen([sys.executable, "-c", PARENT, name, str(tmp_path)])
    pids = []
    until = time.monotonic() + 60
    while len(pids) < 2 and time.monotonic() < until:
        time.sleep(0.1)
        pids = [psutil.Process(int(line.split()[2])) for line in _lines(tmp_path / "runs" / "began.txt")]
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert not psutil.wait_procs(pids, timeout=20)[1]


def _lines(file):
    return file.read_text().splitlines() if file.exists() else []


def test_a_lost_server_costs_time_and_no_row(opened, tmp_path):
    """The process from which jobs are forked is killed: its jobs are lost, and begun again."""
    pool = opened("pool")
    folder = make_job(tmp_path / "runs", "job", {"1": "sleep"})
    killed = []

    def kill(counts):
        if began(tmp_path / "runs") and not killed:
            killed.append(pool._processes._server.pid)
            os.kill(killed[0], signal.SIGKILL)

    run_all(pool, [folder], progress=kill)
    assert has_ended(folder) == "FINISHED"
    assert began(tmp_path / "runs") == [("job", 1), ("job", 2)]
    assert len(earlier_attempts(folder)) == 1


# -- attempts


def test_an_attempt_begins_in_an_empty_folder_and_the_earlier_one_is_kept(tmp_path):
    folder = make_job(tmp_path, "job")
    assert begin(folder) == 1
    (folder / "tracking").mkdir()
    (folder / "tracking" / "events.jsonl").write_text("begun")
    write(folder, "run.json", {"status": "RUNNING"})
    assert begin(folder) == 2
    assert sorted(p.name for p in folder.iterdir()) == ["attempt.json", "attempts", "job.json"]
    assert (folder / "attempts" / "1" / "tracking" / "events.jsonl").read_text() == "begun"
    (earlier,) = earlier_attempts(folder)
    assert earlier["reason"].startswith("its engine began it again")
    assert num_attempts(folder) == 2


def test_what_has_finished_is_not_begun_again(tmp_path):
    folder = make_job(tmp_path, "job")
    begin(folder)
    write(folder, "run.json", {"status": "FINISHED"})
    assert begin(folder) == 0
    write(folder, LOST, {"reason": "taken for lost"})
    assert begin(folder) == 0
    failed = make_job(tmp_path, "failed")
    begin(failed)
    write(failed, "run.json", {"status": "FAILED", "error": "ValueError: no"})
    assert begin(failed) == 0


def test_a_job_that_was_told_to_end_is_no_failure(tmp_path):
    folder = make_job(tmp_path, "job")
    begin(folder)
    write(folder, "run.json", {"status": "FAILED", "error": "SIGTERM: the process was told to end"})
    assert has_ended(folder) == ""
    write(folder, END, {"code": 143, "preempted": True})
    assert has_ended(folder) == ""
    assert begin(folder) == 2
    assert earlier_attempts(folder)[0]["reason"].startswith("preempted")


def test_a_preempted_job_is_told_and_ends_in_time(tmp_path, monkeypatch):
    stand_in(tmp_path / "site", monkeypatch)
    folder = make_job(tmp_path, "job", {"1": "sleep"})
    code = f"from quantlab.running import node; print(node.run({str(folder)!r}))"
    watching = subprocess.Popen([sys.executable, "-c", code])
    while not began(tmp_path):
        time.sleep(0.05)
    watching.send_signal(signal.SIGTERM)
    assert watching.wait(60) == 0
    assert read(folder, END)["preempted"]
    assert node.run(folder) == "exit code 0"
    assert has_ended(folder) == "FINISHED"


@pytest.mark.slow
def test_a_node_that_was_taken_for_lost_leaves_the_folder_to_the_next(tmp_path, monkeypatch):
    stand_in(tmp_path / "site", monkeypatch)
    folder = make_job(tmp_path, "job", {"1": "sleep"})
    code = f"from quantlab.running import node; print(node.run({str(folder)!r}))"
    old = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    while not began(tmp_path):
        time.sleep(0.05)
    write(folder, LOST, {"reason": "NODE_FAIL"})
    assert node.run(folder) == "exit code 0"
    assert old.communicate(timeout=60)[0].strip() == "it was begun elsewhere"
    assert has_ended(folder) == "FINISHED"
    assert earlier_attempts(folder)[0]["reason"] == "NODE_FAIL"


@pytest.mark.parametrize("max_attempts", [1, 3])
def test_a_job_that_is_always_lost_is_a_row_in_the_end(tmp_path, max_attempts):
    engine = Simulated(0, lost=1.0, lazy=True)
    folder = make_job(tmp_path, "job")
    run_all(engine, [folder], max_attempts)
    assert has_ended(folder) == "FAILED"
    assert ending(folder) == f"lost {max_attempts} times (launcher.max_attempts), last: NODE_FAIL"
    assert engine.num_submitted == max_attempts


def test_what_somebody_cancelled_is_not_begun_again(tmp_path):
    class Cancelled(Simulated):
        def _step(self, job_id):
            begin(self.running.pop(job_id))
            self.over[job_id] = State("stopped", "node1", "cancelled in SLURM")

    folder = make_job(tmp_path, "job")
    engine = Cancelled(0)
    run_all(engine, [folder])
    assert (ending(folder), engine.num_submitted) == ("cancelled in SLURM", 1)


@pytest.mark.parametrize("seed", range(8))
def test_no_row_is_lost_or_twice_whatever_an_engine_does(tmp_path, seed, monkeypatch):
    monkeypatch.setattr(scheduler, "_LONGEST_PAUSE_S", 0.0)
    monkeypatch.setattr(scheduler, "_PAUSE_S", 0.0)
    monkeypatch.setattr(scheduler, "say", lambda *_: None)
    engine = Simulated(seed, num_at_once=16, lost=0.2, preempted=0.2, repeated=0.3)
    folders = [make_job(tmp_path, f"job{i}") for i in range(60)]
    run_all(engine, folders, max_attempts=50)
    assert {has_ended(folder) for folder in folders} == {"FINISHED"}
    assert set(engine.computed.values()) == {1}


def test_jobs_that_never_run_are_told_with_the_engines_own_reason(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(scheduler, "say", lambda text, kind="": said.append(text))
    monkeypatch.setattr(scheduler, "WAIT_TOLD_S", 0.0)

    class Full(Simulated):
        def poll(self, ids):
            self.num_at_once = 0 if not said else 64
            return super().poll(ids)

    run_all(Full(0, lost=0, preempted=0, lazy=True), [make_job(tmp_path, f"job{i}") for i in range(3)])
    assert any("3 wait: Resources" in line for line in said)


# -- settings


@pytest.mark.parametrize("engine", ["slurm", "submitit_local"])
def test_the_settings_are_submitits_own_words(engine, tmp_path):
    submitit = pytest.importorskip("submitit")
    settings = LAUNCHER_SETTINGS[engine]()
    told = {f: "1" for f in vars(settings) if f not in ("setup", "additional_parameters", "stderr_to_stdout")}
    for name in told:
        setattr(settings, name, 1 if name not in ("name", "partition", "qos", "comment") else "x")
    executor = submitit.AutoExecutor(tmp_path, cluster="slurm" if engine == "slurm" else "local")
    executor.update_parameters(**parameters(settings))


def test_a_command_without_slurm_is_told_where_to_go(tmp_path, monkeypatch):
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"^launcher=slurm: there is no sbatch on the path.*launcher=pool"):
        Slurm(SlurmSettings(), tmp_path)


@pytest.mark.parametrize("engine", ["serial", "pool", "ray"])
def test_only_jobs_that_outlive_their_sweep_can_be_left(engine, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    settings = LAUNCHER_SETTINGS[engine]()
    with pytest.raises(ConfigError, match=r"^launcher.detach=true: .*launcher=slurm"):
        check_launcher(LauncherConfig(engine=engine, detach=True, settings=settings))
    there = RaySettings()
    there.ray.init.address = "host:6379"
    check_launcher(LauncherConfig(engine="ray", detach=True, settings=there))


def test_a_single_job_is_not_left_to_an_engine():
    request = plan(["backend=quanto", "dtype=int8", "launcher=slurm", "launcher.detach=true"])
    with pytest.raises(ConfigError, match=r"^launcher.detach=true: a single job .*-m dtype=int8,int4"):
        run_plan(request)


SQUEUE = {
    ("PENDING", "", "Resources"): ("queued", "Resources"),
    ("RUNNING", "n1", "None"): ("running", "None"),
    ("CANCELLED by 1000", "n1", ""): ("stopped", "cancelled in SLURM"),
    ("NODE_FAIL", "n1", ""): ("lost", "NODE_FAIL of n1"),
    ("PREEMPTED", "n1", ""): ("preempted", "preempted by SLURM"),
    ("OUT_OF_MEMORY", "n1", ""): ("stopped", slurm._LIMITS["OUT_OF_MEMORY"]),
    ("COMPLETED", "n1", "None"): ("ended", ""),
}


@pytest.mark.parametrize("said", SQUEUE)
def test_what_slurm_says(said):
    state = slurm._state(*said)
    assert (state.what, state.reason) == SQUEUE[said]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A SLURM whose node n1 ends each job at once and writes where nobody looks, and the time of its clock."""
    now = [0.0]
    monkeypatch.setattr(slurm.shutil, "which", lambda name: name)
    monkeypatch.setattr(slurm, "_call", lambda *words: "JobId=7 JobState=FAILED NodeList=n1" if "show" in words else "")
    monkeypatch.setattr(slurm.time, "monotonic", lambda: now[0])
    engine = Slurm(SlurmSettings(), tmp_path / "launcher")
    engine._folders = {i: make_job(tmp_path / "runs", f"job{i}") for i in "78"}
    return engine, now


def test_a_folder_that_the_first_node_does_not_see_is_named(elsewhere, tmp_path):
    engine, now = elsewhere
    assert engine.poll(["7"])["7"].is_open, "a shared folder may take a while"
    now[0] = 29.0
    assert engine.poll(["7"])["7"].is_open
    now[0] = 31.0
    with pytest.raises(
        EngineError,
        match=rf"^output_dir={tmp_path}: node n1 wrote nothing there \(SLURM says FAILED\); .*output_dir=/shared",
    ):
        engine.poll(["7"])


def test_all_jobs_are_cancelled_where_the_first_one_shows_that_no_folder_is_shared(elsewhere, tmp_path, monkeypatch):
    engine, now = elsewhere
    ended = []
    monkeypatch.setattr(engine, "submit", lambda folders, after=(): ["7", "8"])
    monkeypatch.setattr(engine, "wait", lambda seconds: now.append(now.pop() + 10))
    monkeypatch.setattr(engine, "cancel", ended.extend)
    one = Scheduler(engine, 3, lambda folder: None)
    one.add(list(engine._folders.values()))
    with pytest.raises(EngineError, match=r"^output_dir="):
        one.run()
    assert ended == ["7", "8"]


def test_one_node_that_does_not_see_what_others_do_is_a_lost_one(elsewhere):
    engine, now = elsewhere
    begin(engine._folders["8"])
    write(engine._folders["8"], "run.json", {"status": "FINISHED"})
    assert engine.poll(["7", "8"])["8"].what == "ended"
    now[0] = 31.0
    state = engine.poll(["7"])["7"]
    assert (state.what, state.node) == ("lost", "n1")
    assert "wrote nothing there" in state.reason
    begin(engine._folders["7"])
    assert engine.poll(["7"])["7"] == State("ended", "n1")


def test_what_is_cancelled_while_it_is_queued_began_on_no_node(elsewhere, monkeypatch):
    """SLURM forgets such a task of an array at once; that says nothing of the folder."""
    engine, now = elsewhere
    said = {"squeue": "7|PENDING||Resources\n8|RUNNING|n1|None"}
    monkeypatch.setattr(slurm, "_call", lambda *words: said.get(words[0]))
    assert engine.poll(["7", "8"])["7"].what == "queued"
    said["squeue"] = ""
    assert all(state.is_open for state in engine.poll(["7", "8"]).values())
    now[0] = 31.0
    with pytest.raises(EngineError, match="node n1 wrote nothing there .SLURM says nothing of the job"):
        engine.poll(["8"])
    assert engine.poll(["7"])["7"] == State("stopped", "", "cancelled in SLURM while it was queued")


def test_what_a_job_said_before_it_came_to_its_folder_is_its_reason(elsewhere, tmp_path):
    engine, _ = elsewhere
    (tmp_path / "launcher").mkdir()
    (tmp_path / "launcher" / "7_0_log.err").write_text("slurmstepd: x\n/usr/bin/python: No module named quantlab\n\n")
    assert engine.poll(["7"])["7"].reason == "it began nothing: /usr/bin/python: No module named quantlab"


REFUSED = {
    "partition": "sbatch: error: invalid partition specified: none_such\nsbatch: error: Batch job submission failed: Invalid partition name specified",
    "account": "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified",
    "qos": "sbatch: error: Batch job submission failed: Invalid qos specification",
    "gpus_per_node": "sbatch: error: Invalid generic resource (gres) specification",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_sbatch_refuses_is_said_in_its_own_words(what, tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("sbatch", "srun", "squeue", "sacct", "scontrol"):
        (commands / name).write_text(
            f"#!/bin/sh\n[ {name} = sbatch ] && echo '{REFUSED[what]}' >&2 && exit 1\nexit 0\n"
        )
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    engine = Slurm(SlurmSettings(**{what: 1 if what == "gpus_per_node" else "none_such"}), tmp_path / "launcher")
    with pytest.raises(EngineError, match=r"^launcher=slurm: sbatch refuses the jobs .*launcher.settings") as told:
        engine.submit([make_job(tmp_path / "runs", "job")])
    assert REFUSED[what].rpartition(": ")[2] in str(told.value)
    assert f"{what}" in str(told.value).partition("look at")[2]


def test_a_controller_that_does_not_answer_loses_no_job(tmp_path, monkeypatch):
    monkeypatch.setattr(slurm.shutil, "which", lambda name: name)
    told = {"squeue": "7_0|RUNNING|n1|None\n7_1|PENDING||Priority\n"}
    monkeypatch.setattr(slurm, "_call", lambda *words: told.get(words[0]))
    engine = Slurm(SlurmSettings(), tmp_path)
    assert engine.poll(["7_0", "7_1"])["7_0"] == State("running", "n1", "None")
    told.clear()
    assert engine.poll(["7_0", "7_1"])["7_1"] == State("queued", "", "Priority")
    told |= {"squeue": "", "scontrol": "JobId=7 JobState=NODE_FAIL Reason=NodeDown NodeList=n1"}
    assert engine.poll(["7_0"])["7_0"] == State("lost", "n1", "NODE_FAIL of n1")
    assert json.dumps(sorted(engine.adopt({"7_0": tmp_path}))) == "[]"


def test_a_job_behind_others_waits_for_their_processes(tmp_path, monkeypatch):
    looks, began = iter([True, True, False, False]), []
    monkeypatch.setattr(node, "is_alive", lambda job_id: next(looks))
    monkeypatch.setattr(node.time, "sleep", lambda seconds: began.append("waited"))
    monkeypatch.setattr(node, "run", lambda *words: began.append(words))
    node.run_after(["here/1/0", "here/2/0"], tmp_path, 3.0, None, "0,1")
    assert began == ["waited", "waited", (tmp_path, 3.0, None, "0,1")]


@pytest.mark.slow
def test_a_detached_job_of_submitit_begins_when_what_it_is_behind_is_over(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    stand_in(tmp_path / "site", monkeypatch, is_quick=True)
    first, second = make_job(tmp_path / "runs", "reference", seconds=2), make_job(tmp_path / "runs", "candidate")
    engine = Submitted(SubmititSettings(), tmp_path / "submitit", 2, detached=True)
    ids = engine.submit([first])
    ids += engine.submit([second], after=ids)
    try:
        until = time.monotonic() + 120
        while not has_ended(second) and time.monotonic() < until:
            assert has_ended(first) or not (tmp_path / "runs/candidate/attempt.json").exists()
            engine.wait(0.2)
        assert [has_ended(first), has_ended(second)] == ["FINISHED", "FINISHED"]
    finally:
        engine.cancel(ids)
