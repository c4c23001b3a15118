"""Progress of long work: a bar with time left on a terminal, a line a stage elsewhere. All of it goes to stderr."""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(stderr=True)


class Advance(Protocol):
    """``advance(what, done, total)`` shows the state of one piece of work; ``note`` stands behind the numbers."""

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None: ...


@contextmanager
def progress_bars(quiet: bool = False) -> Iterator[Advance]:
    """``advance(what, done, total)`` shows the state of each piece of work; finished bars disappear."""
    if quiet:
        yield lambda what, done, total, note="": None
        return
    columns: tuple[ProgressColumn, ...] = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    began = time.monotonic()
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def advance(what: str, done: int, total: int, note: str = "") -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total, note=note)
            bars.update(tasks[what], completed=done, total=total, note=note)
            if note and done and not console.is_terminal:  # a log shows no bar
                left = (time.monotonic() - began) / done * (total - done) / 60
                say(f"{what}: {done} of {total} done, {note}, about {left:.0f} min left")
            if done >= total:
                bars.remove_task(tasks.pop(what))

        yield advance


def printable(text: str, most: int = 2000) -> str:
    """``text`` for a terminal: on one line, what is no visible character written out, cut after ``most`` characters."""
    cut = text if len(text) <= most else f"{text[: most - 1]}…"
    return "".join(
        c if unicodedata.category(c)[0] not in "C" and c not in "\u2028\u2029" else ascii(c)[1:-1] for c in cut
    )


def say(text: str) -> None:
    """One line for the user, beside the bars."""
    console.print(text, highlight=False, soft_wrap=True)
