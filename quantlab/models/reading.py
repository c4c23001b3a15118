"""What every family checks of ``model.path`` and ``model.dtype``, and one clear error for all that a library raises."""

from __future__ import annotations

import importlib.util
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from quantlab.errors import ConfigError, ModelError, QuantlabError, first_line, is_of_the_machine, nearest
from quantlab.vocabulary.dtypes import COMPUTE_DTYPES
from quantlab.vocabulary.files import object_in
from quantlab.vocabulary.schema import ModelConfig

if TYPE_CHECKING:
    import torch

_MOST = {
    "layers": (re.compile(r"(layers?|blocks|depths?|layers_per_block)$"), 10_000),
    "labels": (re.compile(r"^num_labels$"), 1_000_000),  # transformers makes a name for each
}
"""What a configuration counts -> the fields that say it, and how many no model has."""
_KERNELS = re.compile(r"^_?(attn|experts)_implementation$")
_OF_TORCH = ("eager", "sdpa", "flex_attention", "batched_mm", "grouped_mm")
"""What transformers computes by torch alone; for others it imports packages, or fetches native code from the Hub."""
_OF_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
"""What it computes by a package that somebody installed; where that is not here, it asks the Hub for another."""
_MOST_PARTS = 1_000_000
"""Modules and parameters that no model has: to make as many takes half a minute."""
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
HOLLOW = "meta"
"""The device of a model that is loaded without the values of its weights, which stay in its files."""
ASKS_FOR_CODE = "trust_remote_code"
"""In every message with which transformers and Diffusers refuse to run a checkpoint's code."""
_Module = TypeVar("_Module", bound="torch.nn.Module")


def required_path(config: ModelConfig, what: str, example: str) -> str:
    """``model.path``; ModelError where a family that has no model of its own is given none.

    ``what`` is what the path leads to (``"a pipeline"``), ``example`` a Hub id.
    """
    if not config.path:
        raise ModelError(
            f"model.path=null: family {config.family} needs {what}; give a local folder or a Hub id, such as "
            f"model.path={example}"
        )
    return config.path


def local_folder(key: str, path: str, index: str, what: str, writer: str) -> Path | None:
    """The folder that ``path`` names, or None where it can only be a Hub id.

    ModelError for a file, for a path that leads nowhere, and for a folder without ``index``, which makes it no
    ``what``; ``writer`` is what would have written it.
    """
    local = Path(path).expanduser()
    if local.is_file():
        said = _GGUF if local.suffix == ".gguf" else f"name the folder that holds {index}"
        raise ModelError(f"{key}: this is a file; {said}")
    if local.exists():
        require_index(key, local, index, what, writer)
        return local
    if path.startswith(("/", ".", "~")) or path.count("/") != 1:
        raise ModelError(f"{key}: there is no such folder; name a local folder or a Hub id (owner/name)")
    return None


def check_saved_model(path: str) -> None:
    """ModelError for a path where ``save_pretrained`` of transformers wrote nothing; a Hub id is not looked up."""
    local_folder(f"model.path={path}", path, "config.json", "a transformers model", "save_pretrained")


def check_variant(names: Iterable[str], variant: str | None) -> None:
    """ConfigError for a variant that no file of weights is of, or that all are of and nobody asked for; ``names`` are
    those of all files of a checkpoint."""
    of = {
        _SHARD.sub("", parts[1]) if len(parts := name.split(".")) > 2 and not parts[1].isdigit() else ""
        for name in names
        if name.endswith((".safetensors", ".bin"))
    }
    there = sorted(of - {""})
    if variant is None and there and "" not in of:
        raise ConfigError(
            f"model.variant: all files of weights are of a variant ({', '.join(there)}); set model.variant={there[0]}"
        )
    if variant is not None and variant not in there:
        have = f"there are {', '.join(there)}" if there else "this checkpoint has none"
        raise ConfigError(
            f"model.variant={variant}: no weight file is of it ({have}){nearest(variant, there)}; "
            "leave model.variant out for the files without one"
        )


def require_index(key: str, folder: Path, index: str, what: str, writer: str) -> None:
    """ModelError where ``folder`` has no file ``index``."""
    if not (folder / index).is_file():
        said = _GGUF if next(folder.glob("*.gguf"), None) else f"name a folder that {writer} wrote"
        raise ModelError(f"{key}: the folder has no {index}, so it is not {what}; {said}")


_GGUF = (
    "what a GGUF file holds is measured as a candidate: name the folder or Hub id of the model that it "
    "was made from, and the file by checkpoint=FILE.gguf"
)


ADAPTER = "adapter_config.json"


def no_checkpoint(key: str, path: str) -> ModelError:
    """What is said of a path where no configuration of a model lies, by what lies there."""
    place = Path(path).expanduser()
    if (place / ADAPTER).is_file():
        return ModelError(
            f"{key}: is an adapter of PEFT ({ADAPTER}) without its model; merge it (merge_and_unload), save that with "
            "save_pretrained, and name that folder"
        )
    if place.suffix == ".gguf" or (place.is_dir() and next(place.glob("*.gguf"), None)):
        return ModelError(f"{key}: {_GGUF}")
    if place.is_file():
        return ModelError(f"{key}: is a file; name the folder that save_pretrained wrote, with its config.json")
    return ModelError(
        f"{key}: neither a config.json nor a model_index.json is there; name a folder that save_pretrained wrote, or "
        "the Hub id of a model"
    )


def check_no_adapter(key: str, there: bool) -> None:
    """ModelError where a checkpoint of transformers holds an adapter: ``there`` is whether it has a file of its name.

    transformers then loads the model that the adapter's configuration names, from wherever that is, and not the weights
    that lie beside it; no digest of the checkpoint would know of them.
    """
    if there:
        raise ModelError(
            f"{key}: {ADAPTER} is there, so that transformers loads the adapter's own base model from elsewhere and "
            "not these weights; merge it (PEFT's merge_and_unload) and save that, or take the adapter's files away"
        )


def chosen_dtype(config: ModelConfig, auto: str) -> str:
    """``model.dtype``, with ``auto`` spelled out; ConfigError for a dtype that models do not compute in."""
    if config.dtype not in ("auto", *COMPUTE_DTYPES):
        raise ConfigError(
            f"model.dtype={config.dtype}: a model computes in one of auto, {', '.join(COMPUTE_DTYPES)}"
            f"{nearest(config.dtype, COMPUTE_DTYPES)}"
        )
    return auto if config.dtype == "auto" else config.dtype


def remote_code(key: str, what: str) -> ModelError:
    """The refusal of a checkpoint that runs only with code which it brings; ``what`` says where it asks for that."""
    return ModelError(
        f"{key}: {what}, which is remote code: not run, by policy; name a model of a class that the library itself "
        "ships, or load this one yourself and give the module to quantlab.evaluate in Python"
    )


def is_of_a_pickle(error: Exception) -> bool:
    """Whether torch refused to load a pickle for what it holds; it then tells how to load it nevertheless."""
    return isinstance(error, UnpicklingError) or "weights_only" in str(error)


def of_a_pickle(key: str) -> ModelError:
    """The refusal of a file of weights that would run code while it is read."""
    return ModelError(
        f"{key}: its weights are a pickle that holds more than tensors, or is damaged: not loaded, as it would run "
        "code; name a checkpoint in safetensors"
    )


def check_settings(key: str, name: str, config: Mapping[str, Any]) -> None:
    """ModelError for a configuration ``name`` of so many layers or labels that making them alone would not end, and for
    one that chooses the code by which it is computed."""
    for field, value in ((str(k), v) for k, v in config.items()):  # labels are numbered
        if isinstance(value, Mapping):
            check_settings(key, name, value)
        for what, (named, most) in _MOST.items():
            for count in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(count, int) and count > most and named.search(field):
                    raise ModelError(
                        f"{key}: {name} says {field}={count}, and no model has more than {most} {what}; copy or "
                        "download it again"
                    )
        if _KERNELS.match(field):
            for said in value.values() if isinstance(value, Mapping) else (value,):
                if said is not None and said not in _OF_TORCH and not _is_of_installed(said):
                    raise ModelError(
                        f"{key}: {name} says {field}={said!s:.100}, which is code of another package or of the Hub, "
                        "and no file chooses that; take the field out of a copy of the folder"
                    )


def _is_of_installed(said: object) -> bool:
    package = _OF_PACKAGES.get(said) if isinstance(said, str) else None
    return package is not None and importlib.util.find_spec(package) is not None


def check_config(key: str, file: Path, folder: Path) -> None:
    """:func:`check_settings` of a file of a checkpoint; of one that is none, or cannot be read, loading tells."""
    check_settings(key, file.relative_to(folder).as_posix(), object_in(file))


@contextmanager
def as_model_error(key: str, way_out: str, brings_code: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """What reading a broken, missing or unreachable checkpoint raises, as one ModelError with its first line.

    A checkpoint that needs code of its own is one that :func:`remote_code` tells of: the library says so, or its files
    do where that looks for a class elsewhere and finds none (``brings_code``). Running out of memory stays what
    it is.
    """
    try:
        yield
    except unreadable() as error:
        if isinstance(error, QuantlabError) or is_of_the_machine(error):
            raise
        if ASKS_FOR_CODE in str(error) or brings_code():
            raise remote_code(key, "it asks for code of its own") from error
        if is_of_a_pickle(error):
            raise of_a_pickle(key) from error
        raise ModelError(f"{key}: it cannot be loaded ({first_line(error)}); {way_out}") from error


def unreadable() -> tuple[type[Exception], ...]:
    """What libraries raise over a checkpoint or configuration that they cannot read."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    builtin = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError)
    sizes = (ArithmeticError, AssertionError, EOFError)  # of a configuration whose numbers do not fit each other
    return *builtin, *sizes, UnpicklingError, SafetensorError, StrictDataclassError


def frozen(module: _Module) -> _Module:
    """The module, from now on in eval mode and without gradients."""
    module.eval()
    module.requires_grad_(False)
    return module


class _ProgressBars(Protocol):
    """The logging module of transformers, and that of Diffusers."""

    def is_progress_bar_enabled(self) -> bool: ...
    def disable_progress_bar(self) -> None: ...
    def enable_progress_bar(self) -> None: ...


@contextmanager
def quiet_loading(bars: _ProgressBars) -> Iterator[None]:
    """A library's bars (one a tensor) off, and back on where they were on; ``bars`` is its ``utils.logging``.

    ValueError where it makes more modules and parameters than any model has, whatever settings multiply to that.
    """
    from torch.nn.modules.module import register_module_module_registration_hook as of_modules
    from torch.nn.modules.module import register_module_parameter_registration_hook as of_parameters

    numbers = itertools.count(1)

    def count(*_: object) -> None:
        if next(numbers) > _MOST_PARTS:
            raise ValueError(f"its settings make more than {_MOST_PARTS} modules and parameters, which no model has")

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    hooks = of_modules(count), of_parameters(count)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        if shown:
            bars.enable_progress_bar()
