"""Sound: the waveform's signal-to-noise ratio, and the distance of the spectra, which does not see phase."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantlab.errors import MetricUndefined
from quantlab.metrics.arrays import Values, as_float32, relative
from quantlab.metrics.psnr import CAP_DB

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WINDOW, HOP = 2048, 512
"""Samples of a window of the spectrum, and from one to the next."""
FLOOR = 1e-10
"""Least power of a spectrum's bin, full scale 1: what is below is silence."""


def audio_snr_db(candidate: Values, reference: Values) -> NDArray[np.float64]:
    """min(100, 10 log10(sum r^2 / sum (c - r)^2)) in dB, of waveforms (n, channels, samples): (n,).

    Raises :class:`~quantlab.errors.MetricUndefined` for a silent reference and for shapes that differ.
    """
    import numpy as np

    share = _share(candidate, reference, "audio_snr_db")
    return -10.0 * np.log10(np.maximum(share, 10.0 ** (-CAP_DB / 10.0)))


def audio_rel_mse(candidate: Values, reference: Values) -> NDArray[np.float64]:
    """sum (c - r)^2 / sum r^2, of waveforms (n, channels, samples): (n,), what :func:`audio_snr_db` is a logarithm of.

    Raises :class:`~quantlab.errors.MetricUndefined` for a silent reference and for shapes that differ.
    """
    return _share(candidate, reference, "audio_rel_mse")


def log_spectral_distance_db(candidate: Values, reference: Values) -> NDArray[np.float64]:
    """Log-spectral distance in dB, of waveforms (n, channels, samples): (n,), 0 for equal spectra.

    Mean over windows and channels of sqrt(mean over bins of (10 log10 P_r - 10 log10 P_c)^2), with the power spectra P
    of Hann windows of 2048 samples every 512 (shorter sounds: one window), at least 1e-10 (Gray and Markel, "Distance
    measures for speech processing", IEEE TASSP 24(5), 1976, in decibels).
    Raises :class:`~quantlab.errors.MetricUndefined` for shapes that differ.
    """
    import numpy as np

    cand, ref = _paired(candidate, reference, "log_spectral_distance_db")
    levels = [10.0 * np.log10(np.maximum(_power(sound), FLOOR)) for sound in (cand, ref)]
    return np.asarray(np.sqrt(((levels[0] - levels[1]) ** 2).mean(axis=-1)).mean(axis=(1, 2)))


def _share(candidate: Values, reference: Values, name: str) -> NDArray[np.float64]:
    cand, ref = _paired(candidate, reference, name)
    return relative(((cand - ref) ** 2).sum(axis=(1, 2)), (ref**2).sum(axis=(1, 2)), name)


def _power(sound: NDArray[np.float64]) -> NDArray[np.float64]:
    """Power spectra (n, channels, windows, bins) of the windows that lie inside, a full-scale sine's peak at 1/4."""
    import numpy as np
    from scipy.signal import get_window

    size = min(WINDOW, sound.shape[-1])
    window = get_window("hann", size)
    parts = np.lib.stride_tricks.sliding_window_view(sound, size, axis=-1)[..., ::HOP, :]
    return np.asarray(np.abs(np.fft.rfft(parts * (window / window.sum()))) ** 2)


def _paired(candidate: Values, reference: Values, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    import numpy as np

    cand, ref = (as_float32(sound).astype(np.float64) for sound in (candidate, reference))
    if cand.shape != ref.shape or cand.ndim != 3 or not cand.size:
        raise MetricUndefined(
            f"{name}: the candidate's sound has shape {cand.shape}, the reference's {ref.shape}; give both as one "
            "shape (n, channels, samples)"
        )
    return cand, ref
