"""Progress of long work: a bar with time left on a terminal, a line a stage elsewhere. All of it goes to stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True)

Advance = Callable[[str, int, int], None]


@contextmanager
def progress_bars(quiet: bool = False) -> Iterator[Advance]:
    """``advance(what, done, total)`` shows the state of each piece of work; finished bars disappear."""
    if quiet:
        yield lambda what, done, total: None
        return
    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)
            if done >= total:
                bars.remove_task(tasks.pop(what))

        yield advance


def say(text: str) -> None:
    """One line for the user, beside the bars."""
    console.print(text, highlight=False, soft_wrap=True)
