"""A 95% interval of a mean that holds for few and for skewed values.

It is put together from two intervals: Student's t, which is right for normal values, and the generalised interval of a
log-normal mean (Krishnamoorthy and Mathew, J. Stat. Plan. Inference 115, 2003, 103-121) of the values shifted, and
turned where they are skewed to the left, so that their logarithms have no skewness left. Without skewness the shift is
far away and the second interval is the first; the more skewed the values are, the longer its far tail. Both are needed,
since the skewness of few values is itself uncertain: towards the far tail the farther bound counts, towards the near
one a bound between the two.

Where many values lie at their end (identical images, exact zeros) no shift makes them log-normal: the nearest tears
their logarithms into two heaps. Student's interval is that of two heaps, and of others the shift stays as far away as
the log-normal's mean agrees with the values' own.

Why no bootstrap: of few skewed values the percentile bootstrap, and also the studentized one, hold the truth far less
often than they say. What this interval holds is simulated in the README of this folder.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TAILS = (0.025, 0.975)
FARTHEST = 4.0
"""Decimal logarithm of the farthest shift in ranges of the values: there the logarithms are as good as linear."""
NEAREST = 4.0
"""The nearest shift is this / n^2 ranges from the outermost value: few values cannot show that they end just there."""
BISECTIONS = 30
_LARGEST_LOG = 700.0
MAX_APART = 1.0
"""Standard errors that the mean of the log-normal may be away from that of the values. Log-normal values keep to it, so
that what holds for them does not change; without it intervals of values with a heap at their end left it out."""
TWO_HEAPS = 0.97
"""Sarle's coefficient of bimodality, (skewness^2 + 1) / kurtosis, of logarithms in two heaps: 1 of two numbers, 5/9 of
evenly spread ones, 1/3 of normal ones."""
NEAR_SHARE = 0.25
"""How far the near bound goes from Student's to the log-normal's: by simulation, so that neither values that only
happen to lean to one side (heavy tails) nor those that do (exponential) are held too rarely or too often."""


def t_bounds(mean: float, se: float, degrees: int) -> tuple[float, float]:
    """Student's 95% interval of a mean by its standard error with ``degrees`` of freedom."""
    from scipy.special import stdtrit

    half = float(stdtrit(degrees, TAILS[1])) * se
    return mean - half, mean + half


def skewed_bounds(values: NDArray[np.float64], degrees: int, num_draws: int, seed: int) -> tuple[float, float]:
    """The 95% interval of the mean of ``values`` (n,), by the method of the module's docstring.

    ``degrees`` of freedom are those that the values' spread rests on, n - 1 or fewer; ``num_draws`` are drawn of the
    generalised pivot. Values that are all the same have no interval beyond themselves.
    """
    import numpy as np

    n, mean = values.size, float(values.mean())
    spread = float(values.std(ddof=1))
    low, high = t_bounds(mean, spread / n**0.5, degrees)
    if not spread > 1e-12 * abs(mean):
        return low, high
    turn = 1.0 if _skewness(values) >= 0 else -1.0
    unit = (values - mean) * turn / spread
    shift = _shift(unit)
    logs = np.log(unit - shift)
    z, chi = _pivot(n, degrees, num_draws, seed)
    log_sd = float(logs.std(ddof=1))
    drawn = logs.mean() - log_sd * z / (chi * n**0.5) + 0.5 * (log_sd / chi) ** 2
    near, far = (mean + turn * spread * (float(np.exp(q)) + shift) for q in np.quantile(drawn, TAILS))
    own = (low if turn > 0 else high) * (1 - NEAR_SHARE) + near * NEAR_SHARE
    return (own, max(high, far)) if turn > 0 else (min(low, far), own)


def _skewness(values: NDArray[np.float64]) -> float:
    import numpy as np

    deviations = values - values.mean()
    scale = float(np.mean(deviations**2)) ** 1.5
    return float(np.mean(deviations**3)) / scale if scale > 0 else 0.0  # 0 where deviations below 1e-107 underflow


def _shift(values: NDArray[np.float64]) -> float:
    """The shift below all ``values`` (mean 0, standard deviation 1, skewed to the right) that leaves their logarithms
    without skewness, or the nearest farther one at which the log-normal's mean is theirs."""
    import math

    import numpy as np

    smallest = float(values.min())
    extent = float(values.max()) - smallest

    def at(place: float) -> float:
        return smallest - extent * float(10**place)

    def logs(place: float) -> NDArray[np.float64]:
        return np.log(values - at(place))

    def is_apart(place: float) -> bool:
        log_mean = float(logs(place).mean() + 0.5 * logs(place).var(ddof=1))
        mean = math.inf if log_mean > _LARGEST_LOG else math.exp(log_mean) + at(place)
        return abs(mean) > MAX_APART / values.size**0.5

    nearest = max(math.log10(NEAREST / values.size**2), -8.0)
    place = _first(lambda tried: _skewness(logs(tried)) < 0, nearest, FARTHEST)
    if _bimodality(logs(place)) > TWO_HEAPS:
        return at(FARTHEST)
    return at(_first(is_apart, place, FARTHEST) if is_apart(place) else place)


def _bimodality(values: NDArray[np.float64]) -> float:
    import numpy as np

    deviations = (values - values.mean()) / values.std()
    return float((np.mean(deviations**3) ** 2 + 1) / np.mean(deviations**4))


def _first(is_too_near: Callable[[float], bool], near: float, far: float) -> float:
    """By bisection: the nearest place that is not too near."""
    for _ in range(BISECTIONS):
        middle = (near + far) / 2
        if is_too_near(middle):
            near = middle
        else:
            far = middle
    return far


@functools.lru_cache(maxsize=4)
def _pivot(n: int, degrees: int, num_draws: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Draws of a standard normal, and of a standard deviation over its true value; shared by all of one layout."""
    import numpy as np

    generator = np.random.default_rng(seed)
    z = generator.standard_normal(num_draws)
    chi = np.sqrt(generator.chisquare(degrees, num_draws) / degrees)
    z.flags.writeable = chi.flags.writeable = False
    return z, chi
