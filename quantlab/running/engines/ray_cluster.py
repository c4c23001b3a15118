"""Ray: one task a job. An actor of the cluster keeps them, so that a sweep may leave and come back."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantlab.running.engines.forking import python_path
from quantlab.running.engines.protocol import EngineError, State, What
from quantlab.running.node import run
from quantlab.vocabulary.launching import RaySettings

_NAMESPACE = "quantlab"
_KEEPER = "quantlab-jobs"
_ANSWER_S = 15.0
_LOST = (
    "NodeDiedError",
    "WorkerCrashedError",
    "ObjectLostError",
    "OwnerDiedError",
    "OutOfMemoryError",
    "ActorDiedError",
)


class Keeper:
    """Lives on the cluster: the tasks that were begun, and what is known of each."""

    def __init__(self) -> None:
        self._refs: dict[str, Any] = {}
        self._nodes: dict[str, str] = {}

    def submit(
        self,
        jobs: Sequence[tuple[str, str]],
        options: Mapping[str, float],
        resources: Mapping[str, float],
        timeout_s: float | None,
    ) -> None:
        """Begin a task for each (id, folder)."""
        import ray

        task = ray.remote(_task).options(**options, resources=dict(resources), max_retries=0)
        me = ray.get_runtime_context().current_actor
        for job_id, folder in jobs:
            self._refs[job_id] = task.remote(me, job_id, folder, timeout_s)

    def begun(self, job_id: str, node: str) -> None:
        """A task says where it runs."""
        self._nodes[job_id] = node

    def poll(self, ids: Sequence[str]) -> dict[str, tuple[What, str, str]]:
        """What of each job is known: state, node, reason; ids that it never had are lost."""
        import ray

        asked = {i: self._refs[i] for i in ids if i in self._refs}
        done = set(ray.wait(list(asked.values()), num_returns=len(asked), timeout=0)[0]) if asked else set()
        found: dict[str, tuple[What, str, str]] = {}
        for job_id in ids:
            node = self._nodes.get(job_id, "")
            if job_id not in asked:
                found[job_id] = ("lost", node, "the cluster does not know it any more")
            elif asked[job_id] in done:
                found[job_id] = self._end(asked[job_id], node)
                del self._refs[job_id]
            else:
                found[job_id] = ("running" if node else "queued", node, "")
        return found

    def cancel(self, ids: Sequence[str]) -> None:
        """End tasks."""
        import ray

        for job_id in ids:
            if job_id in self._refs:
                ray.cancel(self._refs.pop(job_id), force=False)

    def known(self, ids: Sequence[str]) -> list[str]:
        """Those that it keeps."""
        return [i for i in ids if i in self._refs]

    @staticmethod
    def _end(ref: Any, node: str) -> tuple[What, str, str]:
        import ray

        try:
            ray.get(ref)
        except Exception as error:  # noqa: BLE001  Ray's own, or the task's
            name = type(error).__name__
            said = next((line.strip() for line in str(error).splitlines() if line.strip()), name)
            if name == "TaskCancelledError":
                return "stopped", node, "cancelled in Ray"
            return ("lost" if name in _LOST else "ended"), node, f"{name}: {said[:300]}"
        return "ended", node, ""


def _task(keeper: Any, job_id: str, folder: str, timeout_s: float | None) -> str:
    """What a node runs."""
    keeper.begun.remote(job_id, socket.gethostname())
    return run(folder, timeout_s)


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
        self._keeper = (
            ray.remote(Keeper)
            .options(name=_KEEPER, namespace=_NAMESPACE, lifetime="detached", get_if_exists=True, num_cpus=0, **again)
            .remote()
        )
        ray.get(self._keeper.known.remote([]), timeout=60)

    def _connect(self, ray: Any, address: str | None, own: Mapping[str, int | None]) -> None:
        if address is not None and address not in ("auto", "local"):
            _listens(address)
        more = {k: v for k, v in own.items() if v is not None} if address is None else {"address": address}
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            ray.init(
                **more,
                namespace=_NAMESPACE,
                log_to_driver=False,
                logging_level="ERROR",
                include_dashboard=False if address is None else None,
                runtime_env={"env_vars": {"PYTHONPATH": python_path()}},
            )
        except Exception as error:  # whatever Ray raises for a cluster that it cannot use
            said = " ".join(str(error).split())[:500]
            raise EngineError(
                f"launcher.settings.ray.init.address={address or 'null'}: Ray refuses ({said}); the "
                " cluster must run, with this Ray's and this Python's version"
            ) from error
        self._began = True

    def submit(self, folders: Sequence[Path], after: Sequence[str] = ()) -> list[str]:
        """Ids of the jobs."""
        import ray

        ids = []
        for _ in folders:
            self._num += 1
            ids.append(f"{socket.gethostname()}-{os.getpid()}-{id(self):x}-{self._num}")
        jobs = [(i, str(folder)) for i, folder in zip(ids, folders, strict=True)]
        ray.get(self._keeper.submit.remote(jobs, self._options, self._resources, self._timeout_s))
        return ids

    def poll(self, ids: Sequence[str]) -> Mapping[str, State]:
        """What the keeper knows; where it is gone, its tasks are too."""
        import ray

        try:
            told = ray.get(self._keeper.poll.remote(list(ids)), timeout=60)
        except ray.exceptions.RayActorError as error:
            return {
                i: State("lost", reason=f"Ray lost the jobs' keeper ({str(error).splitlines()[0][:200]})") for i in ids
            }
        return {i: State(what, node, reason or self._waits(what)) for i, (what, node, reason) in told.items()}

    def _waits(self, what: What) -> str:
        import ray

        if what != "queued":
            return ""
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
            ray.get(self._keeper.cancel.remote(list(ids)), timeout=30)

    def adopt(self, jobs: Mapping[str, Path]) -> set[str]:
        """Those that the keeper has."""
        import ray

        return set(ray.get(self._keeper.known.remote(list(jobs)), timeout=60))

    def close(self) -> None:
        """Leave a cluster that was there before; end one of this process's own."""
        import ray

        if self._began:
            ray.shutdown()


def _listens(address: str) -> None:
    """EngineError where nothing answers at ``host:port`` within 15 s."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_S).close()
    except (OSError, ValueError) as error:
        raise EngineError(
            f"launcher.settings.ray.init.address={address}: nothing listens there ({error}); start the cluster "
            "(ray start --head), or leave the key out for a Ray of this machine"
        ) from error
