"""Time of ``quantlab plan``: forty combinations of FLUX.1 in one process, and what a process's start adds to one.

    python tests/benchmarks/bench_plan.py [--combinations 40]

A model is built once on the meta device and priced as often as there are combinations; 20 s on two cores is to be kept.
``start`` is the time of a fresh ``quantlab plan`` over that of one combination in a process that has imported and built
nothing of the model yet. Seconds by the clock, and of the processor, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).parent.parent.parent
MODEL = "model=flux_dev"
ONE = [MODEL, "backend=bitsandbytes", "dtype=nf4"]
MAX_SECONDS = 20.0
T = TypeVar("T")


def schemes(num: int) -> list[dict[str, str]]:
    """Schemes of all backends in turn: their dtypes, then group sizes of those that take several."""
    from quantlab.backends.table import offers

    found = []
    for name, offer in offers().items():
        for dtype, row in offer.rows.items():
            if name == "none":
                continue
            sizes = [str(s) for s in row.group_sizes if s not in ("none", None)][:3] if len(row.group_sizes) > 1 else []
            found += [{"backend": name, "dtype": dtype, **({"group_size": s} if s else {})} for s in ("", *sizes)]
    found.sort(key=lambda scheme: "group_size" in scheme)
    return found[:num]


def timed(function: Callable[[], T]) -> tuple[T, float, float]:
    """(what it returns, seconds by the clock, seconds of the processor)."""
    began, busy = time.perf_counter(), time.process_time()
    found = function()
    return found, time.perf_counter() - began, time.process_time() - busy


def started() -> tuple[float, float]:
    """Seconds of a fresh process: by the clock, and of the processor."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "quantlab", "plan", *ONE, "--json"], cwd=ROOT, check=True, capture_output=True
    )
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--combinations", type=int, default=40)
    args = parser.parse_args()
    cold = started()

    from quantlab.planning.plan import plan
    from quantlab.running.forecast import forecast

    candidates = schemes(args.combinations)
    words = ", ".join("{" + ", ".join(f"{k}: {v}" for k, v in scheme.items()) + "}" for scheme in candidates)
    forecast(plan(["model=smollm2_135m", "backend=bitsandbytes", "dtype=nf4"]))  # the libraries are imported
    _, *one = timed(lambda: forecast(plan(ONE)))
    prices, *many = timed(lambda: forecast(plan([MODEL, "sweep.on_invalid=skip", f"sweep.candidates=[{words}]"])))
    priced = [p for p in prices if p.components]
    print(f"{'':<28}{'clock [s]':>10}{'cpu [s]':>10}")
    print(f"{'a fresh process, one':<28}{cold[0]:>10.2f}{cold[1]:>10.2f}")
    print(f"{'in a process, one':<28}{one[0]:>10.2f}{one[1]:>10.2f}")
    print(f"{f'in a process, {len(candidates)}':<28}{many[0]:>10.2f}{many[1]:>10.2f}   {len(priced)} priced")
    print(f"start: {cold[0] / one[0]:.1f} (cpu {cold[1] / one[1]:.1f})")
    return 0 if many[0] <= MAX_SECONDS else 1


if __name__ == "__main__":
    sys.exit(main())
