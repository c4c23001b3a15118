"""What an engine must do, and what it says of a job. Every engine runs the same files, so no number depends on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from quantlab.errors import QuantlabError

What = Literal["queued", "running", "ended", "lost", "preempted", "stopped"]


class EngineError(QuantlabError):
    """An engine that takes no job: an address where nothing listens, a partition that is none, no command of its."""

    exit_code = 2


@dataclass(frozen=True)
class State:
    """What an engine says of a job.

    ``ended``: its process is over, the folder says how. ``lost``: its node or process is gone. ``preempted``: another
    job took its place. ``stopped``: somebody or a limit ended it, and it is not to be begun again.
    """

    what: What
    node: str = ""
    reason: str = ""
    """In the engine's own words: what it waits for, or how it ended."""

    @property
    def is_open(self) -> bool:
        """Will more be heard of it?"""
        return self.what in ("queued", "running")


class Engine(Protocol):
    """Runs the jobs in folders."""

    outlives: bool
    """Do jobs go on when the process that submitted them has ended?"""
    settle_s: float
    """How long after a job's end its files may take to be seen here."""

    def submit(self, folders: Sequence[Path], after: Sequence[str] = ()) -> list[str]:
        """Ids of the jobs, which begin when those of ``after`` have ended well. Raises :class:`EngineError`."""

    def poll(self, ids: Sequence[str]) -> Mapping[str, State]:
        """The state of each job. What it costs does not depend on jobs that are not asked for."""

    def wait(self, seconds: float) -> None:
        """Until something may have changed, or that long."""

    def cancel(self, ids: Sequence[str]) -> None:
        """End jobs, queued and running; returns when they are told."""

    def adopt(self, jobs: Mapping[str, Path]) -> set[str]:
        """Of the ids of an earlier process (with their folders), those that still wait or run here."""

    def close(self) -> None:
        """Let go of what this process holds; jobs of an engine that outlives it go on."""
