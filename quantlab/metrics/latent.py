"""How far the final latent moved, before the VAE: the most direct view of a quantized denoiser."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantlab.metrics.arrays import Values, cosine, paired_rows, relative, row_dots

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def latent_rel_mse(candidate: Values, reference: Values) -> NDArray[np.float64]:
    """||z_q - z_r||^2 / ||z_r||^2 of final latents (n, ...): (n,), 0 for equal latents, no unit.

    Raises :class:`~quantlab.errors.MetricUndefined` for different shapes and for a reference of zeros.
    """
    cand, ref = paired_rows(candidate, reference, "latent_rel_mse")
    error = cand - ref
    return relative(row_dots(error, error), row_dots(ref, ref), "latent_rel_mse")


def latent_cosine(candidate: Values, reference: Values) -> NDArray[np.float64]:
    """cos(z_q, z_r) of final latents (n, ...): (n,), 1 for equal directions.

    Raises :class:`~quantlab.errors.MetricUndefined` for different shapes and where a latent is all zeros.
    """
    return cosine(candidate, reference, "latent_cosine")
