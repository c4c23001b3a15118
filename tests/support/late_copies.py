"""Streams of a GPU that is not there: what Diffusers copies without waiting arrives when its stream is waited for, and is
not a number before. On a GPU it is whatever lay there, and only sometimes too late."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from diffusers.hooks import group_offloading


class Stream:
    def __init__(self) -> None:
        self.coming: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def synchronize(self) -> None:
        self._bring(len(self.coming))

    def record_event(self) -> tuple[Stream, list[Any]]:
        """The last that was begun."""
        return self, self.coming[-1:]

    def wait_event(self, event: tuple[Stream, list[Any]]) -> None:
        """Of the stream that computes; what it waits for is there."""
        stream, [*last] = event
        at = [i for i, coming in enumerate(stream.coming) if any(coming is one for one in last)]
        stream._bring(at[-1] + 1 if at else 0)

    def _bring(self, num: int) -> None:
        for tensor, empty, source in self.coming[:num]:
            if tensor.data_ptr() == empty.data_ptr():  # and not gone again
                tensor.data = source.clone()
        del self.coming[:num]


class Backend:
    """What Diffusers asks of a kind of device."""

    Stream = Stream

    def __init__(self, device: Any) -> None:
        del device

    @staticmethod
    def stream(stream: Stream) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext(stream)

    @staticmethod
    def current_stream() -> Stream:
        return Stream()


def transfer(group: Any, tensor: torch.Tensor, source: torch.Tensor, default_stream: object) -> None:
    """In the place of ``ModuleGroup._transfer_tensor_to_device``."""
    del default_stream
    if group.stream is None or not group.non_blocking:
        tensor.data = source.clone()
        return
    empty = torch.full_like(source, float("nan")) if source.is_floating_point() else torch.zeros_like(source)
    tensor.data = empty
    group.stream.coming.append((tensor, empty, source))


def late_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on Diffusers' groups go to such a device, which is the host."""
    monkeypatch.setattr(group_offloading, "TorchDeviceBackend", Backend)
    monkeypatch.setattr(group_offloading, "send_to_device", lambda given, *_, **__: given)
    monkeypatch.setattr(group_offloading.ModuleGroup, "_transfer_tensor_to_device", transfer)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
