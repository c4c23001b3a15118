"""Files of the user's: their sizes are known before they are read, and what is no text is refused as such."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from quantlab.errors import ConfigError
from quantlab.vocabulary.amounts import MIB

MAX_TEXT_BYTES, MAX_DATA_BYTES = 256 * MIB, 16 * MIB
"""Of a text to evaluate on; of a recipe, a configuration or a list of prompts."""


def read_text(path: str | Path, key: str, way_out: str, max_bytes: int = MAX_DATA_BYTES) -> str:
    """The file as UTF-8 text; line ends stay as they are, a byte order mark is none.

    Raises ConfigError that begins with ``key`` and ends with ``way_out``, for a file that cannot be read, is larger
    than ``max_bytes``, holds NUL characters or is not UTF-8.
    """
    path = Path(path).expanduser()
    try:
        if not path.is_file():
            why = "is a folder" if path.is_dir() else "is no file" if path.exists() else "there is no such file"
            raise ConfigError(f"{key}: the file cannot be read ({why}); {way_out}")
        size = path.stat().st_size
        if size > max_bytes:
            raise ConfigError(
                f"{key}: the file has {size / MIB:.0f} MiB and at most {max_bytes / MIB:.0f} are read; {way_out}"
            )
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{key}: the file cannot be read ({error.strerror}); {way_out}") from error
    if b"\0" in content:
        raise ConfigError(f"{key}: not text (a NUL byte at {content.index(0)}); {way_out}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{key}: not UTF-8 text ({error.reason} at byte {error.start}); {way_out}") from error


def read_json(path: str | Path, key: str, way_out: str) -> Any:
    """The file as JSON data; ConfigError as for :func:`read_text`, and for what is no JSON."""
    text = read_text(path, key, way_out)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        why = str(error) if isinstance(error, ValueError) else "nested too deep"
        raise ConfigError(f"{key}: not a readable JSON file ({why}); {way_out}") from error


def object_in(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds; empty where none can be read: whoever needs it says what is wrong."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def lines_of(text: str) -> list[tuple[int, str]]:
    """The lines that are not empty, with their numbers; of the signs that divide lines, only those that editors write.

    ``str.splitlines`` divides at ten more, which stand within a prompt or a string of JSON.
    """
    return [(i, line) for i, line in enumerate(re.split(r"\r\n|\n|\r", text), 1) if line.strip()]


def read_json_lines(path: str | Path, key: str, way_out: str, max_bytes: int = MAX_DATA_BYTES) -> list[tuple[int, Any]]:
    """The data of each line that is not empty, with its number; ConfigError as for :func:`read_text`, and for lines
    that are no JSON or hold half a character."""
    rows = []
    for number, line in lines_of(read_text(path, key, way_out, max_bytes)):
        try:
            found = json.loads(line)
            json.dumps(found, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            why = "half a character of two" if isinstance(error, UnicodeEncodeError) else str(error)
            raise ConfigError(f"{key}: line {number} is no JSON ({why}); {way_out}") from error
        rows.append((number, found))
    return rows


def files_below(path: str | Path) -> list[Path]:
    """Every file below a folder, also in folders that are links, each of these once; of a file itself that."""
    place = Path(path).expanduser()
    if not place.is_dir():
        return [place]
    found: list[Path] = []
    entered: set[Path] = set()
    for folder, inner, names in os.walk(place, followlinks=True):
        real = Path(folder).resolve()
        if real in entered:  # a link to where it lies
            inner.clear()
            continue
        entered.add(real)
        found += [file for name in names if (file := Path(folder) / name).is_file()]
    return sorted(found)


def sha256_of(file: Path) -> str:
    """Of the file's content, as hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def leads_to_a_file(key: str) -> bool:
    """Whether a key's value is a path, of which a name says no more than it must."""
    return key.rpartition(".")[2] in ("path", "checkpoint", "imatrix_file")


def ends_of_paths(paths: Collection[str]) -> dict[str, str]:
    """Path -> the shortest end of it that no other of them has; what several folders have in common is left out."""
    parts = {path: [part for part in path.split("/") if part not in ("", ".")] for path in paths}
    for num in range(1, max(map(len, parts.values()), default=0) + 1):
        ends = {path: own[-num:] for path, own in parts.items()}
        if len({tuple(end) for end in ends.values()}) == len(ends):
            alike = num > 2 and len({tuple(end[1:]) for end in ends.values()}) == 1
            return {p: f"{end[0]}/…/{end[-1]}" if alike else "/".join(end) for p, end in ends.items()}
    return {path: path for path in paths}
