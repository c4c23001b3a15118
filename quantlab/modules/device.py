"""The device that a model is on: what it has left, how its memory is given back, and whether it still answers."""

from __future__ import annotations

import contextlib
import gc
import itertools
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

_THRESHOLD = gc.get_threshold()


def kind_of(device: str) -> str:
    """``cpu`` or ``cuda``, whatever the number behind it."""
    return device.partition(":")[0]


@contextlib.contextmanager
def current(device: str) -> Iterator[None]:
    """While open, ``device`` is the GPU that libraries mean where they name none; nothing on a CPU."""
    import torch

    if kind_of(device) != "cuda":
        yield
        return
    with torch.cuda.device(torch.device(device)):
        yield


def lies_on(layer: nn.Module) -> str:
    """The device of a layer's own tensors; "" for one that has none."""
    tensors = itertools.chain(layer.parameters(), layer.buffers())
    return next((str(tensor.device) for tensor in tensors), "")


def free_bytes(device: str) -> int:
    """Bytes that a new tensor may take on ``device`` (``cpu``, ``cuda``, ``cuda:1``) now."""
    import psutil
    import torch

    if kind_of(device) == "cpu":
        return int(psutil.virtual_memory().available)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + cached


def total_bytes(device: str) -> int:
    """Bytes that ``device`` has in all: of a CPU the machine's memory."""
    import psutil
    import torch

    if kind_of(device) == "cpu":
        return int(psutil.virtual_memory().total)
    return int(torch.cuda.get_device_properties(device).total_memory)


def collect_rarely() -> None:
    """Let the garbage collector look seldom, until :func:`collect_as_usual`: while libraries are imported it looks at
    each of their million objects several times, a quarter of the time that they take, and finds nothing."""
    gc.set_threshold(50_000, 20, 10)


def collect_as_usual() -> None:
    """The collector as Python begins: a model is there, and a cycle may hold its tensors."""
    gc.set_threshold(*_THRESHOLD)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """While open, no collection looks at what is there now: a million objects of libraries, once a stage.

    What a caller has frozen stays frozen, and is all that is.
    """
    gc.collect()
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def give_back(device: str) -> None:
    """Collect what is unreachable and return the memory that the GPU's allocator keeps; also after an error of it."""
    import torch

    gc.collect()
    if kind_of(device) == "cuda":
        with contextlib.suppress(RuntimeError):  # a GPU that answers no more
            torch.cuda.empty_cache()


def let_go(error: BaseException | None) -> None:
    """Drop what the frames of an error, and of those that it came from, still hold: half-made copies of a model.

    The frames that are running stay as they are.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def answers(device: str) -> bool:
    """Does the GPU still do what it is told? After an assert in a kernel it does not, in this process."""
    import torch

    if kind_of(device) != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True
