"""``quantlab.load(path)``: the module or pipeline of an export, and of any checkpoint that its library loads.

An export says in its manifest by which class it is loaded; another folder says it in the library's own files. The
library's loader does it either way: quantlab adds nothing to what comes back.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.backends.modelopt.checkpointing import ENABLE
from quantlab.backends.modelopt.restore import loading_arguments, restoring, rewrap
from quantlab.backends.table import loggers
from quantlab.errors import ConfigError, MissingPackage, ModelError, first_line, is_of_the_machine, nearest
from quantlab.exporting import check
from quantlab.exporting.folder import read_manifest
from quantlab.exporting.single_file import CONFIG, load_file
from quantlab.models.exported import MANIFEST, check_digests
from quantlab.models.pipeline_files import INDEX, listed_parts, read_index
from quantlab.models.reading import (
    ASKS_FOR_CODE,
    check_config,
    is_of_a_pickle,
    of_a_pickle,
    quiet_loading,
    remote_code,
    unreadable,
)
from quantlab.models.repository import of_folder
from quantlab.quiet import quiet_libraries
from quantlab.vocabulary.dtypes import COMPUTE_DTYPES

if TYPE_CHECKING:
    from torch import nn

    from quantlab.models.loaded import Pipeline

_LOADERS = {("diffusers", "from_pretrained"), ("diffusers", "from_single_file"), ("transformers", "from_pretrained")}
_BEFORE = ("", ENABLE)
_ARGUMENTS: dict[str, Callable[[Any], bool]] = {
    "dtype": lambda value: value in COMPUTE_DTYPES,
    "compute_dtype": lambda value: value in COMPUTE_DTYPES,
    "config": lambda value: value == ".",
    "gguf_file": lambda value: isinstance(value, str) and Path(value).name == value,
    "low_cpu_mem_usage": lambda value: isinstance(value, bool),
}
"""What an export tells a loader besides. Any other word may run code that lies in the folder (``trust_remote_code``,
``custom_pipeline``), or read and write elsewhere (``cache_dir``, ``offload_folder``)."""
_NO_CODE = {"transformers": {"trust_remote_code": False}}
"""Library -> its answer to code in a folder; without one transformers asks for it at the terminal."""
_FILES = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def load(path: str | Path, device: str | None = None, config: str | Path | None = None) -> nn.Module | Pipeline:
    """The quantized module of a folder or file, in eval mode, or a whole pipeline, as their library loads it.

    Args:
        path: a folder that ``quantlab export`` wrote, a checkpoint of Diffusers or transformers, or a single GGUF or
            ``.safetensors`` file. transformers makes dense weights of a GGUF file's.
        device: where it is put; None: where the library leaves it.
        config: of a single file of a diffusion model: a folder with its class's ``config.json``; None: its own folder.

    Raises:
        ConfigError: no such folder, one that holds no model, or a file whose configuration is not known.
        MissingPackage: its quantization needs a package that is not installed.
        ModelError: a file that is not as it was exported; what the library says of a checkpoint that it cannot read.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        raise ConfigError(f"path={path}: there is no such folder; give one that quantlab export wrote, or a checkpoint")
    if config is not None and not folder.is_file():
        raise ConfigError(f"config={config}: it is for a single file, and {path} is a folder; leave it out")
    quiet_libraries(loggers())
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging

    try:
        check_digests(f"path={path}", folder)
        with quiet_loading(logging), quiet_loading(diffusers_logging):
            if folder.is_file():
                made = load_file(folder, config)
            else:
                for file in (*folder.glob(CONFIG), *folder.glob(f"*/{CONFIG}")):
                    check_config(f"path={path}", file, folder)
                made = _exported(folder) if (folder / MANIFEST).is_file() else _of_a_library(folder)
    except (ConfigError, ModelError):
        raise
    except ImportError as error:
        raise MissingPackage(f"path={path}: {first_line(error)}; install that package") from error
    except unreadable() as error:
        if is_of_the_machine(error):
            raise
        if ASKS_FOR_CODE in str(error):
            raise remote_code(f"path={path}", "it asks for code of its own") from error
        if is_of_a_pickle(error):
            raise of_a_pickle(f"path={path}") from error
        raise ModelError(
            f"path={path}: it cannot be loaded ({type(error).__name__}: {first_line(error)}); check that its files "
            "are complete, and that the libraries are those that wrote it or newer"
        ) from error
    if hasattr(made, "eval"):
        made.eval()
    placed: nn.Module | Pipeline = made if device is None else made.to(device)
    return placed


def holds_model(text: str) -> bool:
    """Whether a text is the path of a folder with a model or of a file of weights, and not the name of a run."""
    try:
        folder = Path(text).expanduser()
        if folder.is_file():
            return folder.suffix in _FILES
        return folder.is_dir() and any((folder / name).is_file() for name in (MANIFEST, INDEX, CONFIG))
    except (OSError, RuntimeError, ValueError):
        return False


def _exported(folder: Path) -> Any:
    """By the manifest, whose loaders are two libraries' and nothing else."""
    data = read_manifest("path", folder)
    parts: Mapping[str, Any] = data.get("parts", {})
    known = listed_parts(read_index(f"path={folder}", of_folder(folder))) if data["pipeline"] else parts
    for name, part in parts.items():
        if name not in known:  # the pipeline's loader would take it for a word of its own
            raise ConfigError(f"path={folder}: its {MANIFEST} has a part {name}, and {INDEX} none; export it again")
        _check_part(folder, part)
    alone = {
        name: _part(part, folder / part["subfolder"])
        for name, part in parts.items()
        if not data["pipeline"] or part["method"] != "from_pretrained" or part.get("before")
    }
    if not data["pipeline"]:
        return next(iter(alone.values()))
    whole = {
        "target": data["pipeline"],
        "method": "from_pretrained",
        "arguments": {"dtype": next(iter(parts.values()))["dtype"], **alone},
        "needs_gpu": any(part["needs_gpu"] for part in parts.values()),
    }
    library, _, name = str(data["pipeline"]).partition(":")
    if library != "diffusers" or not name.isidentifier():
        raise ConfigError(
            f"path={folder}: its {MANIFEST} names {data['pipeline']}, which is no pipeline; export it again"
        )
    return check.load(whole, str(folder))[0]


def _check_part(folder: Path, part: Mapping[str, Any]) -> None:
    """ConfigError for what no export says of a part: another loader, a place elsewhere, an argument that is more than
    how tensors are loaded."""
    library, _, name = str(part["target"]).partition(":")
    is_known = name.isidentifier() and part.get("before", "") in _BEFORE
    place, own = folder / str(part["subfolder"]), folder.resolve()
    inside = all(one.resolve().is_relative_to(own) for one in (place, place / str(part["file"])))
    if (library, part["method"]) not in _LOADERS or not is_known or not inside:
        raise ConfigError(f"path={folder}: its {MANIFEST} names {part['target']}, which is no loader; export it again")
    told = {"dtype": part["dtype"], **part["arguments"]}
    if odd := [key for key, value in told.items() if key not in _ARGUMENTS or not _ARGUMENTS[key](value)]:
        raise ConfigError(
            f"path={folder}: its {MANIFEST} tells the loader {odd[0]}={told[odd[0]]!r:.80}, which no export does; "
            "export it again"
        )


def _part(part: Mapping[str, Any], folder: Path) -> Any:
    """One component; what its library would change in the whole process for it is changed while it is loaded."""
    library, _, name = str(part["target"]).partition(":")
    part = {**part, "arguments": {**part["arguments"], **_NO_CODE.get(library, {})}}
    if not part.get("before"):
        return check.load(part, str(folder))[0]
    with restoring(getattr(importlib.import_module(library), name), folder):
        made = check.load({**part, "before": ""}, str(folder))[0]
    rewrap(made, folder)
    return made


def _of_a_library(folder: Path) -> Any:
    """A checkpoint that quantlab did not write, by what its own files say; its code is never run."""
    if (folder / INDEX).is_file():
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline

        read_index(f"path={folder}", of_folder(folder))
        return DiffusionPipeline.from_pretrained(folder)
    if not (folder / CONFIG).is_file():
        near = nearest(CONFIG, [f.name for f in folder.iterdir()])
        raise ConfigError(f"path={folder}: holds no model (no {INDEX}, no {CONFIG}{near}); give the folder of one")
    said = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    library, name = ("diffusers", said["_class_name"]) if "_class_name" in said else ("transformers", None)
    if name is None:
        name = (said.get("architectures") or [""])[0]
    kind = getattr(importlib.import_module(library), str(name), None) if str(name).isidentifier() else None
    if kind is None or not hasattr(kind, "from_pretrained"):
        raise ConfigError(
            f"path={folder}: {CONFIG} names {str(name)[:80] or 'no class'}, which {library} does not have"
        )
    with restoring(kind, folder):
        made = kind.from_pretrained(folder, **_NO_CODE.get(library, {}), **loading_arguments(kind, folder))
    rewrap(made, folder)
    return made
