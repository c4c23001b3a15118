"""What the shapes of a model refuse, asked of its outline: in a run's words, with no weights in memory.

A run learns it when its model is loaded and its reference observed, which may take hours; its dry run learns it here.
Where no outline can be had (a model of the Hub that is not on this disk, a class of its own files), that is told.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.backends.scheme import Scheme
from quantlab.backends.table import loggers
from quantlab.datasets.calibration import in_words_of_calibration, sampling_settings
from quantlab.datasets.table import DATASETS
from quantlab.errors import ConfigError, QuantlabError, first_line
from quantlab.exporting.beforehand import check_outlined
from quantlab.models.architectures import CONFIG
from quantlab.models.checkpoint import load_tokenizer
from quantlab.models.foreign import check_class
from quantlab.models.loaded import LoadedModel, Parts
from quantlab.models.outline import Outline
from quantlab.models.outlines import outline
from quantlab.models.pipeline_files import INDEX
from quantlab.models.repository import folder_here
from quantlab.models.spared import spared
from quantlab.models.table import family_of
from quantlab.modules.gpu_seen import sees_gpu
from quantlab.modules.spread import plan_map
from quantlab.planning.architectures import shipped_architecture
from quantlab.planning.components import told_under
from quantlab.planning.job import Job
from quantlab.planning.placing import check_streamed
from quantlab.progress import say
from quantlab.protocols import encoder, language
from quantlab.quiet import quiet_libraries
from quantlab.running.choice import refusal
from quantlab.running.forecast import Book, phases_of_each, read_by_code
from quantlab.running.placement import check_largest, spread_as_said, spread_over
from quantlab.stages.bundle import check_settings
from quantlab.stages.foreign import told_by_files
from quantlab.stages.select import QuantizationRequest, Selection, check_device, check_layers, choose_layers
from quantlab.vocabulary.native import canonical_json
from quantlab.vocabulary.schema import EvaluationConfig, ExperimentConfig, MemoryConfig

if TYPE_CHECKING:
    pass

_LENGTHS: Mapping[str, Callable[[EvaluationConfig, Any], object]] = {
    "language": language.check_length,
    "encoder": encoder.check_length,
}
"""Protocol -> what raises ConfigError for texts that are longer than the model takes."""


class _NotOutlined(Exception):
    """A model of which no outline can be had: why, with the key before it."""


class LacksPackages(Exception):
    """A model could not be built with what a process that only plans imports: one that imports all may tell more."""


def refused_by_shape(
    jobs: Iterable[Job], is_far: bool, is_spared: bool = False, tell: Callable[[str], object] = say
) -> dict[str, ConfigError]:
    """Job -> what its run raises once its model is loaded, as far as the outline of the model tells.

    ``is_far``: on nodes, whose devices are not known. ``is_spared``: this process does nothing else
    (:mod:`quantlab.models.spared`); then LacksPackages is raised for a model that cannot be built so. ``tell`` is given
    a line for each model that cannot be looked at.
    """
    quiet_libraries(loggers())  # a model's class is looked at, which imports its library
    found: dict[str, ConfigError] = {}
    outlines: dict[str, Outline | None] = {}
    brought: dict[str, ConfigError | None] = {}
    texts: dict[str, ConfigError | None] = {}
    said: dict[str, None] = {}
    for job in jobs:
        if (why := _brought(job.config, brought)) is not None:
            found[job.name] = why
            continue
        if not _is_looked_at(job):
            continue
        device = "cpu" if job.config.device == "cpu" or not (is_far or sees_gpu()) else "cuda"
        key = canonical_json([asdict(job.config.model), device])
        if key not in outlines:
            try:
                outlines[key] = _outline(job.config, device, is_spared)
            except _NotOutlined as error:
                outlines[key] = None
                tell(f"{error}; its shapes are not looked at here, and what they refuse the run tells")
        if (made := outlines[key]) is None:
            continue
        try:
            _check(job, made, device, is_far, texts)
            said |= dict.fromkeys(_settings(job, made))
        except ConfigError as error:
            found[job.name] = error
        except Exception:  # whatever a library finds in a module without values: a run has some
            if _shows_errors():
                raise
    for line in said:
        tell(line)
    return found


def _brought(config: ExperimentConfig, known: dict[str, ConfigError | None]) -> ConfigError | None:
    """What a run raises of a reference that was made elsewhere, before its model loads; asked once of each."""
    if config.reference.path is None:
        return None
    told = (asdict(config.reference), asdict(config.model_with()), asdict(config.dataset), asdict(config.evaluation))
    key = canonical_json(told)
    if key not in known:
        known[key] = None
        try:
            check_settings(config)
        except ConfigError as error:
            known[key] = error
    return known[key]


def _is_looked_at(job: Job) -> bool:
    """Whether a model's shapes could refuse the job: a denoiser that stays as it is and whole is not built for it."""
    is_changed = job.schemes or job.config.checkpoint is not None or job.config.memory.placement == "spread"
    return bool(is_changed) or family_of(job.config.model).protocol in _LENGTHS


def _outline(config: ExperimentConfig, device: str, is_spared: bool) -> Outline:
    model = config.model
    if shipped_architecture(model.path) is None and model.path and not Path(model.path).expanduser().exists():
        index = INDEX if model.family == "diffusers" else CONFIG
        folder = folder_here(model.path, model.revision, index)  # the Hub is not asked
        if folder is None:
            raise _NotOutlined(f"model.path={model.path}: it is not on this disk, and the Hub is not asked")
        model = replace(model, path=str(folder))
    try:
        with spared() if is_spared else contextlib.nullcontext():
            return outline(model, device, shipped_architecture)
    except Exception as error:
        if is_spared and type(error) is not ConfigError:
            raise LacksPackages from error
        if _shows_errors():
            raise
        if isinstance(error, QuantlabError):
            raise _NotOutlined(str(error)) from error
        key = f"model.path={model.path}" if model.path else f"model.family={model.family}"
        raise _NotOutlined(f"{key}: it cannot be built from its configuration ({first_line(error)})") from error


def _settings(job: Job, made: Outline) -> list[str]:
    """What the run will tell of the settings of a checkpoint that stands in the place of a scheme."""
    names = job.components(made.quantized)
    if job.config.checkpoint is None or not names.keys() <= made.components.keys():
        return []
    return told_by_files(job.config.checkpoint, made.components, list(names))


def _check(job: Job, made: Outline, device: str, is_far: bool, texts: dict[str, ConfigError | None]) -> None:
    config, schemes = job.config, job.components(made.quantized)
    _check_model(job, made, device, is_far)
    if short := _of_text(config, made, texts):
        raise short
    if not schemes.keys() <= made.components.keys():
        return
    if config.checkpoint is not None:
        check_class(config.checkpoint, made.components, list(schemes))
        return
    asked = {name: scheme for name, scheme in schemes.items() if scheme is not None}
    memory, is_calibrated = config.memory, job.needs_data
    is_streamed = memory.placement not in ("resident", "spread") and not (memory.placement == "auto" and is_calibrated)
    if memory.device_gib is not None and is_streamed:
        check_largest({name: made.components[name] for name in asked}, memory.device_gib)
    if memory.device_gib is not None:
        for _, phases in phases_of_each(Book(outline=made, device=device), [job]):
            if why := refusal(phases, memory):
                raise ConfigError(why)
    first = [name for name, scheme in asked.items() if scheme.native.needs_data]  # calibrated before others are made
    selected = {}
    for name in dict.fromkeys((*first, *asked)):
        with told_under(job.key_of(name)):
            selected[name] = request, chosen = _select(job, made, name, asked[name], "" if is_far else device)
            if not is_far:
                check_layers(request, made.components[name], chosen)
    if config.export.path is not None:
        for name, (request, chosen) in selected.items():
            check_outlined(request, made.components[name], chosen, made.dtype)


def _check_model(job: Job, made: Outline, device: str, is_far: bool) -> None:
    """ConfigError for what concerns the unquantized model too, in the order of a run."""
    memory = job.config.memory
    if memory.placement == "spread":
        _check_spread(memory, made, device, is_far)
    if check := _LENGTHS.get(family_of(job.config.model).protocol):
        check(job.config.evaluation, made.components["model"])
        if job.needs_data:
            try:
                check(sampling_settings(job.config.calibration, job.config.evaluation), made.components["model"])
            except ConfigError as error:
                raise type(error)(in_words_of_calibration(str(error))) from error


def _of_text(config: ExperimentConfig, made: Outline, known: dict[str, ConfigError | None]) -> ConfigError | None:
    """What a run raises of a text of the user's own, as that it has too few tokens; asked once of each."""
    model, protocol = config.model, family_of(config.model).protocol
    folder = Path(model.path or "").expanduser()
    if config.dataset.name != "text" or protocol not in _LENGTHS or not (model.path and folder.is_dir()):
        return None
    key = canonical_json([asdict(node) for node in (model, config.dataset, config.evaluation)])
    if key not in known:
        known[key] = None
        parts = Parts(tokenizer=load_tokenizer(model.path, model, f"model.path={model.path}"))
        read = LoadedModel(name=folder.name, protocol=protocol, components=made.components, parts=parts)
        try:
            DATASETS[config.dataset.name].load(config.dataset, config.evaluation, read)
        except ConfigError as error:
            known[key] = error
    return known[key]


def _check_spread(memory: MemoryConfig, made: Outline, device: str, is_far: bool) -> None:
    if device == "cpu" and not is_far:
        over = spread_over(memory, device)
        plan_map(made.components, len(over.devices), over.budget, over.said)
    elif memory.devices and memory.device_gib is not None:  # what devices have free is not asked for
        over = spread_as_said(memory, memory.devices)
        plan_map(made.components, len(over.devices), over.budget, over.said)


def _shows_errors() -> bool:
    return os.environ.get("QUANTLAB_TRACEBACK") == "1"


def _select(job: Job, made: Outline, name: str, scheme: Scheme, device: str) -> tuple[QuantizationRequest, Selection]:
    """As :func:`quantlab.stages.select.select_layers` and ``select_streamed``, without tensors. ``device``: "" where it
    is not known."""
    module, asked, placement = made.components[name], scheme.axes.compute_dtype, job.config.memory.placement
    request = QuantizationRequest(
        component=name,
        scheme=scheme,
        compute_dtype=made.dtype if asked == "auto" else asked,
        device=device or "cuda",
        default_exclusions=made.default_exclusions.get(name, ()),
        read=read_by_code(module),
        typed=job.key_of(name),
    )
    if device:
        check_device(scheme.format, device, request.compute_dtype)
    if placement in ("streamed", "group_offload"):
        check_streamed(scheme, placement)
    try:
        return request, choose_layers(request, module)
    except ConfigError as error:  # it may read fewer weights than its code says, which a run sees
        with contextlib.suppress(ConfigError):
            unread = replace(request, read=())
            return unread, choose_layers(unread, module)
        raise error
