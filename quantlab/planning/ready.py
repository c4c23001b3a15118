"""What can be known of a request before anything is loaded, from the disk: files and folders that are not there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import astuple, replace
from pathlib import Path

from quantlab.backends.table import loggers
from quantlab.datasets.table import check_call, check_file
from quantlab.errors import ConfigError, DiskFull
from quantlab.models.foreign import check_checkpoint
from quantlab.models.headers import check_whole
from quantlab.models.pipeline_call import UNUSED
from quantlab.models.reading import no_checkpoint
from quantlab.models.table import check_components, check_path, family_of
from quantlab.planning.components import named_by_users
from quantlab.planning.job import Job
from quantlab.planning.places import option_dirs
from quantlab.planning.placing import check_family
from quantlab.quiet import quiet_libraries
from quantlab.vocabulary.amounts import MIB

_OF_A_MODEL = ("config.json", "model_index.json")
"""A folder that a model is loaded from has one of them."""
LEAST_ROOM_BYTES = 16 * MIB
"""Of a disk on which a run begins: its record, its store and the reference of the smallest model."""


def check_ready(jobs: Sequence[Job], by_files: bool = False) -> None:
    """ConfigError for the first model or data set of these jobs whose path leads nowhere; each is looked at once.

    With ``by_files`` a pipeline's class is not looked at, which would import torch: the job that loads it does that.
    """
    quiet_libraries(loggers())  # a pipeline's class is looked at, which imports its library
    known = set()
    for job in jobs:
        config = job.config
        if config.checkpoint is not None:
            check_checkpoint(config.checkpoint)
        check_files(job)
        check_family(config)
        whole, asked = config.model_with(), config.evaluation
        sizes = (asked.num_samples, asked.height, asked.width, asked.num_frames, asked.tiled_decoding)
        where = (str(astuple(whole)), str(astuple(config.dataset)), str(sizes))
        if where not in known:
            known.add(where)
            check_path(config.model)
            check_file(config)
            with named_by_users(config):
                check_components(whole)
                check_call(replace(config, model=whole), by_files, _typed(job))
            if family_of(whole).needs_path is not None:
                check_whole(whole)


def _typed(job: Job) -> list[str]:
    """Of the settings that a pipeline may have no argument for, those that someone chose for this job: others come with
    the options of a group, which are for pipelines of all kinds."""
    words = {word.lstrip("+").partition("=")[0] for word in job.overrides}
    return [
        name
        for name in UNUSED
        if f"evaluation.{name}" in words or getattr(job.config.evaluation, name) not in _of_options(job, name)
    ]


def _of_options(job: Job, name: str) -> Iterator[object]:
    """The values that options of groups have for a setting of the evaluation."""
    import yaml

    for folder in option_dirs():
        for file in (*folder.glob("evaluation/*.yaml"), folder / "model" / f"{job.choices.get('model')}.yaml"):
            if file.is_file():
                content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
                yield content.get("evaluation", content).get(name)


def check_files(job: Job) -> None:
    """ConfigError for a file or folder of the job's that is not there, and that is read when a model lies in memory."""
    reference, model = job.config.reference.path, job.config.model.path
    if reference is not None and not (Path(reference).expanduser() / "reference.json").is_file():
        raise ConfigError(
            f"reference.path: {reference} holds no reference.json; make it with quantlab reference export DIR ..."
        )
    for scheme in job.schemes.values():
        scheme.native.check_files()
    folder = Path(model or "").expanduser()
    is_loaded = family_of(job.config.model).needs_path is not None
    if model and is_loaded and folder.exists() and not any((folder / name).is_file() for name in _OF_A_MODEL):
        raise no_checkpoint(f"model.path={model}", model)


def no_folder(output_dir: str, place: Path, why: str) -> ConfigError:
    """What is said of results that could not be kept."""
    return ConfigError(
        f"output_dir={output_dir}: {place} cannot be written ({why}); make it a folder that you may write to, "
        "or set output_dir=<a folder of yours>"
    )


def check_room(output_dir: str, folder: Path) -> None:
    """DiskFull where ``folder``, which is there, has no room for a run: else that shows when the work is done."""
    free = shutil.disk_usage(folder).free
    if free < LEAST_ROOM_BYTES:
        raise DiskFull(
            f"output_dir={output_dir}: {free / MIB:.0f} MiB are free on its disk, and "
            f"{LEAST_ROOM_BYTES // MIB} MiB are wanted before a run begins; make room, or set output_dir=<a folder "
            "on another disk>"
        )
