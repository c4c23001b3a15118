"""What is shown while work goes on, and text from outside as text.

Progress of long work: a bar with time left on a terminal, a line a stage elsewhere. All of it goes to stderr."""

from __future__ import annotations

import codecs
import io
import re
import threading
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Protocol

from rich.cells import cell_len
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

console = Console(stderr=True, markup=False, highlight=False, emoji=False, force_jupyter=False)
"""A notebook is told what a log is: rich's bars there need a package, and ask for it at each bar."""


def shows_bars() -> bool:
    """Whether a bar can be drawn over itself: FORCE_COLOR, which notebooks and CI set, makes a log no terminal."""
    return console.is_terminal and console.file.isatty()


class Advance(Protocol):
    """``advance(what, done, total)`` shows the state of one piece of work; ``note`` stands behind the numbers."""

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None: ...


class _Done(MofNCompleteColumn):
    """Empty beside work of which nobody knows how long it takes."""

    def render(self, task: Task) -> Text:
        return Text() if task.total is None else super().render(task)


class _What(TextColumn):
    """One line, which alone gives way to the numbers beside it."""

    def render(self, task: Task) -> Text:
        return Text(task.description, no_wrap=True, overflow="ellipsis")


class _Left(TimeRemainingColumn):
    def render(self, task: Task) -> Text:
        return Text() if task.total is None else Text.assemble("left ", super().render(task))


_advance: Advance | None = None
"""That of the bars that are open."""
_is_quiet = False


@contextmanager
def progress_bars(quiet: bool = False) -> Iterator[Advance]:
    """``advance(what, done, total)`` shows the state of each piece of work; finished bars disappear.

    What is under way is a bar of its own, with the time since it began. Within others these are shown there.
    With ``quiet`` nothing is shown, and :func:`say` says only what is wrong.
    """
    global _advance, _is_quiet
    before = _advance, _is_quiet
    _is_quiet = quiet or _is_quiet
    try:
        if _is_quiet:
            yield lambda what, done, total, note="": None
        elif _advance is not None:
            yield _advance
        else:
            with _bars() as _advance:
                yield _advance
    finally:
        _advance, _is_quiet = before


@contextmanager
def _bars() -> Iterator[Advance]:
    whole = Column(no_wrap=True)
    columns: tuple[ProgressColumn, ...] = (
        _What("", table_column=Column()),
        BarColumn(min(40, console.width // 8)),
        _Done(table_column=whole),
        TimeElapsedColumn(table_column=whole),
        _Left(table_column=whole),
        TextColumn("{task.fields[note]}", markup=False),
    )
    began = time.monotonic()
    with (
        _own_stream(),
        Progress(*columns, console=console, transient=True, disable=not shows_bars()) as bars,
        _beating(began, bars),
    ):
        tasks: dict[str, TaskID] = {}
        first: dict[str, tuple[int, float]] = {}
        logged: dict[str, tuple[int, str]] = {}

        def advance(what: str, done: int, total: int, note: str = "") -> None:
            what, note = printable(what, 60), printable(note, 120)
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total, note=note)
            bars.update(tasks[what], completed=done, total=total, note=note)
            if not shows_bars():
                under_way(f"{what}: {done} of {total}")
            if note and done and not shows_bars() and logged.get(what) != (done, note):  # a log has none
                logged[what] = (done, note)  # a cluster is asked each second
                now = time.monotonic()
                had, since = first.setdefault(what, (done, now))  # what the first took holds loading and the reference
                pace = (now - since) / (done - had) if done > had else None
                say(f"{what}: {done} of {total} done, {note}{_told_left(pace, total - done)}")
            if done >= total:
                bars.remove_task(tasks.pop(what))

        yield advance


@contextmanager
def _own_stream() -> Iterator[None]:
    """While open, what is told goes to the stderr of now: libraries are made quiet by another one, for minutes."""
    before, console._file = console._file, console._file or console.file
    try:
        yield
    finally:
        console._file = before


def _told_left(pace_s: float | None, num: int) -> str:
    """How long ``num`` more take, each ``pace_s`` seconds; nothing where that is not known yet or none is left."""
    if pace_s is None or not num:
        return ""
    minutes = pace_s * num / 60
    return f", about {minutes:.0f} min left" if minutes >= 1 else ", less than a minute left"


BEAT_S = 10.0
_told: list[str] = []
"""What this process was warned of, in words."""
_under_way = ""
_said_at = 0.0


def under_way(text: str) -> None:
    """What the work is at: a terminal shows it, a log is told it when nothing else was for :data:`BEAT_S` seconds."""
    global _under_way
    _under_way = text


@contextmanager
def _beating(began: float, bars: Progress) -> Iterator[None]:
    """Show what is under way: as a bar, or where none can be drawn in a line every :data:`BEAT_S` seconds."""
    under_way("starting")
    over = threading.Event()
    task = bars.add_task(_under_way, total=None, note="")

    def beat() -> None:
        shown = _under_way
        while not over.wait(BEAT_S / 10 if bars.disable else 0.1):
            if not bars.disable and _under_way != shown:
                shown = _under_way
                bars.reset(task, description=printable(shown, 60), total=None)
            elif bars.disable and _under_way and time.monotonic() - max(_said_at, began) >= BEAT_S:
                say(f"{time.monotonic() - began:.0f} s: {_under_way}")

    thread = threading.Thread(target=beat, daemon=True, name="quantlab-progress")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


_COLOURS = {"failed": "red", "launcher": "red", "warning": "yellow", "undefined": "yellow", "out of memory": "yellow"}
"""How a line begins -> the colour of that word."""


def printable(text: str, most: int = 2000, lines: bool = False) -> str:
    """``text`` from outside as a terminal may show it: what is no visible character (control characters, escapes, marks
    that turn a line around) is written out, line ends only with ``lines`` kept, and cut after ``most`` characters."""
    cut = text if len(text) <= most else f"{text[: most - 1]}…"
    kept = "\n\t" if lines else ""
    return "".join(c if c in kept or unicodedata.category(c) not in _UNSEEN else ascii(c)[1:-1] for c in cut)


def unbroken(text: str) -> str:
    """No line of it ends between a number and its percent sign."""
    return re.sub(r"(?<=\d) %", "\u00a0%", text)


def in_markdown(text: str, most: int = 200) -> str:
    """One cell (or line of prose): nothing in it ends the cell, opens an element or a link."""
    return unbroken("".join(f"\\{c}" if c in "|<[`*\\" else c for c in printable(text, most)))


_UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def counted(num: int, what: str) -> str:
    """``1 job``, ``3 jobs``."""
    return f"{num} {what}{'' if num == 1 else 's'}"


def headline_of(text: str, most: int = 200) -> str:
    """The beginning of a long message, whole words where it has any: what follows is told below the table."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most].rpartition(' ')[0] or line[:most]} …"


def plain(text: str, most: int = 200, width: int | None = None) -> Text:
    """``text`` from outside as a cell or line of rich: never markup, an emoji's name or an escape; in a cell of
    ``width`` columns."""
    shown = printable(text, most)
    return Text(shown if width is None else broken(shown, width))


def parts_of(name: str) -> list[str]:
    """A name cut behind each of its separators."""
    return re.findall(r"[^/_.:,=-]*[/_.:,=-]|[^/_.:,=-]+", name)


def broken(text: str, width: int) -> str:
    """A text whose words fit ``width``: a longer name goes on in the next line behind a separator, where it has one."""
    lines = []
    for word in text.split(" "):
        rest = word
        while cell_len(rest) > width:
            ends = [end for end in accumulate(map(len, parts_of(rest))) if end <= min(width, len(rest) - 1)]
            if not ends:
                break
            lines.append(f"{rest[: ends[-1]]}\n")
            rest = rest[ends[-1] :]
        lines.append(f"{rest} ")
    return "".join(lines)[:-1]


_ASCII = {
    "°": "#",
    "★": "*",
    "±": "+-",
    "↑": "^",
    "↓": "v",
    "…": "...",
    "×": "x",
    "–": "-",
    "—": "-",
    "≤": "<=",
    "≥": ">=",
}


def spell_out(*streams: object) -> None:
    """Let streams whose encoding lacks a character (an ASCII terminal) get another spelling of it, not an error."""
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "backslashreplace"):
            stream.reconfigure(errors="quantlab.spell_out")


def _spelled(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    return "".join(_ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lost), error.end


codecs.register_error("quantlab.spell_out", _spelled)


def spelled_for(encoding: str, text: str) -> str:
    """``text`` as a stream of this encoding gets it after :func:`spell_out`."""
    return text.encode(encoding, "quantlab.spell_out").decode(encoding)


def file_name(text: str, most: int = 60) -> str:
    """``text`` from outside as a part of a file's name: ASCII letters, digits, dots and spaces, never a path."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "_. ") else "-" for c in text)[:most]


def was_said(sentence: str) -> bool:
    """Whether a line of a kind ended so in this process: it stands on stderr."""
    return any(text.endswith(sentence) for text in _told)


def say(text: str, kind: str = "") -> None:
    """One line for the user, beside the bars; ``kind`` (``failed``, ``warning``...) stands before it in its colour.

    A line of no kind is about the work and changes what no number means: who wants quiet is not told it.
    """
    global _said_at
    if _is_quiet and not kind:
        return
    if kind:
        _told.append(text)
    _said_at = time.monotonic()
    line = Text(printable(text, lines=True))
    console.print(
        Text.assemble((kind, _COLOURS[kind]), ": ", line) if kind else line, soft_wrap=not console.is_terminal
    )
