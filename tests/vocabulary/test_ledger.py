"""Bytes add up: what is planned, what is there, and what is left over, by name."""

from quantlab.vocabulary.ledger import ledger, remainders, warning
from quantlab.vocabulary.reports import MemoryReport, RunReport, StageReport


def memory(codes, scales, other):
    return MemoryReport(
        weights_bytes=codes + scales + other,
        quantized_bytes=codes,
        scale_bytes=scales,
        other_bytes=other,
        bytes_at_16_bit=1000,
        num_parameters=500,
    )


def report(measured, planned):
    return RunReport(
        name="scheme",
        status="FINISHED",
        memory={"transformer": measured},
        planned={"transformer": planned},
        disk_bytes=900,
        stages=(StageReport(name="evaluate", seconds=1.0, peak_rss_bytes=5000),),
    )


def test_a_plan_that_holds_leaves_nothing():
    rows = ledger(report(memory(500, 50, 100), memory(500, 50, 100)))
    assert rows[-1] == {
        "component": "",
        "what": "unexplained remainder",
        "planned_bytes": 650,
        "measured_bytes": 650,
        "unexplained_bytes": 0,
        "unexplained_percent": 0.0,
    }
    told = {(r["component"], r["what"]): r["measured_bytes"] for r in rows}
    assert told["", "on disk"] == 900
    assert told["", "evaluate: peak_rss_bytes"] == 5000
    assert told["transformer", "scale"] == 50
    assert not warning(report(memory(500, 50, 100), memory(500, 50, 100)))


def test_the_largest_unexplained_part_is_named():
    found = report(memory(500, 90, 101), memory(500, 50, 100))
    assert remainders(found) == {"transformer": 41}
    assert warning(found) == (
        "scheme: +41 bytes of weights (+6.3%) are not in the plan; the largest part are the scale bytes of transformer "
        "(+40)"
    )
    assert not warning(report(memory(500, 51, 110), memory(500, 50, 100)))
    assert not warning(RunReport(name="a", status="FINISHED", memory={"transformer": memory(1, 1, 1)}))
