"""How many bytes of tensors a piece of code holds at once, counted at torch's own allocator: the same at every run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch


class Allocated:
    """What torch's CPU allocator gives out while open: every allocation of this thread, those inside kernels too.

    Not seen: memory that the allocator did not give (pages of mapped files, numpy's, a library's own), what other
    threads allocate, and what a heap holds without use.

    ``peak_bytes``: the most that was held at once above what was held when it was opened; ``end_bytes``: what was
    held when it was closed, less than 0 where more was freed than made.
    """

    peak_bytes: int
    end_bytes: int

    def __enter__(self) -> Allocated:
        self._opened = contextlib.ExitStack()
        self._opened.enter_context(_without_inner_profilers())
        self._profile = self._opened.enter_context(
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()
        changes = sorted(_changes(self._profile.profiler.kineto_results.experimental_event_tree()))
        files: set[int] = set()  # the allocator's sum does not know them
        sums = [0]
        for _time, held, num_bytes, address in changes:
            if not held and (num_bytes > 0 or address in files):
                files ^= {address}
            else:
                sums = [held - num_bytes, held] if len(sums) == 1 else [*sums, held]
        self.peak_bytes, self.end_bytes = max(sums) - sums[0], sums[-1] - sums[0]


def _changes(events: Any) -> Iterator[tuple[int, int, int, int]]:
    """When [ns]; bytes that the allocator has given out then, 0 where a file was mapped or let go; by how much they
    changed; and where."""
    for event in events:
        told = event.extra_fields
        if hasattr(told, "total_allocated"):
            yield event.start_time_ns, told.total_allocated, told.alloc_size, told.ptr
        yield from _changes(event.children)


@contextlib.contextmanager
def _without_inner_profilers() -> Iterator[None]:
    """Read-back asks a profiler for the kernels of one product; beside it the outer one would not hear of memory."""
    from torch.autograd import profiler_legacy

    @contextlib.contextmanager
    def nothing() -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(function_events=[])

    own = profiler_legacy.profile
    profiler_legacy.profile = nothing  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        profiler_legacy.profile = own  # type: ignore[misc]
