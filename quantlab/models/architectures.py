"""What a model is made of, known without its weights: the class and the configuration of each component.

An architecture is data: it comes from ``conf/architectures`` (with its source), from the configuration files of a local
folder, or from those of a Hub repository, a few kB. :mod:`quantlab.models.outline` builds it on the meta device.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantlab.errors import ModelError
from quantlab.models.pipeline_files import (
    INDEX,
    check_classes,
    check_found,
    is_a_pipelines,
    left_out,
    listed_parts,
)
from quantlab.models.reading import ADAPTER, as_model_error, check_no_adapter, local_folder, remote_code
from quantlab.vocabulary.schema import ModelConfig

CONFIG = "config.json"
_OFFLINE = (
    "check the name and the network; without a network name a local folder, or one of the models that quantlab list "
    "models shows with their configuration"
)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One component: a class of Diffusers or transformers, and what its configuration says beyond the defaults."""

    class_name: str
    config: Mapping[str, Any]
    module: str = ""
    """Where a class is that neither library has at its top: a module of Diffusers' pipelines (``ltx2``)."""
    source: str = ""
    """Where the configuration was published."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model without its weights."""

    path: str
    """Hub id or folder."""
    parts: Mapping[str, Part]
    dtype: str = ""
    """What the weights are stored in; "": not said."""


def read_architecture(config: ModelConfig, only: str = "") -> Architecture:
    """The architecture at ``model.path``: a local folder, or a Hub id by its configuration files alone.

    ``only`` names the single component of a checkpoint of transformers (``model``). Raises ModelError, beginning with
    ``model.path=``, where it cannot be found or read, or brings code of its own.
    """
    path = config.path or ""
    key = f"model.path={path}"
    index_name = CONFIG if only else INDEX
    what = ("a transformers model", "save_pretrained") if only else ("a Diffusers pipeline", "save_pretrained")
    local = local_folder(key, path, index_name, *what)
    read = _from_folder(key, local) if local is not None else _from_hub(key, path, config.revision)
    index = read(index_name)
    if only:
        check_no_adapter(key, local is not None and (local / ADAPTER).is_file())
        return Architecture(path=path, parts={only: _model_part(key, index)}, dtype=_stored_dtype(index))
    if not isinstance(index.get("_class_name"), str):
        raise remote_code(key, f"{INDEX} names a pipeline class of its own files")
    check_found(key, index)
    without = left_out(config, [name for name in index if not name.startswith("_")])
    check_classes(key, {name: found for name, found in index.items() if name not in without})
    parts = {}
    for name, found in listed_parts(index).items():
        if name in without or not all(found):
            continue
        if class_of(str(found[1]), str(found[0])) is not None:
            parts[name] = Part(class_name=str(found[1]), module=str(found[0]), config=read(f"{name}/{CONFIG}"))
        elif found[0] not in ("diffusers", "transformers") and not is_a_pipelines(str(found[0])):
            raise remote_code(key, f"{INDEX} names the class {found[1]} of {name}/{found[0]}.py")
    return Architecture(path=path, parts=parts)


def _model_part(key: str, config: Mapping[str, Any]) -> Part:
    names = config.get("architectures") or []
    name = str(names[0]) if names else ""
    if "auto_map" in config and class_of(name) is None:
        raise remote_code(key, f"{CONFIG} names a class of its own files (auto_map)")
    if class_of(name) is None:
        raise ModelError(
            f"{key}: {CONFIG} names the class {name or '(none)'}, which the installed transformers does not have; "
            "name a model of a class that it has, or install a newer transformers"
        )
    return Part(class_name=name, config=config)


def _stored_dtype(config: Mapping[str, Any]) -> str:
    return str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")


def class_of(name: str, module: str = "") -> Any:
    """The module class of Diffusers or transformers with this name, or of the ``module`` of a pipeline of Diffusers;
    None where there is none (schedulers, tokenizers and classes of other places)."""
    import diffusers
    import transformers
    from torch import nn

    of_pipeline = getattr(diffusers.pipelines, module) if is_a_pipelines(module) else None
    for library in (diffusers, transformers, of_pipeline):
        found = getattr(library, name, None) if name.isidentifier() else None
        if isinstance(found, type) and issubclass(found, nn.Module):
            return found
    return None


def module_of(kind: type) -> str:
    """The module by which :func:`class_of` finds a class of a pipeline's own; "" for others."""
    found = re.match(r"diffusers\.pipelines\.(\w+)", kind.__module__)
    return found[1] if found else ""


def _from_folder(key: str, folder: Path) -> Callable[[str], dict[str, Any]]:
    def read(name: str) -> dict[str, Any]:
        return _parsed(key, name, folder / name)

    return read


def _from_hub(key: str, path: str, revision: str | None) -> Callable[[str], dict[str, Any]]:
    def read(name: str) -> dict[str, Any]:
        from huggingface_hub import hf_hub_download

        with as_model_error(key, _OFFLINE):
            return _parsed(key, name, Path(hf_hub_download(path, name, revision=revision)))

    return read


def _parsed(key: str, name: str, file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"), object_hook=_number_or_mapping)
    except (OSError, ValueError) as error:
        raise ModelError(f"{key}: {name} cannot be read ({error}); copy or download it again") from error
    if not isinstance(data, dict):
        raise ModelError(f"{key}: {name} is no configuration; copy or download it again")
    return data


def _number_or_mapping(value: dict[str, Any]) -> Any:
    """A mapping of a configuration; or the number that transformers writes as one, as JSON has no infinity."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value
