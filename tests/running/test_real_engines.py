"""SLURM and Ray as they are, with their own daemons on this machine; skipped where they are not installed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time

import psutil
import pytest

from quantlab.running.attempts import earlier_attempts, ending, has_ended, num_attempts
from quantlab.running.engines.protocol import EngineError
from quantlab.running.engines.ray_cluster import Ray
from quantlab.running.engines.slurm import Slurm
from quantlab.running.scheduler import Scheduler
from quantlab.vocabulary.launching import RayInit, RayParts, RayRemote, RaySettings, SlurmSettings
from tests.support.engines import began, make_job, require_slurm, stand_in
from tests.support.ray_nodes import two_nodes

pytestmark = pytest.mark.slow
LIMIT_S = 400.0


def watched(engine, progress=lambda counts: None, max_attempts=3):
    """A scheduler that ends with an error where it takes too long."""
    over, until = [], time.monotonic() + LIMIT_S

    def look(counts):
        assert time.monotonic() < until, counts
        progress(counts)

    return Scheduler(engine, max_attempts, over.append, progress=look), over


# -- SLURM


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A SLURM that answers; ``tmp_path`` is seen by its node, which is this machine."""
    require_slurm()
    stand_in(tmp_path / "site", monkeypatch)
    return tmp_path


def slurm(folder, **more):
    return Slurm(SlurmSettings(timeout_min=10, cpus_per_task=1, array_parallelism=2, **more), folder / "submitit")


def test_slurm_requeues_and_somebody_cancels(cluster):
    """The requeued job costs time and no row; the cancelled one is a row that says so; the others finish."""
    runs = cluster / "runs"
    jobs = [make_job(runs, f"job{i}", {"1": "sleep"} if i < 2 else {}) for i in range(4)]
    acted, ids = [], []

    def act(counts):
        if len(began(runs)) >= 2 and not acted:
            acted.append(subprocess.run(["scontrol", "requeue", ids[0]], check=True))
            acted.append(subprocess.run(["scancel", ids[1]], check=True))

    engine = slurm(cluster)
    one, over = watched(engine, act)
    ids += one.add(jobs)
    one.run()
    assert sorted(over) == sorted(jobs)
    assert [has_ended(job) for job in jobs] == ["FINISHED", "FAILED", "FINISHED", "FINISHED"]
    assert ending(jobs[1]) == "cancelled in SLURM"
    assert [num_attempts(job) for job in jobs] == [2, 1, 1, 1]
    assert earlier_attempts(jobs[0])[0]["reason"].startswith("preempted")


def test_jobs_of_a_sweep_that_went_away_are_taken_over(cluster):
    jobs = [make_job(cluster / "runs", f"job{i}", seconds=3) for i in range(3)]
    first, _ = watched(slurm(cluster))
    left = dict(zip(first.add(jobs), jobs, strict=True))  # and its process ends
    second, over = watched(slurm(cluster))
    assert second.adopt(left) == set(jobs)
    second.run()
    assert sorted(over) == sorted(jobs)
    assert sorted(began(cluster / "runs")) == [(f"job{i}", 1) for i in range(3)], "nothing is computed twice"


def test_what_is_cancelled_leaves_the_queue_at_once(cluster):
    jobs = [make_job(cluster / "runs", f"job{i}", {"0": "sleep"}) for i in range(5)]

    def interrupt(counts):
        if counts.running:
            raise KeyboardInterrupt

    engine = slurm(cluster)
    one, _ = watched(engine, interrupt)
    ids = one.add(jobs)
    with pytest.raises(KeyboardInterrupt):
        one.run()
    until = time.monotonic() + 60
    while any(state.is_open for state in engine.poll(ids).values()) and time.monotonic() < until:
        time.sleep(0.5)
    assert not engine.adopt(dict(zip(ids, jobs, strict=True)))


def test_five_hundred_jobs_are_submitted_in_arrays_as_large_as_the_cluster_takes(cluster, monkeypatch):
    """In under 30 s, asked about in one command, and cancelled."""
    engine = slurm(cluster)
    assert engine._most() > 1
    engine._array_size = 201
    jobs = [make_job(cluster / "runs", f"job{i:03d}", {"0": "sleep"}) for i in range(500)]
    began_at = time.monotonic()
    ids = engine.submit(jobs)
    seconds = time.monotonic() - began_at
    states = engine.poll(ids)
    engine.cancel(ids)
    assert len(set(ids)) == 500
    assert len({i.split("_")[0] for i in ids}) == 3
    assert {state.what for state in states.values()} <= {"queued", "running"}
    assert not any("does not answer" in state.reason for state in states.values())
    assert seconds < 30


@pytest.mark.parametrize("settings", [{"partition": "none_such"}, {"constraint": "none_such"}])
def test_what_slurm_refuses_is_named(cluster, settings):
    engine = slurm(cluster, **settings)
    with pytest.raises(EngineError, match=r"^launcher=slurm: sbatch refuses the jobs .*launcher.settings"):
        engine.submit([make_job(cluster / "runs", "job")])


# -- Ray


@pytest.fixture
def nodes(tmp_path, monkeypatch):
    """The address of a cluster of two nodes on this machine, which see an empty folder where ``tmp_path/here`` is."""
    pytest.importorskip("ray")
    stand_in(tmp_path / "site", monkeypatch, is_quick=True)
    with two_nodes(tmp_path, monkeypatch) as address:
        yield address


def other_node():
    """The process of the node that this one is not connected by."""
    import ray

    mine = ray.get_runtime_context().get_node_id()
    (port,) = [node["NodeManagerPort"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != mine]
    found = [c.pid for c in psutil.net_connections() if c.status == "LISTEN" and c.laddr.port == port]
    return found[0]


def settings(address, **more):
    return RaySettings(ray=RayParts(init=RayInit(address=address), remote=RayRemote(num_gpus=0, **more)))


def test_forty_jobs_over_two_nodes_of_which_one_is_killed(nodes, tmp_path, capsys):
    """No node sees the sweep's folder: the reference goes to each, and what jobs leave comes back."""
    reference = tmp_path / "here" / "cache" / "reference" / "0123.safetensors"
    reference.parent.mkdir(parents=True)
    reference.write_bytes(os.urandom(2**20))
    path = reference.relative_to(tmp_path / "here").as_posix()
    more = {"seconds": 0.2, "known": {"reference_key": "0123"}, "reads": [path]}
    jobs = [make_job(tmp_path / "here" / "runs", f"job{i:02d}", **more) for i in range(40)]
    killed = []

    def kill(counts):
        if counts.ended >= 4 and counts.running == 2 and not killed:
            killed.append(other_node())
            os.kill(killed[0], signal.SIGKILL)

    engine = Ray(settings(nodes), "cpu")
    one, over = watched(engine, kill)
    one.add(jobs)
    one.run()
    engine.close()
    assert killed
    assert sorted(over) == sorted(jobs)
    assert {has_ended(job) for job in jobs} == {"FINISHED"}
    assert any(num_attempts(job) == 2 for job in jobs), "what ran on the node was begun again"
    assert all((job / reference.name).read_bytes() == reference.read_bytes() for job in jobs)
    logs = {(job / "worker.log").read_text().split()[1].removeprefix(f"{tmp_path}/")[0] for job in jobs}
    assert logs == {"a", "b"}, "each node has a cache of its own"
    assert "raylet" not in capsys.readouterr().out.lower(), "a program reads the rows there"


def test_jobs_on_ray_are_taken_over_and_cancelled(nodes, tmp_path):
    jobs = [make_job(tmp_path / "here" / "runs", f"job{i}", {"0": "sleep"}) for i in range(3)]
    first = Ray(settings(nodes), "cpu")
    left = dict(zip(first.submit(jobs), jobs, strict=True))
    until = time.monotonic() + LIMIT_S
    while not any(state.what == "running" for state in first.poll(list(left)).values()):
        assert time.monotonic() < until
        time.sleep(0.2)
    first.close()
    second = Ray(settings(nodes), "cpu")
    assert second.adopt(left) == set(left)
    states = second.poll(list(left))
    assert sorted(state.what for state in states.values()) in (
        ["queued", "running", "running"],
        ["queued", "queued", "running"],
    )
    second.cancel(list(left))
    assert not second.adopt(left)
    second.close()


def test_what_no_node_has_is_said(nodes, tmp_path):
    engine = Ray(settings(nodes, num_cpus=64), "cpu")
    ids = engine.submit([make_job(tmp_path / "here" / "runs", "job")])
    assert engine.poll(ids)[ids[0]].reason == "no node of the cluster has CPU: 64"
    engine.cancel(ids)
    engine.close()


def test_an_address_where_nothing_listens_is_named():
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    began_at = time.monotonic()
    with pytest.raises(EngineError, match=rf"^launcher.settings.ray.init.address={address}: nothing listens there"):
        Ray(settings(address), "cpu")
    assert time.monotonic() - began_at < 20
