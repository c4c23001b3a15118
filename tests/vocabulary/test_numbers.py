"""What a number's name means."""

from __future__ import annotations

import pytest

from quantlab.vocabulary.ledger import ledger
from quantlab.vocabulary.numbers import flat_metrics
from quantlab.vocabulary.reports import MemoryReport, RunReport, StageReport

WEIGHTS = MemoryReport(
    weights_bytes=400, quantized_bytes=300, scale_bytes=50, other_bytes=50, bytes_at_16_bit=1600, num_parameters=800
)


def row(*stages, memory=True):
    return RunReport(name="x", status="FINISHED", memory={"model": WEIGHTS} if memory else {}, stages=stages)


def test_what_a_scheme_needs_leaves_out_what_was_there_before():
    """900 bytes (the reference, encoders and the candidate's own 400) were there; the evaluation took 250 more."""
    load = StageReport(name="load", seconds=1.0, baseline_alloc_bytes=0, peak_alloc_bytes=5000)
    run = StageReport(name="evaluate", seconds=1.0, baseline_alloc_bytes=900, peak_alloc_bytes=1150)
    found = flat_metrics(row(load, run))
    assert found["memory/needed_bytes"] == 400 + 250
    assert found["memory/evaluate/peak_alloc_bytes"] == 1150
    assert found["memory/evaluate/baseline_alloc_bytes"] == 900


def test_each_of_several_devices_has_its_peak_and_all_of_them_count():
    run = StageReport(
        name="evaluate",
        seconds=1.0,
        baseline_alloc_bytes=900,
        peak_alloc_bytes=1150,
        by_device=((900, 1150), (100, 700)),
    )
    found = flat_metrics(row(run))
    assert found["memory/needed_bytes"] == 400 + 250 + 600
    assert found["memory/device_0/evaluate/peak_alloc_bytes"] == found["memory/evaluate/peak_alloc_bytes"] == 1150
    assert found["memory/device_1/evaluate/peak_alloc_bytes"] == 700
    told = {r["what"]: r["measured_bytes"] for r in ledger(row(run))}
    assert told["evaluate: peak_alloc_bytes of device 1"] == 700


@pytest.mark.parametrize(
    "stages",
    [
        (),
        (StageReport(name="evaluate", seconds=1.0, baseline_rss_bytes=900, peak_rss_bytes=1150),),
        (StageReport(name="evaluate", seconds=1.0, baseline_alloc_bytes=900),),
        (StageReport(name="load", seconds=1.0, baseline_alloc_bytes=900, peak_alloc_bytes=950),),
    ],
)
def test_it_is_absent_where_it_cannot_be_known(stages):
    assert "memory/needed_bytes" not in flat_metrics(row(*stages))
    assert "memory/needed_bytes" not in flat_metrics(row(memory=False))
