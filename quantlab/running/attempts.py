"""The folder of a job that was handed over: its attempts, and how each ended. Read and written without a heavy library.

In the run's folder::

    job.json         what the sweep asks for
    attempt.json     who runs it now: number, host, pid
    exit.json        how the process of this attempt ended, as whoever started it saw
    lost.json        why the sweep gave it to the engine again
    attempts/1 ...   what earlier attempts left, whole
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantlab.tracking.tags import HOST
from quantlab.tracking.values import this_process
from quantlab.vocabulary.files import object_in

JOB, ATTEMPT, END, LOST, LOG, EARLIER, WHY = (
    "job.json",
    "attempt.json",
    "exit.json",
    "lost.json",
    "worker.log",
    "attempts",
    "why.json",
)
RESULT = "reference.json"
"""Of a reference's job, what it found: ``known``, ``rows`` (floor -> key) and ``floors`` (floor -> its numbers)."""
RESUMED = "resumed"
"""In ``run.json`` of a job that found that it had been finished before: by which key."""
TERMINATED = "SIGTERM"
"""How the failure of a run begins that was told to end: no failure of the job's."""
_MEANING = {
    "SIGSEGV": "a segmentation fault in a library",
    "SIGABRT": "a library gave up",
    "SIGKILL": "killed from outside, as the system does when memory runs out",
    "SIGILL": "an instruction that this processor does not have",
}


def begin(folder: Path) -> int:
    """Begin an attempt in ``folder`` and return its number; 0 where the job is over already.

    What an earlier attempt left is moved aside, whole, so that this one begins in an empty folder.
    """
    if ended_since_given(folder):
        return 0
    number = set_aside(folder)
    (folder / LOST).unlink(missing_ok=True)
    write(folder, ATTEMPT, {"attempt": number, **this_process()})
    return number


def set_aside(folder: Path) -> int:
    """Move what an earlier attempt left to its own folder, whole; the number of the attempt that comes."""
    number = num_attempts(folder, begun=False) + 1
    if not (folder / ATTEMPT).exists() and not (folder / "tracking").exists():
        return number
    kept = folder / EARLIER / str(number)
    kept.mkdir(parents=True, exist_ok=True)
    write(kept, WHY, {"reason": _why_again(folder)})
    for entry in [entry for entry in folder.iterdir() if entry.name not in (JOB, LOST, EARLIER)]:
        entry.replace(kept / entry.name)
    return number + 1


def num_attempts(folder: Path, begun: bool = True) -> int:
    """Attempts that were begun in ``folder``; without the one that is there now, those that were set aside."""
    now = begun and (folder / ATTEMPT).exists()
    with contextlib.suppress(OSError):
        return len([e for e in (folder / EARLIER).iterdir() if e.name.isdigit()]) + now
    return int(now)


def earlier_attempts(folder: Path) -> list[dict[str, Any]]:
    """Of each attempt before this one: ``attempt``, ``node`` and ``reason`` of its end."""
    found = []
    for number in range(1, 1000):
        kept = folder / EARLIER / str(number)
        if not kept.is_dir():
            break
        node = read(kept, ATTEMPT).get(HOST, "")
        found.append({"attempt": number, "node": node, "reason": read(kept, WHY).get("reason", "")})
    return found


def has_ended(folder: Path) -> str:
    """``FINISHED`` or ``FAILED`` where the job of ``folder`` is over, else an empty text.

    A job that was told to end (preempted) is not over.
    """
    end = read(folder, END)
    if end.get("preempted"):
        return ""
    run = read(folder, "run.json")
    status = str(run.get("status", ""))
    if status == "FINISHED" or (status == "FAILED" and not str(run.get("error", "")).startswith(TERMINATED)):
        return status
    return "FAILED" if end else ""


def ended_since_given(folder: Path) -> str:
    """:func:`has_ended`, where what is there is not the failure of an attempt after which the job was given again."""
    status = has_ended(folder)
    return status if status == "FINISHED" or not (folder / LOST).exists() else ""


def signal_of(folder: Path) -> str:
    """The signal that killed the job's process, where that is how it ended; else an empty text."""
    end = {} if (folder / LOST).exists() else read(folder, END)
    code = end.get("code")
    if not isinstance(code, int) or code >= 0 or end.get("timed_out") or end.get("preempted"):
        return ""
    if read(folder, "run.json").get("status") in ("FINISHED", "FAILED"):  # it had said so itself by then
        return ""
    return signal.Signals(-code).name


def ending(folder: Path) -> str:
    """How the process of a job ended, for the user."""
    end = read(folder, END)
    if not end:
        return "the job's process never reported back (its machine or its launcher ended)"
    if end.get("stopped"):
        return str(end["stopped"])
    if end.get("timed_out"):
        return f"timeout: longer than sweep.timeout_s={end['timeout_s']:g}"
    code = int(end.get("code") or 0)
    if code < 0:
        name = signal.Signals(-code).name
        again = [one for one in earlier_attempts(folder) if str(one["reason"]).startswith(f"{name}:")]
        twice = f"; so did attempt {again[-1]['attempt']}" if again else ""
        what = f"the job's process ended ({_MEANING.get(name, 'by a signal')})"
        return f"{name}: {what}; see worker.log in {folder.name}{twice}"
    lines = [line.strip() for line in _text(folder / LOG).splitlines() if line.strip()]
    return f"exit code {code}: {lines[-1][:300] if lines else 'the process said nothing'}"


def node_of(folder: Path) -> str:
    """The host of the attempt that was begun last; empty before the first."""
    return str(read(folder, ATTEMPT).get(HOST, ""))


def is_mine(folder: Path, number: int) -> bool:
    """Is attempt ``number`` of this process still the one that the folder belongs to?"""
    return read(folder, ATTEMPT) == {"attempt": number, **this_process()}


def read(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of the folder; empty where there is none that can be read."""
    return object_in(folder / name)


def write(folder: Path, name: str, data: Mapping[str, object]) -> None:
    """All or nothing, so that no reader sees half a file."""
    draft = folder / f".{name}.{os.getpid()}"
    draft.write_text(json.dumps(data), encoding="utf-8")
    draft.replace(folder / name)


def _why_again(folder: Path) -> str:
    if reason := read(folder, LOST).get("reason"):
        return str(reason)
    if read(folder, END).get("preempted"):
        return "preempted: its engine told it to end"
    return "its engine began it again (it was requeued, or its node was lost)"


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
