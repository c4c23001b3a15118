"""The model families: one row each, and a family is one file with a ``load`` function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from quantlab.errors import ConfigError, ModelError, nearest
from quantlab.models import causal_lm, diffusers_pipeline, digits_dit, encoder, seq2seq, smollm2, vision
from quantlab.models.auto import AUTO, family_of_checkpoint
from quantlab.models.loaded import LoadedModel, Progress
from quantlab.models.pipeline_files import INDEX, named_denoisers
from quantlab.models.reading import check_saved_model, check_variant, required_path
from quantlab.vocabulary.schema import ModelConfig


class Load(Protocol):
    """Loads what ``config`` names; ModelError (key ``model.path``) for what cannot be read."""

    def __call__(
        self, config: ModelConfig, device: str, cache_dir: Path, progress: Progress | None = None
    ) -> LoadedModel: ...


class LoadTrained(Protocol):
    """The model from a folder of weights that quantlab trained; ModelError where they are not intact."""

    def __call__(self, folder: Path, *, dtype: str) -> LoadedModel: ...


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Where the weights are that quantlab itself trains: tracked once, and found again by their digest."""

    files: tuple[str, str]
    """Names of the files with the model's weights and with its judge's."""
    cache_key: Callable[[ModelConfig], str]
    """The folder below ``cache/models`` that a config's weights are trained into."""
    load: LoadTrained


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of model. Nothing has a default: what does not apply is None."""

    name: str
    """The word behind ``model.family=``."""
    protocol: str
    """Row of ``protocols.PROTOCOLS``: how its models are run and compared."""
    load: Load
    components: tuple[str, ...] | None
    """Names of its components; None: they are in the files of each pipeline."""
    needs_path: tuple[str, str] | None
    """What ``model.path`` leads to, and an example; None: the family has a model of its own."""
    check: Callable[[str], None] | None
    """ModelError for a ``model.path`` where none of its models can lie, by the names of files; None: ``look`` tells."""
    look: Callable[..., type | None] | None
    """The class of a pipeline, its files, call, components and sizes looked at, without loading; None for one of the
    Hub of which nothing can be had, and None instead: models of the family are no pipelines."""
    trained: Trained | None
    """None: the weights are of others."""
    own_files: Callable[[ModelConfig, Path], list[Path]] | None
    """What the family's own model is read from, given the cache's folder, as far as it is there; None: it has none."""


_ONE = ("model",)
_ROWS = (
    Family(
        name="digits_dit",
        protocol="diffusion",
        load=digits_dit.load,
        components=("transformer",),
        needs_path=None,
        check=digits_dit.check_folder,
        look=None,
        trained=Trained(
            files=(digits_dit.MODEL_FILE, digits_dit.JUDGE_FILE),
            cache_key=digits_dit.cache_key,
            load=digits_dit.load_cached,
        ),
        own_files=digits_dit.own_files,
    ),
    Family(
        name="diffusers",
        protocol="diffusion",
        load=diffusers_pipeline.load,
        components=None,
        needs_path=diffusers_pipeline.NEEDS_PATH,
        check=None,
        look=diffusers_pipeline.look,
        trained=None,
        own_files=None,
    ),
    Family(
        name="smollm2",
        protocol="language",
        load=smollm2.load,
        components=_ONE,
        needs_path=None,
        check=smollm2.check_no_path,
        look=None,
        trained=None,
        own_files=smollm2.own_files,
    ),
    Family(
        name="causal_lm",
        protocol="language",
        load=causal_lm.load,
        components=_ONE,
        needs_path=causal_lm.NEEDS_PATH,
        check=check_saved_model,
        look=None,
        trained=None,
        own_files=None,
    ),
    Family(
        name="encoder",
        protocol="encoder",
        load=encoder.load,
        components=_ONE,
        needs_path=None,
        check=check_saved_model,
        look=None,
        trained=None,
        own_files=encoder.own_files,
    ),
    Family(
        name="seq2seq",
        protocol="seq2seq",
        load=seq2seq.load,
        components=_ONE,
        needs_path=seq2seq.NEEDS_PATH,
        check=check_saved_model,
        look=None,
        trained=None,
        own_files=None,
    ),
    Family(
        name="vision",
        protocol="vision",
        load=vision.load,
        components=_ONE,
        needs_path=vision.NEEDS_PATH,
        check=check_saved_model,
        look=None,
        trained=None,
        own_files=None,
    ),
)

FAMILIES: dict[str, Family] = {row.name: row for row in _ROWS}


def check_path(config: ModelConfig) -> None:
    """ModelError, before anything is loaded, for a path that can only be a local folder and is none."""
    path = config.path
    if path and (path.startswith(("/", ".", "~")) or path.count("/") > 1) and not Path(path).expanduser().exists():
        raise ModelError(f"model.path={path}: there is no such folder; name a local folder or a Hub id (owner/name)")
    family = family_of(config)
    if needs := family.needs_path:
        required_path(config, *needs)
    if path and family.check is not None:
        family.check(path)
    if path and family.look is None and (folder := Path(path).expanduser()).is_dir():
        check_variant([file.name for file in folder.iterdir()], config.variant)


def components_of_family(config: ModelConfig) -> tuple[str, ...]:
    """The components that are quantized where ``model.components`` names none, as far as that is known without
    loading: of a pipeline that lies in a local folder, those that are called like denoisers."""
    if config.family == AUTO:
        return ()
    fixed = family_of(config).components
    if fixed is not None:
        return fixed
    index = Path(config.path or "").expanduser() / INDEX
    return named_denoisers(index) if config.path and index.is_file() else ()


def check_components(config: ModelConfig) -> None:
    """ConfigError, before anything is loaded, for a component that the family has not."""
    fixed = family_of(config).components
    for name in config.components:
        if fixed is not None and name not in fixed:
            raise ConfigError(
                f"model.components={name}: a model of family {config.family} has {', '.join(fixed)}"
                f"{nearest(name, fixed)}"
            )


def family_of(config: ModelConfig) -> Family:
    """The row of ``model.family``, for ``auto`` by what the checkpoint says; ConfigError for one that there is not."""
    if config.family == AUTO:
        return FAMILIES[family_of_checkpoint(config.path, config.revision)]
    if config.family not in FAMILIES:
        raise ConfigError(
            f"model.family={config.family}: there are {', '.join(FAMILIES)}{nearest(config.family, FAMILIES)}"
        )
    return FAMILIES[config.family]
