"""Are the intervals and verdicts right? Simulated against known answers: ``python tests/metrics/simulate.py [NUM [TABLE...]]``.

Writes the tables of ``quantlab/metrics/README.md``; the slow tier runs a smaller simulation of the same.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantlab.metrics.output_error import whole_intervals
from quantlab.metrics.significance import t_test
from quantlab.metrics.statistics import degrees_of_freedom, mean_interval
from quantlab.report.verdicts import BETTER, IN_FLOOR, WORSE, Floor, Verdict, less, verdict

Draw = Callable[[np.random.Generator, int], NDArray[np.float64]]
README = Path(__file__).parents[2] / "quantlab" / "metrics" / "README.md"
LAYOUTS: dict[str, tuple[int, int]] = {"5": (1, 5), "10": (1, 10), "20": (1, 20), "10 x 2": (10, 2), "60": (1, 60)}
"""What is said of it -> strata, clusters in each."""
VALUES: dict[str, tuple[Draw, float]] = {
    "normal": (lambda rng, n: rng.normal(5, 1, n), 5.0),
    "log-normal 0.5": (lambda rng, n: rng.lognormal(0, 0.5, n), float(np.exp(0.125))),
    "log-normal 1": (lambda rng, n: rng.lognormal(0, 1, n), float(np.exp(0.5))),
    "exponential": (lambda rng, n: rng.exponential(1, n), 1.0),
    "heavy tail": (lambda rng, n: rng.standard_t(3, n), 0.0),
    "60 % zeros": (
        lambda rng, n: np.where(rng.random(n) < 0.6, 0.0, rng.lognormal(0, 0.3, n)),
        0.4 * float(np.exp(0.045)),
    ),
}
"""Values and their true mean."""
NUM_DRAWS = 1000
ONE_NUMBER: dict[str, tuple[Draw, Callable[[NDArray[np.float64]], NDArray[np.float64]], Draw]] = {
    "normal": (lambda rng, n: rng.normal(0.5, 1, n), np.ones_like, lambda rng, n: rng.normal(0, 1, n)),
    "larger ones err more": (
        lambda rng, n: rng.normal(0.5, 1, n),
        lambda ref: 1 + abs(ref),
        lambda rng, n: rng.normal(0, 1, n),
    ),
    "few far larger, err more": (
        lambda rng, n: rng.lognormal(0, 1, n) * rng.choice([-1, 1], n),
        lambda ref: 1 + abs(ref),
        lambda rng, n: rng.normal(0, 1, n),
    ),
    "few far larger": (
        lambda rng, n: rng.lognormal(0, 1, n) * rng.choice([-1, 1], n),
        np.ones_like,
        lambda rng, n: rng.normal(0, 1, n),
    ),
    "few errors far larger": (
        lambda rng, n: rng.normal(0.5, 1, n),
        np.ones_like,
        lambda rng, n: rng.standard_t(3, n),
    ),
}
"""Outputs of one number a row -> what the reference answers, the spread of the error at each answer, and the error."""
SIZES = (5, 10, 20, 60)


def strata_of(layout: tuple[int, int]) -> NDArray[np.int64]:
    """The stratum of each sample."""
    return np.repeat(np.arange(layout[0]), layout[1])


def coverage(name: str, layout: tuple[int, int], num: int) -> float:
    """Share of ``num`` simulated evaluations whose interval holds the true mean."""
    draw, truth = VALUES[name]
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(num):
        found = mean_interval(draw(rng, layout[0] * layout[1]), None, strata_of(layout), NUM_DRAWS)
        assert found.ci_lo is not None
        assert found.ci_hi is not None
        held += found.ci_lo <= truth <= found.ci_hi
    return held / num


def whole_coverage(name: str, size: int, num: int) -> dict[str, float]:
    """Share of ``num`` simulated evaluations of ``size`` rows whose interval holds the truth, of each metric."""
    draw, spread, noise = ONE_NUMBER[name]
    rng = np.random.default_rng(4)

    def answers(n: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        reference = draw(rng, n)
        return reference + 0.1 * spread(reference) * noise(rng, n), reference

    cand, ref = answers(2_000_000)
    truth = {
        "output_cosine": float(cand @ ref / np.sqrt((cand @ cand) * (ref @ ref))),
        "output_rel_error": float(np.sqrt(((cand - ref) ** 2).sum() / (ref @ ref))),
    }
    held = dict.fromkeys(truth, 0)
    for _ in range(num):
        for metric, found in whole_intervals(*answers(size), None).items():
            assert found.ci_lo is not None
            assert found.ci_hi is not None
            held[metric] += found.ci_lo <= truth[metric] <= found.ci_hi
    return {metric: count / num for metric, count in held.items()}


def whole_table(num: int) -> str:
    """How often the intervals of outputs of one number hold the truth: of the cosine, and of the relative error."""
    heads = [f"{metric}: {name}" for metric in ("cosine", "error") for name in ONE_NUMBER]
    lines = [f"| rows | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for size in SIZES:
        found = [whole_coverage(name, size, num) for name in ONE_NUMBER]
        shares = [row[metric] for metric in ("output_cosine", "output_rel_error") for row in found]
        lines.append(f"| {size} | {' | '.join(f'{100 * s:.1f}' for s in shares)} |")
    return "\n".join(lines)


def judged(values: NDArray[np.float64], floor: NDArray[np.float64] | None, layout: tuple[int, int]) -> str:
    """The verdict on a candidate's errors against the reference, alone in its family."""
    strata = strata_of(layout)
    found = mean_interval(values, None, strata, NUM_DRAWS)
    p = t_test(found, degrees_of_freedom(values.size, None, strata))
    known = None
    if floor is not None:
        cost = mean_interval(floor, None, strata, NUM_DRAWS)
        known = Floor(name="floor_bf16", value=cost.value, cost=cost)
    return verdict(Verdict(a="a", b="b", difference=less(found, 0.0), test="t", p_holm=p), "latent_rel_mse", known, 0.0)


def false_difference(name: str, layout: tuple[int, int], num: int) -> float:
    """Share of *better* and *worse* where the true difference is 0."""
    draw, truth = VALUES[name]
    rng = np.random.default_rng(2)
    n = layout[0] * layout[1]
    return sum(judged(draw(rng, n) - truth, None, layout) in (BETTER, WORSE) for _ in range(num)) / num


def floor_verdicts(name: str, layout: tuple[int, int], num: int, times: float) -> dict[str, float]:
    """Share of each verdict on errors whose true mean is ``times`` the floor's, on the same samples."""
    draw, truth = VALUES[name]
    rng = np.random.default_rng(3)
    n = layout[0] * layout[1]
    found: dict[str, int] = {}
    for _ in range(num):
        shared = rng.lognormal(0, 0.3, n)
        errors, floor = (shared * np.abs(draw(rng, n)) / truth for _ in range(2))
        said = judged(times * errors, floor, layout)
        found[said] = found.get(said, 0) + 1
    return {text: count / num for text, count in found.items()}


def coverage_table(num: int) -> str:
    """How often the interval holds the truth."""
    lines = [f"| clusters | {' | '.join(VALUES)} |", "|---|" + "---:|" * len(VALUES)]
    for label, layout in LAYOUTS.items():
        lines.append(f"| {label} | {' | '.join(f'{100 * coverage(n, layout, num):.1f}' for n in VALUES)} |")
    return "\n".join(lines)


def verdict_table(num: int) -> str:
    """How often the verdicts are wrong, and how often they are found."""
    null = ("normal", "log-normal 1", "heavy tail")
    head = [f"false: {n}" for n in null]
    head += ["false: inside the floor", "false: worse", "inside at half", "worse at twice"]
    lines = [f"| clusters | {' | '.join(head)} |", "|---|" + "---:|" * len(head)]
    for label, layout in LAYOUTS.items():
        shares = [false_difference(n, layout, num) for n in null]
        at = {times: floor_verdicts("log-normal 0.5", layout, num, times) for times in (0.5, 1.0, 2.0)}
        shares += [at[1.0].get(IN_FLOOR, 0), at[1.0].get(WORSE, 0), at[0.5].get(IN_FLOOR, 0), at[2.0].get(WORSE, 0)]
        lines.append(f"| {label} | {' | '.join(f'{100 * s:.1f}' for s in shares)} |")
    return "\n".join(lines)


def main() -> None:
    num = int(sys.argv[1]) if len(sys.argv) > 1 else 4000
    text = README.read_text(encoding="utf-8")
    made = {"coverage": coverage_table, "one number": whole_table, "verdicts": verdict_table}
    for name in sys.argv[2:] or made:
        table = made[name](num)
        said = f"<!-- simulated: {name} -->\n{table}\n\n{num} simulations a cell.\n<!-- end -->"
        text = re.sub(rf"<!-- simulated: {name} -->.*?<!-- end -->", lambda _, said=said: said, text, flags=re.DOTALL)
        print(table, "\n")
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
