"""Structural similarity of images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantlab.errors import MetricUndefined
from quantlab.metrics.arrays import Values
from quantlab.metrics.psnr import paired_images

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


def ssim(candidate: Values, reference: Values) -> NDArray[np.float64]:
    """Structural similarity by image, of 8-bit images (n, height, width, channels): (n,), 1 for equal images.

    Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error visibility to structural similarity",
    IEEE TIP 13(4), 2004: Gaussian window of 11 x 11 with sigma 1.5, K = (0.01, 0.03), biased variances, windows inside
    the image only; the mean over windows and channels. No downsampling before.
    Raises :class:`~quantlab.errors.MetricUndefined` for images smaller than the window, not 8-bit, or of two shapes.
    """
    import numpy as np

    cand, ref = paired_images(candidate, reference, "ssim")
    if min(cand.shape[1:3]) < WINDOW:
        raise MetricUndefined(
            f"ssim: images of {cand.shape[1]} x {cand.shape[2]} px hold no window of {WINDOW} px; "
            f"use psnr_db, or images of {WINDOW} px or more"
        )
    return np.array([_ssim_image(c / 255.0, r / 255.0) for c, r in zip(cand, ref, strict=True)])


def _ssim_image(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    mean_x, mean_y = _window_means(x), _window_means(y)
    var_x = _window_means(x * x) - mean_x**2
    var_y = _window_means(y * y) - mean_y**2
    covariance = _window_means(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + K1**2) / (mean_x**2 + mean_y**2 + K1**2)
    structure = (2 * covariance + K2**2) / (var_x + var_y + K2**2)
    return float((luminance * structure).mean())


def _window_means(image: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gaussian-weighted means of all windows inside an image (height, width, channels)."""
    import numpy as np
    from scipy.ndimage import correlate1d

    radius = WINDOW // 2
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / SIGMA) ** 2)
    weights /= weights.sum()
    rows = correlate1d(image, weights, axis=0)[radius:-radius]
    return correlate1d(rows, weights, axis=1)[:, radius:-radius]
