"""Processes on this machine, forked from one that has the imports behind it; they end with the sweep's process."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantlab.running.attempts import END, begin, write
from quantlab.running.engines.forking import Forking
from quantlab.running.engines.protocol import State

_GRACE_S = 3.0
_LOOK_S = 0.2
_MOST_FRUITLESS = 10
_DIES = "the process that begins the workers ends before one takes a job, however often it is begun; it says why itself"
BUSY = "all workers are busy"


@dataclass
class _Job:
    folder: Path
    job_id: str
    slot: int = -1
    began: float = 0.0
    timed_out: bool = False


class Pool:
    """``num_at_once`` jobs at a time, each in a process of its own; ``gpus[i]`` is what the job in slot i sees."""

    outlives = False
    settle_s = 0.0

    def __init__(self, num_at_once: int, timeout_s: float | None = None, gpus: Sequence[str] = ()) -> None:
        self._free = list(range(num_at_once))[::-1]
        self._gpus = gpus
        self._timeout_s = timeout_s
        self._waiting: deque[_Job] = deque()
        self._running: dict[str, _Job] = {}
        self._num = 0
        self._processes = Forking()

    def submit(self, folders: Sequence[Path], after: Sequence[str] = ()) -> list[str]:
        """Ids of the jobs; they wait in line."""
        ids = []
        for folder in folders:
            self._num += 1
            self._waiting.append(_Job(folder, f"{os.getpid()}.{self._num}"))
            ids.append(self._waiting[-1].job_id)
        self._fill()
        return ids

    def poll(self, ids: Sequence[str]) -> Mapping[str, State]:
        """Where each job is."""
        self._listen()
        self._end_late_ones()
        self._fill()
        waiting, node = {job.job_id for job in self._waiting}, socket.gethostname()

        def state(job_id: str) -> State:
            if job_id in waiting:
                return State("queued", reason=BUSY)
            return State("running" if job_id in self._running else "ended", node)

        return {job_id: state(job_id) for job_id in ids}

    def wait(self, seconds: float) -> None:
        """Until a process begins or ends."""
        if not self._running:
            time.sleep(seconds)
        limit, jobs = self._timeout_s or float("inf"), self._running.values()
        late = (job.began + limit - time.monotonic() for job in jobs if not job.timed_out)
        self._listen(max(0.0, min([seconds, *late])))

    def cancel(self, ids: Sequence[str]) -> None:
        """End jobs; those that run have a moment to close their runs."""
        wanted = set(ids)
        self._waiting = deque(job for job in self._waiting if job.job_id not in wanted)
        for number in (signal.SIGTERM, signal.SIGKILL):
            for job in self._running.values():
                if job.job_id in wanted:
                    self._processes.kill(job.job_id, number)
            until = time.monotonic() + _GRACE_S
            while wanted & set(self._running) and time.monotonic() < until:
                self._listen(0.1)

    def adopt(self, jobs: Mapping[str, Path]) -> set[str]:
        """None: workers end with the process that began them."""
        return set()

    def close(self) -> None:
        """End what still runs."""
        self._processes.close()

    def _fill(self) -> None:
        while self._waiting and self._free:
            job = self._waiting.popleft()
            if not begin(job.folder):  # it was over already
                continue
            job.slot, job.began = self._free.pop(), time.monotonic()
            self._running[job.job_id] = job
            self._processes.begin(job.job_id, job.folder, [str(job.folder)], gpu_env(self._gpus, job.slot))

    def _listen(self, seconds: float = 0.0) -> None:
        for said in self._processes.heard(seconds):
            if not said:  # no end is written: they are lost, and given again
                for job in list(self._running.values()):
                    self._drop(job)
                return
            job_or_none = self._running.get(said["id"])
            if job_or_none is None:
                continue
            if "code" in said:
                end = {"code": said["code"], "timed_out": job_or_none.timed_out, "timeout_s": self._timeout_s}
                write(job_or_none.folder, END, end)
                self._drop(job_or_none)
            else:
                job_or_none.began = time.monotonic()

    def _drop(self, job: _Job) -> None:
        del self._running[job.job_id]
        self._free.append(job.slot)

    def _end_late_ones(self) -> None:
        for job in self._running.values():
            if self._timeout_s and not job.timed_out and time.monotonic() - job.began > self._timeout_s:
                job.timed_out = True
                self._processes.kill(job.job_id, signal.SIGKILL)


class SharingPool:
    """``num_at_once`` workers that take one job after the other and share what they have loaded. No time limit."""

    outlives = False
    settle_s = 0.0

    def __init__(self, num_at_once: int, queue: Path, gpus: Sequence[str] = ()) -> None:
        self._free = list(range(num_at_once))[::-1]
        self._gpus = gpus
        self._queue = queue
        queue.mkdir(parents=True, exist_ok=True)
        self._slots: dict[str, int] = {}
        self._pids: dict[str, int] = {}
        self._codes: dict[int, int] = {}
        self._folders: dict[str, Path] = {}
        self._fruitless: list[dict[str, object]] = []  # ends of workers that took no job, since one did
        self._num = 0
        self._processes = Forking()

    def submit(self, folders: Sequence[Path], after: Sequence[str] = ()) -> list[str]:
        """Ids of the jobs, which lie in the queue as files; a worker takes one by renaming it."""
        ids = []
        for folder in folders:
            self._num += 1
            ids.append(f"{self._num:06d}")
            self._folders[ids[-1]] = folder
            write(self._queue, f"{ids[-1]}.job", {"folder": str(folder)})
        return ids

    def poll(self, ids: Sequence[str]) -> Mapping[str, State]:
        """Where each job is."""
        self._listen()
        files = {file.stem: file.suffix[1:] for file in self._queue.glob("[0-9]*.*")}
        num_queued = sum(word == "job" for word in files.values())
        while self._free and len(self._slots) - sum(word.isdigit() for word in files.values()) < num_queued:
            slot, name = self._free.pop(), f"worker-{len(self._codes) + len(self._slots)}-{self._num}"
            self._slots[name] = slot
            folder = self._queue / name
            folder.mkdir(exist_ok=True)
            self._processes.begin(name, folder, ["queue", str(self._queue)], gpu_env(self._gpus, slot))
        return {job_id: self._state(job_id, files.get(job_id, "")) for job_id in ids}

    def wait(self, seconds: float) -> None:
        """That long, as workers go on with the next job by themselves."""
        time.sleep(min(seconds, _LOOK_S))

    def cancel(self, ids: Sequence[str]) -> None:
        """End all workers: they share their jobs."""
        for file in self._queue.glob("*.job"):
            file.unlink(missing_ok=True)
        self._processes.close()

    def adopt(self, jobs: Mapping[str, Path]) -> set[str]:
        """None: workers end with the process that began them."""
        return set()

    def close(self) -> None:
        """End the workers."""
        self._processes.close()

    def _state(self, job_id: str, word: str) -> State:
        folder, node = self._folders[job_id], socket.gethostname()
        if word == "job" and len(self._fruitless) <= _MOST_FRUITLESS:
            return State("queued", reason=BUSY)
        if word == "job":
            write(folder, END, self._fruitless[-1])
        if word.isdigit() and not (folder / END).exists():
            if int(word) not in self._codes:
                return State("running", node)
            write(folder, END, {"code": self._codes[int(word)]})  # its worker ended with it
        (self._queue / f"{job_id}.{word}").unlink(missing_ok=True)
        return State("ended", node)

    def _listen(self) -> None:
        for said in self._processes.heard():
            if not said:
                took = any(next(self._queue.glob(f"*.{pid}"), None) for pid in self._pids.values())
                self._fruitless = [] if took else [*self._fruitless, {"stopped": _DIES}]
                self._codes |= dict.fromkeys(self._pids.values(), -signal.SIGKILL)
                self._free += self._slots.values()
                self._slots, self._pids = {}, {}
                return
            if "code" in said:
                pid = self._pids.pop(said["id"])
                self._codes[pid] = said["code"]
                if any(self._queue.glob(f"*.{pid}")):
                    self._fruitless = []
                elif said["code"]:
                    self._fruitless.append({"code": said["code"]})
                self._free.append(self._slots.pop(said["id"]))
            else:
                self._pids[said["id"]] = said["pid"]


def gpu_env(gpus: Sequence[str], slot: int) -> dict[str, str]:
    """What makes a process see the GPU of its slot alone; nothing where there are none."""
    return {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {}


def visible_gpus() -> list[str]:
    """The names by which CUDA_VISIBLE_DEVICES chooses each GPU that this process may use: numbers, UUIDs, MIG slices.

    As CUDA reads the list: what follows the first name that is no device (``-1``, an empty one) counts for nothing.
    NVML is asked, not torch, which would be a long import.
    """
    chosen, num = os.environ.get("CUDA_VISIBLE_DEVICES"), num_gpus()
    if chosen is None:
        return [str(i) for i in range(num)]
    names: list[str] = []
    for word in chosen.split(","):
        name = word.strip()
        if not num or not (name.startswith(("GPU-", "MIG-")) or (name.isdigit() and int(name) < num)):
            break
        names.append(name)
    return names


def num_gpus() -> int:
    """GPUs of this machine."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:
        return 0
