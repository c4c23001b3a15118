"""What travels with a job to a node that shares no folder with the sweep, and what comes back: files by their content.

On the node a sweep's ``output_dir`` is a folder of the node's own cache. What jobs share (reference, trained weights)
lies there once, under its SHA-256, whichever sweep brought it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from quantlab.running.attempts import ATTEMPT, EARLIER, END, JOB, WHY, read, write

Contents = dict[str, bytes]
"""Path below ``output_dir`` -> content."""
_REFERENCES, _MODELS = "cache/reference", "cache/models"
_SHARED = (_REFERENCES, "cache/known", _MODELS)
"""What jobs leave for one another."""
_MOST_BYTES = 64 * 2**20
"""Of a file below the models: those that quantlab trained are small, and others are each node's own to load."""
_LAST = ("run.json", END)
"""What says that a job is over comes after all else."""
_OLD_S = 14 * 86400.0


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """A job on its way to a node."""

    sweep: str
    """By which the node knows the sweep's ``output_dir``."""
    output_dir: str
    """There where the job comes from."""
    folder: str
    """Of the run, below ``output_dir``."""
    files: Contents
    """Small, and the job's own."""
    shared: Mapping[str, str] = field(default_factory=dict)
    """Path below ``output_dir`` -> SHA-256."""


def pack(folder: Path, digest_of: Callable[[Path], str]) -> Parcel:
    """A job's folder, with the reference and the trained weights that ``output_dir`` has for it.

    ``folder`` is ``output_dir/runs/NAME``. Of earlier attempts only how they ended travels.
    """
    output_dir = folder.parents[1]
    asked = read(folder, JOB)
    small = [folder / JOB]
    for name in (ATTEMPT, WHY):
        small += sorted((folder / EARLIER).glob(f"*/{name}"))
    if behind := asked.get("behind"):
        small += sorted(Path(behind).glob("*.json"))
    key = (asked.get("known") or {}).get("reference_key")
    large = sorted((output_dir / _REFERENCES).glob(f"{key}*")) if key else []
    large += [one for one in sorted((output_dir / _MODELS).rglob("*")) if one.stat().st_size <= _MOST_BYTES]
    return Parcel(
        sweep=hashlib.sha256(f"{socket.gethostname()} {output_dir}".encode()).hexdigest()[:16],
        output_dir=str(output_dir),
        folder=_below(folder, output_dir),
        files={_below(one, output_dir): one.read_bytes() for one in small if one.is_file()},
        shared={_below(one, output_dir): digest_of(one) for one in large if _is_whole(one)},
    )


def unpack(parcel: Parcel, before: list[Contents], fetch: Callable[[str], Any]) -> Path:
    """The job's folder on this node, ready to run; ``before`` came back from jobs that it waited for.

    ``fetch`` gives the content of a digest that this node's cache lacks.
    """
    base = local_cache() / "sweeps" / parcel.sweep
    folder = base / parcel.folder
    folder.mkdir(parents=True, exist_ok=True)
    for contents in before:
        put(contents, base)
    put(parcel.files, base)
    for path, digest in parcel.shared.items():
        _link(_cached(digest, fetch), _place(base, path))
    asked = read(folder, JOB)
    behind = str(asked.get("behind") or "")
    asked |= {"output_dir": str(base), "base_dir": _existing(asked.get("base_dir"), base)}
    if behind.startswith(parcel.output_dir):
        asked["behind"] = str(base) + behind.removeprefix(parcel.output_dir)
    write(folder, JOB, asked)
    os.utime(base)
    return folder


def pack_back(folder: Path, since: float) -> Contents:
    """What a job has left: its folder, and what has appeared in the caches since a time of this node's clock."""
    base = folder.parents[1]
    files = [one for one in sorted(folder.rglob("*")) if one.is_file() and not _was_sent(one.relative_to(folder))]
    for name in _SHARED:
        files += [one for one in sorted((base / name).rglob("*")) if _is_whole(one) and _is_new(one, since)]
    return {_below(one, base): one.read_bytes() for one in files}


def put(contents: Contents, base: Path) -> None:
    """Write files below ``base``, each whole or not at all, and those that say that a job is over at the end.

    Raises ValueError for a path that leads elsewhere.
    """
    for path, content in sorted(contents.items(), key=lambda one: PurePosixPath(one[0]).name in _LAST):
        place = _place(base, path)
        draft = place.with_name(f".{place.name}.{os.getpid()}")
        draft.write_bytes(content)
        draft.replace(place)


def local_cache() -> Path:
    """This user's folder on this node's own disk; what nobody has used for two weeks is removed from it.

    Raises PermissionError where it is another user's.
    """
    uid = os.getuid() if hasattr(os, "getuid") else 0
    root = Path(tempfile.gettempdir()) / f"quantlab-{uid}"
    root.mkdir(mode=0o700, exist_ok=True)
    if root.is_symlink() or root.stat().st_uid != uid:
        raise PermissionError(f"{root} is not this user's own; set TMPDIR on the node to a folder of yours")
    return root


def forget_old(root: Path) -> None:
    """Remove contents and sweeps that were used last long ago."""
    until = time.time() - _OLD_S
    for one in [*root.glob("content/*"), *root.glob("sweeps/*")]:
        with contextlib.suppress(OSError):
            if one.stat().st_mtime < until:
                shutil.rmtree(one) if one.is_dir() else one.unlink()


def _cached(digest: str, fetch: Callable[[str], Any]) -> Path:
    file = local_cache() / "content" / digest
    if file.exists():
        os.utime(file)
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    content = fetch(digest)
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(f"what came for {digest} is something else")
    draft = file.with_name(f".{digest}.{os.getpid()}")
    draft.write_bytes(content)
    draft.replace(file)
    return file


def _link(file: Path, place: Path) -> None:
    if place.exists() and place.samefile(file):
        return
    draft = place.with_name(f".{place.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    os.link(file, draft)
    draft.replace(place)


def _place(base: Path, path: str) -> Path:
    parts = PurePosixPath(path).parts
    if not parts or parts[0] not in ("runs", "cache") or ".." in parts or PurePosixPath(path).is_absolute():
        raise ValueError(f"{path}: no place of a job's files")
    place = base.joinpath(*parts)
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def _below(file: Path, base: Path) -> str:
    return file.relative_to(base).as_posix()


def _is_whole(file: Path) -> bool:
    return file.is_file() and file.suffix not in (".part", ".lock") and not file.name.startswith(".")


def _is_new(file: Path, since: float) -> bool:
    said = file.stat()
    return said.st_mtime >= since and said.st_nlink == 1  # what was sent is a link into the cache


def _was_sent(path: Path) -> bool:
    return path.parts[0] == EARLIER or path.name.startswith(".") or path.as_posix() == JOB


def _existing(folder: object, other: Path) -> str:
    return str(folder) if folder and Path(str(folder)).is_dir() else str(other)
