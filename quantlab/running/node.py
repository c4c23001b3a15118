"""A job on a node of a cluster: begun cleanly, watched, told in time that it must go, and its end written down."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from quantlab.running.attempts import END, LOG, begin, is_mine, read, write
from quantlab.running.engines.forking import python_environment
from quantlab.tracking.tags import HOST, PID, PID_STARTED
from quantlab.tracking.values import process_is_alive

_CODE = "import sys; from quantlab.running.worker import main; sys.exit(main(sys.argv[1:]))"
_GRACE_S = 20.0
"""For a job that is told to go, below the 30 s that SLURM waits before it kills."""
_LOOK_S = 0.5
_NEAR_S = 120.0
OWNER = "owner.json"
"""In a job's folder, the process without which nobody wants the job; absent for jobs that outlive their sweep."""


def run(
    folder: Path | str, timeout_s: float | None = None, limit_s: float | None = None, gpu: str | None = None
) -> str:
    """Run the job of ``folder`` in a process of its own; how it ended is in its folder, and what is returned is a word.

    It is killed after ``timeout_s``, and sees ``gpu`` alone (None: all). SIGTERM and the engine's own
    signal mean that it is preempted, or near ``limit_s`` that the engine's limit has come.
    """
    folder = Path(folder)
    number = begin(folder)
    if not number:
        return "it was over already"
    told: list[int] = []
    began = time.monotonic()
    previous = {
        one: signal.signal(one, lambda got, frame: _note(told, got, frame)) for one in (signal.SIGTERM, signal.SIGUSR2)
    }
    try:
        return _watched(folder, number, told, timeout_s, began + (limit_s or float("inf")), gpu)
    finally:
        for one, handler in previous.items():
            signal.signal(one, handler)


def run_after(
    after: Sequence[str], folder: Path | str, timeout_s: float | None, limit_s: float | None, gpu: str | None
) -> str:
    """As :func:`run`, when the processes of the ids ``after`` on this machine are over."""
    while any(map(is_alive, after)):
        time.sleep(_LOOK_S)
    return run(folder, timeout_s, limit_s, gpu)


def is_alive(job_id: str) -> bool:
    """Whether the process of an id, ``host/pid/start``, is there."""
    host, _, rest = job_id.partition("/")
    pid, _, started = rest.partition("/")
    return host == socket.gethostname() and process_is_alive({HOST: host, PID: pid, PID_STARTED: started})


def _note(told: list[int], got: int, frame: FrameType | None) -> None:
    told.append(got)


def _watched(folder: Path, number: int, told: list[int], timeout_s: float | None, limit: float, gpu: str | None) -> str:
    env = {**os.environ, **python_environment(), **({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})}
    command = [sys.executable, "-X", "faulthandler", "-c", _CODE, str(folder)]
    end: dict[str, object] = {}
    with (
        (folder / LOG).open("wb") as log,
        subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
        ) as process,
    ):
        until = time.monotonic() + (timeout_s or float("inf"))
        try:
            while process.poll() is None:
                if not is_mine(folder, number):  # this node was taken for lost, and the job is begun elsewhere
                    _end(process, 0.0)
                    return "it was begun elsewhere"
                if told or not _is_wanted(folder):
                    _end(process, _GRACE_S)
                    end = _told_end(told, limit)
                elif time.monotonic() > until:
                    _end(process, 0.0)
                    end = {"timed_out": True, "timeout_s": timeout_s}
                else:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(_LOOK_S)
        finally:
            _end(process, 0.0)
    if told and not end:  # the engine's signal reached the job first
        end = _told_end(told, limit)
    write(folder, END, {"code": process.returncode, "timed_out": False, **end})
    return f"exit code {process.returncode}"


def _told_end(told: list[int], limit: float) -> dict[str, object]:
    """What it means that this process was told to end, or that nobody wants the job any more."""
    if told and time.monotonic() > limit - _NEAR_S:
        return {"stopped": "timeout: longer than the engine's limit (launcher.settings.timeout_min)"}
    return {"preempted": True}


def _is_wanted(folder: Path) -> bool:
    owner = read(folder, OWNER)
    return not owner or process_is_alive(owner)


def _end(process: subprocess.Popen[bytes], grace_s: float) -> None:
    for number, seconds in ((signal.SIGTERM, grace_s), (signal.SIGKILL, _GRACE_S)):
        if process.poll() is None and seconds:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
