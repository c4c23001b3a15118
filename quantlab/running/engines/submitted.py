"""submitit without a cluster: processes on this machine, which may outlive the sweep's."""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from quantlab.running.attempts import write
from quantlab.running.engines.forking import python_environment
from quantlab.running.engines.protocol import State
from quantlab.running.engines.slurm import parameters
from quantlab.running.node import OWNER, is_alive, run_after
from quantlab.tracking.values import this_process
from quantlab.vocabulary.launching import SubmititSettings

_GRACE_S = 3.0
_LOOK_S = 0.2


class Submitted:
    """``num_at_once`` jobs at a time; without a limit, and after this process has ended, where ``detached``."""

    settle_s = 1.0

    def __init__(
        self,
        settings: SubmititSettings,
        folder: Path,
        num_at_once: int,
        timeout_s: float | None = None,
        gpus: Sequence[str] = (),
        detached: bool = False,
    ) -> None:
        self.outlives = detached
        self._settings = settings
        self._folder = folder
        self._most = 10**6 if detached else num_at_once
        self._slots = list(range(num_at_once))[::-1]
        self._gpus = gpus
        self._timeout_s = timeout_s
        self._waiting: deque[tuple[str, Path, Sequence[str]]] = deque()
        self._ids: dict[str, str] = {}
        self._num = 0
        self._running: dict[str, int] = {}

    def submit(self, folders: Sequence[Path], after: Sequence[str] = ()) -> list[str]:
        """Ids of the jobs: host, pid and start of the process that watches each; it waits for those of ``after``."""
        names = []
        for folder in folders:
            self._num += 1
            names.append(f"waiting.{os.getpid()}.{self._num}")
            self._waiting.append((names[-1], folder, [self._ids.get(one, one) for one in after]))
        self._fill()
        return [self._ids.get(name, name) if self.outlives else name for name in names]

    def poll(self, ids: Sequence[str]) -> Mapping[str, State]:
        """Is the process there?"""
        for job_id in [i for i in self._running if not is_alive(i)]:
            self._slots.append(self._running.pop(job_id))
        self._fill()
        waiting = {name for name, *_ in self._waiting}
        return {i: self._state(i, waiting) for i in ids}

    def wait(self, seconds: float) -> None:
        """That long, or a moment: a free place is to be filled."""
        time.sleep(min(seconds, _LOOK_S))

    def cancel(self, ids: Sequence[str]) -> None:
        """End the processes; they have a moment to close their runs."""
        import psutil

        wanted = set(ids)
        self._waiting = deque(one for one in self._waiting if one[0] not in wanted)
        trees = []
        for one in ids:
            job_id = self._ids.get(one, one)
            if is_alive(job_id):
                parent = psutil.Process(int(job_id.split("/")[1]))
                trees += [*parent.children(recursive=True), parent]
        for process in trees:
            _tell(process, "terminate")
        for process in psutil.wait_procs(trees, _GRACE_S)[1]:
            _tell(process, "kill")

    def adopt(self, jobs: Mapping[str, Path]) -> set[str]:
        """Those whose process is there."""
        return {i for i in jobs if is_alive(i)}

    def close(self) -> None:
        """Nothing is held."""

    def _state(self, job_id: str, waiting: set[str]) -> State:
        if job_id in waiting:
            return State("queued", reason="all workers are busy")
        return State("running" if is_alive(self._ids.get(job_id, job_id)) else "ended", socket.gethostname())

    def _fill(self) -> None:
        import submitit

        while self._waiting and len(self._running) < self._most:
            name, folder, after = self._waiting.popleft()
            if not self.outlives:
                write(folder, OWNER, this_process())
            executor = submitit.AutoExecutor(self._folder, cluster="local")
            told = {k: v for k, v in parameters(self._settings).items() if k != "gpus_per_node"}
            if (
                after and "timeout_min" in told
            ):  # submitit counts the time that it waits, which is at most that of those before it
                told["timeout_min"] *= 2
            executor.update_parameters(**told)
            slot = self._slots.pop() if self._slots else 0
            gpu = self._gpus[slot % len(self._gpus)] if self._gpus else None
            inherited = python_environment()
            before = {key: os.environ.get(key) for key in inherited}
            os.environ.update(inherited)  # by submitit's process
            try:
                job = executor.submit(run_after, list(after), str(folder), self._timeout_s, None, gpu)
            finally:
                for key, value in before.items():
                    os.environ.pop(key)
                    if value is not None:
                        os.environ[key] = value
            self._ids[name] = _id_of(int(job.job_id))
            self._running[self._ids[name]] = slot


def _id_of(pid: int) -> str:
    import psutil

    try:
        return f"{socket.gethostname()}/{pid}/{psutil.Process(pid).create_time():.2f}"
    except psutil.NoSuchProcess:
        return f"{socket.gethostname()}/{pid}/0"


def _tell(process: object, word: str) -> None:
    import psutil

    try:
        getattr(process, word)()
    except psutil.NoSuchProcess:
        return
