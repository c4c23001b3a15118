"""Divergence of next-token distributions, in nats, token by token.

Natural logarithms; the direction is KL(reference || candidate), p the reference's distribution and q the candidate's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantlab.errors import MetricUndefined
from quantlab.metrics.statistics import require_finite

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray
    from torch import Tensor

LOGITS_AT_ONCE = 2**20
"""Logits of a model that are worked on together, whole tokens at a time: bounds the copies that are made of them to
32 MiB for any vocabulary, and keeps them near the processor."""
SMALLEST_KLD = -1e-6
QUANTILES = {"kld_median": 0.5, "kld_p90": 0.9, "kld_p99": 0.99, "kld_p999": 0.999, "kld_max": 1.0, "kld_min": 0.0}


def token_statistics(
    reference_logits: Tensor, candidate_logits: Tensor, targets: Tensor
) -> dict[str, NDArray[np.float64]]:
    """Per-token numbers of two models on the same tokens: a dict of float64 arrays (tokens,).

    Takes torch logits (tokens, vocabulary) of fp32 (or fp64) on one device, any number of tokens, and the true next
    tokens (tokens,). Returns ``kld`` = sum_v p (log p - log q) in nats; ``same_top1`` (0/1): the most probable token is
    the same; ``delta_p`` = q(target) - p(target); ``nll_reference`` and ``nll_candidate`` in nats. fp32 log-softmax,
    sums in float64, renormalised there so that rounding cannot make a divergence negative. ``kld`` is infinite where
    the candidate excludes (logit -inf) a token that the reference allows, a ``nll`` where a model excludes the target.
    Raises :class:`~quantlab.errors.MetricUndefined` for 16-bit logits, for shapes that do not fit, for targets outside
    the vocabulary, and for NaN.
    """
    import numpy as np

    _check(reference_logits, candidate_logits, targets)
    rows_at_once = max(1, LOGITS_AT_ONCE // reference_logits.shape[1])
    slices = [slice(i, i + rows_at_once) for i in range(0, len(targets), rows_at_once)]
    parts = [_rows(reference_logits[rows], candidate_logits[rows], targets[rows]) for rows in slices]
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    for name, values in found.items():
        require_finite(np.where(np.isnan(values), values, 0.0), f"{name} of tokens")
    return found


def kld_quantiles(kld: ArrayLike) -> dict[str, float]:
    """Quantiles over tokens (linear interpolation), in nats, under the names of ``QUANTILES``.

    Infinite where a divergence is: then the largest, and the quantiles that it reaches.
    Raises :class:`~quantlab.errors.MetricUndefined` for no token, NaN, and a divergence below -1e-6, which no two
    distributions have: the logits were rounded or are not of the same tokens.
    """
    import numpy as np

    values = np.asarray(kld, dtype=np.float64)
    require_finite(np.where(np.isinf(values), 0.0, values), "kld of tokens")
    if values.min() < SMALLEST_KLD:
        raise MetricUndefined(
            f"kld_min: token {int(values.argmin())} has a divergence of {values.min():.3g} nats, which cannot be; "
            "compute the log-probabilities in fp32 from fp32 logits"
        )
    with np.errstate(invalid="ignore"):  # between two infinite values: NaN
        found = np.quantile(values, list(QUANTILES.values()))
    found = np.where(np.isnan(found), np.inf, found)
    return {name: float(value) for name, value in zip(QUANTILES, found, strict=True)}


def _check(reference_logits: Tensor, candidate_logits: Tensor, targets: Tensor) -> None:
    for whose, logits in (("reference", reference_logits), ("candidate", candidate_logits)):
        if not logits.is_floating_point() or logits.element_size() < 4:
            raise MetricUndefined(
                f"kld: the {whose}'s logits are {logits.dtype}; 16-bit logits inflate the divergence of a good model "
                "by a quarter and more: run the last projection (lm_head) in float32"
            )
    shapes = [tuple(t.shape) for t in (reference_logits, candidate_logits, targets)]
    if len(shapes[0]) != 2 or shapes[0] != shapes[1] or shapes[2] != shapes[0][:1] or not shapes[2][0]:
        raise MetricUndefined(
            f"kld: reference logits {shapes[0]}, candidate logits {shapes[1]}, targets {shapes[2]}; "
            "give (tokens, vocabulary) twice and (tokens,), of one tokenizer and at least one token"
        )
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= shapes[0][1]:
        raise MetricUndefined(
            f"kld: targets from {low} to {high} for a vocabulary of {shapes[0][1]}; use the tokenizer of this model"
        )


def _rows(reference: Tensor, candidate: Tensor, targets: Tensor) -> dict[str, NDArray[np.float64]]:
    import torch

    with torch.no_grad():
        log_p, log_q = reference.float().log_softmax(-1), candidate.float().log_softmax(-1)
        p = log_p.exp()
        # fp32 log-softmax is normalised to 1e-7 only; what is missing, exactly, is one number a token
        mass_p = p.sum(-1, dtype=torch.float64)
        excess_p, excess_q = mass_p.log(), log_q.exp().sum(-1, dtype=torch.float64).log()
        terms = torch.where(p > 0, p * (log_p - log_q), 0.0)  # a token that the reference excludes adds nothing
        kld = terms.sum(-1, dtype=torch.float64) / mass_p - (excess_p - excess_q)
        where = targets.to(log_p.device).long()[:, None]
        nll_p = excess_p - log_p.gather(-1, where)[:, 0]
        nll_q = excess_q - log_q.gather(-1, where)[:, 0]
        found = {
            "kld": kld,
            "same_top1": (reference.argmax(-1) == candidate.argmax(-1)).double(),
            "delta_p": (-nll_q).exp() - (-nll_p).exp(),
            "nll_reference": nll_p,
            "nll_candidate": nll_q,
        }
        return {name: values.cpu().numpy() for name, values in found.items()}
