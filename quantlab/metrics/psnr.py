"""Peak signal-to-noise ratio of images, and the 8-bit images that the image metrics take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantlab.errors import MetricUndefined
from quantlab.metrics.arrays import Values, as_array, as_float32
from quantlab.metrics.statistics import require_finite

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

CAP_DB = 100.0
"""PSNR of identical images: infinity has no mean, and tracking stores turn it into 1.8e308."""


def to_uint8(images: Tensor | NDArray[np.floating]) -> NDArray[np.uint8]:
    """Float images (n, ...) in [0, 1], tensor or array, clipped and rounded to 256 values; the layout stays.

    Raises :class:`~quantlab.errors.MetricUndefined` for images that are not float, and for NaN or infinity in one.
    """
    import numpy as np

    is_float = (
        np.issubdtype(images.dtype, np.floating) if isinstance(images, np.ndarray) else images.is_floating_point()
    )
    if not is_float:
        raise MetricUndefined(f"images: to_uint8 takes floats in [0, 1], not {images.dtype}; 8-bit images are ready")
    array = as_float32(images)
    require_finite(array.reshape(len(array), -1).sum(axis=1), "images")
    return (np.clip(array, 0.0, 1.0) * 255.0).round().astype(np.uint8)


def paired_images(candidate: Values, reference: Values, name: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Two arrays or tensors of 8-bit images (n, height, width, channels), checked.

    Raises :class:`~quantlab.errors.MetricUndefined` for floats (how they are rounded changes the number) and for shapes
    that differ or are not of images.
    """
    import numpy as np

    pair = [as_array(images) for images in (candidate, reference)]
    for images in pair:
        if images.dtype != np.uint8:
            raise MetricUndefined(
                f"{name}: the images are {images.dtype}, and the number depends on their rounding; "
                "give 8-bit images, of floats in [0, 1] made by to_uint8"
            )
    if pair[0].shape != pair[1].shape or pair[0].ndim != 4 or not pair[0].size:
        raise MetricUndefined(
            f"{name}: the candidate's images have shape {pair[0].shape}, the reference's {pair[1].shape}; "
            "give both as one shape (n, height, width, channels)"
        )
    return pair[0], pair[1]


def psnr_db(candidate: Values, reference: Values) -> NDArray[np.float64]:
    """min(100, 10 log10(1 / MSE)) in dB by image, of 8-bit images (n, height, width, channels) read as [0, 1]: (n,).

    Images as files have them: rounded to 8 bits, which for small errors is an error of its own (of unrounded images
    the number is several dB higher). The mean over images is the mean of dB, and identical images count 100; the dB of
    the mean error is :func:`psnr_pooled_db`.
    Raises :class:`~quantlab.errors.MetricUndefined` for images that are not 8-bit and for shapes that differ.
    """
    import numpy as np

    smallest = 10.0 ** (-CAP_DB / 10.0)
    return -10.0 * np.log10(np.maximum(_mse(*paired_images(candidate, reference, "psnr_db")), smallest))


def psnr_pooled_db(mse: Values) -> float:
    """min(100, 10 log10(1 / mean MSE)) in dB, of the images' :func:`image_mse` (n,): their mean first, then dB.

    Never above the mean of :func:`psnr_db`, and far below it where many images are identical, which count 100 there.
    Raises :class:`~quantlab.errors.MetricUndefined` for no image, NaN and infinity.
    """
    import numpy as np

    values = np.asarray(mse, dtype=np.float64)
    require_finite(values, "psnr_pooled_db")
    return float(-10.0 * np.log10(max(float(values.mean()), 10.0 ** (-CAP_DB / 10.0))))


def image_mse(candidate: Values, reference: Values) -> NDArray[np.float64]:
    """Mean squared error by image, of 8-bit images (n, height, width, channels) read as [0, 1]: (n,).

    Raises :class:`~quantlab.errors.MetricUndefined` for images that are not 8-bit and for shapes that differ.
    """
    return _mse(*paired_images(candidate, reference, "image_mse"))


def _mse(candidate: NDArray[np.uint8], reference: NDArray[np.uint8]) -> NDArray[np.float64]:
    import numpy as np

    pairs = zip(candidate, reference, strict=True)
    squares = [float(np.sum((c.astype(np.int32) - r) ** 2, dtype=np.int64)) for c, r in pairs]
    return np.array(squares) / (candidate[0].size * 255.0**2)


def num_identical(candidate: Values, reference: Values) -> int:
    """How many of the 8-bit images (n, height, width, channels) equal the reference's in every value."""
    cand, ref = paired_images(candidate, reference, "n_identical")
    return int((cand == ref).all(axis=(1, 2, 3)).sum())
