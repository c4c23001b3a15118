"""What a value of a schema's node may be: declared beside the field, checked by one walk. Torch-free."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantlab.errors import ConfigError, nearest

SEED = 2**32 - 1
"""The largest seed that every library takes."""


def number(default: float | None, least: float, most: float, *, above: bool = False) -> Any:
    """A dataclass field for a number from ``least`` (with ``above``: above it) to ``most``."""
    return dataclasses.field(default=default, metadata={"least": least, "most": most, "above": above})


def choice(default: str, *options: str) -> Any:
    """A dataclass field for one of a few words."""
    return dataclasses.field(default=default, metadata={"choices": (default, *options)})


def text(default: str, most: int) -> Any:
    """A dataclass field for text of at most ``most`` characters."""
    return dataclasses.field(default=default, metadata={"most_characters": most})


def path(default: str | None) -> Any:
    """A dataclass field for the path of a file or folder."""
    return dataclasses.field(default=default, metadata={"path": True})


def checked_path(key: str, value: str) -> Path:
    """``value`` as a path, its home folder written out; ConfigError where no file can be called so."""
    shown = value if len(value) <= 80 else f"{value[:80]}..."
    if "\0" in value or len(value) > 4096 or any(len(part.encode(errors="replace")) > 255 for part in value.split("/")):
        raise ConfigError(f"{key}={shown}: no file can be called so; give the path of one")
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{key}={shown}: there is no such home folder; write the whole path") from error


def check_types(node: Any, path: str = "") -> None:
    """ConfigError naming the first key of a dataclass, and of those in it, whose value is not of its declared type: a
    reference to another key brings whatever is there."""
    for name, hint in typing.get_type_hints(type(node)).items():
        value = getattr(node, name)
        if dataclasses.is_dataclass(value):
            check_types(value, f"{path}{name}.")
        if not _fits(value, hint):
            raise ConfigError(f"{path}{name}: {str(value)[:80]!r} is no value of it; write the value itself")


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is dict:
        return isinstance(value, dict) and all(_fits(v, inner[1]) for v in value.values())
    if origin in (list, tuple):
        return isinstance(value, (list, tuple)) and all(_fits(v, inner[0]) for v in value)
    if inner:  # a union
        return any(_fits(value, one) for one in inner)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint) and not (hint is int and isinstance(value, bool))


def check_values(node: Any, path: str = "") -> None:
    """ConfigError naming the first key of a dataclass, and of those in it, that is outside its range."""
    for field in dataclasses.fields(node):
        key, value, said = f"{path}{field.name}", getattr(node, field.name), field.metadata
        if dataclasses.is_dataclass(value):
            check_values(value, f"{key}.")
        elif "least" in said and value is not None:
            _check_number(key, value, said, " or null" if field.default is None else "")
        elif "path" in said and value is not None:
            checked_path(key, value)
        elif "most_characters" in said and len(value) > said["most_characters"]:
            raise ConfigError(
                f"{key}={value[:40]}...: {len(value)} characters; {said['most_characters']} are the most, shorten it"
            )
        elif "choices" in said and value not in said["choices"]:
            raise ConfigError(f"{key}={value}: there are {', '.join(said['choices'])}{nearest(value, said['choices'])}")


def _check_number(key: str, value: float, said: Mapping[str, Any], or_null: str) -> None:
    least, most = said["least"], said["most"]
    if math.isfinite(value) and least <= value <= most and not (said["above"] and value == least):
        return
    kind = "a whole number" if isinstance(value, int) else "a number"
    start = f"above {least:g}, at most" if said["above"] else f"from {least:g} to"
    raise ConfigError(f"{key}={value:g}: {kind} {start} {_written(most)} is wanted{or_null}")


def _written(bound: float) -> str:
    return f"{bound:d}" if isinstance(bound, int) else f"{bound:g}"
