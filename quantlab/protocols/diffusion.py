"""Diffusion models: a candidate samples from the reference's noise and conditioning, and each sample is compared.

Two views of the error, over a subset of the samples: *free-running*, where the candidate's trajectory goes its own way,
and *teacher-forced*, where it answers the denoiser calls that the reference made. Generic over the model: ``sample``
and the modules named by ``parts["denoisers"]`` are used, and ``parts["judge"]`` where there is one.
"""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from quantlab.errors import ConfigError, MetricUndefined, ModelError, NotFinite
from quantlab.metrics.latent import latent_cosine, latent_rel_mse
from quantlab.metrics.psnr import num_identical, psnr_pooled_db, to_uint8
from quantlab.metrics.statistics import bootstrap_interval
from quantlab.metrics.trajectory import step_divergence
from quantlab.models.loaded import LoadedModel, Sampled
from quantlab.modules.calls import Call, Progress, recorded_calls
from quantlab.modules.timing import Clock
from quantlab.protocols.defined import defined
from quantlab.protocols.diffusion_inputs import DiffusionInputs
from quantlab.protocols.finite import OVERFLOWS, bad_rows
from quantlab.protocols.guidance import recorded_velocities
from quantlab.protocols.judged import judge_metrics
from quantlab.protocols.media import (
    METRICS_OF,
    SAID_OF,
    image_metrics,
    moving_metrics,
    shown_images,
    tell_of_one_colour,
)
from quantlab.protocols.teacher_forced import teacher_forced_metrics
from quantlab.vocabulary.reports import Measurements, MetricValue
from quantlab.vocabulary.schema import EvaluationConfig

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

HEADLINE = ("latent_rel_mse", "psnr_db", "frame_psnr_db", "temporal_rel_error", "audio_snr_db")
NUM_SHOWN = 8
_UNHEARD = (
    "latent_rel_mse: the model's scheduler was not heard to step (some pipelines step by copies of it), or steps "
    "tokens, which have no distance, so that there are no latents and no curves of them; look at what is made of them"
)


def check(model: LoadedModel, inputs: DiffusionInputs) -> None:
    """Nothing is asked of these models before they run."""


def observe(
    model: LoadedModel,
    inputs: DiffusionInputs,
    evaluation: EvaluationConfig,
    progress: Progress | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """The reference's outputs, a tree that :mod:`quantlab.modules.kept` stores.

    ``latents`` (n, ...) float32, absent where no scheduler steps; ``images`` uint8 (n, height, width, channels),
    ``frames`` uint8 (n, frames, height, width, channels) and ``audio`` float32 (n, channels, samples), of what is made;
    ``step_indices`` (m,): which samples are traced; for these, where m > 0, ``steps`` (num_steps, m, ...) float32, the
    latents after each step, and ``calls``: the denoiser's calls with their ``step``, the rows ``start`` to ``stop``
    of ``step_indices`` that they belong to, and the ``velocity`` that the scheduler was given; ``timings_ms``;
    ``noise``, ``conditioning`` and ``draws`` (the dtypes that noise was drawn in), so that the file alone is enough to
    repeat the measurement.
    ``progress(done, total)`` counts denoising steps over all batches.
    Raises MetricUndefined, naming sample and step, for NaN or infinity in a latent or an image, and ModelError for a
    model that does not repeat itself bit for bit.
    """
    traced = spread(inputs, evaluation.num_teacher_forced)
    batches = _batches(inputs, traced, batch_size or evaluation.batch_size)
    tick = _Ticks(progress, evaluation.num_inference_steps * len(batches))
    outputs, calls = _run(model, inputs, evaluation, batches, tick, record=True)
    _check_repeats(model, inputs, evaluation, min(batches, key=lambda batch: len(batch.indices)), outputs)
    tell_of_one_colour(outputs, inputs.sample_ids)
    given = {"noise": inputs.noise, "conditioning": dict(inputs.conditioning)}
    return {**outputs, **given, "calls": calls} if calls else {**outputs, **given}


def measure(
    model: LoadedModel,
    inputs: DiffusionInputs,
    evaluation: EvaluationConfig,
    reference: Mapping[str, Any],
    reference_model: LoadedModel,
    progress: Progress | None = None,
    batch_size: int | None = None,
) -> Measurements:
    """Run a candidate on the reference's noise and compare it with what :func:`observe` stored.

    The judge and the sampler's noise levels are those of ``reference_model``. ``progress(done, total)`` counts
    denoising steps over all batches and then replayed calls.
    What has no value (of images that are NaN, of a replayed call that is, of one image's distribution) is undefined, by
    itself. Raises MetricUndefined, naming sample and step, for NaN or infinity in a latent.
    """
    model = replace(model, parts={**model.parts, "draws": reference["draws"]})
    traced = [int(i) for i in reference["step_indices"]]
    batches = _batches(inputs, traced, batch_size or evaluation.batch_size)
    calls = reference.get("calls", [])
    tick = _Ticks(progress, evaluation.num_inference_steps * len(batches) + len(calls))
    outputs, _ = _run(model, inputs, evaluation, batches, tick, record=False)
    undefined: dict[str, str] = dict(outputs.get("undefined", {}))
    samples: dict[str, NDArray[np.float64]] = {}
    if "latents" in reference:
        latents, expected = outputs["latents"], reference["latents"]
        means = {
            "latent_rel_mse": lambda: latent_rel_mse(latents, expected),
            "latent_cosine": lambda: latent_cosine(latents, expected),
        }
        samples = defined(means, undefined)
    else:
        undefined["latent_rel_mse"] = _UNHEARD
    steps: dict[str, NDArray[np.float64]] = {}
    estimates: dict[str, MetricValue] = {}
    if "images" in outputs and "images" in reference:
        pair = outputs["images"].numpy(), reference["images"].numpy()
        estimates["n_identical"] = MetricValue(value=float(num_identical(*pair)), n=inputs.num_samples)
        samples.update(image_metrics(*pair))
        estimates["psnr_pooled_db"] = _pooled(samples["image_mse"], inputs, evaluation)
        if "judge" in reference_model.parts and "class_label" in inputs.conditioning:
            judged, distances = judge_metrics(reference_model.parts["judge"], *pair, inputs, evaluation, undefined)
            samples.update(judged)
            estimates.update(distances)
    samples.update(defined(moving_metrics(outputs, reference), undefined))
    if calls:
        if "steps" in reference:
            curves = {"step_divergence": lambda: step_divergence(outputs["steps"], reference["steps"])[0]}
            steps.update(defined(curves, undefined))
        part = inputs.subset(traced)
        forced, errors = teacher_forced_metrics(model, reference_model, calls, part, evaluation, tick, undefined)
        steps.update(forced)
        estimates.update(errors)
    shown = spread(inputs, NUM_SHOWN)
    return Measurements(
        samples=samples,
        clusters=inputs.clusters,
        strata=inputs.strata,
        sample_ids=inputs.sample_ids,
        seeds=inputs.seeds,
        estimates=estimates,
        steps=steps,
        images=shown_images(outputs, reference, shown),
        image_ids=tuple(inputs.sample_ids[i] for i in shown),
        undefined=undefined,
        timings_ms=outputs["timings_ms"],
    )


def calls(
    model: LoadedModel,
    inputs: DiffusionInputs,
    evaluation: EvaluationConfig,
    components: Sequence[str],
    progress: Progress | None = None,
) -> Iterator[tuple[str, Call]]:
    """The calls of ``components`` along the model's own trajectories, each with its ``step``, batch after batch.

    ``evaluation.batch_size`` samples at once; at most one batch's calls are in memory.
    Raises MetricUndefined, naming sample and step, for NaN or infinity in a latent.
    """
    batches = _batches(inputs, [], evaluation.batch_size)
    tick = _Ticks(progress, evaluation.num_inference_steps * len(batches))
    for batch in batches:
        with ExitStack() as stack:
            way_out = "leave it out of the components, or choose an algorithm that needs no data"
            recorded = {
                n: stack.enter_context(recorded_calls(model.components[n], f"model.components={n}", way_out))
                for n in components
            }
            _run_batch(model, inputs.subset(batch.indices), evaluation, tick, record=False, open_calls=recorded)
        for name, found in recorded.items():
            yield from ((name, call) for call in found)


def spread(inputs: DiffusionInputs, num_wanted: int) -> list[int]:
    """Up to ``num_wanted`` samples, in order, spread evenly over strata (or clusters): a round takes one of each.

    Of a round that is not taken whole evenly spaced ones: prompts that are alike stand side by side.
    """
    given = inputs.strata if inputs.strata is not None else inputs.clusters
    rounds: dict[int, list[int]] = {}
    seen: Counter[int] = Counter()
    for i, group in enumerate(range(inputs.num_samples) if given is None else map(int, given)):
        rounds.setdefault(seen[group], []).append(i)
        seen[group] += 1
    chosen: list[int] = []
    for one in rounds.values():
        num = min(num_wanted - len(chosen), len(one))
        chosen += [one[i * len(one) // num] for i in range(num)]
    return sorted(chosen)


# -- sampling, the same for the reference and the candidates


class _Ticks:
    """Counts steps and tells ``progress``."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.done, self.total = progress, 0, total

    def __call__(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(min(self.done, self.total), self.total)


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Samples that run together, and whether they are traced."""

    indices: tuple[int, ...]
    traced: bool


def _batches(inputs: DiffusionInputs, traced: Sequence[int], batch_size: int) -> list[_Batch]:
    """The traced samples in batches of their own, first, then the others."""
    others = sorted(set(range(inputs.num_samples)) - set(traced))
    batch_size = 1 if inputs.one_at_a_time else batch_size
    return [
        _Batch(indices=tuple(rows[i : i + batch_size]), traced=is_traced)
        for rows, is_traced in ((traced, True), (others, False))
        for i in range(0, len(rows), batch_size)
    ]


def _run(
    model: LoadedModel,
    inputs: DiffusionInputs,
    evaluation: EvaluationConfig,
    batches: Sequence[_Batch],
    tick: Callable[[], None],
    *,
    record: bool,
) -> tuple[dict[str, Any], list[Call]]:
    """Sample all batches: the tree of :func:`observe` without ``calls``, and the calls where they are recorded.

    Where an image of a candidate (``record`` is false) is NaN there are no images, and ``undefined`` says why.
    """
    import torch

    rows: dict[str, list[Tensor]] = {}
    states: list[Tensor] = []
    calls: list[Call] = []
    seconds: list[tuple[_Batch, list[float]]] = []
    undefined: dict[str, str] = {}
    draws: Sequence[Sequence[str]] = ()
    num_traced = 0
    for batch in batches:
        part = inputs.subset(batch.indices)
        recorded = record and batch.traced
        sampled, trajectory, batch_calls, times = _run_batch(model, part, evaluation, tick, record=recorded)
        if batch.traced:
            states += [] if trajectory is None else [trajectory]
            calls += [{**call, "start": num_traced, "stop": num_traced + part.num_samples} for call in batch_calls]
            num_traced += part.num_samples
        seconds.append((batch, times))
        draws = max(draws, sampled.draws, key=len)
        if sampled.latents is not None:
            rows.setdefault("latents", []).append(sampled.latents)
        for kind, made in sampled.media.items():
            try:
                _require_finite(made, part.sample_ids, SAID_OF[kind])
            except MetricUndefined as error:
                if record:
                    raise
                undefined |= dict.fromkeys(METRICS_OF[kind], str(error))
                continue
            rows.setdefault(kind, []).append(made if kind == "audio" else torch.from_numpy(to_uint8(made)))
    order = torch.tensor([i for b in batches for i in b.indices]).argsort()
    outputs: dict[str, Any] = {
        "step_indices": torch.tensor([i for b in batches if b.traced for i in b.indices], dtype=torch.int64),
        "timings_ms": {"denoise_step_ms": _step_ms(seconds)},
        "draws": draws,
    }
    if undefined:
        outputs["undefined"] = undefined
    for kind, parts in rows.items():
        if len(parts) == len(batches):
            outputs[kind] = _joined(parts, kind)[order]
    if states and len({state.shape[0] for state in states}) == 1:
        outputs["steps"] = torch.cat(states, dim=1)
    return outputs, calls


def _joined(parts: Sequence[Tensor], kind: str) -> Tensor:
    import torch

    shapes = {tuple(part.shape[1:]) for part in parts}
    if len(shapes) > 1:
        raise ConfigError(
            f"evaluation.height=null: the {kind} are of {len(shapes)} sizes ({', '.join(map(str, sorted(shapes)))}), "
            "and samples are compared at one; set evaluation.height and evaluation.width"
        )
    return torch.cat(list(parts))


def _check_repeats(
    model: LoadedModel,
    inputs: DiffusionInputs,
    evaluation: EvaluationConfig,
    batch: _Batch,
    outputs: Mapping[str, Any],
) -> None:
    """ModelError unless a batch that runs again gives the same, bit for bit: else noise would count as an error."""
    import torch

    again, _ = _run(model, inputs.subset(batch.indices), evaluation, [_whole(batch)], lambda: None, record=True)
    for kind in ("latents", *METRICS_OF):
        if kind in outputs and not torch.equal(outputs[kind][list(batch.indices)], again[kind]):
            raise ModelError(
                f"model={model.name}: run twice on the same inputs with the same generators, the reference differs "
                f"from itself ({kind}), so no candidate can be paired with it: something draws noise that no generator "
                "of a sample gives; take device=cpu, or a scheduler that draws from the generator"
            )


def _whole(batch: _Batch) -> _Batch:
    return _Batch(indices=tuple(range(len(batch.indices))), traced=False)


def _run_batch(
    model: LoadedModel,
    inputs: DiffusionInputs,
    evaluation: EvaluationConfig,
    tick: Callable[[], None],
    *,
    record: bool,
    open_calls: Mapping[str, list[Call]] = MappingProxyType({}),
) -> tuple[Sampled, Tensor | None, list[Call], list[float]]:
    """One batch: what is made, latents after each step (num_steps, b, ...), denoisers' calls, seconds of each step.

    There are no latents of steps where they change their shape on the way, or are tokens.
    """
    import torch

    assert model.sample is not None, "families of this protocol have a sampler"
    states: list[Tensor] = []
    clock = Clock(model.device)

    with ExitStack() as stack:
        calls: dict[str, list[Call]] = {}
        velocities: list[Tensor] = []
        if record:
            velocities = stack.enter_context(recorded_velocities(model.parts.get("scheduler")))
            for name in model.parts["denoisers"]:
                calls[name] = stack.enter_context(recorded_calls(model.components[name]))

        def on_step(k: int, latents: Tensor) -> None:
            clock.stop()
            state = latents.detach().to("cpu", torch.float32, copy=True)
            _require_finite(state, inputs.sample_ids, f"latent after step {k} of {evaluation.num_inference_steps}")
            states.append(state)
            new = [call for found in calls.values() for call in found if "step" not in call]
            if len(velocities) == 1 and new:
                new[0]["velocity"] = velocities[0]
            velocities.clear()
            for name, found in calls.items():
                for call in found:
                    call.setdefault("component", name)
            for call in itertools.chain(*calls.values(), *open_calls.values()):
                call.setdefault("step", k)
            tick()
            clock.start()

        clock.start()
        sampled = model.sample(model, inputs.noise, inputs.conditioning, evaluation, on_step)
        if not states:
            clock.stop()
    if sampled.latents is not None:
        _require_finite(sampled.latents, inputs.sample_ids, "final latent")
    for call in itertools.chain(*open_calls.values()):
        call.setdefault("step", max(len(states) - 1, 0))
    are_latents = sampled.latents is not None and len({s.shape for s in states}) == 1
    trajectory = torch.stack(states) if are_latents else None
    heard = sorted((c for found in calls.values() for c in found if "step" in c), key=lambda call: call["step"])
    seconds = clock.seconds()
    # The first step's time holds what comes before it, such as the text encoders, and kernels that are chosen then.
    return sampled, trajectory, heard, seconds[1:] or seconds


def _require_finite(tensor: Tensor, sample_ids: Sequence[str], what: str) -> None:
    bad = bad_rows(tensor)
    if bad:
        raise NotFinite(
            f"sample {sample_ids[bad[0]]}: the {what} is NaN or infinite, as for {len(bad)} of {len(tensor)} samples "
            f"of its batch; {OVERFLOWS}",
            f"the {what} of sample {sample_ids[bad[0]]}",
        )


def _step_ms(seconds: Sequence[tuple[_Batch, Sequence[float]]]) -> float:
    """Median time of a step over the largest batches that are neither the first (warm-up) nor traced, if there are."""
    timed = seconds[1:] or seconds
    timed = [row for row in timed if not row[0].traced] or timed
    largest = max(len(batch.indices) for batch, _ in timed)
    return 1e3 * statistics.median(s for batch, times in timed if len(batch.indices) == largest for s in times)


def _pooled(mse: NDArray[np.float64], inputs: DiffusionInputs, evaluation: EvaluationConfig) -> MetricValue:
    drawn = (evaluation.num_bootstrap, evaluation.bootstrap_seed)
    return bootstrap_interval(
        lambda rows: psnr_pooled_db(mse[rows]), inputs.num_samples, inputs.clusters, inputs.strata, *drawn
    )
