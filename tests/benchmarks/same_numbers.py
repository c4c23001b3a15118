"""Are two result files (``quantlab ... --json > FILE``) the same, bit for bit? For changes that may change no number.

    python tests/benchmarks/same_numbers.py BEFORE.json AFTER.json

Quality, memory and quantization figures of every row are compared; times, peaks and what a stage began with are not,
which differ from run to run.
Both files are made on one machine, with as many threads. Exit code 1 where a figure differs or is missing on one side.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

CHANGING = re.compile(r"perf/|memory/\w+/(peak|baseline)_")


def figures(file: str) -> dict[str, dict[str, float]]:
    """Row -> its figures that do not depend on the moment."""
    rows = json.loads(Path(file).read_text(encoding="utf-8"))
    return {r["name"]: {k: v for k, v in r["metrics"].items() if not CHANGING.match(k)} for r in rows}


def main(before: str, after: str) -> int:
    """Print what differs; the number of differences, at most 1."""
    was, now = figures(before), figures(after)
    found = [f"only in one: {name}" for name in sorted(set(was) ^ set(now))]
    for name in sorted(set(was) & set(now)):
        keys = sorted(k for k in {*was[name], *now[name]} if was[name].get(k) != now[name].get(k))
        found += [f"{name}: {k}: {was[name].get(k)} / {now[name].get(k)}" for k in keys]
    num = sum(map(len, was.values()))
    print("\n".join(found) or f"{len(was)} rows, {num} figures: identical")
    return min(len(found), 1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
