"""Calibration calls on disk, and the forward loop that replays them."""

import math

import pytest
import torch
from torch import nn

from quantlab.errors import ConfigError
from quantlab.modules.feed import CalibrationFeed, StoredCalls, feed_of_batches

# -- calls on disk


def test_stored_calls_come_back_as_they_were_and_share_tensors(tmp_path):
    shared = torch.randn(3, 4, dtype=torch.bfloat16)
    calls = StoredCalls(tmp_path / "calls")
    given = [
        {
            "args": (torch.arange(3) + i, shared),
            "kwargs": {"deep": [{"x": shared}], "flag": True, "none": None},
            "dtype": "bfloat16",
            "step": i,
            "output": shared,
        }
        for i in range(3)
    ]
    for call in given:
        calls.write(call)
    assert len(list((tmp_path / "calls").glob("tensor-*"))) == 4, "three different tensors, and one that all share"
    again = StoredCalls(tmp_path / "calls")
    assert len(again) == 3
    for call, wanted in zip(again, given, strict=True):
        assert torch.equal(call["args"][0], wanted["args"][0])
        assert torch.equal(call["kwargs"]["deep"][0]["x"], shared)
        assert (call["kwargs"]["flag"], call["kwargs"]["none"], call["step"]) == (True, None, wanted["step"])
        assert "output" not in call
    assert again.sha256() == calls.sha256()
    calls.write(given[0])
    assert calls.sha256() != again.sha256()


def test_only_one_call_is_in_memory_at_a_time(tmp_path):
    calls = StoredCalls(tmp_path)
    for i in range(20):
        calls.write({"args": [torch.full((10,), float(i))], "kwargs": {}, "dtype": "float32", "step": 0})
    for _ in calls:
        assert len(calls._kept) == 1


# -- the feed


def test_a_feed_replays_every_call_as_often_as_it_is_asked():
    seen = []
    net = nn.Sequential(nn.Linear(4, 4))
    net.register_forward_hook(lambda _, args, out: seen.append(args[0].shape[0]))
    ticks = []
    feed = feed_of_batches([torch.randn(3, 4), torch.randn(2, 4)])
    feed = CalibrationFeed(**{**vars(feed), "on_call": lambda i, n: ticks.append((i, n))})
    feed(net)
    feed(net)
    assert seen == [3, 2, 3, 2]
    assert ticks == [(1, 2), (2, 2)] * 2
    assert (feed.num_samples, feed.batch_size) == (5, 3)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], r"^calibration: at least one batch is wanted"),
        (torch.ones(2, 2), r"^calibration: at least one batch is wanted"),
        ([{"a": 1}], r"^calibration: batch 0 holds no tensor"),
        ([torch.ones(2), torch.tensor([math.nan])], r"^calibration: batch 1 holds NaN or infinity"),
    ],
)
def test_bad_batches_are_refused(batches, message):
    with pytest.raises(ConfigError, match=message):
        feed_of_batches(batches)
