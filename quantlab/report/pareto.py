"""The Pareto front: of many schemes, those that no other one beats in everything that was asked for."""

from __future__ import annotations

from collections.abc import Sequence


def pareto_front(points: Sequence[Sequence[float] | None], higher_is_better: Sequence[bool]) -> list[int]:
    """Indices of the points that no other one beats: as good in every objective and better in one.

    ``higher_is_better`` has one entry an objective. Equal points do not beat each other; None (a scheme that failed)
    is on no front.
    """
    costs = [
        (tuple(-x if up else x for x, up in zip(point, higher_is_better, strict=True)), i)
        for i, point in enumerate(points)
        if point is not None
    ]
    front: list[tuple[tuple[float, ...], int]] = []
    for cost, i in sorted(costs):  # whoever beats a point comes before it, and is beaten only by what is on the front
        if not any(other != cost and all(a <= b for a, b in zip(other, cost, strict=True)) for other, _ in front):
            front.append((cost, i))
    return sorted(i for _, i in front)
