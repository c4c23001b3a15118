"""What a sampler steps along: the denoiser's predictions of a step, put together by guidance.

Classifier-free guidance steps along u + s (c - u), of the predictions with (c) and without (u) the condition; an error
of both counts in that combination and not by itself. Which one a pipeline makes (in which order it asks, at what scale,
with which rescaling) is not known beforehand. But the scheduler is given the result, and it is a weighted sum: its
weights are found from the reference, sample by sample, and the candidate's predictions are put together with the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from quantlab.errors import MetricUndefined
from quantlab.modules.stepping import heard_steps

if TYPE_CHECKING:
    from torch import Tensor

_RESIDUAL = 0.03
"""Relative error up to which a weighted sum is what the scheduler was given: 16-bit arithmetic of guidance rounds."""


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


def guided(candidate: Tensor, reference: Tensor, velocity: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
    """What candidate and reference step along, (n, d) each: their predictions (n, conditions, d), put together.

    By weights of a sample where these make the ``velocity`` of the reference, else by weights of a token (the last
    ``width`` values of a prediction): some pipelines give each token the norm of the conditioned prediction's.
    """
    try:
        weights = guidance_weights(reference, velocity)
    except MetricUndefined:
        num, conditions, size = reference.shape
        if velocity is None or width < _VALUES * conditions or size % width:
            raise
        weights = guidance_weights(_tokens(reference, width), velocity.reshape(-1, width))
        parts = (combined(_tokens(part, width), weights).reshape(num, size) for part in (candidate, reference))
        return next(parts), next(parts)
    return combined(candidate, weights), combined(reference, weights)


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
    if velocity is not None and velocity.shape == (len(predictions), predictions.shape[2]):
        columns, wanted = predictions.double().transpose(1, 2), velocity.double()[..., None]
        weights = torch.linalg.lstsq(columns, wanted, driver="gelsy").solution
        missed = (columns @ weights - wanted).norm(dim=1) / wanted.norm(dim=1).clamp_min(1e-300)
        if bool((missed <= _RESIDUAL).all()):
            return weights[..., 0]
    raise MetricUndefined(
        "step_sqnr_db: what the sampler steps along is no weighted sum of the denoiser's predictions, so that their "
        "errors cannot be put together; look at step_divergence, or take guidance_scale=1"
    )


def combined(predictions: Tensor, weights: Tensor) -> Tensor:
    """Predictions (n, conditions, d) put together with ``weights`` (n, conditions): (n, d), float32."""
    import torch

    return torch.einsum("nkd,nk->nd", predictions.double(), weights).float()
