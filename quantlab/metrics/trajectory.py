"""Where along the sampler's steps the error comes from (teacher-forced) and how it grows (free-running)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from quantlab.errors import MetricUndefined
from quantlab.metrics.arrays import Values, as_float32, paired_rows, relative, row_dots

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

Steps: TypeAlias = "Tensor | NDArray[np.floating] | Sequence[Tensor] | Sequence[NDArray[np.floating]]"
"""Of shape (num_steps, n, ...), or num_steps of shape (n, ...)."""
CAP_DB = 100.0


def step_sqnr_db(
    candidate_velocities: Steps, reference_velocities: Steps
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """10 log10(||v_r||^2 / ||v_q - v_r||^2) in dB, at most 100, of velocities on the reference's inputs x_t.

    Returns the mean over samples (num_steps,) and the table (num_steps, n); a sample's value is its column's mean.
    Raises :class:`~quantlab.errors.MetricUndefined` for NaN, for shapes that differ, and for a reference of zeros.
    """
    import numpy as np

    ratios = _error_ratios(candidate_velocities, reference_velocities, "step_sqnr_db")
    table = -10.0 * np.log10(np.maximum(ratios, 10.0 ** (-CAP_DB / 10.0)))
    return table.mean(axis=1), table


def step_divergence(candidate_steps: Steps, reference_steps: Steps) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """||x_k^q - x_k^r|| / ||x_k^r|| of the states of two free-running samplers, no unit.

    Returns the mean over samples (num_steps,) and the table (num_steps, n); a sample's value is its column's mean.
    Raises :class:`~quantlab.errors.MetricUndefined` for NaN, for shapes that differ, and for a reference of zeros.
    """
    import numpy as np

    table = np.sqrt(_error_ratios(candidate_steps, reference_steps, "step_divergence"))
    return table.mean(axis=1), table


def weighted_velocity_mse(
    candidate_velocities: Steps, reference_velocities: Steps, sigmas: Values
) -> NDArray[np.float64]:
    """sum_k (sigma_{k+1} - sigma_k)^2 * mean((v_q - v_r)^2) by sample: (n,), in squared units of the latent.

    ``sigmas`` are the num_steps + 1 noise levels of the sampler. For an Euler flow sampler with velocities on the
    reference's inputs this is the final latent's squared error to first order, the steps' errors taken as independent.
    Raises :class:`~quantlab.errors.MetricUndefined` for NaN, for shapes that differ, and for another number of sigmas.
    """
    import numpy as np

    name = "weighted_velocity_mse"
    pairs = _step_pairs(candidate_velocities, reference_velocities, name)
    levels = as_float32(sigmas).astype(np.float64)
    if levels.shape != (len(pairs) + 1,):
        raise MetricUndefined(
            f"{name}: {len(pairs)} steps lie between {len(pairs) + 1} sigmas, not {levels.shape}; "
            "give the sampler's noise levels with the last one"
        )
    errors = np.stack([row_dots(c - r, c - r) / c.shape[1] for c, r in pairs])
    _refuse_nonfinite(errors, name)
    return np.diff(levels) ** 2 @ errors


def _error_ratios(candidate: Steps, reference: Steps, name: str) -> NDArray[np.float64]:
    """||c - r||^2 / ||r||^2 by step and sample: (num_steps, n)."""
    import numpy as np

    pairs = _step_pairs(candidate, reference, name)
    steps = [relative(row_dots(c - r, c - r), row_dots(r, r), f"{name}/{k}") for k, (c, r) in enumerate(pairs)]
    table = np.stack(steps)
    _refuse_nonfinite(table, name)
    return table


def _step_pairs(
    candidate: Steps, reference: Steps, name: str
) -> Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    if len(candidate) != len(reference) or not len(reference):
        raise MetricUndefined(
            f"{name}: the candidate has {len(candidate)} steps, the reference {len(reference)}; "
            "run both with the same num_inference_steps"
        )
    return [paired_rows(c, r, f"{name}/{k}") for k, (c, r) in enumerate(zip(candidate, reference, strict=True))]


def _refuse_nonfinite(table: NDArray[np.float64], name: str) -> None:
    import numpy as np

    bad = np.argwhere(~np.isfinite(table))
    if bad.size:
        step, sample = bad[0]
        raise MetricUndefined(
            f"{name}/{step}: sample {sample} is {table[step, sample]}; "
            "the candidate overflows at this step: try compute_dtype=bfloat16 or float32, or a wider dtype"
        )
