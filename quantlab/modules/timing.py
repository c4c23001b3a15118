"""Times of what a model does again and again: by the GPU's own clock where it runs on one."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Hashable, Sequence
from typing import Any

from quantlab.modules.device import kind_of


class Clock:
    """Spans between :meth:`start` and :meth:`stop`.

    On a GPU both are events in its stream: they wait for nothing, and what the host does meanwhile (copies, checks,
    progress) is not counted.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._on_cuda = kind_of(device) == "cuda"
        self._spans: list[tuple[Any, Any]] = []
        self._began: Any = None

    def start(self) -> None:
        self._began = self._now()

    def stop(self) -> None:
        self._spans.append((self._began, self._now()))

    def seconds(self) -> list[float]:
        """Of each span, in order; waits for the last of them."""
        if not self._on_cuda:
            return [end - began for began, end in self._spans]
        for _, end in self._spans[-1:]:
            end.synchronize()
        return [began.elapsed_time(end) / 1e3 for began, end in self._spans]

    def _now(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event


def ms_per_token(shapes: Sequence[tuple[int, ...]], clock: Clock) -> float:
    """The typical time of a batch of token ids over its tokens; ``shapes`` are those of the batches that were timed."""
    spans = zip(shapes, clock.seconds(), strict=True)
    return typical([(shape, seconds * 1e3 / math.prod(shape)) for shape, seconds in spans])


def typical(timed: Sequence[tuple[Hashable, float]]) -> float:
    """The median of (shape, value) without the first of each shape, which warms up; of all where nothing else is."""
    seen: set[Hashable] = set()
    later = []
    for shape, value in timed:
        if shape in seen:
            later.append(value)
        seen.add(shape)
    return statistics.median(later or [value for _, value in timed])
