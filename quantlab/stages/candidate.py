"""A job's candidate: copies of the chosen components, calibrated where the scheme needs data, and quantized."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.backends.scheme import Scheme
from quantlab.datasets.calibration import sampling_settings
from quantlab.errors import NotFinite, NotQuantized, is_out_of_memory
from quantlab.models.loaded import LoadedModel
from quantlab.models.outline import cast_as_loaded
from quantlab.modules.device import give_back, let_go
from quantlab.modules.feed import CalibrationFeed
from quantlab.modules.layers import linear_layers, matches, view_of
from quantlab.modules.memory import StageMeasurement, logical_size
from quantlab.modules.source import Source
from quantlab.planning.components import named_by_users, told, told_under, with_keys_of
from quantlab.planning.job import Job
from quantlab.progress import Advance, say, under_way
from quantlab.stages.calibrate import (
    CalibrationSet,
    calibrate_component,
    calibration_set,
    in_smaller_batches,
)
from quantlab.stages.evidence import LayerEnergies, layer_energies, weight_sqnr_db
from quantlab.stages.foreign import load_candidate
from quantlab.stages.quantize import quantize_component
from quantlab.stages.select import QuantizationRequest, Selection, select_layers, select_streamed
from quantlab.vocabulary.reports import CalibratedLayer, CalibrationReport, QuantizationReport, StageReport

if TYPE_CHECKING:
    import torch

_WRITER, _PREPARE = "write_calibration", "prepare"
Stage = Callable[[str], contextlib.AbstractContextManager[StageMeasurement]]


@dataclass(frozen=True, kw_only=True)
class Making:
    """What a candidate is made from."""

    model: LoadedModel
    """The unquantized model."""
    job: Job
    calibration_inputs: Callable[[], Any]
    """Inputs of the model's protocol that calibration may look at; asked for where the scheme needs data."""
    schemes: Mapping[str, Scheme | None]
    """Component -> its scheme, None for one that stays as it is, or is cast."""
    reads: Mapping[str, tuple[str, ...]]
    """Component -> its layers whose weights it reads (:func:`quantlab.stages.reads.weights_read`)."""
    cache_dir: Path
    advance: Advance
    stage: Stage
    """Opens and measures a stage of this name."""
    source: Callable[[str], Source] | None = None
    """Component -> the files that it is streamed from; None: it is copied from the reference."""

    @property
    def quantized(self) -> dict[str, Scheme]:
        """The components that have a scheme."""
        return {name: scheme for name, scheme in self.schemes.items() if scheme is not None}

    @property
    def calibrated(self) -> list[str]:
        """The components whose scheme needs data."""
        return [name for name, scheme in self.quantized.items() if scheme.native.needs_data]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A candidate and what making it showed."""

    model: LoadedModel
    quantization: QuantizationReport | None = None
    calibration: CalibrationReport | None = None
    stages: tuple[StageReport, ...] = ()
    batch_size: int | None = None
    """Of a checkpoint whose rows share a scale of their inputs: 1; else None, the job's."""
    depends_on_neighbours: bool = False
    """Of a checkpoint: whether samples depend on what else is in their batch."""
    disk_bytes: int | None = None
    """Of a checkpoint: its files of weights."""
    calibrated: Mapping[str, tuple[Any, CalibrationFeed]] = field(default_factory=dict)
    """Component -> what the backend's ``calibrate`` returned, and the feed that it had; where the backend has a file
    format for it, as it may hold matrices for each layer."""


@dataclass
class _Part:
    request: QuantizationRequest
    module: Any
    selection: Selection
    calibrated: Any = None
    source: Source | None = None


def make_candidate(making: Making) -> Candidate:
    """Copy, calibrate (where the scheme needs data), quantize, and look at each layer on the calibration data."""
    if making.job.config.checkpoint is not None:
        return _of_checkpoint(making, making.job.config.checkpoint)
    model, quantized = making.model, making.quantized
    for scheme in quantized.values():
        if prepare := getattr(scheme.backend.module, _PREPARE, None):
            making.advance("prepare", 0, 1)
            prepare(scheme.native, model.device)
            making.advance("prepare", 1, 1)
    stages, data, parts = [], None, dict[str, _Part]()
    if making.calibrated:
        with making.stage("calibrate") as measured:
            parts, data = _calibrated_parts(making)
        stages.append(measured.report)
    with making.stage("quantize") as measured:
        made, reports = _casts(making), dict[str, QuantizationReport]()
        for name, scheme in quantized.items():
            with told_under(making.job.key_of(name)):
                part = parts[name] if name in parts else _part(making, name, scheme)
                made[name], reports[name] = quantize_component(
                    part.request,
                    part.module,
                    part.source.module if part.source else model.components[name],
                    part.selection,
                    part.calibrated,
                    source=part.source,
                    advance=_told_of(making, name),
                )
            if not hasattr(scheme.backend.module, _WRITER):
                part.calibrated = None
    stages.append(measured.report)
    candidate = Candidate(
        model=model.with_components(made),
        quantization=_joined(making, reports) if reports else None,
        stages=tuple(stages),
        calibrated={n: (p.calibrated, data.feed(n, model)) for n, p in parts.items() if p.calibrated is not None}
        if data
        else {},
    )
    if data is None:
        return candidate
    with making.stage("evidence") as measured:
        calibration = _evidence(making, data, parts, candidate)
    return replace(candidate, calibration=calibration, stages=(*stages, measured.report))


def _casts(making: Making) -> dict[str, torch.nn.Module]:
    """The components without a scheme, in the dtype that the request casts them to; none where it does not."""
    dtype, model = making.job.config.quantization.dtype, making.model
    if making.job.config.quantization.backend != "none" or dtype == "auto":
        return {}
    left = [name for name in making.schemes if name not in making.quantized]
    return {name: model.placed(name, cast_as_loaded(model.copy_of(name), dtype)) for name in left}


def _of_checkpoint(making: Making, checkpoint: str) -> Candidate:
    """A checkpoint that others made, loaded in the place of a quantized copy."""
    with making.stage("quantize") as measured:
        making.advance("load checkpoint", 0, 1)
        found = load_candidate(checkpoint, making.model, list(making.schemes), making.reads, making.cache_dir)
        making.advance("load checkpoint", 1, 1)
    return Candidate(
        model=found.model,
        quantization=found.quantization,
        stages=(measured.report,),
        batch_size=found.batch_size,
        depends_on_neighbours=found.depends_on_neighbours,
        disk_bytes=found.disk_bytes,
    )


def _part(making: Making, name: str, scheme: Scheme) -> _Part:
    model, asked = making.model, scheme.axes.compute_dtype
    request = QuantizationRequest(
        component=name,
        scheme=scheme,
        compute_dtype=model.dtype if asked == "auto" else asked,
        device=model.device,
        default_exclusions=model.default_exclusions.get(name, ()),
        read=making.reads.get(name, ()),
        typed=making.job.key_of(name),
    )
    _tell_idle_groups(scheme, model.components[name], making.job.key_of(name))
    if making.source is not None:
        source = making.source(name)
        module = copy.deepcopy(source.module)
        selection = select_streamed(request, module, making.model.parts.get("groups") is not None)
        return _Part(request=request, module=module, selection=selection, source=source)
    module = model.copy_of(name)
    return _Part(request=request, module=module, selection=select_layers(request, module))


def _joined(making: Making, reports: Mapping[str, QuantizationReport]) -> QuantizationReport:
    """The reports of all components as one; those that stay as they are count among the parameters."""
    left = [making.model.components[name] for name in making.schemes if name not in reports]
    return QuantizationReport(
        layers=tuple(row for r in reports.values() for row in r.layers),
        num_parameters=sum(r.num_parameters for r in reports.values()) + sum(logical_size(m)[0] for m in left),
        resolved=_resolved(reports),
        unquantized=tuple(
            with_keys_of(making.job.key_of(n), text) for n, r in reports.items() for text in r.unquantized
        ),
    )


def _resolved(reports: Mapping[str, QuantizationReport]) -> dict[str, Any]:
    """What each found out; under the component's name where they do not all say the same."""
    keys = dict.fromkeys(key for r in reports.values() for key in r.resolved)
    found: dict[str, Any] = {}
    for key in keys:
        values = {name: r.resolved.get(key) for name, r in reports.items()}
        first = next(iter(values.values()))
        if all(value == first for value in values.values()):
            found[key] = first
        else:
            found |= {f"{name}.{key}": r.resolved[key] for name, r in reports.items() if key in r.resolved}
    return found


def _tell_idle_groups(scheme: Scheme, module: torch.nn.Module, key: str) -> None:
    """Tell which of the chosen groups of ``conf/modules_to_not_convert`` take no layer; ``key`` is the component's."""
    layers = list(linear_layers(module))
    for group, entries in scheme.shipped_exclusions.items():
        if not any(matches(entry, name) for entry in entries for name in layers):
            idle = f"modules_to_not_convert={group}: matches no layer of this model; nothing is excluded by it"
            say(told(key, idle))


# -- calibration


def _calibrated_parts(making: Making) -> tuple[dict[str, _Part], CalibrationSet]:
    """Every component whose scheme needs data, calibrated on the reference's own calls; where memory runs out, anew
    with half the batch, which is told and recorded."""
    config, inputs = making.job.config, making.calibration_inputs()

    def attempt(batch_size: int) -> tuple[dict[str, _Part], CalibrationSet]:
        asked = replace(config.calibration, batch_size=batch_size)
        with named_by_users(config):
            data = calibration_set(
                making.model,
                making.calibrated,
                inputs,
                sampling_settings(asked, config.evaluation),
                making.cache_dir,
                lambda i, n: making.advance("record calibration calls", i, n),
            )
        parts: dict[str, _Part] = {}
        for name in making.calibrated:
            with told_under(making.job.key_of(name)):
                parts[name] = part = _part(making, name, making.quantized[name])
                feed = data.feed(name, making.model, functools.partial(_tell_calls, making, name, part.request.scheme))
                # what is streamed is measured on the unquantized model, which stays as it is
                measured = part.module if part.source is None else making.model.components[name]
                part.calibrated = calibrate_component(part.request, measured, part.selection, feed)
        return parts, data

    batch_size = min(config.calibration.batch_size, config.calibration.num_samples)
    return in_smaller_batches(attempt, batch_size, making.model.device)


def _tell_calls(making: Making, name: str, scheme: Scheme, done: int, total: int) -> None:
    """The bar of the calls; after the last of a pass the algorithm works on what they showed, which no bar counts."""
    making.advance(f"calibrate {name}", done, total)
    if done >= total:
        under_way(f"calibrate {name}: {scheme.axes.algorithm}, after the calls")
    elif done == 1:  # of another pass
        under_way(f"calibrate {name}: {scheme.axes.algorithm}, calls")


def _evidence(
    making: Making, data: CalibrationSet, parts: Mapping[str, _Part], candidate: Candidate
) -> CalibrationReport:
    """What calibration used, and of each layer its inputs and errors; without the layers where memory runs out."""
    layers: list[CalibratedLayer] = []
    if making.job.config.calibration.num_evidence_calls and candidate.quantization is not None:
        try:
            layers = _layers(making, data, parts, candidate.model, candidate.quantization)
        except Exception as error:  # noqa: BLE001  a library's; only lack of memory is handled here
            if not is_out_of_memory(error):
                raise
            let_go(error)
            say(
                "while looking at the layers: this run goes on without "
                "calibration_layers.json; a smaller calibration.batch_size may help, and "
                "calibration.num_evidence_calls=0 saves the attempt",
                "out of memory",
            )
            give_back(making.model.device)
    return CalibrationReport(
        sha256=data.sha256,
        num_samples=data.num_samples,
        batch_size=data.batch_size,
        num_calls=sum(len(calls) for calls in data.calls.values()),
        layers=tuple(layers),
    )


def _layers(
    making: Making, data: CalibrationSet, parts: Mapping[str, _Part], model: LoadedModel, report: QuantizationReport
) -> list[CalibratedLayer]:
    """One row for each calibrated layer that runs in the evidence's calls: with the plain algorithm, as calibrated."""
    layers = []
    after_rows = {(r.component, r.name): r.weight_rel_error for r in report.layers}
    for name, part in parts.items():
        after = _energies(making, data, name, model.components[name], part.selection.calibrated)
        before, before_rows = _before(making, data, name, part)
        layers += [
            _layer(name, layer, after[layer], before.get(layer), (before_rows.get(layer), after_rows[name, layer]))
            for layer in part.selection.calibrated
            if after[layer].signal
        ]
    return layers


def _before(
    making: Making, data: CalibrationSet, name: str, part: _Part
) -> tuple[dict[str, LayerEnergies], dict[str, float | None]]:
    """The same bits with the plain algorithm that needs no data: energies, and weight errors by layer."""
    plain = replace(part.request.scheme, native=part.selection.native).without_data()
    if plain is None:
        return {}, {}
    request, original = replace(part.request, scheme=plain), making.model.components[name]
    advance = _told_of(making, f"{name} by the plain algorithm")
    try:
        if part.source is not None and making.source is not None:
            source = making.source(name)
            empty = copy.deepcopy(source.module)
            chosen = select_streamed(request, empty)
            module, report = quantize_component(request, empty, source.module, chosen, source=source, advance=advance)
        else:
            module, report = quantize_component(request, view_of(original), original, is_view=True, advance=advance)
        energies = _energies(making, data, name, module, part.selection.calibrated)
    except (NotQuantized, NotFinite):  # the plain algorithm loses, or overflows in, what the calibrated one does not
        return {}, {}
    return energies, {r.name: r.weight_rel_error for r in report.layers}


def _told_of(making: Making, name: str) -> Advance:
    """Progress of what is done with a component."""

    def advance(what: str, done: int, total: int, note: str = "") -> None:
        making.advance(f"{what} {name}", done, total, note)

    return advance


def _energies(
    making: Making, data: CalibrationSet, name: str, module: Any, layers: Sequence[str]
) -> dict[str, LayerEnergies]:
    return layer_energies(
        making.model.components[name],
        module,
        layers,
        data.feed(name, making.model),
        making.job.config.calibration.num_evidence_calls,
        lambda i, n: making.advance(f"look at layers of {name}", i, n),
    )


def _layer(
    component: str,
    name: str,
    after: LayerEnergies,
    before: LayerEnergies | None,
    weight_rel_errors: tuple[float | None, float | None],
) -> CalibratedLayer:
    return CalibratedLayer(
        component=component,
        name=name,
        input_absmax=after.input_absmax,
        outlier_ratio=after.outlier_ratio,
        weight_sqnr_db_before=weight_sqnr_db(weight_rel_errors[0]),
        weight_sqnr_db_after=weight_sqnr_db(weight_rel_errors[1]),
        output_sqnr_db_before=before.sqnr_db() if before else None,
        output_sqnr_db_after=after.sqnr_db(),
        step_sqnr_db={k: after.sqnr_db(k) for k in sorted(after.signal)},
    )


def write_calibration(candidate: Candidate, schemes: Mapping[str, Scheme | None], folder: Path) -> list[Path]:
    """The calibration statistics in their library's own file format, where its backend has one: written files."""
    written = []
    for name, (calibrated, feed) in candidate.calibrated.items():
        scheme = schemes[name]
        write = getattr(scheme.backend.module, _WRITER, None) if scheme else None
        if write is None:
            continue
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        written.append(Path(write(calibrated, target, feed)))
    return written
