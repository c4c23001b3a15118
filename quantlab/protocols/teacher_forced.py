"""The candidate's denoiser on the calls that the reference's denoiser got: the error that each step adds by itself."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from quantlab.errors import MetricUndefined, NotFinite
from quantlab.metrics.statistics import mean_interval
from quantlab.metrics.trajectory import step_sqnr_db, weighted_velocity_mse
from quantlab.models.loaded import LoadedModel
from quantlab.modules.calls import Call, is_replayable, per_sample, replayed_output
from quantlab.protocols.defined import defined
from quantlab.protocols.diffusion_inputs import DiffusionInputs
from quantlab.protocols.finite import bad_rows
from quantlab.protocols.guidance import guided, together
from quantlab.vocabulary.reports import MetricValue
from quantlab.vocabulary.schema import EvaluationConfig

if TYPE_CHECKING:
    import numpy as np
    from diffusers.schedulers.scheduling_utils import SchedulerMixin
    from numpy.typing import NDArray
    from torch import Tensor

_NOISED_ANEW = ("LCM", "TCD", "SCM", "CMStochastic")
"""In the class names of samplers of consistency models, each of whose steps predicts the end and adds noise to it."""
_OTHERWISE = (*_NOISED_ANEW, "SASolver", "Inverse")
"""Those, SA-Solver, which mixes noise and earlier steps by weights of its own, and samplers that end in noise."""
_CUTS_OFF = ("clip_sample", "thresholding")
"""Settings of samplers that keep the sample they predict to a range."""
_AFTERWARDS = ("vocoder", "safety_checker")
"""Parts of pipelines that work on what was denoised, beside the autoencoders."""


def teacher_forced_metrics(
    model: LoadedModel,
    reference_model: LoadedModel,
    calls: Sequence[Call],
    inputs: DiffusionInputs,
    evaluation: EvaluationConfig,
    tick: Callable[[], None],
    undefined: MutableMapping[str, str],
) -> tuple[dict[str, NDArray[np.float64]], dict[str, MetricValue]]:
    """``step_sqnr_db`` (num_steps,) and, where the scheduler's levels are known, ``weighted_velocity_mse``.

    ``calls`` are the recorded calls of the samples ``inputs``. What is compared is what the sampler steps along: the
    predictions of a step put together by guidance (:mod:`quantlab.protocols.guidance`). ``weighted_velocity_mse`` is
    the mean over samples, with its interval. Both are ``undefined`` where an output of the candidate is NaN or
    infinite, guidance is no weighted sum, or what else is quantized has a part in the denoisers' calls, each by itself
    where it alone has no value.
    """
    import numpy as np

    num_steps = 1 + max(call["step"] for call in calls)
    levels = integration_levels(reference_model.parts.get("scheduler"), num_steps)
    measures: dict[str, Callable[[int, Tensor, Tensor], NDArray[np.float64]]]
    measures = {"step_sqnr_db": lambda _, candidate, reference: step_sqnr_db([candidate], [reference])[0]}
    if levels is not None:
        measures["weighted_velocity_mse"] = lambda k, candidate, reference: weighted_velocity_mse(
            [candidate], [reference], levels[k : k + 2]
        )
    by_step: dict[str, list[NDArray[np.float64]]] = {name: [] for name in measures}
    try:
        if others := _heard_by_denoisers(model, reference_model, inputs):
            raise MetricUndefined(
                f"step_sqnr_db: the calls that the reference's denoiser got hold what its {' and '.join(others)} gave, "
                "so that what the quantized one changes is not in them; look at step_divergence"
            )
        for k in range(num_steps):
            pair = _velocities(model, [c for c in calls if c["step"] == k], inputs.sample_ids, tick)
            left = {name: partial(measure, k, *pair) for name, measure in measures.items() if name not in undefined}
            for name, values in defined(left, undefined).items():
                by_step[name].append(values)
    except MetricUndefined as error:
        undefined.update(dict.fromkeys(measures, str(error)))

    def mean_error() -> MetricValue:
        errors = sum(by_step["weighted_velocity_mse"], np.zeros(inputs.num_samples))
        drawn = (evaluation.num_bootstrap, evaluation.bootstrap_seed)
        return mean_interval(errors, inputs.clusters, inputs.strata, *drawn, sample_ids=inputs.sample_ids)

    curves, estimates = {}, {}
    if "step_sqnr_db" not in undefined:
        curves["step_sqnr_db"] = np.concatenate(by_step["step_sqnr_db"])
    if levels is not None and "weighted_velocity_mse" not in undefined:
        estimates = defined({"weighted_velocity_mse": mean_error}, undefined)
    return curves, estimates


def _heard_by_denoisers(model: LoadedModel, reference_model: LoadedModel, inputs: DiffusionInputs) -> list[str]:
    """The candidate's components whose answers its denoisers are given: encoders, ControlNets, priors.

    Autoencoders work when all steps are done, but where there are pictures to encode.
    """
    encodes = bool({"image", "mask", "control"} & set(inputs.conditioning))
    return [
        name
        for name, part in model.components.items()
        if part is not reference_model.components.get(name)
        and name not in (*model.parts["denoisers"], *_AFTERWARDS)
        and (encodes or not hasattr(part, "decode"))
    ]


def integration_levels(scheduler: SchedulerMixin | None, num_steps: int) -> NDArray[np.float64] | None:
    """The variable s, num_steps + 1 values, in which one sampler step is x' = x + (s_{k+1} - s_k) * prediction.

    It depends on what the network predicts. For flow matching s is the scheduler's sigma. For noise (epsilon) it is
    sigma = sqrt((1 - a) / a) with a = alphas_cumprod, for the latent divided by sqrt(a) (DDIM, arXiv 2010.02502,
    eq. 13). For v-prediction it is the angle arctan(sigma), as there d x / d angle = v (arXiv 2202.00512, appendix D).
    The networks of EDM (arXiv 2206.00364, table 1; sigma_data d) predict the like of a velocity whatever their
    scheduler calls it: d * arctan(sigma / d).
    Sigmas are ``scheduler.sigmas`` where it has them, else computed from ``alphas_cumprod`` at its timesteps, ending
    at 0. A sampler that asks twice for one step (Heun's, PNDM in its first) steps along the mean of both: half the step
    each. Of one that ran a part of its steps (from a picture, or not to the end) they are those of this part, where it
    says which step it is at. None where there is no such variable: other predictions, or a sampler that goes to the end
    and noises anew, weighs its steps otherwise, ends in noise, or cuts off what it makes of predicted noise: where the
    weight is largest (4e8 in UnCLIP's first step), nothing of an error is left.
    Of those that add some noise at each step (DDPM, ancestral) the levels are the schedule's own, and the latent's
    squared error is up to three times what they make expect.
    """
    import numpy as np

    config = getattr(scheduler, "config", {})
    if config.get("stochastic_sampling") or any(word in type(scheduler).__name__ for word in _OTHERWISE):
        return None
    kind = "flow_prediction" if "FlowMatch" in type(scheduler).__name__ else config.get("prediction_type", "epsilon")
    if kind == "epsilon" and any(config.get(said) for said in _CUTS_OFF):
        return None
    levels, products = (getattr(scheduler, name, None) for name in ("sigmas", "alphas_cumprod"))
    if levels is not None:
        sigmas = np.asarray([float(s) for s in levels])
        begin = _begin(scheduler, num_steps)
        sigmas = sigmas[begin : begin + num_steps + 1] if begin is not None else sigmas
    elif products is not None:
        kept = np.asarray([float(products[int(t)]) for t in getattr(scheduler, "timesteps", ())])
        sigmas = np.append(np.sqrt((1 - kept) / kept), 0.0)
    else:
        return None
    if len(sigmas) != num_steps + 1 or kind not in ("flow_prediction", "epsilon", "v_prediction"):
        return None
    if width := config.get("sigma_data"):
        levels = width * np.arctan(sigmas / width)
    else:
        levels = np.arctan(sigmas) if kind == "v_prediction" else sigmas
    twice = 1 + np.flatnonzero(np.diff(levels[1:-1]) == 0)
    levels[twice] = (levels[twice - 1] + levels[twice + 1]) / 2
    return levels


def _begin(scheduler: SchedulerMixin | None, num_steps: int) -> int | None:
    """The step that a sampler began at which ran less than all; None for all of them, or where it does not say."""
    whole, at = (getattr(scheduler, name, None) for name in ("timesteps", "step_index"))
    levels = getattr(scheduler, "sigmas", ())
    if whole is None or not num_steps < len(whole) == len(levels) - 1 or not isinstance(at, int) or at < num_steps:
        return None
    return at - num_steps


def _velocities(
    model: LoadedModel, calls: Sequence[Call], sample_ids: Sequence[str], tick: Callable[[], None]
) -> tuple[Tensor, Tensor]:
    """What candidate and reference step along at one step, on the reference's calls: two float32 tensors (m, d)."""
    import torch

    batches: dict[int, list[tuple[Call, Tensor]]] = {}
    for call in calls:
        if not is_replayable(call):
            raise MetricUndefined(
                "step_sqnr_db: the pipeline gives its denoiser an attention with a state while it runs, and recorded "
                "calls cannot be repeated with it; look at step_divergence"
            )
        denoiser = model.components[call.get("component", model.parts["denoisers"][0])]
        output = replayed_output(denoiser, call, model.device, model.dtype)
        if bad := bad_rows(per_sample(output, call["stop"] - call["start"])):
            sample, what = sample_ids[call["start"] + bad[0]], f"the denoiser's output at step {call['step']}"
            raise NotFinite(
                f"sample {sample}: {what} is NaN or infinite on the reference's input; try compute_dtype=bfloat16 or "
                "float32, or a wider dtype",
                f"{what} of sample {sample}, on the reference's input,",
            )
        batches.setdefault(call["start"], []).append((call, output))
        tick()
    pairs = [_pair(batches[start]) for start in sorted(batches)]
    candidate, reference = (torch.cat([pair[i] for pair in pairs]) for i in (0, 1))
    return candidate, reference


def _pair(batch: Sequence[tuple[Call, Tensor]]) -> tuple[Tensor, Tensor]:
    """The velocities of one batch: the calls' predictions put together as the reference's sampler did.

    Where less is stepped than was predicted, what is left out stands last (variances, the tokens of a picture that was
    given) or first (the frame that a video starts from, the tokens of a prompt).
    """
    first = batch[0][0]
    num, width = first["stop"] - first["start"], int(first["output"].shape[-1])
    given = next((call["velocity"] for call, _ in batch if "velocity" in call), None)
    velocity = None if given is None else _as_predicted(given, first["output"], num)
    wanted = None if velocity is None else velocity.flatten(1)
    outputs, recorded = [output for _, output in batch], [call["output"].float() for call, _ in batch]
    samples = [sample for call, _ in batch if (sample := _sample_of(call)) is not None][:1]
    for at_end in (False, True):
        parts = [[_stepped(one, velocity, num, at_end) for one in column] for column in (outputs, recorded, samples)]
        sample = parts[2][0][:, :1] if samples else None
        try:
            return guided(together(parts[0]), together(parts[1]), wanted, width, sample)
        except MetricUndefined:
            if at_end:
                raise
    raise AssertionError("the second returns or raises")


def _stepped(prediction: Tensor, velocity: Tensor | None, num: int, at_end: bool) -> Tensor:
    """Of a prediction (k * n, ...) what is of the ``velocity``'s size (n, ...), its first or its last values on each
    axis: (n, k, d)."""
    if velocity is None:
        return per_sample(prediction, num)
    if prediction.ndim != velocity.ndim:
        return per_sample(prediction, num)[..., : velocity[0].numel()]
    for axis, size in enumerate(velocity.shape):
        spare = prediction.shape[axis] - size
        if axis and spare > 0:
            prediction = prediction.narrow(axis, spare if at_end else 0, size)
    return per_sample(prediction, num)


def _sample_of(call: Call) -> Tensor | None:
    """The sample that a denoiser was given, as what is of its prediction's shape; None where nothing is."""
    import torch

    given = (*call["args"], *call["kwargs"].values())
    return next(
        (one.float() for one in given if isinstance(one, torch.Tensor) and one.shape == call["output"].shape), None
    )


def _as_predicted(velocity: Tensor, prediction: Tensor, num: int) -> Tensor:
    """What the scheduler was given, (n, ...) in a prediction's order.

    Where a video (k * n, channels, frames, ...) was predicted, some schedulers step the frames of each sample as rows;
    where tokens (k * n, tokens, channels) were, some step the video or image that they are of.
    """
    if prediction.ndim == 5 and velocity.ndim == 4 and len(velocity) == num * prediction.shape[2]:
        return velocity.reshape(num, -1, *velocity.shape[1:]).transpose(1, 2)
    if prediction.ndim == 3 and velocity.ndim > 3 and velocity.shape[1] == prediction.shape[2]:
        return velocity[:num].flatten(2).transpose(1, 2)
    return velocity[:num]
