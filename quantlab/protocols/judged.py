"""What a model family's own classifier makes of the candidate's images."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import TYPE_CHECKING

from quantlab.metrics.classes import class_accuracy, judge_agreement
from quantlab.metrics.frechet import frechet_distance
from quantlab.metrics.statistics import bootstrap_interval
from quantlab.models.judge import judge_features_and_logits
from quantlab.protocols.defined import defined
from quantlab.protocols.diffusion_inputs import DiffusionInputs
from quantlab.vocabulary.reports import MetricValue
from quantlab.vocabulary.schema import EvaluationConfig

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

NUM_BOOTSTRAP = 250
"""Draws for the Frechet distance, each a decomposition of its own; fewer where evaluation.num_bootstrap is smaller."""


def judge_metrics(
    judge: nn.Module,
    candidate: NDArray[np.uint8],
    reference: NDArray[np.uint8],
    inputs: DiffusionInputs,
    evaluation: EvaluationConfig,
    undefined: MutableMapping[str, str],
) -> tuple[dict[str, NDArray[np.float64]], dict[str, MetricValue]]:
    """``class_accuracy`` and ``judge_agreement`` (n,), ``frechet_judge`` with its interval; the ``undefined`` apart.

    ``candidate`` and ``reference`` are 8-bit images (n, height, width, channels). The Frechet distance is between the
    two sets of the same n samples; its bootstrap draws pairs, and is centred on the value since repetitions inflate it.
    """
    features, logits = judge_features_and_logits(judge, candidate.astype("float32") / 255)
    reference_features, reference_logits = judge_features_and_logits(judge, reference.astype("float32") / 255)
    shares = {
        "class_accuracy": lambda: class_accuracy(logits, inputs.conditioning["class_label"]),
        "judge_agreement": lambda: judge_agreement(logits, reference_logits),
    }

    def distance() -> MetricValue:
        return bootstrap_interval(
            lambda rows: frechet_distance(features[rows], reference_features[rows]),
            inputs.num_samples,
            inputs.clusters,
            inputs.strata,
            min(NUM_BOOTSTRAP, evaluation.num_bootstrap),
            evaluation.bootstrap_seed,
            recenter=True,
        )

    return defined(shares, undefined), defined({"frechet_judge": distance}, undefined)
