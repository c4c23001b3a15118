"""What may be logged and under which name: the tracking store's limits, checked before anything is sent."""

from __future__ import annotations

import hashlib
import json
import math
import os
import posixpath
import re
import socket
from collections.abc import Mapping
from typing import SupportsFloat

from quantlab.errors import MetricUndefined, TrackingError
from quantlab.progress import printable
from quantlab.tracking.tags import ARTIFACT_DIGESTS, HOST, PID, PID_STARTED

MAX_KEY_CHARS = 250
MAX_PARAM_CHARS = 6000
MAX_TAG_CHARS = 5000
"""The store takes 8000; what is longer than this is no tag."""
MAX_DIGEST_CHARS = 36
_KEY = re.compile(r"[\w\-. :/]+", re.ASCII)
_ARTIFACT = re.compile(r"[\w\-. :/+]+", re.ASCII)
"""MLflow's own names of pictures have a plus."""


def flatten(mapping: Mapping[str, object]) -> dict[str, str]:
    """Nested mappings to dotted keys; values as text: lists as JSON, true/false/null as YAML writes them.

    A mapping whose keys are no names for the store (patterns, paths of modules that are long) is one JSON text.
    """
    flat: dict[str, str] = {}
    for key, value in mapping.items():
        inner = {f"{key}.{k}": text for k, text in flatten(value).items()} if isinstance(value, Mapping) else {}
        if inner and all(_is_key(k) for k in inner):
            flat.update(inner)
        else:
            flat[str(key)] = as_text(value)
    return flat


def as_text(value: object) -> str:
    """One value as the text of a parameter or tag, without characters that no store or page takes."""
    if isinstance(value, str):
        return printable(value, len(value), lines=True)
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=str)
    if value is None or isinstance(value, (bool, list, tuple, Mapping)):
        return json.dumps(value, default=str, ensure_ascii=False).encode(errors="backslashreplace").decode()
    return str(value)


def _is_key(key: str) -> bool:
    plain = posixpath.normpath(key) == key and key != "." and not key.startswith(("/", ".."))
    return plain and len(key) <= MAX_KEY_CHARS and _KEY.fullmatch(key) is not None


def checked_key(key: str, what: str) -> str:
    """``key``, or TrackingError where the store would refuse it as the name of a parameter, metric, tag or artifact."""
    shown = key if len(key) <= 80 else f"{key[:80]}..."
    if len(key) > MAX_KEY_CHARS:
        raise TrackingError(f"{what} {shown!r}: {len(key)} characters; use at most {MAX_KEY_CHARS}")
    if not (_ARTIFACT if what == "artifact" else _KEY).fullmatch(key):
        raise TrackingError(f"{what} {shown!r}: use letters, digits, spaces and _ - . : / only")
    if posixpath.normpath(key) != key or key == "." or key.startswith(("/", "..")):
        raise TrackingError(f"{what} {shown!r}: reads as a path that is not plain; use names like quality/kld_mean")
    return key


def checked_number(name: str, value: SupportsFloat) -> float:
    """``value`` as a float; MetricUndefined for NaN and infinities, TrackingError for what is no number."""
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise TrackingError(f"metric {name!r}: {type(value).__name__} is not a number; log text as a tag") from error
    if not math.isfinite(number):
        raise MetricUndefined(f"{name}={number}: a metric is a finite number; leave out (None) what has no value")
    return number


def checked_tags(tags: Mapping[str, object]) -> dict[str, str]:
    """Tags with checked names and texts of at most 5000 characters."""
    return {checked_key(k, "tag"): shortened(as_text(v), MAX_TAG_CHARS, "cut here") for k, v in tags.items()}


def shortened(text: str, limit: int, rest: str) -> str:
    """``text``, or its beginning and a note of how long it is and where the ``rest`` is."""
    note = f" ... ({len(text)} characters; {rest})"
    return text if len(text) <= limit else text[: limit - len(note)] + note


def this_process() -> dict[str, str]:
    """Tags by which a later process on this host can tell whether the run's process is still there."""
    import psutil

    return {
        HOST: socket.gethostname(),
        PID: str(os.getpid()),
        PID_STARTED: f"{psutil.Process().create_time():.2f}",
    }


def process_is_alive(tags: Mapping[str, str]) -> bool:
    """Whether the process that :func:`this_process` described runs now: the same pid, started at the same time."""
    import psutil

    try:
        process = psutil.Process(int(tags[PID]))
        same_start = abs(process.create_time() - float(tags[PID_STARTED])) < 1.0
        return bool(same_start and process.status() != psutil.STATUS_ZOMBIE)
    except (KeyError, ValueError, psutil.NoSuchProcess):
        return False
    except psutil.AccessDenied:  # another user's process: it exists
        return True


def digest_of(content: bytes) -> str:
    """The first 16 digits of the SHA-256 of an artifact."""
    return hashlib.sha256(content).hexdigest()[:16]


def is_as_written(tags: Mapping[str, str], name: str, content: bytes) -> bool:
    """Is an artifact what its run logged, as far as the run's tags say?"""
    try:
        known = json.loads(tags.get(ARTIFACT_DIGESTS, "{}"))
    except ValueError:
        return False
    return not isinstance(known, dict) or known.get(name, digest_of(content)) == digest_of(content)
