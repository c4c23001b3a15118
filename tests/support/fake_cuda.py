"""A GPU that is not there: what ``torch.cuda`` answers to those who measure, without a device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch


@dataclass
class FakeCuda:
    """Counts calls; once ``lost`` is set each call that waits raises it, as after an assert in a kernel."""

    allocated: int = 0
    peak: int = 0
    lost: Exception | None = None
    calls: list[tuple[str, str]] = field(default_factory=list)
    """(function, device) in order."""

    def _called(self, name: str, device: Any = "") -> None:
        self.calls.append((name, str(device)))
        if self.lost is not None and name in ("synchronize", "empty_cache"):
            raise self.lost

    def begin(self, device: Any = "") -> None:
        self._called("reset_peak_memory_stats", device)
        self.peak = self.allocated

    def allocate(self, num_bytes: int) -> None:
        """Negative: free."""
        self.allocated += num_bytes
        self.peak = max(self.peak, self.allocated)


def fake_cuda(monkeypatch: pytest.MonkeyPatch, num_devices: int = 1) -> FakeCuda:
    """``torch.cuda`` as it answers with ``num_devices`` GPUs."""
    fake = FakeCuda()
    answers: dict[str, Any] = {
        "is_available": lambda: num_devices > 0,
        "device_count": lambda: num_devices,
        "synchronize": lambda device="": fake._called("synchronize", device),
        "empty_cache": lambda: fake._called("empty_cache"),
        "reset_peak_memory_stats": fake.begin,
        "memory_allocated": lambda device="": fake.allocated,
        "max_memory_allocated": lambda device="": fake.peak,
        "memory_stats": lambda device="": {"requested_bytes.all.peak": fake.peak},
        "max_memory_reserved": lambda device="": fake.peak,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    return fake
