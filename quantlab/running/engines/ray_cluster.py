"""Ray: one task a job. An actor of the cluster keeps them, so that a sweep may leave and come back.

No folder is shared: a job and what it needs travel through the object store, and so does what it leaves.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantlab.errors import first_line
from quantlab.running.attempts import ATTEMPT, LOST, ended_since_given, num_attempts, set_aside, write
from quantlab.running.engines.forking import python_environment
from quantlab.running.engines.parcels import (
    Contents,
    Parcel,
    forget_old,
    local_cache,
    pack,
    pack_back,
    put,
    unpack,
)
from quantlab.running.engines.protocol import EngineError, State, What
from quantlab.running.node import run
from quantlab.tracking.tags import HOST
from quantlab.tracking.values import this_process
from quantlab.vocabulary.files import sha256_of
from quantlab.vocabulary.launching import RaySettings

_NAMESPACE = "quantlab"
_KEEPER = "quantlab-jobs-2"
"""The number is that of what it and its callers say to one another."""
_HELD_S = 600.0
_ANSWER_S = 15.0
_BUSY_S = 300.0
"""How long an answer may take of a cluster that is there."""
_MAX_LOST = 5
"""How often what jobs read may be lost on its way."""
_LOST = (
    "NodeDiedError",
    "WorkerCrashedError",
    "ObjectLostError",
    "OwnerDiedError",
    "OutOfMemoryError",
    "ActorDiedError",
)


def keep_off_stdout() -> None:
    """A program reads our rows there, where Ray tells of each node that ends in forty lines, log_to_driver or not."""

    def shown(data: Mapping[str, Any], *_: object, **__: object) -> None:
        if os.environ.get("QUANTLAB_VERBOSE") == "1":
            print(*data.get("lines", ()), sep="\n", file=sys.stderr)

    with contextlib.suppress(ImportError):
        from ray._private import worker

        worker.print_to_stdstream = shown


@dataclass
class _Kept:
    """A job on the cluster."""

    ended: Any
    left: Any
    """What its folder held at the end; both are Ray's references."""
    needs: frozenset[str] = frozenset()
    attempt: dict[str, Any] = field(default_factory=dict)


class Keeper:
    """Lives on the cluster: the tasks that were begun, what is known of each, and the files that they share."""

    def __init__(self) -> None:
        self._jobs: dict[str, _Kept] = {}
        self._contents: dict[str, tuple[Any, float]] = {}

    def hold(self, digest: str, content: Any) -> None:
        """Have a content for the jobs that come."""
        import ray

        self._contents[digest] = (ray.put(content), time.monotonic())

    def submit(
        self,
        jobs: Sequence[tuple[str, Parcel]],
        options: Mapping[str, float],
        resources: Mapping[str, float],
        timeout_s: float | None,
        after: Sequence[str] = (),
    ) -> list[str]:
        """Begin a task for each (id, parcel), when those of ``after`` have ended; or the digests of contents that are
        to be held first, and none is begun."""
        import ray

        needs = {job_id: frozenset(parcel.shared.values()) for job_id, parcel in jobs}
        if lacking := self._lacking(frozenset[str]().union(*needs.values())):
            return lacking
        task = ray.remote(_task).options(**options, resources=dict(resources), max_retries=0, num_returns=2)
        me = ray.get_runtime_context().current_actor
        before = [self._jobs[i].left for i in after if i in self._jobs]
        for job_id, parcel in jobs:
            contents = {digest: self._contents[digest][0] for digest in needs[job_id]}
            refs = task.remote(me, job_id, parcel, contents, timeout_s, *before)
            self._jobs[job_id] = _Kept(refs[0], refs[1], needs=needs[job_id])
        return []

    def _lacking(self, digests: frozenset[str]) -> list[str]:
        now, needed = time.monotonic(), digests.union(*(job.needs for job in self._jobs.values()))
        kept = {d: (ref, now if d in digests else at) for d, (ref, at) in self._contents.items()}
        self._contents = {d: (ref, at) for d, (ref, at) in kept.items() if d in needed or now - at < _HELD_S}
        return sorted(digests - set(self._contents))

    def begun(self, job_id: str, attempt: dict[str, Any]) -> None:
        """A task says where it runs."""
        if job_id in self._jobs:
            self._jobs[job_id].attempt = attempt

    def poll(self, ids: Sequence[str]) -> dict[str, tuple[What, str, dict[str, Any], Any]]:
        """What of each job is known: state, reason, attempt, and what it left; ids that it never had are lost."""
        import ray

        asked = {i: self._jobs[i].ended for i in ids if i in self._jobs}
        done = set(ray.wait(list(asked.values()), num_returns=len(asked), timeout=0)[0]) if asked else set()
        found: dict[str, tuple[What, str, dict[str, Any], Any]] = {}
        for job_id in ids:
            if job_id not in asked:
                found[job_id] = ("lost", "the cluster does not know it any more", {}, None)
                continue
            job = self._jobs[job_id]
            if job.ended in done:
                what, reason = self._end(job.ended)
                found[job_id] = (what, reason, job.attempt, None if reason else [job.left])
            else:
                found[job_id] = ("running" if job.attempt else "queued", "", job.attempt, None)
        return found

    def forget(self, ids: Sequence[str]) -> None:
        """What these left has arrived."""
        for job_id in ids:
            self._jobs.pop(job_id, None)

    def cancel(self, ids: Sequence[str]) -> None:
        """End tasks."""
        import ray

        for job_id in ids:
            if job_id in self._jobs:
                ray.cancel(self._jobs.pop(job_id).ended, force=False)

    def known(self, ids: Sequence[str]) -> list[str]:
        """Those that it keeps."""
        return [i for i in ids if i in self._jobs]

    @staticmethod
    def _end(ref: Any) -> tuple[What, str]:
        import ray

        try:
            ray.get(ref)
        except Exception as error:  # noqa: BLE001  Ray's own, or the task's
            name = type(error).__name__
            if name == "TaskCancelledError":
                return "stopped", "cancelled in Ray"
            is_lost = any(word in name for word in _LOST)
            return ("lost" if is_lost else "ended"), f"{name}: {first_line(error)}"
        return "ended", ""


def _task(
    keeper: Any, job_id: str, parcel: Parcel, contents: Mapping[str, Any], timeout_s: float | None, *before: Contents
) -> tuple[str, Contents]:
    """What a node runs: how it ended, and what it left."""
    import ray

    began = time.time()
    folder = unpack(parcel, list(before), lambda digest: ray.get(contents[digest]))
    keeper.begun.remote(job_id, {"attempt": num_attempts(folder) + 1, **this_process()})
    try:
        return run(folder, timeout_s), pack_back(folder, began)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        forget_old(local_cache())


class Ray:
    """A cluster at ``settings.ray.init.address``, or one of this process's own on this machine."""

    settle_s = 5.0

    def __init__(self, settings: RaySettings, device: str, timeout_s: float | None = None) -> None:
        import ray

        init, remote = settings.ray.init, settings.ray.remote
        self.outlives = init.address is not None
        self._timeout_s = timeout_s
        self._num = 0
        self._began = False
        self._folders: dict[str, Path] = {}
        self._over: set[str] = set()
        self._last: Mapping[str, State] = {}
        self._digests: dict[tuple[Path, int, int], str] = {}
        if not ray.is_initialized():
            self._connect(ray, init.address, {"num_cpus": init.num_cpus, "num_gpus": init.num_gpus})
        has_gpus = device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
        self._resources = dict(remote.resources)
        self._options: dict[str, float] = {
            "num_cpus": 1.0 if remote.num_cpus is None else remote.num_cpus,
            "num_gpus": float(has_gpus) if remote.num_gpus is None else remote.num_gpus,
            **({} if remote.memory is None else {"memory": remote.memory}),
        }
        again = {"max_restarts": -1, "max_task_retries": -1}  # with its node go its tasks: they are lost, and told so
        found = {"name": _KEEPER, "namespace": _NAMESPACE, "lifetime": "detached", "get_if_exists": True}
        self._keeper = ray.remote(Keeper).options(**found, **again, **_at_the_head(ray), num_cpus=0).remote()
        try:
            ray.get(self._keeper.known.remote([]), timeout=_BUSY_S)
        except Exception as error:  # Ray's own, or what importing quantlab there raises
            self.close()
            raise EngineError(
                f"launcher=ray: the cluster cannot run quantlab ({first_line(error)}); install the same "
                "quantlab-recipes[ray] on its nodes"
            ) from error

    def _connect(self, ray: Any, address: str | None, own: Mapping[str, int | None]) -> None:
        if address is not None:
            check_address(address)
        more: dict[str, Any] = {
            "address": address or "local"
        }  # without an address Ray joins whatever was begun last here
        if address is None:
            more |= {k: v for k, v in own.items() if v is not None}
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            with contextlib.chdir(
                Path(__file__).parents[3]
            ):  # Ray has its workers import from the folder it is called in
                ray.init(
                    **more,
                    namespace=_NAMESPACE,
                    log_to_driver=False,
                    logging_level="ERROR",
                    include_dashboard=False if address is None else None,
                    runtime_env={"env_vars": python_environment()},
                )
        except Exception as error:  # whatever Ray raises for a cluster that it cannot use
            said = " ".join(str(error).split())[:500]
            raise EngineError(
                f"launcher.settings.ray.init.address={address or 'null'}: Ray refuses ({said}); the cluster must run, "
                f"with this Ray's version ({ray.__version__}) and this Python's ({platform.python_version()})"
            ) from error
        self._began = True
        keep_off_stdout()

    def submit(self, folders: Sequence[Path], after: Sequence[str] = ()) -> list[str]:
        """Ids of the jobs."""
        import ray

        jobs, ids = [], []
        for folder in folders:
            self._num += 1
            ids.append(f"{socket.gethostname()}-{os.getpid()}-{id(self):x}-{self._num}")
            if ended_since_given(folder):
                self._over.add(ids[-1])
                continue
            set_aside(folder)
            (folder / LOST).unlink(missing_ok=True)
            jobs.append((ids[-1], pack(folder, self._digest)))
        self._folders |= dict(zip(ids, folders, strict=True))
        files = {d: Path(p.output_dir) / path for _, p in jobs for path, d in p.shared.items()}
        told = (jobs, self._options, self._resources, self._timeout_s, list(after))
        num_lost = 0
        while lacking := ray.get(self._keeper.submit.remote(*told)):  # more than once where the keeper began anew
            for digest in lacking:
                try:
                    ray.get(self._keeper.hold.remote(digest, _content(files[digest])))
                except ray.exceptions.ObjectLostError as error:  # on its way; the keeper lacks it still
                    num_lost += 1
                    if num_lost == _MAX_LOST:
                        raise EngineError(
                            f"launcher=ray: what the jobs read does not reach the cluster ({first_line(error)}); give "
                            "the same command again, or look at the cluster's logs"
                        ) from error
                    time.sleep(num_lost)
        return ids

    def poll(self, ids: Sequence[str]) -> Mapping[str, State]:
        """What the keeper knows, with the files of what has ended here; where it is gone, its tasks are too."""
        import ray

        states = {i: State("ended") for i in ids if i in self._over}
        asked = [i for i in ids if i not in states]
        try:
            told = ray.get(self._keeper.poll.remote(asked), timeout=_BUSY_S)
        except ray.exceptions.GetTimeoutError:  # nothing is known to have changed
            return {i: self._last.get(i, State("queued", reason="Ray does not answer")) for i in ids}
        except ray.exceptions.RayActorError as error:
            why = f"Ray lost the jobs' keeper ({first_line(error)})"
            return states | {i: State("lost", reason=why) for i in asked}
        states |= {i: self._arrived(i, *said) for i, said in told.items()}
        if arrived := [i for i in asked if not states[i].is_open]:
            self._keeper.forget.remote(arrived)
        if queued := [i for i in asked if states[i].what == "queued"]:
            states |= dict.fromkeys(queued, State("queued", reason=self._waits()))
        self._last = states
        return states

    def _arrived(self, job_id: str, what: What, reason: str, attempt: dict[str, Any], left: Any) -> State:
        import ray

        folder, node = self._folders[job_id], str(attempt.get(HOST, ""))
        if attempt and not (folder / ATTEMPT).exists():
            write(folder, ATTEMPT, attempt)  # of which a lost node leaves nothing else
        if left:
            try:
                put(ray.get(left[0], timeout=_BUSY_S), folder.parents[1])
            except ray.exceptions.RayError as error:
                return State("lost", node, f"what it left is lost ({type(error).__name__})")
        return State(what, node, reason)

    def _digest(self, file: Path) -> str:
        said = file.stat()
        key = (file, said.st_mtime_ns, said.st_size)
        if key not in self._digests:
            self._digests[key] = sha256_of(file)
        return self._digests[key]

    def _waits(self) -> str:
        import ray

        asked = {"CPU": self._options["num_cpus"], "GPU": self._options["num_gpus"], **self._resources}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(all(node.get(k, 0) >= v for k, v in asked.items()) for node in nodes):
            told = ", ".join(f"{k}: {v:g}" for k, v in asked.items() if v)
            return f"no node of the cluster has {told}"
        return "all nodes are busy"

    def wait(self, seconds: float) -> None:
        """That long."""
        time.sleep(seconds)

    def cancel(self, ids: Sequence[str]) -> None:
        """End tasks; each has a moment to close its run."""
        import ray

        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(self._keeper.cancel.remote(list(ids)), timeout=_BUSY_S)

    def adopt(self, jobs: Mapping[str, Path]) -> set[str]:
        """Those that the keeper has."""
        import ray

        self._folders |= jobs
        return set(ray.get(self._keeper.known.remote(list(jobs)), timeout=_BUSY_S))

    def close(self) -> None:
        """Leave a cluster that was there before; end one of this process's own."""
        import ray

        if self._began:
            ray.shutdown()


def _at_the_head(ray: Any) -> dict[str, Any]:
    """Where the keeper had best be: the other nodes come and go."""
    heads = [n["NodeID"] for n in ray.nodes() if n["Alive"] and "node:__internal_head__" in n["Resources"]]
    if not heads:
        return {}
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(heads[0], soft=True)}


def _content(file: Path) -> Any:
    import numpy as np

    return np.fromfile(file, dtype=np.uint8)  # which Ray hands on without a copy


def check_address(address: str) -> None:
    """EngineError where nothing answers at ``host:port`` within 15 s."""
    if address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_S).close()
    except (OSError, ValueError) as error:
        raise EngineError(
            f"launcher.settings.ray.init.address={address}: nothing listens there ({error}); start the cluster "
            "(ray start --head), or leave the key out for a Ray of this machine"
        ) from error
