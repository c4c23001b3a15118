"""The files of a pipeline of Diffusers, looked at before any of it is loaded."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.errors import ConfigError, MissingPackage, ModelError, nearest
from quantlab.models.reading import ADAPTER, check_config, check_no_adapter, check_variant, remote_code
from quantlab.models.repository import Repository, of_folder
from quantlab.modules.source import check_indices, shards_of, tensor_names
from quantlab.vocabulary.files import object_in
from quantlab.vocabulary.schema import ModelConfig

if TYPE_CHECKING:
    from torch import nn

INDEX = "model_index.json"
DENOISER = re.compile(r"(unconditional_)?(transformer|unet)(_\d+)?")
"""Names of the components that are called at a step; some pipelines have one of its own for no prompt."""
NO_DENOISER = re.compile(r"vae|vq|movq|encod|embed|project|safety|feature|vocoder|controlnet|language_model")
"""What is in the names of other modules, where no component is called so."""
_LIBRARIES = ("diffusers", "transformers")
"""Whose classes the parts of a pipeline are."""
_NOW = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""A layer of attention in older files -> what Diffusers loads it as."""
_RENAMED = re.compile(rf"\b({'|'.join(_NOW)})(?=\.(?:weight|bias)$)")


def denoisers_of(key: str, modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """The names of the components that are called at a step: by their names, else the largest of what may be one."""
    if named := tuple(name for name in modules if DENOISER.fullmatch(name)):
        return named
    others = {n: sum(p.numel() for p in m.parameters()) for n, m in modules.items() if not NO_DENOISER.search(n)}
    if not others:
        raise ModelError(f"{key}: it has no denoiser ({', '.join(modules)}); name a pipeline that generates")
    return (max(others, key=others.__getitem__),)


def listed_parts(index: Mapping[str, Any]) -> dict[str, tuple[str | None, str | None]]:
    """Component -> its library and class, None where there is none: the pairs of an index that are of words.

    A pipeline's own settings stand beside them, and may be lists of numbers.
    """
    return {
        name: (found[0], found[1])
        for name, found in index.items()
        if isinstance(found, list) and len(found) == 2 and all(word is None or isinstance(word, str) for word in found)
    }


def named_denoisers(index: Path) -> tuple[str, ...]:
    """The parts of an index that are called like denoisers; none of a damaged one, which loading tells."""
    return tuple(name for name in object_in(index) if DENOISER.fullmatch(name))


def check_choice(files: Repository, index: Mapping[str, Any], config: ModelConfig) -> None:
    """ConfigError for a variant that no file is of, or that all files of weights are of and nobody asked for, and for
    parts to leave out that are not there."""
    check_variant([name.partition("/")[2] for name in files.names], config.variant)
    parts = [name for name, (library, _) in listed_parts(index).items() if library is not None]
    for name in config.without:
        if name not in parts:
            raise ConfigError(
                f"model.without={name}: the pipeline has no such part{nearest(name, parts)}; it has {', '.join(parts)}"
            )
        if DENOISER.fullmatch(name) or name in (*config.components, "vae", "scheduler"):
            raise ConfigError(f"model.without={name}: it is needed to run the pipeline; leave it in")


def pipeline_class(index: Mapping[str, Any]) -> type | None:
    """The class of Diffusers that an index names; None for one that it has not."""
    import diffusers

    found = getattr(diffusers, str(index["_class_name"]), None)
    return found if isinstance(found, type) else None


def check_tiles(index: Mapping[str, Any]) -> None:
    """ConfigError ``evaluation.tiled_decoding=true: ...`` for a pipeline without a decoder that works in tiles."""
    import diffusers

    listed = index.get("vae") or [None, None]
    if not hasattr(getattr(diffusers, str(listed[1]), None), "enable_tiling"):
        raise ConfigError(
            f"evaluation.tiled_decoding=true: {index['_class_name']} has no decoder that works in tiles; leave it out"
        )


def check_parts(
    key: str, files: Repository, index: Mapping[str, Any], pipeline: type, without: Collection[str] = ()
) -> None:
    """ModelError for a part that the pipeline needs and has not, or that it does not know; None is a part, too.

    MissingPackage for one whose class wants a package that is not installed; ``without`` are not loaded.
    """
    made: Any = pipeline
    known = {k: v for k, v in inspect.signature(made.__init__).parameters.items() if k not in ("self", "kwargs")}
    if "scheduler" not in known:
        raise ModelError(
            f"{key}: {made.__name__} has no scheduler, so it takes no steps; name a pipeline that generates"
        )
    listed = listed_parts(index)
    optional = getattr(made, "_optional_components", [])
    check_classes(key, {name: found for name, found in index.items() if name not in without})
    for name, found in listed.items():
        if found[0] == "transformers" and name not in without:
            check_no_adapter(f"{key}: {name}", f"{name}/{ADAPTER}" in files.names)
        if name not in known:
            raise ModelError(
                f"{key}: {INDEX} lists {name}, which {made.__name__} does not have{nearest(name, known)}; it has "
                f"{', '.join(known)}: take the part out, or name the pipeline's own class"
            )
        is_setting = known[name].default is not known[name].empty and name not in optional
        if found[0] is not None and not is_setting and not files.holds(name):  # Diffusers saves no part that is one
            raise ModelError(
                f"{key}: {INDEX} lists {name}, and the folder has none; copy or download it again, or write "
                f'"{name}": [null, null] there if the pipeline can do without'
            )
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in optional and name not in index:
            raise ModelError(
                f"{key}: {made.__name__} needs {name}, and {INDEX} does not list it; copy or download the folder again"
            )
    for name, found in listed.items():
        if found[0] is not None and name not in without and (package := _wanting(*map(str, found))):
            raise MissingPackage(
                f"{key}: its {name}, a {found[1]}, needs the package {package}, which is not installed; "
                f"pip install {package}, of a version that goes with the installed torch"
            )


def _wanting(library: str, name: str) -> str:
    """The first package that a class of a library needs and that is not there; "" for none."""
    import importlib
    from importlib.util import find_spec

    try:
        made = getattr(importlib.import_module(library), name, None)
    except ImportError:
        return ""
    needs = list(getattr(made, "_backends", ()))  # a stand-in for a class that could not be imported
    attributes = getattr(made, "get_attributes", None)  # of a processor: what it is put together of
    if attributes is not None and "video_processor" in attributes():
        needs.append("torchvision")  # in every version of transformers since it reads videos
    return next((package for package in needs if isinstance(package, str) and not find_spec(package)), "")


def left_out(config: ModelConfig, parts: Collection[str]) -> dict[str, None]:
    """What is not loaded; the tokenizer of a text encoder goes with it."""
    tokenizers = [name.replace("text_encoder", "tokenizer") for name in config.without]
    return dict.fromkeys(name for name in (*config.without, *tokenizers) if name in parts)


def check_files(key: str, folder: Path) -> dict[str, Any]:
    """The pipeline's index. ModelError as :func:`read_index`, and for damaged files of weights and their indices."""
    index = read_index(key, of_folder(folder))
    for part in sorted(part for part in folder.iterdir() if part.is_dir()):
        check_indices(f"{key}: {part.name}", part)
        check_config(key, part / "config.json", folder)
    for file in sorted(folder.glob("*/*.safetensors")):
        tensor_names(f"{key}: {file.relative_to(folder)}", file)
    return index


def unread_tensors(key: str, folder: Path, module: nn.Module, variant: str | None = None) -> list[str]:
    """The tensors that the files of a Diffusers module hold and it has no place for, as those of adapters.

    Diffusers leaves them out without a word; names of attention that it has since changed are no such.
    """
    from diffusers.models.modeling_utils import ModelMixin

    if not isinstance(module, ModelMixin) or not any(folder.glob("*.safetensors")):
        return []
    try:
        stored = shards_of(key, folder, variant).files
    except ModelError:
        return []  # whoever reads them says it better
    known: Any = module
    ignored = [re.compile(pattern) for pattern in known._keys_to_ignore_on_load_unexpected or ()]
    has = known.state_dict()
    return [
        name
        for name in sorted(stored)
        if name not in has
        and _RENAMED.sub(lambda old: _NOW[old[1]], name) not in has
        and not any(pattern.search(name) for pattern in ignored)
    ]


def read_index(key: str, files: Repository) -> dict[str, Any]:
    """The pipeline's index. ModelError for one that is none, and for code in the checkpoint."""
    try:
        index = json.loads(files.fetch(INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{key}: {INDEX} cannot be read ({error}); copy or download the folder again") from error
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), (str, list)):
        raise ModelError(f"{key}: {INDEX} names no pipeline class; name a pipeline that Diffusers ships")
    check_found(key, index)
    if asks := _code_of_its_own(files, index):
        raise remote_code(key, asks)
    return index


def check_found(key: str, index: Mapping[str, Any]) -> None:
    """ModelError for a part whose class Diffusers ships with a deprecated pipeline, where no index leads it."""
    for module, name in listed_parts(index).values():
        if module is not None and module not in _LIBRARIES and not is_a_pipelines(module) and _is_deprecated(module):
            where = f"diffusers.pipelines.deprecated.{module}"
            raise _not_found(key, module, name, f"which this Diffusers has in {where} and looks for elsewhere")


def check_classes(key: str, index: Mapping[str, Any]) -> None:
    """ModelError for a part of a class that Diffusers does not have, which it says when others are loaded."""
    import diffusers

    for module, name in listed_parts(index).values():
        if module == "diffusers" and name is not None and not hasattr(diffusers, name.removeprefix("FlashPack")):
            raise _not_found(key, module, name, f"and Diffusers {diffusers.__version__} does not have it there")


def _not_found(key: str, module: str, name: str | None, why: str) -> ModelError:
    return ModelError(
        f"{key}: {INDEX} names the class {name} of {module}, {why}; install a Diffusers that finds it, or make the "
        "pipeline of its parts yourself and give the one to quantize to quantlab.evaluate in Python"
    )


def _is_deprecated(module: str) -> bool:
    """Whether a module is one that Diffusers has moved to its deprecated pipelines; it is looked for, not imported."""
    import diffusers

    return (Path(diffusers.__path__[0]) / "pipelines" / "deprecated" / module / "__init__.py").is_file()


def is_a_pipelines(module: str) -> bool:
    """Whether a part's module is one of Diffusers' own (``stable_diffusion``): any other would be imported, whatever it
    does then."""
    from diffusers import pipelines

    return hasattr(pipelines, module)


def _code_of_its_own(files: Repository, index: Mapping[str, Any]) -> str:
    """What in a pipeline is to be run from Python files that come with it; "" for nothing.

    Diffusers would look for some of these classes in its own modules, find none, and say that and no more.
    """
    name = index["_class_name"]
    has_code = any(file.endswith(".py") and "/" not in file for file in files.names)
    if isinstance(name, list) or (has_code and pipeline_class(index) is None):
        return f"{INDEX} names the pipeline class {name[-1] if isinstance(name, list) else name} of its own files"
    for part, found in listed_parts(index).items():
        if f"{part}/{found[0]}.py" in files.names:
            return f"{INDEX} names the class {found[1]} of {part}/{found[0]}.py"
        if found[0] is not None and found[0] not in _LIBRARIES and not is_a_pipelines(found[0]):
            return f"{INDEX} names the class {found[1]} of the module {found[0]}"
        if str(found[1]).startswith("Auto") and '"auto_map"' in files.text(f"{part}/config.json"):
            return f"{part}/config.json names a class of its own files (auto_map)"
    return ""
