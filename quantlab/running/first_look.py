"""A first look: how much a request runs, and the words with which it runs less; time goes about with it."""

from __future__ import annotations

from quantlab.datasets.table import DATASETS
from quantlab.errors import ConfigError
from quantlab.metrics.statistics import MIN_CLUSTERS
from quantlab.models.table import family_of
from quantlab.vocabulary.schema import ExperimentConfig

_SAMPLES, _STEPS = MIN_CLUSTERS + 3, 5
"""Enough for intervals, with a few that may be there twice."""


def amount(config: ExperimentConfig) -> str:
    """What each job runs: ``32 samples of 28 steps``."""
    evaluation = config.evaluation
    steps = f" of {evaluation.num_inference_steps} steps" if _has_steps(config) else ""
    return f"{evaluation.num_samples} samples{steps}"


def first_look(config: ExperimentConfig) -> list[str]:
    """The words that make a request quick; [] where it is already.

    One batch, so that the floor's batch is still another; batches stay as they are, for what they hold may be all that
    a device has room for.
    """
    evaluation = config.evaluation
    least = max(evaluation.batch_size, evaluation.floor_batch_size, _SAMPLES)
    few = next((num for num in range(least, evaluation.num_samples) if _is_taken(config, num)), None)
    words = [f"evaluation.num_samples={few}"] if few is not None else []
    if _has_steps(config) and evaluation.num_inference_steps > _STEPS:
        words.append(f"evaluation.num_inference_steps={_STEPS}")
    return words


def _is_taken(config: ExperimentConfig, num_samples: int) -> bool:
    """Whether the data set has so many: one of classes has a share of each."""
    check = DATASETS[config.dataset.name].check_samples
    if check is None:
        return True
    try:
        check(num_samples)
    except ConfigError:
        return False
    return True


def _has_steps(config: ExperimentConfig) -> bool:
    return family_of(config.model).protocol == "diffusion"
