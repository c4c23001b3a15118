"""Diffusion models: a candidate samples from the reference's noise and conditioning, and each sample is compared.

Two views of the error, over a subset of the samples: *free-running*, where the candidate's trajectory goes its own way,
and *teacher-forced*, where it answers the denoiser calls that the reference made. Generic over the model: ``sample``,
``decode`` and the module named by ``parts["denoiser"]`` are used, and ``parts["judge"]`` where there is one.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from quantlab.errors import MetricUndefined, NotFinite
from quantlab.metrics.latent import latent_cosine, latent_rel_mse
from quantlab.metrics.psnr import image_mse, num_identical, psnr_db, psnr_pooled_db, to_uint8
from quantlab.metrics.ssim import WINDOW, ssim
from quantlab.metrics.statistics import bootstrap_interval
from quantlab.metrics.trajectory import step_divergence
from quantlab.models.loaded import LoadedModel
from quantlab.modules.calls import Call, Progress, recorded_calls
from quantlab.modules.timing import Clock
from quantlab.protocols.defined import defined
from quantlab.protocols.diffusion_inputs import DiffusionInputs
from quantlab.protocols.finite import bad_rows
from quantlab.protocols.guidance import recorded_velocities
from quantlab.protocols.judged import judge_metrics
from quantlab.protocols.teacher_forced import teacher_forced_metrics
from quantlab.vocabulary.reports import Measurements, MetricValue
from quantlab.vocabulary.schema import EvaluationConfig

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

HEADLINE = ("latent_rel_mse", "psnr_db")
IMAGE_METRICS = (
    "psnr_db",
    "psnr_pooled_db",
    "image_mse",
    "ssim",
    "n_identical",
    "class_accuracy",
    "judge_agreement",
    "frechet_judge",
)
"""What is measured of decoded images."""
NUM_SHOWN = 8
DIFFERENCE_GAIN = 4


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

    ``latents`` (n, ...) float32; ``images`` uint8 (n, height, width, channels), absent without ``decode``;
    ``step_indices`` (m,): which samples are traced; for these, where m > 0, ``steps`` (num_steps, m, ...) float32, the
    latents after each step, and ``calls``: the denoiser's calls with their ``step``, the rows ``start`` to ``stop``
    of ``step_indices`` that they belong to, and the ``velocity`` that the scheduler was given; ``timings_ms``;
    ``noise`` and ``conditioning``, so that the file alone is enough to repeat the measurement.
    ``progress(done, total)`` counts denoising steps over all batches.
    Raises MetricUndefined, naming sample and step, for NaN or infinity in a latent or an image.
    """
    traced = spread(inputs, evaluation.num_teacher_forced)
    batches = _batches(inputs.num_samples, traced, batch_size or evaluation.batch_size)
    tick = _Ticks(progress, evaluation.num_inference_steps * len(batches))
    outputs, calls = _run(model, inputs, evaluation, batches, tick, record=True)
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
    traced = [int(i) for i in reference["step_indices"]]
    batches = _batches(inputs.num_samples, traced, batch_size or evaluation.batch_size)
    calls = reference.get("calls", [])
    tick = _Ticks(progress, evaluation.num_inference_steps * len(batches) + len(calls))
    outputs, _ = _run(model, inputs, evaluation, batches, tick, record=False)
    latents, expected = outputs["latents"], reference["latents"]
    undefined: dict[str, str] = dict(outputs.get("undefined", {}))
    means = {
        "latent_rel_mse": lambda: latent_rel_mse(latents, expected),
        "latent_cosine": lambda: latent_cosine(latents, expected),
    }
    samples = defined(means, undefined)
    steps: dict[str, NDArray[np.float64]] = {}
    estimates: dict[str, MetricValue] = {}
    if "images" in outputs and "images" in reference:
        pair = outputs["images"].numpy(), reference["images"].numpy()
        estimates["n_identical"] = MetricValue(value=float(num_identical(*pair)), n=inputs.num_samples)
        samples.update(_image_metrics(*pair))
        estimates["psnr_pooled_db"] = _pooled(samples["image_mse"], inputs, evaluation)
        if "judge" in reference_model.parts and "class_label" in inputs.conditioning:
            judged, distances = judge_metrics(reference_model.parts["judge"], *pair, inputs, evaluation, undefined)
            samples.update(judged)
            estimates.update(distances)
    if calls:
        curves = {"step_divergence": lambda: step_divergence(outputs["steps"], reference["steps"])[0]}
        steps.update(defined(curves, undefined))
        part, scheduler = inputs.subset(traced), reference_model.parts.get("scheduler")
        forced, errors = teacher_forced_metrics(model, calls, part, evaluation, scheduler, tick, undefined)
        steps.update(forced)
        estimates.update(errors)
    shown = spread(inputs, NUM_SHOWN)
    return Measurements(
        samples=samples,
        clusters=inputs.clusters,
        strata=inputs.strata,
        sample_ids=inputs.sample_ids,
        estimates=estimates,
        steps=steps,
        images=_shown_images(outputs, reference, shown),
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
    # Prompts that were encoded before would not reach the text encoders again.
    model = replace(model, parts={**model.parts, "prompt_embeddings": {}})
    batches = _batches(inputs.num_samples, [], evaluation.batch_size)
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
    """Up to ``num_wanted`` samples, in order, spread evenly over strata (or clusters): a round takes one of each."""
    groups = inputs.strata if inputs.strata is not None else inputs.clusters
    if groups is None:
        num = min(num_wanted, inputs.num_samples)
        return [i * inputs.num_samples // num for i in range(num)]
    seen: dict[int, int] = {}
    rounds = []
    for i, group in enumerate(int(g) for g in groups):
        rounds.append((seen.get(group, 0), i))
        seen[group] = rounds[-1][0] + 1
    return sorted(i for _, i in sorted(rounds)[:num_wanted])


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


def _batches(num_samples: int, traced: Sequence[int], batch_size: int) -> list[_Batch]:
    """The traced samples in batches of their own, first, then the others."""
    others = sorted(set(range(num_samples)) - set(traced))
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

    latents: list[Tensor] = []
    images: list[Tensor] = []
    states: list[Tensor] = []
    calls: list[Call] = []
    seconds: list[tuple[_Batch, list[float]]] = []
    undefined: dict[str, str] = {}
    for batch in batches:
        part = inputs.subset(batch.indices)
        recorded = record and batch.traced
        final, trajectory, batch_calls, times = _run_batch(model, part, evaluation, tick, record=recorded)
        if batch.traced:
            start = sum(int(s.shape[1]) for s in states)
            states.append(trajectory)
            calls += [{**call, "start": start, "stop": start + part.num_samples} for call in batch_calls]
        latents.append(final)
        seconds.append((batch, times))
        if model.decode is not None:
            with torch.no_grad():
                decoded = model.decode(model, final).float().cpu()
            try:
                _require_finite(decoded, part.sample_ids, "decoded image")
            except MetricUndefined as error:
                if record:
                    raise
                undefined = dict.fromkeys(IMAGE_METRICS, str(error))
                continue
            images.append(torch.from_numpy(to_uint8(decoded)))
    order = torch.tensor([i for b in batches for i in b.indices]).argsort()
    outputs = {
        "latents": torch.cat(latents)[order],
        "step_indices": torch.tensor([i for b in batches if b.traced for i in b.indices], dtype=torch.int64),
        "timings_ms": {"denoise_step_ms": _step_ms(seconds)},
    }
    if undefined:
        outputs["undefined"] = undefined
    elif images:
        outputs["images"] = torch.cat(images)[order]
    if states:
        outputs["steps"] = torch.cat(states, dim=1)
    return outputs, calls


def _run_batch(
    model: LoadedModel,
    inputs: DiffusionInputs,
    evaluation: EvaluationConfig,
    tick: Callable[[], None],
    *,
    record: bool,
    open_calls: Mapping[str, list[Call]] = MappingProxyType({}),
) -> tuple[Tensor, Tensor, list[Call], list[float]]:
    """One batch: final latents, latents after each step (num_steps, b, ...), denoiser calls, seconds of each step."""
    import torch

    assert model.sample is not None, "families of this protocol have a sampler"
    states: list[Tensor] = []
    clock = Clock(model.device)

    with ExitStack() as stack:
        calls: list[Call] = []
        velocities: list[Tensor] = []
        if record:
            velocities = stack.enter_context(recorded_velocities(model.parts.get("scheduler")))
            calls = stack.enter_context(recorded_calls(model.components[model.parts["denoiser"]]))

        def on_step(k: int, latents: Tensor) -> None:
            clock.stop()
            state = latents.detach().to("cpu", torch.float32, copy=True)
            _require_finite(state, inputs.sample_ids, f"latent after step {k} of {evaluation.num_inference_steps}")
            states.append(state)
            if len(velocities) == 1 and (new := [call for call in calls if "step" not in call]):
                new[0]["velocity"] = velocities[0]
            velocities.clear()
            for call in itertools.chain(calls, *open_calls.values()):
                call.setdefault("step", k)
            tick()
            clock.start()

        clock.start()
        final = model.sample(model, inputs.noise, inputs.conditioning, evaluation, on_step)
    _require_finite(final, inputs.sample_ids, "final latent")
    seconds = clock.seconds()
    # The first step's time holds what comes before it, such as the text encoders, and kernels that are chosen then.
    return final.float().cpu(), torch.stack(states), list(calls), seconds[1:] or seconds


def _require_finite(tensor: Tensor, sample_ids: Sequence[str], what: str) -> None:
    bad = bad_rows(tensor)
    if bad:
        raise NotFinite(
            f"sample {sample_ids[bad[0]]}: the {what} is NaN or infinite, as for {len(bad)} of {len(tensor)} samples "
            "of its batch; the model overflows: try compute_dtype=bfloat16 or float32, or a wider dtype",
            f"the {what} of sample {sample_ids[bad[0]]}",
        )


def _step_ms(seconds: Sequence[tuple[_Batch, Sequence[float]]]) -> float:
    """Median time of a step over the largest batches that are neither the first (warm-up) nor traced, if there are."""
    timed = seconds[1:] or seconds
    timed = [row for row in timed if not row[0].traced] or timed
    largest = max(len(batch.indices) for batch, _ in timed)
    return 1e3 * statistics.median(s for batch, times in timed if len(batch.indices) == largest for s in times)


# -- images


def _image_metrics(candidate: NDArray[np.uint8], reference: NDArray[np.uint8]) -> dict[str, NDArray[np.float64]]:
    found = {"psnr_db": psnr_db(candidate, reference), "image_mse": image_mse(candidate, reference)}
    if min(reference.shape[1:3]) >= WINDOW:
        found["ssim"] = ssim(candidate, reference)
    return found


def _pooled(mse: NDArray[np.float64], inputs: DiffusionInputs, evaluation: EvaluationConfig) -> MetricValue:
    drawn = (evaluation.num_bootstrap, evaluation.bootstrap_seed)
    return bootstrap_interval(
        lambda rows: psnr_pooled_db(mse[rows]), inputs.num_samples, inputs.clusters, inputs.strata, *drawn
    )


def _shown_images(
    outputs: Mapping[str, Any], reference: Mapping[str, Any], rows: Sequence[int]
) -> NDArray[np.uint8] | None:
    """uint8 (k, 3, height, width, channels): reference, candidate, 4 * |difference| cut off at 255; None without."""
    import numpy as np

    if "images" not in outputs or "images" not in reference:
        return None
    ref, cand = (tree["images"].numpy()[list(rows)] for tree in (reference, outputs))
    difference = np.abs(cand.astype(np.int32) - ref) * DIFFERENCE_GAIN
    return np.stack([ref, cand, np.minimum(difference, 255).astype(np.uint8)], axis=1)
