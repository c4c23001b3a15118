"""Videos and sound: against scikit-image and scipy, and against what is known by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import signal
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from quantlab.errors import MetricUndefined
from quantlab.metrics import METRICS
from quantlab.metrics.audio import audio_rel_mse, audio_snr_db, log_spectral_distance_db
from quantlab.metrics.video import frame_mse, frame_psnr_db, frame_ssim, temporal_rel_error

RANDOM = np.random.default_rng(0)
VIDEO = RANDOM.integers(0, 256, (2, 5, 20, 24, 3), dtype=np.uint8)
NOISY = np.clip(VIDEO.astype(int) + RANDOM.integers(-9, 10, VIDEO.shape), 0, 255).astype(np.uint8)
SOUND = RANDOM.normal(size=(2, 2, 6000)) * 0.1
HISS = SOUND + RANDOM.normal(size=SOUND.shape) * 0.01


def test_psnr_and_ssim_are_those_of_scikit_image_frame_by_frame():
    psnr = [np.mean([peak_signal_noise_ratio(r, c) for r, c in zip(*pair, strict=True)]) for pair in pairs()]
    np.testing.assert_allclose(frame_psnr_db(NOISY, VIDEO), psnr, rtol=1e-9)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    ssim = []
    for pair in pairs():
        frames = []
        for r, c in zip(*pair, strict=True):
            _, full = structural_similarity(r, c, channel_axis=-1, full=True, **settings)
            frames.append(full[5:-5, 5:-5].mean())
        ssim.append(np.mean(frames))
    np.testing.assert_allclose(frame_ssim(NOISY, VIDEO), ssim, atol=1e-6)
    expected = ((NOISY / 255 - VIDEO / 255) ** 2).mean(axis=(1, 2, 3, 4))
    np.testing.assert_allclose(frame_mse(NOISY, VIDEO), expected)


def pairs():
    return zip(VIDEO, NOISY, strict=True)


def test_the_temporal_error_sees_flicker_and_no_error_that_stands_still():
    assert temporal_rel_error(VIDEO, VIDEO).tolist() == [0, 0]
    dark = (VIDEO // 2).astype(np.uint8)
    standing = np.clip(dark.astype(int) + 40, 0, 255).astype(np.uint8)
    assert temporal_rel_error(standing, dark).tolist() == [0, 0]
    flicker = dark.copy()
    flicker[:, 1::2] += 40
    assert (temporal_rel_error(flicker, dark) > 0.05).all()
    still = np.repeat(dark[:, :1], 5, axis=1)
    np.testing.assert_allclose(temporal_rel_error(still, dark), 1)
    by_hand = np.diff(NOISY.astype(float), axis=1) - np.diff(VIDEO.astype(float), axis=1)
    change = np.diff(VIDEO.astype(float), axis=1)
    expected = (by_hand**2).sum(axis=(1, 2, 3, 4)) / (change**2).sum(axis=(1, 2, 3, 4))
    np.testing.assert_allclose(temporal_rel_error(NOISY, VIDEO), expected)


def test_signal_to_noise_of_known_noise():
    np.testing.assert_allclose(audio_snr_db(SOUND * 1.1, SOUND), 20)
    np.testing.assert_allclose(audio_rel_mse(SOUND * 1.1, SOUND), 0.01, rtol=1e-5)
    assert audio_snr_db(SOUND, SOUND).tolist() == [100, 100]
    np.testing.assert_allclose(10 ** (-audio_snr_db(HISS, SOUND) / 10), audio_rel_mse(HISS, SOUND))


def test_the_spectral_distance_is_that_of_scipys_spectra():
    def levels(sound):
        window = signal.get_window("hann", 2048)
        *_, spectra = signal.spectrogram(sound, window=window, noverlap=1536, detrend=False, scaling="spectrum")
        spectra[..., 1:-1, :] /= 2  # scipy's are one-sided: both halves in one
        return 10 * np.log10(np.maximum(spectra, 1e-10))

    expected = np.sqrt(((levels(SOUND) - levels(HISS)) ** 2).mean(axis=-2)).mean(axis=(1, 2))
    np.testing.assert_allclose(log_spectral_distance_db(HISS, SOUND), expected, rtol=1e-4)


def test_the_spectral_distance_of_a_gain_is_the_gain_and_phase_is_not_heard():
    np.testing.assert_allclose(log_spectral_distance_db(SOUND * 2, SOUND), 20 * np.log10(2), rtol=1e-4)
    assert log_spectral_distance_db(-SOUND, SOUND).max() == 0
    assert audio_snr_db(-SOUND, SOUND).max() < 0
    short = SOUND[..., :100]
    np.testing.assert_allclose(log_spectral_distance_db(short * 10, short), 20, rtol=1e-4)


@pytest.mark.parametrize(
    ("metric", "pair"),
    [
        (frame_psnr_db, (VIDEO / 255, VIDEO / 255)),
        (frame_mse, (VIDEO[:1], VIDEO)),
        (frame_ssim, (VIDEO[..., :8, :, :], VIDEO[..., :8, :, :])),
        (temporal_rel_error, (VIDEO[:, :1], VIDEO[:, :1])),
        (temporal_rel_error, (VIDEO, np.repeat(VIDEO[:, :1], 5, axis=1))),
        (audio_snr_db, (SOUND, SOUND * 0)),
        (audio_rel_mse, (SOUND[..., :5], SOUND)),
        (log_spectral_distance_db, (SOUND[0], SOUND[0])),
    ],
)
def test_what_has_no_value_says_so(metric, pair):
    with pytest.raises(MetricUndefined, match=rf"^({metric.__name__}|ssim): "):
        metric(*pair)


def test_each_has_a_row_and_decibels_name_their_error():
    for name in ("frame_psnr_db", "audio_snr_db"):
        assert METRICS[METRICS[name].error_metric].of_reference == 0
    for name in ("frame_ssim", "temporal_rel_error", "log_spectral_distance_db"):
        assert METRICS[name].description
