"""What can go wrong, and how a user is told.

    QuantlabError
    ├── ConfigError (also ValueError)      a request that cannot be carried out: exit 2
    │   ├── MissingPackage (also ImportError)   a library that the request needs is not installed
    │   ├── ModelError                     a model, tokenizer or data set that cannot be read or is broken
    │   └── TrackingError                  the tracking store cannot be used
    ├── NotQuantized                       the tensors show something else than what was asked for: exit 1
    ├── DiskFull                           there is no room for what is measured: exit 1
    └── MetricUndefined                    a number that does not exist for these samples (NaN, none left): exit 1
        └── NotFinite                      because an output is NaN or infinite

Every message begins with the key that the user typed (``dtype=nf4: ...``) and ends with the way out.
"""

from __future__ import annotations

import difflib
import errno
import importlib.util
from collections.abc import Iterable


class QuantlabError(Exception):
    """Base of all errors that quantlab raises on purpose."""

    exit_code = 1


class ConfigError(QuantlabError, ValueError):
    """A request that cannot be carried out as it stands."""

    exit_code = 2


class MissingPackage(ConfigError, ImportError):
    """A package that the request needs is not installed."""


class ModelError(ConfigError):
    """A model, tokenizer or data set that cannot be found, read or trusted."""


class TrackingError(ConfigError):
    """The tracking store cannot be reached or used."""


class NotQuantized(QuantlabError):
    """Layers that were asked for are not what was asked for, as read from their tensors."""


class DiskFull(QuantlabError):
    """There is no room for what is measured; what was written before is kept."""


class MetricUndefined(QuantlabError):
    """A metric that has no value on these samples."""


class NotFinite(MetricUndefined):
    """An output that holds NaN or infinity; ``what`` names it: ``the final latent of sample 3``."""

    def __init__(self, message: str, what: str) -> None:
        super().__init__(message)
        self.what = what


_DISK_FULL_TEXTS = ("No space left on device", "database or disk is full", "PytorchStreamWriter failed writing file")
"""How libraries that write files themselves (safetensors, SQLite, torch) say it."""


def is_disk_full(error: BaseException | None) -> bool:
    """Whether ``error``, or what it came from, is a disk (or a quota) without room."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(text in str(error) for text in _DISK_FULL_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False


def nearest(word: str, options: Iterable[str]) -> str:
    """``"; did you mean X?"`` for the closest of ``options``, or ``""`` where none is close."""
    near = difflib.get_close_matches(str(word), [str(o) for o in options], 1)
    return f"; did you mean {near[0]}?" if near else ""


def require_package(module: str, key: str, install: str) -> None:
    """Raise :class:`MissingPackage` unless ``module`` can be imported; nothing is imported here.

    ``key`` is what the user typed (``backend=gguf``), ``install`` what brings the package, as pip takes it.
    """
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is absent
        found = False
    if not found:
        raise MissingPackage(f"{key}: the package {module} is not installed; pip install '{install}'")
