"""Perplexity, and its change paired by token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantlab.errors import MetricUndefined
from quantlab.metrics.statistics import require_finite

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

LARGEST_MEAN_NATS = 709.0
"""exp of more is no float64."""


def perplexity(nll: ArrayLike) -> float:
    """exp(mean of the negative log-likelihoods (tokens,), in nats), float64.

    Raises :class:`~quantlab.errors.MetricUndefined` for no token, for NaN or infinity (a token of probability 0), and
    where the number is beyond float64 (a mean above 709 nats).
    """
    import numpy as np

    values = np.asarray(nll, dtype=np.float64)
    require_finite(values, "ppl")
    mean = float(values.mean())
    if mean > LARGEST_MEAN_NATS:
        raise MetricUndefined(
            f"ppl: exp({mean:.4g}), of the mean negative log-likelihood in nats, is beyond float64; the model's logits "
            "are far too large: look at kld_mean and ln_ppl_ratio instead"
        )
    return float(np.exp(mean))


def ln_ppl_ratio(nll_candidate: ArrayLike, nll_reference: ArrayLike) -> NDArray[np.float64]:
    """NLL_q - NLL_p of the same tokens (tokens,), in nats; its mean is ln(PPL_q / PPL_p).

    NaN where both models exclude a token.
    Raises :class:`~quantlab.errors.MetricUndefined` for different numbers of tokens.
    """
    import numpy as np

    cand, ref = np.asarray(nll_candidate, dtype=np.float64), np.asarray(nll_reference, dtype=np.float64)
    if cand.shape != ref.shape:
        raise MetricUndefined(
            f"ln_ppl_ratio: {cand.shape} tokens of the candidate, {ref.shape} of the reference; score the same tokens"
        )
    with np.errstate(invalid="ignore"):
        return cand - ref
