"""What a sampler steps along: the denoiser's predictions of a step, put together by guidance.

Classifier-free guidance steps along u + s (c - u), of the predictions with (c) and without (u) the condition; an error
of both counts in that combination and not by itself. Which one a pipeline makes (in which order it asks, at what scale,
with which rescaling) is not known beforehand. But the scheduler is given the result, and it is a weighted sum: its
weights are found from the reference, sample by sample, and the candidate's predictions are put together with the same.
What a pipeline rescales as the image that it predicts has a share of the sample in it, the same for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from quantlab.errors import MetricUndefined
from quantlab.modules.stepping import heard_steps

if TYPE_CHECKING:
    from torch import Tensor

_RESIDUAL = 0.03
"""Relative error up to which a weighted sum is what the scheduler was given: 16-bit arithmetic of guidance rounds."""
_ROUNDED = 1e-4
"""Relative error of a weighted sum that is none but float32's rounding."""
_VALUES = 8
"""Values of a token for each weight that is found from them: fewer would fit whatever they are."""


@contextmanager
def recorded_velocities(scheduler: object | None) -> Iterator[list[Tensor]]:
    """While open, what ``scheduler.step`` is given as the model's output is appended, float32 on the CPU."""
    seen: list[Tensor] = []

    def told(given: Tensor, _: Tensor) -> None:
        import torch

        seen.append(given.detach().to("cpu", torch.float32, copy=True))

    with heard_steps(scheduler, told):
        yield seen


def guided(
    candidate: Tensor, reference: Tensor, velocity: Tensor | None, width: int, sample: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What candidate and reference step along, (n, d) each: their predictions (n, conditions, d), put together.

    By weights of a sample where these make the ``velocity`` of the reference, with the ``sample`` (n, 1, d) that the
    denoiser was given among them where it has a part in it, else by weights of a token (the last ``width`` values of a
    prediction): some pipelines give each token the norm of the conditioned prediction's.
    """
    if velocity is None:
        weights = guidance_weights(reference, None)
        return combined(candidate, weights), combined(reference, weights)
    weights, missed = _fitted(reference, velocity)
    if missed > _ROUNDED and sample is not None and sample.shape[2] == reference.shape[2]:
        beside = together([reference, sample])
        found, left = _fitted(beside, velocity)
        if left < missed / 10:
            candidate, reference = together([candidate, sample]), beside
            weights, missed = found, left
    if missed <= _RESIDUAL:
        return combined(candidate, weights), combined(reference, weights)
    num, conditions, size = reference.shape
    if width < _VALUES * conditions or size % width or velocity.shape != (num, size):
        raise _no_sum()
    weights = guidance_weights(_tokens(reference, width), velocity.reshape(-1, width))
    parts = (combined(_tokens(part, width), weights).reshape(num, size) for part in (candidate, reference))
    return next(parts), next(parts)


def together(predictions: Sequence[Tensor]) -> Tensor:
    """Predictions (n, k, d) of the same samples as one (n, conditions, d). MetricUndefined for those of other sizes."""
    import torch

    if len({part.shape[2] for part in predictions}) > 1:
        raise _no_sum()
    return torch.cat(list(predictions), dim=1)


def _tokens(predictions: Tensor, width: int) -> Tensor:
    """(n, conditions, tokens * width) as (n * tokens, conditions, width)."""
    num, conditions, _ = predictions.shape
    return predictions.reshape(num, conditions, -1, width).transpose(1, 2).reshape(-1, conditions, width)


def guidance_weights(predictions: Tensor, velocity: Tensor | None) -> Tensor:
    """The weights (n, conditions), float64, with which ``predictions`` (n, conditions, d) make ``velocity`` (n, d).

    Least squares, sample by sample. ``velocity`` None: not recorded, and a single prediction is the velocity itself.
    Raises MetricUndefined where no weighted sum is what the scheduler was given.
    """
    import torch

    if velocity is None and predictions.shape[1] == 1:
        return torch.ones(predictions.shape[:2], dtype=torch.float64)
    weights, missed = _fitted(predictions, velocity)
    if missed <= _RESIDUAL:
        return weights
    raise _no_sum()


def _fitted(predictions: Tensor, velocity: Tensor | None) -> tuple[Tensor, float]:
    """The weights of :func:`guidance_weights` and the largest relative error of what they make."""
    import torch

    if velocity is None or velocity.shape != (len(predictions), predictions.shape[2]):
        return torch.zeros(predictions.shape[:2], dtype=torch.float64), float("inf")
    columns, wanted = predictions.double().transpose(1, 2), velocity.double()[..., None]
    weights = torch.linalg.lstsq(columns, wanted, driver="gelsy").solution
    missed = (columns @ weights - wanted).norm(dim=1) / wanted.norm(dim=1).clamp_min(1e-300)
    return weights[..., 0], float(missed.max())


def _no_sum() -> MetricUndefined:
    return MetricUndefined(
        "step_sqnr_db: what the sampler steps along is no weighted sum of the denoiser's predictions, so that their "
        "errors cannot be put together; look at step_divergence, or take guidance_scale=1"
    )


def combined(predictions: Tensor, weights: Tensor) -> Tensor:
    """Predictions (n, conditions, d) put together with ``weights`` (n, conditions): (n, d), float32."""
    import torch

    return torch.einsum("nkd,nk->nd", predictions.double(), weights).float()
