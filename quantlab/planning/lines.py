"""Where in a recipe's file something stands, for messages. Read again only where there is something to say."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml
from omegaconf._utils import get_yaml_loader

_MAX_DEPTH = 24
_KEY = re.compile(r"[\w.\[\]]+")

Place = tuple[str | int, ...]
"""Keys and positions from the top: ``("sweep", "candidates", 1, "dtype")``."""


def lines_of(text: str) -> dict[Place, int]:
    """Line, from 1 on, of each key and each entry of a list; of a choice also under its entry's own key.

    Empty of what is no YAML. What an alias repeats is found where it stands first.
    """
    with contextlib.suppress(yaml.YAMLError, RecursionError):
        top = yaml.compose(text, Loader=get_yaml_loader())
        return dict(_places(top, (), set())) if isinstance(top, yaml.Node) else {}
    return {}


def _places(node: yaml.Node, above: Place, seen: set[int]) -> Iterator[tuple[Place, int]]:
    if id(node) in seen or len(above) > _MAX_DEPTH:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            line = key.start_mark.line + 1
            yield (*above, str(key.value)), line
            if above[:1] == ("defaults",):
                yield (str(key.value),), line
            yield from _places(value, (*above, str(key.value)), seen)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            yield (*above, i), value.start_mark.line + 1
            yield from _places(value, (*above, i), seen)


def place_of(message: str) -> Place:
    """The key that a message begins with: ``sweep.candidates[1].dtype: ...``."""
    found = _KEY.match(message)
    words = re.findall(r"\w+", found[0]) if found else []
    return tuple(int(word) if word.isdecimal() else word for word in words)


def line_told(message: str, files: Sequence[Path]) -> str:
    """Where the files have the key that a message begins with, the first one before the others; empty where none has.

    ``"line 7: "`` of the first file, ``"base.yaml line 7: "`` of another.
    """
    place = place_of(message)
    key = ".".join(map(str, place)).removeprefix("quantization.")
    for i, file in enumerate(files):
        lines = _read(file)
        for meant in (place, (".".join(map(str, place)),), (f"override /{key}",), ("quantization", key)):
            if meant in lines:
                return f"{f'{file.name} ' if i else ''}line {lines[meant]}: "
    return ""


def candidate_lines(file: Path) -> Mapping[int, int]:
    """Position of each candidate -> its line."""
    found = _read(file)
    return {
        place[2]: line
        for place, line in found.items()
        if place[:2] == ("sweep", "candidates") and len(place) == 3 and isinstance(place[2], int)
    }


def _read(file: Path) -> dict[Place, int]:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return lines_of(file.read_text(encoding="utf-8"))
    return {}
