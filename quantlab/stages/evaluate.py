"""Evaluate: a candidate's outputs against the reference's, and every number with its uncertainty."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from quantlab.backends.scheme import Scheme
from quantlab.errors import MetricUndefined, NotFinite
from quantlab.metrics import METRICS
from quantlab.metrics.statistics import mean_interval, require_finite, within
from quantlab.models.loaded import LoadedModel
from quantlab.planning.components import told
from quantlab.protocols.defined import defined
from quantlab.protocols.table import PROTOCOLS
from quantlab.stages.products import wider
from quantlab.vocabulary.reports import Measurements, MetricValue
from quantlab.vocabulary.schema import EvaluationConfig


def evaluate(
    candidate: LoadedModel,
    reference_model: LoadedModel,
    reference: Mapping[str, Any],
    inputs: Any,
    evaluation: EvaluationConfig,
    progress: Callable[[int, int], Any] | None = None,
    batch_size: int | None = None,
    schemes: Mapping[str, Scheme] | None = None,
) -> Measurements:
    """Run ``candidate`` on ``inputs`` by its protocol and compare it with the stored ``reference`` outputs.

    A metric that is NaN or infinite for a sample is among the ``undefined`` ones and no longer among the ``samples``.
    Raises MetricUndefined where none is left, and NotFinite for outputs that are NaN or infinite; it names
    ``schemes`` (key of the component, "" for the whole request's -> scheme), as the reference has none.
    """
    try:
        measured: Measurements = PROTOCOLS[candidate.protocol].measure(
            candidate, inputs, evaluation, reference, reference_model, progress, batch_size
        )
    except NotFinite as error:
        if not schemes:
            raise
        messages = {key: _overflow_message(scheme, candidate.dtype, error.what) for key, scheme in schemes.items()}
        text = "; or ".join(told(key, message) for key, message in messages.items())
        raise NotFinite(text, error.what) from error
    undefined = dict(measured.undefined)

    def checked(name: str, values: Any, sample_ids: Sequence[str] = ()) -> Callable[[], Any]:
        def check() -> Any:
            require_finite(values, name, sample_ids)
            return values

        return check

    ids = measured.sample_ids
    samples = defined({name: checked(name, values, ids) for name, values in measured.samples.items()}, undefined)
    steps = defined({name: checked(name, curve) for name, curve in measured.steps.items()}, undefined)
    if undefined and not (samples or measured.estimates):
        raise MetricUndefined(next(iter(undefined.values())))
    return replace(measured, samples=samples, steps=steps, undefined=undefined)


def warm_up(model: LoadedModel, inputs: Any, evaluation: EvaluationConfig, batch_size: int | None = None) -> None:
    """Run one batch of each size that :func:`evaluate` will run, for a few steps and for nothing.

    On a GPU kernels are chosen, compiled and tuned when a shape is first seen, which is no time of the scheme's.
    Outputs that are NaN are left to :func:`evaluate`, which says whose they are.
    """
    size = batch_size or evaluation.batch_size
    brief = replace(evaluation, num_inference_steps=min(2, evaluation.num_inference_steps), num_teacher_forced=0)
    for num in dict.fromkeys((min(size, inputs.num_samples), inputs.num_samples % size)):
        if num:
            with contextlib.suppress(MetricUndefined):
                PROTOCOLS[model.protocol].observe(model, inputs.subset(range(num)), brief, None, num)


def _overflow_message(scheme: Scheme, dtype: str, what: str) -> str:
    axes, row = scheme.axes, scheme.row
    computed = dtype if axes.compute_dtype == "auto" else axes.compute_dtype
    who = f"{axes.backend} {axes.dtype}"
    why = f"{who} is known to overflow in {computed} ({row.note}); " if computed in row.overflows_in else ""
    return (
        f"dtype={axes.dtype}: {what} by {who} is NaN or infinite where the reference's is not; {why}"
        f"{wider(scheme, computed)}choose another dtype, group_size or algorithm, or exclude the layers that overflow"
    )


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Attention by plain matrix products, where torch would choose a fused kernel: another order of the same sums."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield


def summarize(measured: Measurements, evaluation: EvaluationConfig) -> dict[str, MetricValue]:
    """Means over samples with clustered errors and intervals, beside the protocol's own estimates.

    A number may be both: its samples pair it with other runs, and its interval is the estimate's.
    """
    values = {}
    for name, samples in measured.samples.items():
        require_finite(samples, name, measured.sample_ids)
        found = mean_interval(
            samples, measured.clusters, measured.strata, evaluation.num_bootstrap, evaluation.bootstrap_seed
        )
        values[name] = within(found, METRICS[name].bounds)
    for name, found in measured.estimates.items():
        mean = values[name].value if name in values else found.value
        if not math.isclose(mean, found.value, rel_tol=1e-6, abs_tol=1e-9):
            raise MetricUndefined(f"{name}: measured twice, {mean} as a mean and {found.value} as an estimate")
        values[name] = within(replace(found, value=mean), METRICS[name].bounds)
    return values
