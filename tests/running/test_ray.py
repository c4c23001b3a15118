"""Ray without a shared folder: what travels to a node, what comes back, and what is refused. No Ray is needed."""

from __future__ import annotations

import os
import socket
import sys
import time

import pytest

from quantlab.running import node
from quantlab.running.attempts import LOG, earlier_attempts, has_ended, node_of, num_attempts, read
from quantlab.running.engines import parcels, ray_cluster
from quantlab.running.engines.parcels import forget_old, local_cache, pack, put, unpack
from quantlab.running.engines.protocol import EngineError
from quantlab.running.engines.ray_cluster import Ray
from quantlab.running.scheduler import Scheduler
from quantlab.vocabulary.files import sha256_of
from quantlab.vocabulary.launching import RayInit, RayParts, RaySettings
from tests.support.engines import make_job, run_here, stand_in
from tests.support.fake_ray import FakeRay
from tests.support.stores import ROOT

KEY = "0123abcd"


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A Ray whose nodes do not see ``tmp_path/here``."""
    monkeypatch.setattr(ray_cluster, "run", run_here)
    (tmp_path / "here").mkdir()
    ray = FakeRay(tmp_path / "nodes", tmp_path / "here")
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return ray


@pytest.fixture
def runs(tmp_path):
    return tmp_path / "here" / "runs"


def run_all(folders, **more):
    over = []
    one = Scheduler(Ray(RaySettings(), "cpu"), 3, over.append, **more)
    one.add(folders)
    one.run()
    assert sorted(over) == sorted(folders)


def test_jobs_run_where_no_folder_is_shared(cluster, runs, tmp_path, monkeypatch):
    """In processes, as they do."""
    stand_in(tmp_path / "site", monkeypatch)
    monkeypatch.setattr(ray_cluster, "run", node.run)
    jobs = [make_job(runs, "good"), make_job(runs, "bad", {"0": "fail"})]
    run_all(jobs)
    assert [has_ended(job) for job in jobs] == ["FINISHED", "FAILED"]
    assert read(jobs[1], "run.json")["error"] == "ValueError: no"
    assert str(cluster.place) in (jobs[0] / LOG).read_text(), "its log is here, its folder was there"
    assert read(jobs[0], "exit.json")["code"] == 0
    assert read(jobs[0], "job.json") == {"does": {}}, "as it was given"
    assert not list(cluster.place.glob("*/quantlab-*/sweeps/*/runs/good")), "nothing of it is left there"


def test_the_reference_travels_once_to_each_node_by_its_content(cluster, runs):
    cache = runs.parent / "cache"
    for path in (
        f"reference/{KEY}.safetensors",
        f"reference/{KEY}.floor.json",
        "reference/another.safetensors",
        "models/digits/weights",
    ):
        (cache / path).parent.mkdir(parents=True, exist_ok=True)
        (cache / path).write_text(f"content of {path}")
    paths = [f"cache/reference/{KEY}.safetensors", "cache/models/digits/weights"]
    jobs = [make_job(runs, f"job{i}", reads=paths, known={"reference_key": KEY}) for i in range(4)]
    run_all(jobs)
    for job in jobs:
        assert (job / f"{KEY}.safetensors").read_text() == f"content of reference/{KEY}.safetensors"
        assert (job / "weights").read_text() == "content of models/digits/weights"
    assert len(cluster.puts) == 3, "each content once, and not what another sweep has left"
    for name in cluster.names:
        assert len(list((cluster.place / name).glob("quantlab-*/content/*"))) == 3


def test_what_a_job_leaves_for_others_reaches_those_that_wait_for_it(cluster, runs):
    """The job of a reference on one node, its candidate on the other."""
    path = f"cache/reference/{KEY}.safetensors"
    first = make_job(runs, "reference", makes={path: "observed there"})
    second = make_job(runs, "candidate", reads=[path, "runs/reference/run.json"], behind=str(first))
    over = []
    one = Scheduler(Ray(RaySettings(), "cpu"), 3, over.append)
    one.add([second], after=one.add([first]))
    one.run()
    assert over == [first, second]
    assert (second / f"{KEY}.safetensors").read_text() == "observed there"
    assert (runs.parent / path).read_text() == "observed there", "it is here for the next sweep"
    assert read(second, "run.json")["status"] == "FINISHED"


def test_a_lost_node_leaves_a_trace_and_costs_no_row(cluster, runs):
    job = make_job(runs, "job")
    cluster.dies = ["its raylet was killed"]
    run_all([job])
    assert has_ended(job) == "FINISHED"
    ((earlier),) = earlier_attempts(job)
    assert (earlier["attempt"], earlier["node"]) == (1, "a")
    assert earlier["reason"].startswith("NodeDiedError: its raylet was killed")
    assert (num_attempts(job), node_of(job)) == (2, socket.gethostname())
    assert read(job, "attempt.json")["attempt"] == 2


def test_a_sweep_that_comes_back_finds_what_has_ended_meanwhile(cluster, runs):
    jobs = [make_job(runs, f"job{i}") for i in range(2)]
    left = dict(zip(Ray(RaySettings(), "cpu").submit(jobs), jobs, strict=True))
    for number in list(cluster.tasks):
        cluster._run(number)
    assert not any(has_ended(job) for job in jobs)
    over = []
    second = Scheduler(Ray(RaySettings(), "cpu"), 3, over.append)
    assert second.adopt(left) == set(jobs)
    second.run()
    assert [has_ended(job) for job in sorted(over)] == ["FINISHED"] * 2
    assert cluster.num_run == 2
    third = Scheduler(Ray(RaySettings(), "cpu"), 3, over.append)
    assert third.adopt(left) == set(jobs), "they are over, and the cluster has forgotten them"
    third.run()
    assert cluster.num_run == 2


def test_contents_that_nobody_needs_are_let_go_of(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(ray_cluster.time, "monotonic", lambda: now[0])
    monkeypatch.setitem(sys.modules, "ray", FakeRay(None, None))
    keeper = ray_cluster.Keeper()
    keeper.hold("a", b"1")
    assert keeper._lacking(frozenset("b")) == ["b"]
    assert keeper._lacking(frozenset("a")) == [], "another sweep may be about to ask for it"
    now[0] = 601.0
    assert keeper._lacking(frozenset("b")) == ["b"]
    assert keeper._lacking(frozenset("a")) == ["a"]


def test_a_keeper_that_began_anew_is_given_the_contents_again(cluster, runs):
    """Its node was lost: it knows no job and holds nothing."""
    reference = runs.parent / "cache" / "reference" / f"{KEY}.safetensors"
    reference.parent.mkdir(parents=True)
    reference.write_text("observed")
    jobs = [
        make_job(runs, f"job{i}", reads=[f"cache/reference/{reference.name}"], known={"reference_key": KEY})
        for i in range(3)
    ]

    def lose(counts):
        if counts.ended == 1 and len(cluster.puts) == 1:
            (keeper,) = cluster.actors.values()
            keeper.__init__()

    run_all(jobs, progress=lose)
    assert {has_ended(job) for job in jobs} == {"FINISHED"}
    assert len(cluster.puts) == 2


@pytest.mark.parametrize("num_lost", [1, 4, 5])
def test_what_jobs_read_is_sent_again_where_it_is_lost_on_its_way(cluster, runs, monkeypatch, num_lost):
    reference = runs.parent / "cache" / "reference" / f"{KEY}.safetensors"
    reference.parent.mkdir(parents=True)
    reference.write_text("observed")
    job = make_job(runs, "job", reads=[f"cache/reference/{reference.name}"], known={"reference_key": KEY})
    own, lost = ray_cluster.Keeper.hold, iter(range(num_lost))

    def hold(self, digest, content):
        for _ in lost:
            raise cluster.exceptions.ObjectLostError("its owner\nis gone")
        own(self, digest, content)

    monkeypatch.setattr(ray_cluster.Keeper, "hold", hold)
    if num_lost < ray_cluster._MAX_LOST:
        run_all([job])
        assert has_ended(job) == "FINISHED"
    else:
        with pytest.raises(EngineError, match=r"^launcher=ray: what the jobs read .*\(its owner\).*same command again"):
            run_all([job])


def test_a_cluster_that_does_not_answer_loses_no_job(cluster, runs, monkeypatch):
    engine = Ray(RaySettings(), "cpu")
    ids = engine.submit([make_job(runs, "job")])
    assert engine.poll(ids)[ids[0]].what == "ended"
    more = engine.submit([make_job(runs, "other")])

    def poll(self, ids):
        raise cluster.exceptions.GetTimeoutError

    monkeypatch.setattr(ray_cluster.Keeper, "poll", poll)
    again = Ray(RaySettings(), "cpu")
    assert again.poll(more)[more[0]].reason == "Ray does not answer"


# -- parcels


@pytest.mark.parametrize("path", ["../x", "runs/../../x", "/etc/x", "other/x", ""])
def test_what_comes_from_elsewhere_is_written_to_a_jobs_places_alone(tmp_path, path):
    with pytest.raises(ValueError, match="no place of a job's files"):
        put({path: b""}, tmp_path)
    assert not list(tmp_path.rglob("x"))


def test_a_content_that_is_another_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parcels.tempfile, "tempdir", str(tmp_path))
    job = make_job(tmp_path / "here" / "runs", "job", known={"reference_key": KEY})
    reference = tmp_path / "here" / "cache" / "reference" / f"{KEY}.safetensors"
    reference.parent.mkdir(parents=True)
    reference.write_text("whole")
    parcel = pack(job, sha256_of)
    with pytest.raises(ValueError, match="something else"):
        unpack(parcel, [], lambda digest: b"half")
    folder = unpack(parcel, [], lambda digest: b"whole")
    assert (folder.parents[1] / "cache" / "reference" / reference.name).read_text() == "whole"
    unpack(parcel, [], lambda digest: pytest.fail("it is in the cache"))


def test_what_nobody_has_used_for_long_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(parcels.tempfile, "tempdir", str(tmp_path))
    root = local_cache()
    for name in ("content/old", "content/new", "sweeps/old/runs", "sweeps/new/runs"):
        (root / name).mkdir(parents=True)
    for name in ("content/old", "sweeps/old"):
        os.utime(root / name, (1, 1))
    forget_old(root)
    assert sorted(p.relative_to(root).as_posix() for p in root.glob("*/*")) == ["content/new", "sweeps/new"]


def test_a_cache_that_is_anothers_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(parcels.tempfile, "tempdir", str(tmp_path))
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"quantlab-{os.getuid()}").symlink_to(tmp_path / "theirs")
    with pytest.raises(PermissionError, match="set TMPDIR"):
        local_cache()


# -- what is refused

REFUSALS = {
    "another version": RuntimeError("Version mismatch: The cluster was started with: Ray: 2.40.0 Python: 3.11.7"),
    "no cluster": ConnectionError("Could not find any running Ray instance."),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_a_cluster_that_ray_refuses_is_named_with_its_reason(what, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", FakeRay(tmp_path, tmp_path, refuses=REFUSALS[what]))
    settings = RaySettings(ray=RayParts(init=RayInit(address="auto")))
    with pytest.raises(
        EngineError, match=r"^launcher.settings.ray.init.address=auto: Ray refuses \(.*2\.60\.0"
    ) as told:
        Ray(settings, "cpu")
    assert str(REFUSALS[what]) in str(told.value)


def test_a_ray_of_the_sweeps_own_joins_no_cluster_that_is_there(cluster):
    settings = RaySettings(ray=RayParts(init=RayInit(num_cpus=3)))
    Ray(settings, "cpu")
    assert (cluster.settings["address"], cluster.settings["num_cpus"]) == ("local", 3)


def test_workers_import_nothing_from_the_current_folder(cluster, tmp_path, monkeypatch):
    """Ray puts the folder in which it is called before all others of its workers' path; it may be a downloaded one."""
    monkeypatch.chdir(tmp_path)
    Ray(RaySettings(), "cpu")
    assert cluster.called_in == str(ROOT)
    assert os.getcwd() == str(tmp_path)


def test_nodes_without_quantlab_are_told_of(cluster, monkeypatch):
    def known(self, ids):
        raise ModuleNotFoundError("No module named 'quantlab'")

    monkeypatch.setattr(ray_cluster.Keeper, "known", known)
    with pytest.raises(
        EngineError, match=r"^launcher=ray: the cluster cannot run quantlab \(No module named .*install"
    ):
        Ray(RaySettings(), "cpu")


def test_where_nothing_listens_is_named(cluster):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(EngineError, match=rf"^launcher.settings.ray.init.address={address}: nothing listens there"):
        Ray(RaySettings(ray=RayParts(init=RayInit(address=address))), "cpu")


def test_an_address_that_never_answers_is_given_fifteen_seconds(cluster, monkeypatch):
    asked = []

    def connect(address, timeout):
        asked.append((address, timeout))
        raise TimeoutError("timed out")

    monkeypatch.setattr(ray_cluster.socket, "create_connection", connect)
    with pytest.raises(EngineError, match=r"^launcher.settings.ray.init.address=10.255.255.1:6379: .*timed out"):
        Ray(RaySettings(ray=RayParts(init=RayInit(address="10.255.255.1:6379"))), "cpu")
    assert asked == [(("10.255.255.1", 6379), 15.0)]


@pytest.mark.parametrize("verbose", ["0", "1"])
def test_what_ray_tells_of_its_nodes_is_not_among_the_rows(monkeypatch, capsys, verbose):
    """``--json`` of a sweep that lost a node began with forty lines of a raylet's state."""
    worker = pytest.importorskip("ray._private.worker")
    monkeypatch.setattr(worker, "print_to_stdstream", worker.print_to_stdstream)
    monkeypatch.setenv("QUANTLAB_VERBOSE", verbose)
    ray_cluster.keep_off_stdout()
    told = {"lines": ["Raylet is terminated."], "pid": "raylet", "is_err": False}
    worker.print_to_stdstream(told, ignore_prefix=False)
    assert capsys.readouterr() == ("", "Raylet is terminated.\n" if verbose == "1" else "")
