"""What a run refuses before it works. A dry run asks the same, in the same order, and says it in the same words.

Known here is what neither the model's weights nor torch are needed for. Where the model must be looked at (an exclusion
that matches no layer, a shape), :mod:`quantlab.running.outlined` tells a dry run; what fits in the memory, ``quantlab
plan``.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from quantlab.errors import ConfigError
from quantlab.exporting.folder import check_target
from quantlab.models.table import family_of
from quantlab.modules.gpu_seen import NO_CUDA, sees_gpu
from quantlab.planning.job import Job, Plan
from quantlab.planning.ready import check_ready, check_room, no_folder
from quantlab.running.engines.table import check_launcher, is_far
from quantlab.running.placement import spread_over
from quantlab.stages.select import check_device
from quantlab.tracking.connect import check_store
from quantlab.vocabulary.schema import ExperimentConfig

_OF_TRANSFORMERS = ("model",)
"""The components of families that are no pipelines."""
_CHECK_STORED = "check_stored"


def check_request(request: Plan) -> None:
    """ConfigError for what is wrong with a request itself, its files and its launcher."""
    first = request.jobs[0].config
    check_ready(request.jobs, by_files=runs_elsewhere(request))
    if request.export.path is not None:
        check_target("export.path", request.export.path)
        _check_export(request)
    if request.is_sweep:
        check_launcher(first.launcher)
        if first.launcher.detach and first.sweep.search.num_trials:
            raise ConfigError("launcher.detach=true: a search chooses by the rows that it waits for; leave it out")
    elif first.launcher.detach:
        raise ConfigError(
            "launcher.detach=true: a single job is run by this process; ask for several (-m dtype=int8,int4)"
        )
    if not request.is_sweep:
        for why in refused_here(request).values():
            raise ConfigError(why)


def _check_export(request: Plan) -> None:
    """ConfigError where none of the jobs can be exported, as far as their schemes and the model's family say it."""
    refused: list[ConfigError] = []
    for job in request.jobs:
        try:
            if not job.schemes:
                raise ConfigError(
                    f"export.path={request.export.path}: {job.name} is not quantized by this run; leave export.path "
                    "out, or choose a scheme (backend=torchao dtype=int8)"
                )
            if family_of(job.config.model).components == _OF_TRANSFORMERS:
                for scheme in job.schemes.values():
                    if (check := getattr(scheme.backend.module, _CHECK_STORED, None)) is not None:
                        check(scheme.native, "transformers")
        except ConfigError as error:
            refused.append(error)
    if refused and len(refused) == len(request.jobs):
        raise refused[0]


def check_surroundings(request: Plan, base_dir: Path, is_left: bool) -> None:
    """ConfigError for what a run finds when it begins: no device, no folder, no database. Nothing is made.

    ``is_left``: whether a job is to be run at all; one that has finished before needs no device.
    """
    config = request.jobs[0].config
    if is_left and config.device == "cuda" and not runs_elsewhere(request) and not sees_gpu():
        raise ConfigError(NO_CUDA)
    check_folder(config, base_dir, is_left)
    check_store(config.tracking, base_dir)


def refused_here(request: Plan) -> Mapping[str, str]:
    """Job -> why it fails on this machine's device, as far as that is known without its model."""
    if runs_elsewhere(request):
        return {}
    found, seen = {}, dict[str, str]()
    for job in request.jobs:
        asked = job.config.device
        if asked not in seen:
            seen[asked] = "cpu" if asked == "cpu" or not sees_gpu() else "cuda"
        try:
            _check_job(job, seen[asked])
        except ConfigError as error:
            found[job.name] = str(error)
    return found


def _check_job(job: Job, device: str) -> None:
    if job.config.memory.placement == "spread" and device == "cpu":
        spread_over(job.config.memory, device)
    for scheme in job.schemes.values():
        check_device(scheme.format, device)
        wants = scheme.row.cuda_activations.get(scheme.axes.activation_dtype)
        if wants and device == "cpu" and not scheme.native.needs_data and scheme.axes.on_mismatch == "error":
            raise ConfigError(
                f"activation_dtype={scheme.axes.activation_dtype}: {scheme.axes.backend} needs CUDA with compute "
                f"capability {'.'.join(map(str, wants))}, and this run is on {device}; set activation_dtype=none, or "
                "activation_scales=static with calibration data"
            )


def runs_elsewhere(request: Plan) -> bool:
    """Whether other machines compute."""
    return request.is_sweep and is_far(request.jobs[0].config.launcher)


def check_folder(config: ExperimentConfig, base_dir: Path, is_left: bool = True) -> None:
    """ConfigError where the run could not write its results, DiskFull where they would have no room."""
    folder = base_dir / Path(config.output_dir).expanduser()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there):  # it has no name there, and leaves nothing
            pass
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        raise no_folder(config.output_dir, folder / "runs", why) from error
    if is_left:
        check_room(config.output_dir, there)
