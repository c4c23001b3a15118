"""Times of steps and batches; the events of a GPU are faked."""

from __future__ import annotations

import time

import pytest
import torch

from quantlab.modules.timing import Clock, ms_per_token, typical


class FakeEvent:
    """Its time is what the fake GPU's clock says when it was recorded."""

    now_ms = 0.0
    waited = 0

    def __init__(self, enable_timing=False):
        assert enable_timing
        self.at = None

    def record(self, stream):
        assert stream == "stream of cuda:1"
        self.at = FakeEvent.now_ms

    def synchronize(self):
        FakeEvent.waited += 1

    def elapsed_time(self, other):
        return other.at - self.at


@pytest.fixture
def events(monkeypatch):
    FakeEvent.now_ms, FakeEvent.waited = 0.0, 0
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("waits for the device"))
    return FakeEvent


def test_a_gpus_steps_are_timed_by_its_own_clock(events):
    """What the host does between the spans is in none, and nothing waits but the end."""
    clock = Clock("cuda:1")
    for span_ms in (5.0, 2.0, 3.0):
        clock.start()
        events.now_ms += span_ms
        clock.stop()
        events.now_ms += 100.0
        assert events.waited == 0
    assert clock.seconds() == pytest.approx([0.005, 0.002, 0.003])
    assert events.waited == 1
    assert Clock("cuda:1").seconds() == []


def test_on_a_cpu_it_is_the_clock_on_the_wall(events):
    clock = Clock("cpu")
    clock.start()
    time.sleep(0.02)
    clock.stop()
    time.sleep(0.02)
    (seconds,) = clock.seconds()
    assert 0.02 <= seconds < 0.04


@pytest.mark.parametrize(
    ("timed", "expected"),
    [
        ([("a", 9.0), ("a", 1.0), ("a", 2.0), ("a", 3.0)], 2.0),
        ([("a", 9.0), ("a", 1.0), ("a", 2.0), ("b", 70.0)], 1.5),  # the last, smaller batch is a shape of its own
        ([("b", 70.0), ("a", 9.0), ("a", 1.0)], 1.0),
        ([("a", 9.0), ("b", 7.0)], 8.0),  # nothing but firsts
        ([("a", 9.0)], 9.0),
    ],
)
def test_the_first_of_each_shape_is_not_counted(timed, expected):
    assert typical(timed) == expected


def test_a_batchs_time_is_divided_by_its_tokens(events):
    clock = Clock("cuda:1")
    for span_ms in (500.0, 8.0, 400.0):
        clock.start()
        events.now_ms += span_ms
        clock.stop()
    assert ms_per_token([(2, 4), (2, 4), (1, 4)], clock) == pytest.approx(1.0)
