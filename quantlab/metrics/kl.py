"""Divergence of next-token distributions, in nats, token by token.

Natural logarithms; the direction is KL(reference || candidate), p the reference's distribution and q the candidate's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
"""What fp32 leaves of a divergence of 0; a token's is known to some 1e-8 nats."""
QUANTILES = {"kld_median": 0.5, "kld_p90": 0.9, "kld_p99": 0.99, "kld_p999": 0.999, "kld_max": 1.0, "kld_min": 0.0}


@dataclass(frozen=True, kw_only=True, eq=False)
class Distributions:
    """What is known of a model's next-token distributions before they are compared with another's."""

    log_p: Tensor
    """fp32 (tokens, vocabulary)."""
    mass: Tensor
    """float64 (tokens,): their sum, which fp32 log-softmax makes 1 to 1e-7 only."""
    top1: Tensor
    """int64 (tokens,): the most probable token, the first of equal ones."""
    excludes: bool
    """Whether a token has no probability at all."""

    def rows(self, rows: slice) -> Distributions:
        """Those of some of the tokens."""
        return replace(self, log_p=self.log_p[rows], mass=self.mass[rows], top1=self.top1[rows])


def distributions(logits: Tensor) -> Distributions:
    """The distributions of a reference's logits (tokens, vocabulary), of fp32 (or fp64).

    Raises :class:`~quantlab.errors.MetricUndefined` for 16-bit logits.
    """
    import torch

    _check_dtype("reference", logits)
    log_p = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    parts = []
    with torch.no_grad():
        for rows in _slices(logits):
            parts.append(_distributions(logits[rows]))
            log_p[rows] = parts[-1].log_p
            parts[-1] = replace(parts[-1], log_p=log_p[rows])
    return Distributions(
        log_p=log_p,
        mass=torch.cat([p.mass for p in parts]),
        top1=torch.cat([p.top1 for p in parts]),
        excludes=any(p.excludes for p in parts),
    )


def token_statistics(
    reference: Tensor | Distributions, candidate_logits: Tensor, targets: Tensor
) -> dict[str, NDArray[np.float64]]:
    """Per-token numbers of two models on the same tokens: a dict of float64 arrays (tokens,).

    Takes torch logits (tokens, vocabulary) of fp32 (or fp64) on one device, any number of tokens (of the reference also
    what :func:`distributions` made of them, once for many candidates), and the true next tokens (tokens,). Returns
    ``kld`` = sum_v p (log p - log q) in nats; ``same_top1`` (0/1): the most probable token is
    the same; ``delta_p`` = q(target) - p(target); ``nll_reference`` and ``nll_candidate`` in nats. fp32 log-softmax,
    sums in float64, renormalised there; what rounding alone makes negative is 0. ``kld`` is infinite where
    the candidate excludes (logit -inf) a token that the reference allows, a ``nll`` where a model excludes the target.
    Raises :class:`~quantlab.errors.MetricUndefined` for 16-bit logits, for shapes that do not fit, for targets outside
    the vocabulary, and for NaN.
    """
    import numpy as np
    import torch

    known = reference.log_p if isinstance(reference, Distributions) else reference
    _check(known, candidate_logits, targets)
    parts = []
    with torch.no_grad():
        for rows in _slices(known):
            p = reference.rows(rows) if isinstance(reference, Distributions) else _distributions(reference[rows])
            parts.append(_compared(p, _distributions(candidate_logits[rows]), targets[rows]))
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    for name, values in found.items():
        require_finite(np.where(np.isnan(values), values, 0.0), f"{name} of tokens")
    return found


def _slices(logits: Tensor) -> list[slice]:
    rows_at_once = max(1, LOGITS_AT_ONCE // logits.shape[1])
    return [slice(i, i + rows_at_once) for i in range(0, len(logits), rows_at_once)]


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
        _check_dtype(whose, logits)
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


def _check_dtype(whose: str, logits: Tensor) -> None:
    if not logits.is_floating_point() or logits.element_size() < 4:
        raise MetricUndefined(
            f"kld: the {whose}'s logits are {logits.dtype}; 16-bit logits inflate the divergence of a good model "
            "by a quarter and more: run the last projection (lm_head) in float32"
        )


def _distributions(logits: Tensor) -> Distributions:
    import torch

    log_p = logits.float().log_softmax(-1)
    mass = log_p.exp().sum(-1, dtype=torch.float64)
    excludes = bool(torch.isneginf(log_p.amin()))
    return Distributions(log_p=log_p, mass=mass, top1=logits.max(-1).indices, excludes=excludes)


def _compared(p: Distributions, q: Distributions, targets: Tensor) -> dict[str, NDArray[np.float64]]:
    import torch

    probability = p.log_p.exp()
    terms = probability * (p.log_p - q.log_p)
    if p.excludes or q.excludes:
        terms = torch.where(probability > 0, terms, 0.0)  # a token that the reference excludes adds nothing
    excess_p, excess_q = p.mass.log(), q.mass.log()
    kld = terms.sum(-1, dtype=torch.float64) / p.mass - (excess_p - excess_q)
    kld = torch.where((kld < 0) & (kld >= SMALLEST_KLD), 0.0, kld)
    where = targets.to(p.log_p.device).long()[:, None]
    nll_p = excess_p - p.log_p.gather(-1, where)[:, 0]
    nll_q = excess_q - q.log_p.gather(-1, where)[:, 0]
    found = {
        "kld": kld,
        "same_top1": (p.top1 == q.top1).double(),
        "delta_p": (-nll_q).exp() - (-nll_p).exp(),
        "nll_reference": nll_p,
        "nll_candidate": nll_q,
    }
    return {name: values.cpu().numpy() for name, values in found.items()}
