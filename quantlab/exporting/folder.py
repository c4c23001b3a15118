"""The folder of an export: beside its place until it is whole and checked, then moved there in one step."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quantlab.errors import ConfigError, DiskFull
from quantlab.models.exported import MANIFEST
from quantlab.vocabulary.amounts import GIB, MIB
from quantlab.vocabulary.fields import checked_path

FORMAT = 1
_LEAST_ROOM = 64 * MIB
"""Bytes for what is no weight: tokenizers, pictures, the card."""


def check_target(key: str, target: str | Path) -> Path:
    """The absolute path; ConfigError beginning with ``key`` for a place that is something else than an export."""
    path = checked_path(key, str(target)).absolute()
    # through a folder that is not there yet, .. would lead to one that is
    path = path.resolve() if path.name == ".." else path.parent.resolve() / path.name
    _check_free(key, path, str(target))
    parent = next((p for p in path.parents if p.exists()), path)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"{key}={target}: {parent} cannot be written; give a place that you may write to")
    _check_alone(key, path)
    return path


def _check_free(key: str, path: Path, typed: str) -> None:
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ConfigError(f"{key}={typed}: is a file or a link; give a folder that is not there yet")
    if path.is_dir() and any(path.iterdir()) and not (path / MANIFEST).is_file():
        raise ConfigError(
            f"{key}={typed}: is a folder that quantlab did not export, and nothing of it is overwritten; give one "
            "that is not there yet"
        )


def check_room(key: str, target: Path, needed_bytes: int) -> None:
    """DiskFull before the first byte where the disk has no room for ``needed_bytes`` beside what is there."""
    parent = next(p for p in target.parents if p.exists())
    free, wanted = shutil.disk_usage(parent).free, needed_bytes + _LEAST_ROOM
    if free < wanted:
        raise DiskFull(
            f"{key}={target}: it needs {wanted / GIB:.2f} GiB (what is there is replaced "
            f"only afterwards) and {free / GIB:.2f} GiB are free; make room, or give a place on another disk"
        )


@contextlib.contextmanager
def written_beside(target: Path, key: str = "export.path") -> Iterator[Path]:
    """An empty folder beside ``target``, which takes its place when the block ends well, and is gone when it does not.

    A process that is killed leaves the folder that was there, or none; what it left beside it goes with the next export
    to the same place. ConfigError beginning with ``key`` where another export to it is under way.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{os.getpid()}.part")
    _check_alone(key, target)
    _clear_left_overs(target)
    fresh.mkdir()
    try:
        yield fresh
        _synced(fresh)
        _check_free(key, target, str(target))  # whatever came there meanwhile
        _put(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _put(fresh: Path, target: Path) -> None:
    """The new folder in the place of the old one, which has another name for a moment."""
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists():
        os.rename(target, old)
    os.rename(fresh, target)
    shutil.rmtree(old, ignore_errors=True)


def _clear_left_overs(target: Path) -> None:
    """Remove parts of processes that are gone; an old export comes back where nothing took its place."""
    for left, pid in _left_overs(target):
        if _is_at_work(pid, left):
            continue
        if left.suffix == ".old" and not target.exists():
            os.rename(left, target)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _left_overs(target: Path) -> list[tuple[Path, int]]:
    """What exports to ``target`` keep beside it, each with its process."""
    found = [
        (left, left.stem.rpartition(".")[2]) for left in sorted(target.parent.glob(f".{glob.escape(target.name)}.*"))
    ]
    return [(left, int(pid)) for left, pid in found if left.suffix in (".part", ".old") and pid.isdigit()]


def _check_alone(key: str, target: Path) -> None:
    if any(_is_at_work(pid, left) for left, pid in _left_overs(target)):
        raise ConfigError(f"{key}={target}: another export to it is under way; wait for its end, or give another place")


def _is_at_work(pid: int, left: Path) -> bool:
    """Whether the process that made a folder is still there: one of its number that is younger than the folder is
    another."""
    import psutil

    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= left.stat().st_ctime + 1
    except (psutil.Error, OSError):
        return False


def _synced(folder: Path) -> None:
    """What was written is on the disk before the name says so."""
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())


def clean_json(folder: Path, forbidden: str = "") -> None:
    """No JSON file says where a model was; ConfigError where ``forbidden``, its folder, still stands in a text file."""
    for file in sorted(folder.rglob("*")):
        if not file.is_file() or file.suffix == ".safetensors":
            continue
        if file.suffix == ".json":
            data = json.loads(file.read_text(encoding="utf-8"))
            clean = without_paths(data)
            if clean != data:
                file.write_text(json.dumps(clean, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if forbidden and forbidden.encode() in file.read_bytes():
            raise ConfigError(
                f"export.path: {file.relative_to(folder)} would say {forbidden}, a folder of this machine; "
                "rename it in the model's own files"
            )


def without_paths(data: Any) -> Any:
    """JSON data without the keys by which libraries write where a model was."""
    if isinstance(data, Mapping):
        return {k: without_paths(v) for k, v in data.items() if k not in ("_name_or_path", "name_or_path")}
    return [without_paths(v) for v in data] if isinstance(data, list) else data


def file_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def read_manifest(key: str, folder: Path) -> dict[str, Any]:
    """What an export says of itself; ConfigError for a folder that is none."""
    try:
        data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}={folder}: is no export of quantlab (no readable {MANIFEST})") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ConfigError(f"{key}={folder}: its {MANIFEST} is of another version; export it again")
    return data
