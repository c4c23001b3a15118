"""What is said before the numbers of several schemes: how much of a model they leave unquantized."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_NUM_NAMED = 3


def said_first(found: Iterable[tuple[str, Sequence[str]]]) -> list[str]:
    """(scheme, sentences) of each row -> each sentence once, with the schemes that it is true of before it."""
    names: dict[str, list[str]] = {}
    for name, sentences in found:
        for sentence in sentences:
            names.setdefault(sentence, []).append(name)
    return [f"{_some(schemes)}: {sentence}" for sentence, schemes in names.items()]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
    return ", ".join(names[:_NUM_NAMED]) + more
