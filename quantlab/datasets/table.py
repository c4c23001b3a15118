"""The data sets: one row each, and a data set is one file."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantlab.datasets import digits_classes, image_prompts, images, pairs, prompts, text, unprompted, wiki_extracts
from quantlab.errors import ConfigError, nearest
from quantlab.models.loaded import LoadedModel
from quantlab.models.pipeline_call import UNUSED, check_conditions, tell_unused
from quantlab.models.table import family_of
from quantlab.progress import say
from quantlab.protocols.table import Inputs
from quantlab.vocabulary.files import files_below
from quantlab.vocabulary.schema import DatasetConfig, EvaluationConfig, ExperimentConfig

Load = Callable[[DatasetConfig, EvaluationConfig, LoadedModel], Inputs]
"""Makes the inputs of the model's protocol; ConfigError, beginning with the key, for data that are not usable."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """One source of data. Nothing has a default: what does not apply is None."""

    name: str
    """The word behind ``dataset.name=`` and ``calibration.source=``."""
    protocols: tuple[str, ...]
    """The protocols whose models it has inputs for."""
    load: Load
    """The evaluation's inputs."""
    load_calibration: Load | None
    """Inputs with other content than the evaluation's; None: not for calibration."""
    read_file: Callable[[str | None], object] | None
    """Reads the file of the user's that ``path`` names, to refuse a bad one before anything is loaded; None: there is
    no such file."""
    check_rows: Callable[[Any, int, str], None] | None
    """ConfigError where what ``read_file`` gave is too little for a number of samples; then the key. None: any number
    is drawn of it."""
    tell_rows: Callable[[Any, int, str], None] | None
    """As ``check_rows``: tells what samples are that are more than the rows; None: nothing is drawn twice."""
    check_samples: Callable[[int], None] | None
    """ConfigError for a number of samples that it cannot have, known before anything is loaded; None: it takes any."""
    conditions: Callable[[str | None], tuple[str, ...]] | None
    """What it gives to a pipeline, for ``path``, by the names of a call's arguments; None: it is not for pipelines."""
    own_files: Callable[[], list[Path]] | None
    """What it reads where no ``path`` is given; None: that is code, or nothing."""
    seed_is_content: bool
    """True where two sets differ by their seed alone, so that calibration may not have the evaluation's."""


_ROWS = (
    Dataset(
        name="digits_classes",
        protocols=("diffusion",),
        load=digits_classes.load,
        load_calibration=digits_classes.load,
        read_file=None,
        check_rows=None,
        tell_rows=None,
        check_samples=digits_classes.check_samples,
        conditions=None,
        own_files=None,
        seed_is_content=True,
    ),
    Dataset(
        name="prompts",
        protocols=("diffusion",),
        load=prompts.load,
        load_calibration=prompts.load_calibration,
        read_file=prompts.read_prompts,
        check_rows=None,
        tell_rows=prompts.tell_replicas,
        check_samples=None,
        conditions=lambda path: ("prompt",),
        own_files=prompts.own_files,
        seed_is_content=False,
    ),
    Dataset(
        name="image_prompts",
        protocols=("diffusion",),
        load=image_prompts.load,
        load_calibration=image_prompts.load,
        read_file=image_prompts.read,
        check_rows=None,
        tell_rows=image_prompts.tell_replicas,
        check_samples=None,
        conditions=image_prompts.conditions,
        own_files=None,
        seed_is_content=False,
    ),
    Dataset(
        name="classes",
        protocols=("diffusion",),
        load=unprompted.load_classes,
        load_calibration=unprompted.load_classes,
        read_file=None,
        check_rows=None,
        tell_rows=None,
        check_samples=None,
        conditions=lambda path: ("class_labels",),
        own_files=None,
        seed_is_content=True,
    ),
    Dataset(
        name="none",
        protocols=("diffusion",),
        load=unprompted.load_none,
        load_calibration=unprompted.load_none,
        read_file=None,
        check_rows=None,
        tell_rows=None,
        check_samples=None,
        conditions=lambda path: (),
        own_files=None,
        seed_is_content=True,
    ),
    Dataset(
        name="images",
        protocols=("vision",),
        load=images.load,
        load_calibration=images.load,
        read_file=image_prompts.read,
        check_rows=images.check_number,
        tell_rows=None,
        check_samples=None,
        conditions=None,
        own_files=None,
        seed_is_content=False,
    ),
    Dataset(
        name="pairs",
        protocols=("seq2seq",),
        load=pairs.load,
        load_calibration=pairs.load,
        read_file=pairs.read,
        check_rows=pairs.check_number,
        tell_rows=None,
        check_samples=None,
        conditions=None,
        own_files=None,
        seed_is_content=False,
    ),
    Dataset(
        name="wiki_extracts",
        protocols=("language", "encoder", "seq2seq"),
        load=wiki_extracts.load,
        load_calibration=wiki_extracts.load_calibration,
        read_file=None,
        check_rows=None,
        tell_rows=None,
        check_samples=None,
        conditions=None,
        own_files=wiki_extracts.own_files,
        seed_is_content=False,
    ),
    Dataset(
        name="text",
        protocols=("language", "encoder"),
        load=text.load,
        load_calibration=text.load,
        read_file=text.read_text,
        check_rows=None,
        tell_rows=None,
        check_samples=None,
        conditions=None,
        own_files=None,
        seed_is_content=False,
    ),
)

DATASETS: dict[str, Dataset] = {row.name: row for row in _ROWS}
CALIBRATION_SETS: dict[str, Load] = {
    row.name: row.load_calibration for row in _ROWS if row.load_calibration is not None
}
"""``calibration.source`` -> its inputs."""


def files_read(name: str, path: str) -> list[Path]:
    """Every file that the data set ``name`` is made of at ``path``: what lies there or below, and what its lines name
    (one that is not there is told by who loads it).

    Raises ConfigError for a file of lines that cannot be read.
    """
    place, read = Path(path).expanduser(), DATASETS[name].read_file
    found: Any = read(path) if read is not None and place.is_file() else ()
    named = []
    for row in found if isinstance(found, list) else ():
        if isinstance(row, image_prompts.Picture):
            named += [file for file in (row.image, row.mask, row.control) if file is not None]
        elif isinstance(row, dict) and "audio" in row:
            named.append(place.parent / row["audio"])
    return [*files_below(place), *(file for file in named if file.is_file())]


def check_dataset(config: ExperimentConfig) -> None:
    """ConfigError, before anything is loaded, for a family or a data set that there is none of, and where the data set
    has no inputs for the family's models."""
    family, name = family_of(config.model), config.dataset.name
    if name not in DATASETS:
        raise ConfigError(f"dataset.name={name}: there are {', '.join(DATASETS)}{nearest(name, DATASETS)}")
    if family.protocol not in DATASETS[name].protocols:
        fitting = [row.name for row in _ROWS if family.protocol in row.protocols]
        raise ConfigError(
            f"dataset={name}: it has no inputs for model.family={family.name}, whose models are run by the protocol "
            f"{family.protocol}; choose one of {', '.join(fitting)}"
        )
    if check := DATASETS[name].check_samples:
        check(config.evaluation.num_samples)
    check_reads_file("dataset", name, config.dataset.path, family.protocol)


def check_reads_file(node: str, name: str, path: str | None, protocol: str) -> None:
    """ConfigError for a file of the user's that the data set never looks at: what is measured is of others."""
    if path is None or DATASETS[name].read_file is not None:
        return
    readers = [row.name for row in _ROWS if row.read_file and protocol in row.protocols]
    key = "dataset" if node == "dataset" else "calibration.source"
    raise ConfigError(
        f"{node}.path={path}: {key}={name} reads no file; leave the path out, or choose {key}="
        f"{f' or {key}='.join(readers)} to have it read"
    )


def check_call(config: ExperimentConfig, by_files: bool = False, typed: Collection[str] = UNUSED) -> None:
    """ConfigError for what can be known of a pipeline's call before its weights are loaded; with ``by_files`` what its
    files say, and its class, whose import takes long, is left to whoever loads it. Of settings that it has no argument
    for, those are told that are ``typed``."""
    look = family_of(config.model).look
    if look is None:
        if config.model.call:
            raise ConfigError(
                f"model.call.{next(iter(config.model.call))}: models of family {config.model.family} are no pipelines; "
                "leave model.call out"
            )
        if config.evaluation.tiled_decoding:
            raise ConfigError(
                f"evaluation.tiled_decoding=true: models of family {config.model.family} decode nothing in tiles; "
                "leave it out"
            )
        return
    pipeline, row = look(config.model, config.evaluation, by_files), DATASETS[config.dataset.name]
    if pipeline is not None and row.conditions is not None:
        check_conditions(pipeline, row.name, row.conditions(config.dataset.path), config.model.call)
        tell_unused(pipeline, config.evaluation, typed)
    if config.evaluation.tiled_decoding:
        told = "evaluation.tiled_decoding=true: decoded in tiles, the reference too; numbers are of what tiles give"
        say(told, "warning")


def check_file(config: ExperimentConfig) -> None:
    """ConfigError where the data set reads a file of the user's and cannot, or finds too little in it."""
    row, path, num = DATASETS[config.dataset.name], config.dataset.path, config.evaluation.num_samples
    found = row.read_file(path) if row.read_file else None
    for look in (row.check_rows, row.tell_rows):
        if look:
            look(found, num, f"dataset.path={path}")
