"""What can go wrong, and how a user is told.

    QuantlabError
    ├── ConfigError (also ValueError)      a request that cannot be carried out: exit 2
    │   ├── MissingPackage (also ImportError)   a library that the request needs is not installed
    │   ├── ModelError                     a model, tokenizer or data set that cannot be read or is broken
    │   └── TrackingError                  the tracking store cannot be used
    ├── NotQuantized                       the tensors show something else than what was asked for: exit 1
    │   └── DoesNotFit (also ConfigError)  layers have no shape that can be stored as asked: exit 2
    ├── DiskFull                           there is no room for what is measured: exit 1
    └── MetricUndefined                    a number that does not exist for these samples (NaN, none left): exit 1
        └── NotFinite                      because an output is NaN or infinite

Every message begins with the key that the user typed (``dtype=nf4: ...``) and ends with the way out.
"""

from __future__ import annotations

import difflib
import errno
import importlib.util
import itertools
import os
import re
import sys
import sysconfig
import textwrap
import types
from collections.abc import Iterable, Iterator


class QuantlabError(Exception):
    """Base of all errors that quantlab raises on purpose."""

    exit_code = 1

    def _render_traceback_(self) -> list[str]:
        """What IPython, which asks for it, shows: the user's own lines and the message."""
        return _in_a_notebook(self)


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


class DoesNotFit(ConfigError, NotQuantized):
    """Layers that cannot be stored as asked, by their shapes alone: known before there are tensors."""


class DiskFull(QuantlabError):
    """There is no room for what is measured; what was written before is kept."""


class MetricUndefined(QuantlabError):
    """A metric that has no value on these samples."""


class NotFinite(MetricUndefined):
    """An output that holds NaN or infinity; ``what`` names it: ``the final latent of sample 3``."""

    def __init__(self, message: str, what: str) -> None:
        super().__init__(message)
        self.what = what


class Interrupted(KeyboardInterrupt):
    """A run from Python that its user stopped."""

    def _render_traceback_(self) -> list[str]:
        return _in_a_notebook(self)


def _in_a_notebook(error: BaseException) -> list[str]:
    """An error as IPython draws it, without the lines of quantlab and of libraries, and without what it came from (its
    message tells), unless that was in code of the user's; with ``QUANTLAB_TRACEBACK=1`` all."""
    draw = sys.modules["IPython"].get_ipython().InteractiveTB.structured_traceback
    if os.environ.get("QUANTLAB_TRACEBACK") == "1":
        return [*draw(type(error), error, error.__traceback__, tb_offset=1)]
    shown = type(error).__new__(type(error), *error.args)
    vars(shown).update(vars(error))
    if isinstance(error, QuantlabError) and error.args and str(error) == error.args[0]:
        shown.args = (_folded(f"{type(error).__name__}: ", str(error)), *error.args[1:])
    came_from = next(itertools.islice(_origins(error), 1, None), None)
    is_the_users = came_from is not None and any(map(_is_the_users, _frames(came_from.__traceback__)))
    shown.__cause__ = came_from if is_the_users else None  # without one, its context is not shown either
    kept = None
    for one in reversed([one for one in _frames(error.__traceback__) if _is_the_users(one)]):
        kept = types.TracebackType(kept, one.tb_frame, one.tb_lasti, one.tb_lineno)
    where = ["QUANTLAB_TRACEBACK=1 shows where in quantlab"] if isinstance(error, QuantlabError) else []
    return [*draw(type(error), shown, kept, tb_offset=0), *where]


_NOTEBOOK = 75
"""Characters of a line of IPython's own."""


def _folded(before: str, message: str) -> str:
    """A message whose lines end between words: a notebook would end them within one."""
    lines = f"{before}{message}".splitlines()
    fold = textwrap.TextWrapper(_NOTEBOOK, break_long_words=False, break_on_hyphens=False).wrap
    return "\n".join(part for line in lines for part in fold(line) or [""]).removeprefix(before)


def _frames(first: types.TracebackType | None) -> Iterator[types.TracebackType]:
    while first is not None:
        yield first
        first = first.tb_next


def _is_the_users(one: types.TracebackType) -> bool:
    """Is it code of neither quantlab, nor Python, nor a library that is installed?"""
    file = one.tb_frame.f_code.co_filename
    installed = (os.path.dirname(os.path.abspath(__file__)), *sysconfig.get_paths().values())
    root = str(one.tb_frame.f_globals.get("__name__")).partition(".")[0]
    return root not in ("quantlab", "IPython") and not any(file.startswith(f"{path}{os.sep}") for path in installed)


_DISK_FULL_TEXTS = ("No space left on device", "database or disk is full", "PytorchStreamWriter failed writing file")
"""How libraries that write files themselves (safetensors, SQLite, torch) say it."""


def is_disk_full(error: BaseException | None) -> bool:
    """Whether ``error``, or what it came from, is a disk (or a quota) without room."""
    return any(
        (isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT))
        or any(text in str(one) for text in _DISK_FULL_TEXTS)
        for one in _origins(error)
    )


_NO_MEMORY_TYPES = ("OutOfMemoryError",)
"""torch's, by its name: this file imports no library. numpy's is a MemoryError."""
_NO_MEMORY_TEXT = re.compile(
    "out of memory|out_of_memory|not enough memory|can't allocate memory|cannot allocate memory|bad_alloc"
    "|_alloc_failed|cudaerrormemoryallocation",
    re.IGNORECASE,
)
"""How torch, CUDA's driver and runtime, cuBLAS, cuDNN, Triton and torch's allocator on a CPU say it."""
_LOST_DEVICE_TEXT = re.compile(
    "device-side assert|illegal memory access|illegal address|illegal instruction|misaligned address"
    "|unspecified launch failure|hardware stack error|device context is invalid|uncorrectable ecc|device is lost"
    "|fallen off the bus|context is destroyed|cuda_error_(assert|illegal_|misaligned_|launch_failed|hardware_stack)",
    re.IGNORECASE,
)
"""Errors after which each later call of the process on the device fails too."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether ``error``, or what it came from, says that the memory of the device or of the host ran out."""
    return any(
        isinstance(one, MemoryError)
        or type(one).__name__ in _NO_MEMORY_TYPES
        or (isinstance(one, OSError) and one.errno == errno.ENOMEM)
        or (isinstance(one, RuntimeError) and _NO_MEMORY_TEXT.search(str(one)) is not None)
        for one in _origins(error)
    )


def in_words(error: BaseException) -> str:
    """What was raised, for a row or a line: of a library its type and text, and the way out where the machine gave up;
    a message of quantlab's own begins with the key."""
    is_own = isinstance(error, QuantlabError) and bool(str(error))
    text = str(error) if is_own else f"{type(error).__name__}: {error}".removesuffix(": ")
    if isinstance(error, KeyboardInterrupt):
        return "interrupted by its user"
    if is_out_of_memory(error):
        return (
            f"{text}; out of memory: set a smaller evaluation.batch_size (or calibration.batch_size where it "
            "calibrates), quantize fewer model.components, or run fewer jobs at once (launcher.num_workers)"
        )
    return text


def first_line(error: BaseException) -> str:
    """What an error of a library says first: its first line, and the next where that one ends with a colon."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    told = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
    return told[:300].rstrip(".")


def is_device_lost(error: BaseException | None) -> bool:
    """Whether ``error``, or what it came from, leaves this process without its GPU: only a new process has one."""
    return any(
        isinstance(one, RuntimeError) and _LOST_DEVICE_TEXT.search(str(one)) is not None for one in _origins(error)
    )


def is_of_the_machine(error: BaseException | None) -> bool:
    """Is it no fault of the request: out of memory, or a GPU that answers no more? It is told as what it is."""
    return is_out_of_memory(error) or is_device_lost(error)


def _origins(error: BaseException | None) -> Iterator[BaseException]:
    """``error`` and what it came from, each once."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


_CALLED = {
    "modules_to_not_convert": "exclude exclusions skip skip_modules ignore ignored_layers llm_int8_skip_modules",
    "dtype": "bits num_bits nbits wbits w_bit precision quant_type weight_dtype weights_dtype weights",
    "group_size": "block_size blocksize groupsize q_group_size",
    "activation_dtype": "act_dtype activation activations",
    "algorithm": "algo calibration_method",
    "backend": "library method quantizer quant_method",
}
"""A key -> what it is called elsewhere."""
_MEANT = {word: key for key, words in _CALLED.items() for word in words.split()}


def nearest(word: str, options: Iterable[str]) -> str:
    """``"; did you mean X?"`` for the closest of ``options``, or ``""`` where none is close; case says nothing."""
    folded: dict[str, str] = {}
    for option in map(str, options):
        folded.setdefault(option.casefold(), option)
    if (meant := _MEANT.get(str(word).casefold().rpartition(".")[2])) in folded:
        return f"; did you mean {meant}?"
    start = str(word).casefold()
    begun = [option for option in folded if option.startswith((f"{start}_", f"{start} "))]  # kld: kld_mean, the first
    near = begun[:1] or difflib.get_close_matches(start, folded, 1)
    return f"; did you mean {folded[near[0]]}?" if near else ""


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
