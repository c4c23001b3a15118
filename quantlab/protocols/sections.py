"""Windows of a text of which no more is tokenized than they hold."""

from __future__ import annotations

from collections.abc import Callable

_CHARACTERS_A_TOKEN = 6
"""Of English prose 4 to 5; the first guess of how much text a window takes."""
_MARGIN = 16
"""Tokens behind a window that are made as well: what follows may change how its last word is cut."""

Tokenize = Callable[[str], list[int]]


def sections(text: str, num: int, length: int, tokenize: Tokenize) -> dict[int, list[int]] | None:
    """Where it begins -> the first ``length`` tokens of each of ``num`` sections of equal size, in order.

    A section begins behind the first white space of its own. None where one holds fewer tokens than that.
    """
    found = {}
    for i in range(num):
        start, stop = i * len(text) // num, (i + 1) * len(text) // num
        start = _behind_a_space(text, start, stop) if i else start
        ids = _first(text, start, stop, length, tokenize)
        if len(ids) < length:
            return None
        found[start] = ids
    return found


def _behind_a_space(text: str, start: int, stop: int) -> int:
    """The first place behind white space; ``start`` in a text that has none (Chinese, Japanese)."""
    return next((at + 1 for at in range(start, min(start + 1000, stop - 1)) if text[at].isspace()), start)


def _first(text: str, start: int, stop: int, length: int, tokenize: Tokenize) -> list[int]:
    """Up to ``length`` tokens of the text from ``start``, as if it went on to ``stop``."""
    size = (length + _MARGIN) * _CHARACTERS_A_TOKEN
    while True:
        ids = tokenize(text[start : min(start + size, stop)])
        if start + size >= stop or len(ids) >= length + _MARGIN:
            return ids[:length]
        size *= 2
