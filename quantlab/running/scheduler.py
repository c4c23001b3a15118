"""Jobs on an engine, from the first hand-over to the last row: what is lost is given again, what kills is found."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from quantlab.progress import say
from quantlab.running.attempts import (
    END,
    LOST,
    WHY,
    ended_since_given,
    ending,
    has_ended,
    num_attempts,
    read,
    signal_of,
    write,
)
from quantlab.running.engines.protocol import Engine, State

_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0
WAIT_TOLD_S = 300.0
"""After so long in which no job runs, it is said what they wait for."""


@dataclass
class Counts:
    """How many jobs are where."""

    queued: int = 0
    running: int = 0
    ended: int = 0
    failed: int = 0


@dataclass
class Scheduler:
    """Gives jobs to an engine and watches them. ``submitted`` is told each new id, ``over`` each job that is over."""

    engine: Engine
    max_attempts: int
    over: Callable[[Path], None]
    submitted: Callable[[Path, str], None] = lambda folder, job_id: None
    progress: Callable[[Counts], None] = lambda counts: None
    counts: Counts = field(default_factory=Counts)
    _open: dict[str, Path] = field(default_factory=dict)
    _tries: Counter[Path] = field(default_factory=Counter)
    _kills: Counter[Path] = field(default_factory=Counter)
    _settling: dict[str, float] = field(default_factory=dict)

    def add(self, folders: Sequence[Path], after: Sequence[str] = ()) -> list[str]:
        """Submit jobs."""
        ids = self.engine.submit(folders, after)
        for folder, job_id in zip(folders, ids, strict=True):
            self._open[job_id] = folder
            self.submitted(folder, job_id)
        return ids

    def adopt(self, jobs: dict[str, Path]) -> set[Path]:
        """Take over jobs that an earlier process submitted; those that their engine still knows, or that are over."""
        known = self.engine.adopt(jobs)
        taken = {job_id: folder for job_id, folder in jobs.items() if job_id in known or has_ended(folder)}
        self._open |= taken
        return set(taken.values())

    def run(self) -> None:
        """Until all jobs are over. Interrupted, it cancels what waits and runs, and says so."""
        pause, quiet_since, told = _PAUSE_S, time.monotonic(), False
        try:
            while self._open:
                states = self.engine.poll(list(self._open))
                num_ended = self.counts.ended
                self._take(states)
                if any(state.what == "running" for state in states.values()) or self.counts.ended > num_ended:
                    quiet_since, told = time.monotonic(), False
                elif not told and time.monotonic() - quiet_since > WAIT_TOLD_S:
                    told = True
                    say(
                        f"no job has run for {WAIT_TOLD_S / 60:.0f} minutes: {_why_waiting(states.values())}",
                        "launcher",
                    )
                self.progress(self.counts)
                if self._open:
                    pause = _PAUSE_S if self.counts.ended > num_ended else min(1.3 * pause, _LONGEST_PAUSE_S)
                    self.engine.wait(pause)
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """End all that waits and runs."""
        if not self._open:
            return
        queued, running = self.counts.queued, self.counts.running
        self.engine.cancel(list(self._open))
        say(f"cancelled: {max(running, 0)} running jobs, {max(queued, len(self._open) - running)} queued", "launcher")

    def _take(self, states: dict[str, State] | object) -> None:
        assert isinstance(states, dict)
        self.counts.queued = sum(s.what == "queued" for s in states.values())
        self.counts.running = sum(s.what == "running" for s in states.values())
        again: list[Path] = []
        for job_id, state in states.items():
            if state.is_open:
                continue
            folder = self._open[job_id]
            if self._may_settle(job_id, folder, state):
                continue
            del self._open[job_id]
            if self._is_over(folder, state):
                self.counts.ended += 1
                self.counts.failed += has_ended(folder) == "FAILED"
                self._tries.pop(folder, None)
                self._kills.pop(folder, None)
                self.over(folder)
            else:
                again.append(folder)
        if again:
            self.add(again)

    def _may_settle(self, job_id: str, folder: Path, state: State) -> bool:
        """May the end of a job that its engine calls over still appear in its folder?"""
        if state.what != "ended" or not self.engine.settle_s or ended_since_given(folder) or read(folder, END):
            self._settling.pop(job_id, None)
            return False
        since = self._settling.setdefault(job_id, time.monotonic())
        if time.monotonic() - since < self.engine.settle_s:
            return True
        del self._settling[job_id]
        return False

    def _is_over(self, folder: Path, state: State) -> bool:
        """Is the job over? Else its folder says why it is given again."""
        killed_by = signal_of(folder)
        if ended_since_given(folder) and not killed_by:
            return True
        if state.what == "stopped":
            write(folder, END, {"stopped": state.reason or "ended from outside"})
            return True
        preempted = state.what == "preempted" or bool(read(folder, END).get("preempted"))
        if not preempted:
            self._tries[folder] += 1
        self._kills[folder] += bool(killed_by)
        tries = max(self._tries[folder], 0 if preempted else _counted(folder))
        if killed_by and (self._kills[folder] >= 2 or tries >= self.max_attempts):
            return True
        reason = ending(folder) if killed_by else state.reason or ending(folder)
        if tries >= self.max_attempts:
            write(folder, END, {"stopped": f"lost {tries} times (launcher.max_attempts), last: {reason}"})
            return True
        write(folder, LOST, {"reason": reason, "node": state.node})
        what = "preempted" if preempted else "killed its process" if killed_by else "lost"
        say(f"{folder.name}: {what} ({reason[:200]}); it is submitted again", "launcher")
        return False


def _counted(folder: Path) -> int:
    """Attempts that the folder holds and that count: being preempted does not."""
    kept = [folder / "attempts" / str(i) for i in range(1, num_attempts(folder))]
    return num_attempts(folder) - sum("preempted" in str(read(one, WHY).get("reason", "")) for one in kept)


def _why_waiting(states: Iterable[State]) -> str:
    reasons = Counter(state.reason or "its engine gives no reason" for state in states if state.what == "queued")
    return "; ".join(f"{num} wait: {reason}" for reason, num in reasons.most_common(3)) or "its engine gives no reason"
