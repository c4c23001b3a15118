"""What is said before the numbers of several schemes: how much of a model they leave unquantized."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_NUM_NAMED = 3
_MAX_NAMES = 60
"""Characters of all names together: beyond, the names would stand before what is said of them."""


def said_first(found: Iterable[tuple[str, Sequence[str]]]) -> list[str]:
    """(scheme, sentences) of each scheme -> each sentence once, with the schemes that it is true of before it."""
    names: dict[str, list[str]] = {}
    num = 0
    for name, sentences in found:
        num += 1
        for sentence in sentences:
            names.setdefault(sentence, []).append(name)
    return [f"{_some(schemes, num)}: {sentence}" for sentence, schemes in names.items()]


def _some(names: Sequence[str], num: int) -> str:
    told = ", ".join(names)
    if len(names) <= _NUM_NAMED and len(told) <= _MAX_NAMES:
        return told
    if len(names) == num > 1:
        return "both schemes" if num == 2 else f"all {num} schemes"
    named = _NUM_NAMED
    while named > 1 and len(", ".join(names[:named])) > _MAX_NAMES:
        named -= 1
    left = len(names) - named
    return ", ".join(names[:named]) + (f" and {left} more" if left > 0 else "")
