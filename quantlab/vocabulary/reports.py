"""What comes out: plain values that the stages return. Torch-free (tensors appear only as ``Any``)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from shutil import get_terminal_size
from typing import Any

from quantlab.progress import headline_of
from quantlab.vocabulary.dtypes import COMPUTE_DTYPES
from quantlab.vocabulary.shown import as_html

MOST_SHOWN = 4
MOST_CHARS = 120
SHOWN = "_shown"
"""Attribute of a :class:`RunReport`, no field: a function that gives its HTML."""


def brief(report: Any) -> str:
    """A report for people: a line a field that says something, at most 15, long ones counted instead of listed."""
    lines = []
    width = min(get_terminal_size().columns, MOST_CHARS)
    for one in fields(report):
        value = getattr(report, one.name)
        if value is not None and not (isinstance(value, (str, tuple, Mapping, bool)) and not value):
            lines.append(f"  {headline_of(f'{one.name}: {_brief_value(value)}', width - len('   …'))}")
    more = [f"  ... and {len(lines) - 12} more fields"] if len(lines) > 13 else []
    return "\n".join([type(report).__name__, *(lines[:12] if more else lines), *more])


def page(report: Any) -> str:
    """A report as a notebook shows it."""
    return as_html(report, _brief_value)


def _brief_value(value: Any) -> str:
    if is_dataclass(value) and not isinstance(value, (MetricValue, type)):
        text = ", ".join(repr(value).splitlines()[1:4]).replace("  ", "")
    elif isinstance(value, Mapping) and len(value) > MOST_SHOWN:
        first = ", ".join(f"{k}={_brief_value(v)}" for k, v in list(value.items())[:MOST_SHOWN])
        text = f"{len(value)} entries: {first}..."
    elif isinstance(value, Mapping):
        text = ", ".join(f"{k}={_brief_value(v)}" for k, v in value.items())
    elif isinstance(value, (tuple, list)) and not all(isinstance(v, int) for v in value):
        texts = [v for v in value if isinstance(v, str)]  # sentences are told, of parts their number
        text = "; ".join(texts) if texts else f"{len(value)} of {type(value[0]).__name__}"
    elif hasattr(value, "shape"):
        text = f"array of {tuple(value.shape)}"
    else:
        text = short(value) if isinstance(value, float) else str(value)
    return headline_of(text, MOST_CHARS)


def short(value: float) -> str:
    """Four digits, and more where a number that is not 1 would read as 1."""
    digits = next((n for n in range(4, 17) if value == 1 or float(f"{value:.{n}g}") != 1), 17)
    return f"{value:.{digits}g}"


@dataclass(frozen=True, kw_only=True)
class StoredWeight:
    """What the tensors of one quantized layer show; made by a backend's ``read_back``."""

    dtype: str
    """quantlab's name of the format, concluded from the tensors (``int4``, ``nf4``, ``q4_k``...)."""
    group_size: int | None
    """Weights that share one scale, counted from the scales' number; None: one scale a row (or for the tensor)."""
    dense: Any
    """The weight that the layer computes with, dequantized: tensor of shape (out_features, in_features), in fp32 or in
    16 bit where these hold each value exactly."""
    is_simulated: bool = False
    """True where the storage is wider than the dtype's name says."""
    activation_dtype: str = "none"
    activation_granularity: str = ""
    """Which activations share a scale, as the layer shows it: ``per-tensor``, ``per-token``, ``per-block``, with
    `` static`` behind it where it was measured; "" where activations are left alone."""
    column_scale: Any = None
    """fp32 (in_features,): what the weight's columns were multiplied by before they were rounded; None: nothing."""
    span: int | None = None
    """Weights whose blocks' scales are rounded beside one another, or that have one scale all together; None: the
    scale of each block (or row) stands alone."""
    span_error: float | None = None
    """How large an error that makes, as a share of the largest weight of the span; None: as the dtype's codes do."""
    floor: float = 0.0
    """The absolute error that the format's own scales leave in any weight, where they are 16-bit numbers."""
    note: str = ""
    """What the layer decides at each call, which dtypes do not say."""


@dataclass(frozen=True, kw_only=True, repr=False)
class LayerReport:
    """One row of the read-back table: a holder of weights, and what it became."""

    __repr__ = brief
    _repr_html_ = page

    component: str
    name: str
    """Path of the layer; of the parameter, for one that is in no layer (experts)."""
    kind: str
    """``linear``, ``conv``, ``embedding``, ``expert``, ``recurrent`` or ``other``."""
    shape: tuple[int, ...]
    """(out_features, in_features), as backends store it."""
    status: str
    """``quantized``, ``fallback`` (another dtype, by on_mismatch), ``skipped`` (on_mismatch=skip), ``excluded``, or
    ``left``: of a kind that is not asked for, or that no backend stores."""
    dtype: str
    group_size: int | None = None
    activation_dtype: str = "none"
    activation_granularity: str = ""
    bits_per_weight: float | None = None
    """Stored bits per weight, scales and zero points included, bias not."""
    weight_bytes: int = 0
    scale_bytes: int = 0
    weight_rel_error: float | None = None
    """||W - Wq|| / ||W|| (Frobenius), fp32."""
    worst_row_rel_error: float | None = None
    """The same of the row (output feature) where it is largest, of those that are not all zeros."""
    product_rel_error: float | None = None
    """Of a few random rows: the layer's answer against the product of its decoded weight; None: not asked (static
    activation scales)."""
    kernel: str = ""
    """The operator that multiplied, by torch's name."""
    is_simulated: bool = False
    reason: str = ""
    shares: str = ""
    """Name of the layer in whose weight this one's is stored; "": it has its own."""

    @property
    def num_weights(self) -> int:
        """Weights that are in the holder."""
        return math.prod(self.shape)

    @property
    def is_stored_quantized(self) -> bool:
        """Quantized, or fallen back to a quantized dtype."""
        return self.status in ("quantized", "fallback") and self.dtype not in COMPUTE_DTYPES


@dataclass(frozen=True, kw_only=True, repr=False)
class QuantizationReport:
    """What the quantize stage did, as read back from the tensors."""

    __repr__ = brief
    _repr_html_ = page

    layers: tuple[LayerReport, ...]
    num_parameters: int
    resolved: Mapping[str, Any] = field(default_factory=dict)
    """Backend-own settings that were ``auto`` and what the stage made of them."""
    unquantized: tuple[str, ...] = ()
    """A sentence for each component of which much stays unquantized: share, largest holders, way out."""

    @property
    def coverage(self) -> float:
        """Share of the components' parameters that are quantized (fallback layers to a quantized dtype count), each
        stored weight once."""
        num = sum(r.num_weights for r in self.layers if r.is_stored_quantized and not r.shares)
        return num / self.num_parameters if self.num_parameters else 0.0


@dataclass(frozen=True, kw_only=True, repr=False)
class CalibratedLayer:
    """What calibration data showed of one layer; errors in dB of signal over error, larger is better.

    ``before`` is the same format with the plain algorithm, ``after`` the calibrated layer; both answer the inputs that
    the reference's layer gets. None: no such format without data, or evidence was switched off.
    """

    __repr__ = brief
    _repr_html_ = page

    component: str
    name: str
    input_absmax: float
    """Largest |input| over all calls."""
    outlier_ratio: float
    """Largest over median of the input channels' absmax: 1 is flat, above 10 a per-tensor scale hurts."""
    weight_sqnr_db_before: float | None = None
    weight_sqnr_db_after: float | None = None
    output_sqnr_db_before: float | None = None
    output_sqnr_db_after: float | None = None
    step_sqnr_db: Mapping[int, float | None] = field(default_factory=dict)
    """Denoising step -> ``output_sqnr_db_after`` of its calls; one step, 0, for models without."""


@dataclass(frozen=True, kw_only=True, repr=False)
class CalibrationReport:
    """What a job's calibration used and found."""

    __repr__ = brief
    _repr_html_ = page

    sha256: str
    """Of all recorded calls of its components."""
    num_samples: int
    batch_size: int
    """As used: smaller than asked for where memory ran out."""
    num_calls: int
    layers: tuple[CalibratedLayer, ...] = ()
    shared_tokens_of_calibration: float = 0.0
    """Share of its tokens that lie in runs which the evaluation has too; text and prompts."""
    shared_tokens_of_evaluation: float = 0.0


@dataclass(frozen=True, kw_only=True, repr=False)
class MemoryReport:
    """Bytes of one component, each storage counted once."""

    __repr__ = brief
    _repr_html_ = page

    weights_bytes: int
    """All parameters and buffers, with everything that tensor subclasses and quantization states hold."""
    quantized_bytes: int
    """Of these, the codes of quantized layers."""
    scale_bytes: int
    """Of these, scales, zero points, code tables of quantized layers."""
    other_bytes: int
    bytes_at_16_bit: int
    """The same logical parameters and buffers at 2 bytes each, and ``index_bytes`` as they are."""
    num_parameters: int
    index_bytes: int = 0
    """Of ``other_bytes``, buffers of truth values and whole numbers (masks, positions): of no weight."""

    @property
    def bits_per_weight(self) -> float:
        """Bits of each logical value, buffers included but for ``index_bytes``, as ``weights_bytes`` has them too."""
        return bits_per_weight([self])

    def of_values_in(self, size: MemoryReport) -> MemoryReport:
        """These bytes, of the values that another report of the component has counted."""
        return replace(
            self,
            bytes_at_16_bit=size.bytes_at_16_bit,
            num_parameters=size.num_parameters,
            index_bytes=size.index_bytes,
        )


def bits_per_weight(parts: Iterable[MemoryReport]) -> float:
    """Stored bits of each logical value of several components together; 0 of none."""
    known = [(p.weights_bytes - p.index_bytes, p.bytes_at_16_bit - p.index_bytes) for p in parts]
    stored, at_16_bit = (sum(column) for column in zip(*known, strict=True)) if known else (0, 0)
    return 16 * stored / at_16_bit if at_16_bit else 0.0


@dataclass(frozen=True, kw_only=True, repr=False)
class Measurements:
    """What a protocol measured on a candidate against the reference; arrays are numpy, row i is sample i."""

    __repr__ = brief
    _repr_html_ = page

    samples: Mapping[str, Any]
    """Metric name without ``quality/`` -> float array (n,); NaN is refused before it gets here."""
    clusters: Any = None
    """int array (n,): the cluster (prompt, text chunk) of each sample; None: each sample is its own."""
    strata: Any = None
    """int array (n,): the stratum (class) of each sample; None: one stratum."""
    sample_ids: tuple[str, ...] = ()
    seeds: Any = None
    """int array (n,): of a pipeline's samples, for ``torch.Generator().manual_seed``; None: it is none of Diffusers."""
    estimates: Mapping[str, MetricValue] = field(default_factory=dict)
    """Numbers that are not means over samples (Frechet distance, quantiles), with their own interval."""
    steps: Mapping[str, Any] = field(default_factory=dict)
    """Per-step curves: metric name (``step_sqnr_db``) -> float array (num_steps,)."""
    images: Any = None
    """uint8 array (n, 3, height, width, channels) of a few: reference, candidate, difference; None: no images."""
    image_ids: tuple[str, ...] = ()
    """Which samples these are, by their ids."""
    texts: Mapping[str, Any] = field(default_factory=dict)
    """Of language models: ``continuations`` of prompts and the ``worst`` tokens, as text; empty: none."""
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    """``perf/...`` names without the prefix."""
    undefined: Mapping[str, str] = field(default_factory=dict)
    """Metrics that have no value on these samples, and why; the others stand."""
    resolved: Mapping[str, str] = field(default_factory=dict)
    """How it was measured, where the protocol chose: parameters ``resolved.<name>``."""


@dataclass(frozen=True, kw_only=True)
class MetricValue:
    """One number with its uncertainty; bounds and standard error are None where n is too small for them."""

    value: float
    n: int
    se: float | None = None
    ci_lo: float | None = None
    ci_hi: float | None = None

    def __str__(self) -> str:
        bounds = "" if self.ci_lo is None or self.ci_hi is None else f" ({short(self.ci_lo)}..{short(self.ci_hi)})"
        return f"{short(self.value)}{bounds}"


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """What one quantized component costs by itself, the others as they are."""

    quality: Mapping[str, MetricValue]
    """The metrics of the model in which it alone is quantized; empty where they have no value."""
    others: Mapping[str, MetricValue]
    """What the other components cost on top of it: all together less it alone, paired by sample."""
    samples: Mapping[str, Any]
    """Of :attr:`quality`, the values of each sample."""
    saved_bytes: int
    """Bytes of it in the reference less those that it has now."""


@dataclass(frozen=True, kw_only=True, repr=False)
class StageReport:
    """Time and peak memory of one stage; what cannot be measured on the device is None and not logged.

    A peak holds what was there when the stage began (the reference, encoders, libraries): the baseline.
    """

    __repr__ = brief
    _repr_html_ = page

    name: str
    seconds: float
    baseline_rss_bytes: int | None = None
    baseline_alloc_bytes: int | None = None
    peak_rss_bytes: int | None = None
    peak_anon_bytes: int | None = None
    """Of the resident set what no file holds: without the pages of checkpoints that are mapped. Sampled."""
    peak_alloc_bytes: int | None = None
    peak_requested_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    by_device: tuple[tuple[int, int], ...] = ()
    """Allocated bytes (baseline, peak) of each device, where the model lies on several; the others are of the first."""


@dataclass(frozen=True, kw_only=True, repr=False)
class RunReport:
    """Everything that one job found out."""

    __repr__ = brief

    name: str
    status: str
    """``FINISHED``, ``FAILED``, or ``SKIPPED`` (an impossible combination; ``error`` says why)."""
    protocol: str = ""
    quantization: QuantizationReport | None = None
    calibration: CalibrationReport | None = None
    """None: the scheme needs no data."""
    memory: Mapping[str, MemoryReport] = field(default_factory=dict)
    planned: Mapping[str, MemoryReport] = field(default_factory=dict)
    """The same as :attr:`memory`, computed from shapes before anything was quantized."""
    device_bytes: tuple[int, ...] = ()
    """Bytes of these components on each device, where they lie on several (``memory.placement=spread``)."""
    quality: Mapping[str, MetricValue] = field(default_factory=dict)
    floors: Mapping[str, Mapping[str, MetricValue]] = field(default_factory=dict)
    """Row of another execution of the reference (``floor_bf16``, ``floor_batch``...) -> the same metrics of it."""
    other_batch: Mapping[str, MetricValue] = field(default_factory=dict)
    """The same metrics at another batch size, of a scheme whose samples depend on what else is in their batch."""
    measurements: Measurements | None = None
    attribution: Mapping[str, Attribution] = field(default_factory=dict)
    """Component -> what it costs, where ``evaluation.attribute`` asks for it and there are several."""
    speed: Mapping[str, float] = field(default_factory=dict)
    """``perf/...`` names without the prefix, of :mod:`quantlab.stages.speed` and what was compiled."""
    stages: tuple[StageReport, ...] = ()
    disk_bytes: int | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    failed_stage: str = ""
    run_id: str | None = None
    unquantized: tuple[str, ...] = ()
    """See :attr:`QuantizationReport.unquantized`; what is said before the numbers."""
    stored_metrics: Mapping[str, float] | None = None
    """All numbers by their tracked names, of a run that was read back from its record; None: made here and now."""
    is_resumed: bool = False
    """Measured by an earlier sweep."""

    def _repr_html_(self) -> str:
        """Of a report in :class:`~quantlab.report.results.Results` its row and its images; of another its fields."""
        shown = vars(self).get(SHOWN)
        return str(shown(self)) if shown is not None else page(self)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: who shows it knows of a store, which stays here."""
        return {key: value for key, value in vars(self).items() if key != SHOWN}
