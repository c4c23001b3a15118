"""The metrics: one file a number, and one table that says what each number means.

Names are those that are logged, without the prefix ``quality/``. A metric compares a candidate with the unquantized
reference on identical inputs; the functions return one value a sample, and ``quantlab.metrics.statistics`` makes a mean
with an uncertainty of them.

To add a metric: one file here, one row below, and a line in the protocol that measures it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from quantlab.vocabulary.numbers import ON_TOP


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What a number means; the number itself is computed in the file that the description's subject names."""

    name: str
    unit: str
    higher_is_better: bool | None
    """None: neither direction is better (a property of the reference, or a signed number whose best value is 0)."""
    protocols: tuple[str, ...]
    """Rows of ``protocols.PROTOCOLS`` that measure it."""
    of_reference: float | None = None
    """What the metric is for the reference itself, where that is known beforehand; else its own samples tell."""
    at_least: float = -math.inf
    at_most: float = math.inf
    """The range of what can be; an interval ends there, and one of a difference of two values where theirs would."""
    error_metric: str = ""
    """The metric on whose scale distances are judged, where this one has no zero (decibels); empty: itself."""
    is_binary: bool = False
    """True where a sample is 0 or 1: two candidates are then compared by McNemar's test."""
    is_curve: bool = False
    """True where the number is one value a sampler step (``quality/<name>/<step>``), which is drawn as a map."""
    is_log_scale: bool = False
    """True where values span orders of magnitude, so that only their logarithms can be told apart by colour."""
    description: str
    version: int = 1
    """Raised when the definition changes, or which samples it is of: numbers of different versions are not compared."""

    @property
    def bounds(self) -> tuple[float, float]:
        """The range of a value."""
        return self.at_least, self.at_most

    @property
    def bounds_of_difference(self) -> tuple[float, float]:
        """The range of one value less another."""
        return self.at_least - self.at_most, self.at_most - self.at_least


_DIFFUSION, _LANGUAGE = ("diffusion",), ("language",)
_OUTPUTS = ("encoder", "vision", "module")
_WRITTEN = (*_LANGUAGE, "seq2seq")

_ROWS = (
    Metric(
        name="latent_rel_mse",
        unit="1",
        higher_is_better=False,
        protocols=_DIFFUSION,
        of_reference=0.0,
        at_least=0.0,
        description="squared error of the final latent over the squared norm of the reference's",
    ),
    Metric(
        name="latent_cosine",
        unit="1",
        higher_is_better=True,
        protocols=_DIFFUSION,
        of_reference=1.0,
        at_least=-1.0,
        at_most=1.0,
        description="cosine of the final latents",
    ),
    Metric(
        name="psnr_db",
        unit="dB",
        higher_is_better=True,
        protocols=_DIFFUSION,
        of_reference=100.0,
        at_least=0.0,
        at_most=100.0,
        error_metric="image_mse",
        description="peak signal-to-noise ratio to the reference's image, both rounded to 8 bits as files have them; "
        "mean of dB over images, where an identical one counts 100 (n_identical says how many these are)",
    ),
    Metric(
        name="psnr_pooled_db",
        unit="dB",
        higher_is_better=True,
        protocols=_DIFFUSION,
        of_reference=100.0,
        at_least=0.0,
        at_most=100.0,
        error_metric="image_mse",
        description="peak signal-to-noise ratio of the error's mean over all 8-bit images, as some publish it: never "
        "above psnr_db, which identical images raise",
    ),
    Metric(
        name="image_mse",
        unit="1",
        higher_is_better=False,
        protocols=_DIFFUSION,
        of_reference=0.0,
        at_least=0.0,
        at_most=1.0,
        description="mean squared error of the image, full scale 1: what PSNR is the logarithm of, before its limit",
    ),
    Metric(
        name="n_identical",
        unit="images",
        higher_is_better=True,
        protocols=_DIFFUSION,
        at_least=0.0,
        description="images that equal the reference's in every 8-bit value",
    ),
    Metric(
        name="ssim",
        unit="1",
        higher_is_better=True,
        protocols=_DIFFUSION,
        of_reference=1.0,
        at_least=-1.0,
        at_most=1.0,
        description="structural similarity to the reference's image, both rounded to 8 bits (Wang 2004: Gaussian "
        "window, valid region)",
    ),
    Metric(
        name="frame_psnr_db",
        unit="dB",
        higher_is_better=True,
        protocols=_DIFFUSION,
        of_reference=100.0,
        at_least=0.0,
        at_most=100.0,
        error_metric="frame_mse",
        description="peak signal-to-noise ratio to the reference's frame in 8 bits, mean of dB over a video's frames, "
        "where an identical one counts 100",
    ),
    Metric(
        name="frame_mse",
        unit="1",
        higher_is_better=False,
        protocols=_DIFFUSION,
        of_reference=0.0,
        at_least=0.0,
        at_most=1.0,
        description="mean squared error of the video's frames, full scale 1: what PSNR is the logarithm of",
    ),
    Metric(
        name="frame_ssim",
        unit="1",
        higher_is_better=True,
        protocols=_DIFFUSION,
        of_reference=1.0,
        at_least=-1.0,
        at_most=1.0,
        description="structural similarity to the reference's frame in 8 bits, mean over a video's frames",
    ),
    Metric(
        name="temporal_rel_error",
        unit="1",
        higher_is_better=False,
        protocols=_DIFFUSION,
        of_reference=0.0,
        at_least=0.0,
        description="squared error of what changes from frame to frame, over the square of the reference's change",
    ),
    Metric(
        name="audio_snr_db",
        unit="dB",
        higher_is_better=True,
        protocols=_DIFFUSION,
        of_reference=100.0,
        at_most=100.0,
        error_metric="audio_rel_mse",
        description="signal-to-noise ratio of the waveform to the reference's, at most 100",
    ),
    Metric(
        name="audio_rel_mse",
        unit="1",
        higher_is_better=False,
        protocols=_DIFFUSION,
        of_reference=0.0,
        at_least=0.0,
        description="squared error of the waveform over the reference's energy: what its ratio in dB is of",
    ),
    Metric(
        name="log_spectral_distance_db",
        unit="dB",
        higher_is_better=False,
        protocols=_DIFFUSION,
        of_reference=0.0,
        at_least=0.0,
        description="log-spectral distance to the reference's sound (Hann windows of 2048 samples every 512)",
    ),
    Metric(
        name="step_sqnr_db",
        unit="dB",
        higher_is_better=True,
        protocols=_DIFFUSION,
        is_curve=True,
        description="signal-to-quantization-noise, at each step, of what the sampler steps along (predictions with and "
        "without the condition put together by guidance), both models on the reference's input",
        version=3,
    ),
    Metric(
        name="step_divergence",
        unit="1",
        higher_is_better=False,
        protocols=_DIFFUSION,
        is_curve=True,
        is_log_scale=True,
        at_least=0.0,
        description="relative distance of the two free-running trajectories at each step",
        version=2,
    ),
    Metric(
        name="weighted_velocity_mse",
        unit="1",
        higher_is_better=False,
        protocols=_DIFFUSION,
        at_least=0.0,
        description="error of what the sampler steps along, on the reference's inputs, each step weighted by its "
        "squared length",
        version=4,
    ),
    Metric(
        name="class_accuracy",
        unit="fraction",
        higher_is_better=True,
        at_least=0.0,
        at_most=1.0,
        protocols=_DIFFUSION,
        is_binary=True,
        description="images that a fixed classifier takes for the class that was asked for",
    ),
    Metric(
        name="judge_agreement",
        unit="fraction",
        higher_is_better=True,
        protocols=_DIFFUSION,
        is_binary=True,
        of_reference=1.0,
        at_least=0.0,
        at_most=1.0,
        description="images that a fixed classifier puts in the same class as the reference's",
    ),
    Metric(
        name="frechet_judge",
        unit="1",
        higher_is_better=False,
        protocols=_DIFFUSION,
        at_least=0.0,
        description="Frechet distance to the reference's images in a fixed classifier's features",
    ),
    Metric(
        name="kld_mean",
        unit="nats/token",
        higher_is_better=False,
        protocols=_WRITTEN,
        of_reference=0.0,
        at_least=0.0,
        description="Kullback-Leibler divergence of the candidate's next-token distribution from the reference's",
    ),
    Metric(
        name="kld_median",
        unit="nats",
        higher_is_better=False,
        protocols=_LANGUAGE,
        at_least=0.0,
        description="median over tokens of the divergence",
    ),
    Metric(
        name="kld_p90",
        unit="nats",
        higher_is_better=False,
        protocols=_LANGUAGE,
        at_least=0.0,
        description="90th percentile over tokens of the divergence",
    ),
    Metric(
        name="kld_p99",
        unit="nats",
        higher_is_better=False,
        protocols=_LANGUAGE,
        at_least=0.0,
        description="99th percentile over tokens of the divergence",
    ),
    Metric(
        name="kld_p999",
        unit="nats",
        higher_is_better=False,
        protocols=_LANGUAGE,
        at_least=0.0,
        description="99.9th percentile over tokens of the divergence",
    ),
    Metric(
        name="kld_max",
        unit="nats",
        higher_is_better=False,
        protocols=_LANGUAGE,
        at_least=0.0,
        description="largest divergence of a token",
    ),
    Metric(
        name="llama_cpp_kld_mean",
        unit="nats/token",
        higher_is_better=False,
        protocols=_LANGUAGE,
        at_least=0.0,
        description="kld_mean of the candidate's file by llama.cpp's own kernels, where it is installed",
    ),
    Metric(
        name="llama_cpp_ppl",
        unit="1",
        higher_is_better=False,
        protocols=_LANGUAGE,
        at_least=1.0,
        description="perplexity by llama.cpp's own kernels, where it is installed",
    ),
    Metric(
        name="kld_min",
        unit="nats",
        higher_is_better=None,
        protocols=_LANGUAGE,
        description="smallest divergence of a token: a check of the arithmetic, 0 within 1e-6",
    ),
    Metric(
        name="same_top1",
        unit="fraction",
        higher_is_better=True,
        protocols=_WRITTEN,
        of_reference=1.0,
        at_least=0.0,
        at_most=1.0,
        description="tokens whose most probable successor is the reference's",
    ),
    Metric(
        name="delta_p_rms",
        unit="probability",
        higher_is_better=False,
        protocols=_LANGUAGE,
        at_least=0.0,
        at_most=1.0,
        description="root mean square change of the true token's probability",
    ),
    Metric(
        name="delta_p_mean",
        unit="probability",
        higher_is_better=None,
        protocols=_WRITTEN,
        of_reference=0.0,
        at_least=-1.0,
        at_most=1.0,
        description="mean change of the true token's probability; near 0 while the RMS is not: noise without bias",
    ),
    Metric(
        name="ln_ppl_ratio",
        unit="nats/token",
        higher_is_better=False,
        protocols=_WRITTEN,
        of_reference=0.0,
        description="logarithm of the candidate's perplexity over the reference's, paired by token",
    ),
    Metric(
        name="ppl",
        unit="1",
        higher_is_better=False,
        protocols=_WRITTEN,
        at_least=1.0,
        description="the candidate's perplexity; comparable only under one protocol and tokenizer",
    ),
    Metric(
        name="ppl_ref",
        unit="1",
        higher_is_better=None,
        protocols=_WRITTEN,
        at_least=1.0,
        description="the reference's perplexity on the same tokens",
    ),
    Metric(
        name="output_cosine",
        unit="1",
        higher_is_better=True,
        protocols=_OUTPUTS,
        of_reference=1.0,
        at_least=-1.0,
        at_most=1.0,
        description="cosine of the output with the reference's",
    ),
    Metric(
        name="output_rel_error",
        unit="1",
        higher_is_better=False,
        protocols=_OUTPUTS,
        of_reference=0.0,
        at_least=0.0,
        description="norm of the output's error over the norm of the reference's output",
    ),
)

METRICS: dict[str, Metric] = {metric.name: metric for metric in _ROWS}


def bounds_of(key: str) -> tuple[float, float]:
    """The range of a number by the name under which it is tracked (``quality/floor_bf16/ssim``)."""
    metric = METRICS.get(key.rpartition("/")[2])
    if metric is None:
        return -math.inf, math.inf
    return metric.bounds_of_difference if key.startswith(f"{ON_TOP}/") else metric.bounds


def metric_called(text: str) -> str:
    """The metric's name of what people write: MLflow's (``quality/psnr_db``), or one without its unit (``psnr``)."""
    name = text.removeprefix("quality/")
    short = [m for m in METRICS if m.rpartition("_")[0] == name and METRICS[m].unit.lower() == m.rpartition("_")[2]]
    return short[0] if name not in METRICS and len(short) == 1 else name
