"""Tables as a terminal can show them: no number and no word is ever broken; columns give way instead, and it is said.

A :class:`Sheet` is text in rows and columns. :func:`rich_table` gives what fits a width, :func:`tab_separated` all of
it for other programs.
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from quantlab.progress import console as stderr
from quantlab.progress import counted, parts_of, plain, printable, spelled_for

MAX_NAME, MAX_CELL, MAX_LINE = 200, 1000, 2000  # characters
WIDE = 10_000  # columns of a terminal that has no end
LONG_WORD, WHOLE_NAME = 20, 40
"""Columns: what is longer in a sentence, or as a name, has parts and may go on in the next line behind a separator."""


class Terminal(Console):
    """Rich's console, which leaves a reader that went away to :func:`main`."""

    def on_broken_pipe(self) -> None:
        """Called by Rich, whose own answer is exit code 1: here that is a job that failed."""
        raise BrokenPipeError


def terminal(width: int | None = None) -> Console:
    """Where tables go; ``width`` is that of a file or a pipe, which has none of its own."""
    is_known = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit()
    wide = None if is_known else width
    # what is printed is text, never markup; in a notebook Rich would show it apart from what is printed around it
    return Terminal(width=wide, markup=False, highlight=False, emoji=False, force_jupyter=False)


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column; those with the lowest ``keep`` give way first, the rightmost of equal ones."""

    title: str
    is_text: bool = False
    """Left-aligned; goes on in the next line, between two words, where it takes more than half of the terminal."""
    may_wrap: bool = False
    """Sentences: goes on in the next line wherever others need the room."""
    keep: int = 9
    """9 never gives way."""
    caption: str = ""
    """What its marks mean, with ``; `` between: said below the table where the column is shown."""


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A table as text; ``rows[i][j]`` stands under ``columns[j]``."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    styles: Mapping[int, str] = field(default_factory=dict)
    """Row -> rich style."""
    sections: frozenset[int] = frozenset()
    """Rows below which a line is drawn."""
    title: Sequence[str] = ()
    """Sentences above it, a line each."""
    caption: Sequence[str] = ()
    all_in: str = "--wide"
    """Where the columns are for which there is no room."""


def show(console: Console, sheet: Sheet, *, is_plain: bool = False, wide: bool = False) -> None:
    """Print a sheet as a table that fits the console; ``wide``: whole; ``is_plain``: tab-separated."""
    if is_plain:
        for line in tab_separated(sheet):
            print(line, file=console.file)  # rich would make spaces of tabs
        return
    narrow = console.width
    console.width = WIDE if wide else narrow
    table = rich_table(_spelled_for(console.encoding, sheet), console.width)
    if console.is_terminal:
        console.print(table)
    else:
        with console.capture() as drawn:
            console.print(table)
        print("\n".join(line.rstrip() for line in drawn.get().splitlines()), file=console.file)
    console.width = narrow


def _spelled_for(encoding: str, sheet: Sheet) -> Sheet:
    """The sheet in the characters that a terminal has, before its columns are measured."""
    columns = [
        replace(c, title=spelled_for(encoding, c.title), caption=spelled_for(encoding, c.caption))
        for c in sheet.columns
    ]
    rows = [[spelled_for(encoding, text) for text in row] for row in sheet.rows]
    title, caption = ([spelled_for(encoding, line) for line in lines] for lines in (sheet.title, sheet.caption))
    return replace(sheet, columns=columns, rows=rows, title=title, caption=caption)


def tell(console: Console, line: str, style: str = "") -> None:
    """Print a sentence: in a terminal, and where COLUMNS says how wide it is, it goes on in the next line between two
    words, and elsewhere it is one line."""
    is_narrow = console.is_terminal or os.environ.get("COLUMNS", "").isdigit()
    text = plain(line, MAX_LINE)
    if console.is_terminal or not is_narrow:
        console.print(text, style=style, soft_wrap=not is_narrow)
        return
    for part in text.wrap(console, console.width):  # of a pipe, without spaces at a line's end
        console.print(part.plain.rstrip(), soft_wrap=True)


def complain(text: str, who: str = "quantlab: ") -> None:
    """Print an error: in a terminal its lines go on between two words, and elsewhere each is one line."""
    told = f"{who}{printable(text, 20_000, lines=True)}"
    print(fitted(told, stderr.width) if stderr.is_terminal else told, file=sys.stderr)


def fitted(text: str, width: int) -> str:
    """Lines of a text in two columns: a long one goes on between two words, below where its second column begins."""
    lines = []
    for line in text.splitlines():
        if len(line) <= width:
            lines.append(line)
            continue
        begin = len(line) - len(line.lstrip())
        second = [gap.end() for gap in re.finditer(r"\S {2,}(?=\S)", line) if gap.end() <= width // 2]
        indent = " " * (second[-1] if second else begin)
        lines += textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)


def tab_separated(sheet: Sheet) -> Iterator[str]:
    """The titles and the rows, a line each; no cell holds a tab or a line end."""
    yield "\t".join(printable(c.title) for c in sheet.columns)
    for row in sheet.rows:
        yield "\t".join(printable(text, MAX_CELL) for text in row)


def rich_table(sheet: Sheet, width: int) -> Table:
    """What fits ``width`` columns of a terminal; which columns are hidden is said below it."""
    sheet = _wrapping(sheet, width)
    shown = _shown(sheet, width)
    hidden = [c.title for j, c in enumerate(sheet.columns) if j not in shown]
    told = [printable(line, MAX_LINE) for line in told_below(sheet, shown)]
    if hidden:
        told.append(
            f"... {counted(len(hidden), 'column')} hidden ({', '.join(map(printable, hidden))}): {sheet.all_in}"
        )
    table = Table(
        title=Text("\n".join(printable(line, MAX_LINE) for line in sheet.title)) if sheet.title else None,
        title_justify="left",
        caption=Text("\n".join(told), justify="left") if told else None,
        caption_justify="left",
        pad_edge=False,
    )
    widths = dict(zip(shown, _widths(sheet, shown, width), strict=True))
    for j, num in widths.items():
        column = sheet.columns[j]
        table.add_column(Text(column.title), justify=_side(column), overflow="fold", width=num)
    for i, row in enumerate(sheet.rows):
        table.add_row(
            *(plain(row[j], _most(sheet.columns[j]), num) for j, num in widths.items()),
            style=sheet.styles.get(i),
            end_section=i in sheet.sections,
        )
    return table


def told_below(sheet: Sheet, shown: Iterable[int]) -> list[str]:
    """What is said below these columns of a sheet, a line each: what their marks mean, once, then the sheet's own."""
    marks = dict.fromkeys(part for j in shown for part in sheet.columns[j].caption.split("; ") if part)
    return [line for line in ("; ".join(marks), *sheet.caption) if line]


def _most(column: Column) -> int:
    return MAX_CELL if column.may_wrap else MAX_NAME


def _side(column: Column) -> Literal["left", "right"]:
    return "left" if column.is_text else "right"


def _wrapping(sheet: Sheet, width: int) -> Sheet:
    """The sheet; where what never gives way does not fit, texts behind the first column go on between two words: a name
    is broken last."""
    staying = [j for j, c in enumerate(sheet.columns) if c.keep == 9]
    if _fits({j: _least(sheet, j, width) for j in staying}, staying, width):
        return sheet
    columns = [replace(c, may_wrap=c.may_wrap or (c.is_text and j > 0)) for j, c in enumerate(sheet.columns)]
    return replace(sheet, columns=columns)


def _shown(sheet: Sheet, width: int) -> list[int]:
    """Columns that stay: they give way in their order until the rest fits, or none may any more. Of those that went,
    the last first, each comes back for which a wider one that went after it left room."""
    shown = set(range(len(sheet.columns)))
    needs = [_least(sheet, j, width) for j in shown]
    going = sorted((c.keep, -j) for j, c in enumerate(sheet.columns) if c.keep < 9)
    gone: list[int] = []
    while not _fits(needs, shown, width) and len(gone) < len(going):
        gone.append(-going[len(gone)][1])
        shown.remove(gone[-1])
    for j in reversed(gone):
        if _fits(needs, {*shown, j}, width):
            shown.add(j)
    return sorted(shown)


def _fits(needs: Sequence[int] | Mapping[int, int], shown: Collection[int], width: int) -> bool:
    return sum(needs[j] for j in shown) + _frame(len(shown)) <= width


def _frame(num_columns: int) -> int:
    """What the lines between and the padding beside ``num_columns`` take."""
    return 3 * num_columns - 1


def _least(sheet: Sheet, j: int, width: int) -> int:
    """What a column needs, so that no number, no name and no word of a sentence is broken."""
    column = sheet.columns[j]
    cells = [printable(row[j], _most(column)) for row in sheet.rows]
    wraps = column.may_wrap or (column.is_text and _longest(cells) > width // 2)
    words = [word for cell in cells for word in (cell.split() if wraps else [cell])]
    longest = _longest(words)
    if wraps and not column.may_wrap and longest > WHOLE_NAME:  # it goes on behind its separators: others have room
        whole = [word for word in words if cell_len(word) <= WHOLE_NAME]
        longest = min(
            longest, max(width // 3, _longest([*whole, *(part for word in words for part in parts_of(word))]))
        )
    return max(
        min(longest, LONG_WORD) if column.may_wrap else longest,
        _longest(column.title.split()),
        1,
    )


def _longest(texts: Sequence[str]) -> int:
    return max(map(cell_len, texts), default=0)


def _wish(sheet: Sheet, j: int) -> int:
    column = sheet.columns[j]
    return max(_longest([column.title, *(printable(row[j], _most(column)) for row in sheet.rows)]), 1)


def _widths(sheet: Sheet, shown: Sequence[int], width: int) -> list[int]:
    """Of each shown column: what it needs, and of what is left over a share by what it would like."""
    least = [_least(sheet, j, width) for j in shown]
    wishes = [_wish(sheet, j) - need for j, need in zip(shown, least, strict=True)]
    over = max(width - sum(least) - _frame(len(shown)), 0)
    more = [wish * over // sum(wishes) if sum(wishes) > over else wish for wish in wishes]
    too_much = max(sum(least) + _frame(len(shown)) - width, 0)  # of names alone: the longest is folded
    least[0] = max(least[0] - too_much, min(least[0], 12)) if least else 1
    return [need + add for need, add in zip(least, more, strict=True)]
