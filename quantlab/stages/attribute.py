"""Attribute: which component costs what. Each quantized component alone, beside the others as they are, and paired by
sample with all of them together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from quantlab.errors import MetricUndefined
from quantlab.metrics import METRICS
from quantlab.metrics.statistics import paired_differences, within
from quantlab.models.loaded import LoadedModel
from quantlab.progress import say
from quantlab.stages.evaluate import summarize
from quantlab.vocabulary.reports import Attribution, Measurements, MetricValue
from quantlab.vocabulary.schema import EvaluationConfig


def attribute(
    reference: LoadedModel,
    candidate: LoadedModel,
    names: Sequence[str],
    together: Measurements,
    measure: Callable[[str, LoadedModel], Measurements],
    evaluation: EvaluationConfig,
    saved_bytes: Mapping[str, int],
) -> dict[str, Attribution]:
    """Component -> what it costs.

    Args:
        names: the quantized components of ``candidate``; the others are those of ``reference``.
        together: what was measured on the whole candidate.
        measure: (component, the model in which it alone is quantized) -> the same measurements of that; where it raises
            MetricUndefined the component has no numbers, which is told.
        saved_bytes: component -> bytes of it in the reference less those in the candidate.
    """
    found = {}
    for name in names:
        alone: Measurements | None = None
        try:
            alone = measure(name, reference.with_components({name: candidate.components[name]}))
        except MetricUndefined as error:
            say(f"{name} alone: {error}", "undefined")
        found[name] = Attribution(
            quality={} if alone is None else summarize(alone, evaluation),
            others={} if alone is None else _differences(together, alone, evaluation),
            samples={} if alone is None else alone.samples,
            saved_bytes=saved_bytes[name],
        )
    return found


def _differences(together: Measurements, alone: Measurements, evaluation: EvaluationConfig) -> dict[str, MetricValue]:
    """Metric -> its mean over all samples of the whole candidate less the component alone, of the same samples."""
    both = [name for name, values in together.samples.items() if len(alone.samples.get(name, ())) == len(values)]
    return {
        name: within(
            paired_differences(
                [together.samples[name], alone.samples[name]],
                [(0, 1)],
                together.clusters,
                together.strata,
                evaluation.num_bootstrap,
                evaluation.bootstrap_seed,
            )[0],
            METRICS[name].bounds_of_difference,
        )
        for name in both
    }
