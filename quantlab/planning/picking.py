"""``export.pick``: which of a sweep's schemes is exported, as conditions on its numbers. Data, never code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from quantlab.errors import ConfigError, nearest
from quantlab.metrics import METRICS
from quantlab.vocabulary.schema import ExportConfig

_CONDITION = re.compile(r"\s*([\w/]{1,80})\s*(>=|<=|>|<)\s*([-+.\deE]{1,30})\s*", re.ASCII)
_MAX_CONDITIONS = 8
KEY = "export.pick"


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One condition on a number: ``psnr_db>=40``."""

    metric: str
    """By its logged name: ``quality/psnr_db``, ``memory/weights_bytes``."""
    comparison: str
    bound: float

    def holds(self, metrics: Mapping[str, float]) -> bool:
        """Whether a run's numbers meet it; False where it has no such number."""
        if self.metric not in metrics:
            return False
        value = metrics[self.metric]
        return {
            ">=": value >= self.bound,
            "<=": value <= self.bound,
            ">": value > self.bound,
            "<": value < self.bound,
        }[self.comparison]


def conditions(text: str) -> tuple[Condition, ...]:
    """What ``export.pick`` says: conditions with commas between them, all of which must hold.

    Raises ConfigError for anything else, and for a metric that there is not.
    """
    pieces = text.split(",")
    if len(pieces) > _MAX_CONDITIONS:
        raise ConfigError(f"{KEY}: {len(pieces)} conditions; {_MAX_CONDITIONS} are the most")
    found = []
    for piece in pieces:
        match = _CONDITION.fullmatch(piece)
        if match is None:
            raise ConfigError(
                f"{KEY}={piece.strip()[:80]}: a metric, a comparison (>= <= > <) and a number are wanted, as in "
                'export.pick="psnr_db>=40, latent_rel_mse<0.01"'
            )
        name, comparison, number = match.groups()
        if "/" not in name and name not in METRICS:
            raise ConfigError(f"{KEY}={name}: there is no such metric{nearest(name, METRICS)}; quantlab list metrics")
        try:
            bound = float(number)
        except ValueError as error:
            raise ConfigError(
                f"{KEY}={piece.strip()[:80]}: {number} is no number; write one, like 40 or 1e-3"
            ) from error
        metric = name if "/" in name else f"quality/{name}"
        found.append(Condition(metric=metric, comparison=comparison, bound=bound))
    return tuple(found)


def check_export(config: ExportConfig, is_sweep: bool) -> None:
    """ConfigError where the keys of the ``export`` node contradict each other or the request."""
    chooses = "winner=true" if config.winner else f"pick={config.pick}" if config.pick else ""
    if config.pick:
        conditions(config.pick)
    if config.winner and config.pick:
        raise ConfigError("export.winner=true: export.pick chooses too; keep one of the two")
    if chooses and config.path is None:
        raise ConfigError(f"export.{chooses}: it says which, and not where; give export.path=FOLDER")
    if chooses and not is_sweep:
        raise ConfigError(f"export.{chooses}: it chooses among the jobs of a sweep; one job is exported by export.path")
    if config.path is not None and is_sweep and not chooses:
        raise ConfigError(
            f"export.path={config.path}: a sweep has several jobs and one of them is exported; add export.winner=true, "
            'or export.pick="psnr_db>=40"'
        )
