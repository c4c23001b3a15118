"""``model.family=diffusers``: any pipeline of Diffusers, from a folder or the Hub.

The reference is the pipeline as stored. A candidate is run by another pipeline of its class that holds the candidate's
components, so that the reference never changes; the scheduler is shared, as each run sets its steps anew. How it is run
stands in :mod:`quantlab.models.pipeline_call`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from quantlab.errors import ConfigError, ModelError, nearest
from quantlab.models.architectures import read_architecture
from quantlab.models.checkpoint import files_sha256
from quantlab.models.defaults import default_exclusions
from quantlab.models.loaded import LoadedModel, Pipeline, Progress
from quantlab.models.outline import empty
from quantlab.models.pipeline_call import check_arguments, sample
from quantlab.models.pipeline_files import (
    DENOISER,
    INDEX,
    check_choice,
    check_files,
    check_parts,
    check_tiles,
    denoisers_of,
    left_out,
    listed_parts,
    pipeline_class,
    read_index,
    unread_tensors,
)
from quantlab.models.pipeline_sizes import (
    asked_sizes,
    check_frames,
    check_refusals,
    check_sides,
    empty_pipeline,
)
from quantlab.models.reading import (
    HOLLOW,
    as_model_error,
    chosen_dtype,
    frozen,
    local_folder,
    quiet_loading,
    require_index,
    required_path,
)
from quantlab.models.repository import Repository, of_folder, of_hub
from quantlab.models.wanting import wanting
from quantlab.modules.compute_dtype import torch_dtype
from quantlab.progress import say
from quantlab.vocabulary.dtypes import dtype_name
from quantlab.vocabulary.schema import EvaluationConfig, ModelConfig

if TYPE_CHECKING:
    from torch import nn

NEEDS_PATH = ("a pipeline", "black-forest-labs/FLUX.1-schnell")  # what model.path leads to, and an example
_LORA = "pytorch_lora_weights.safetensors"
_FUSE = "save it again after pipe.fuse_lora() and pipe.unload_lora_weights()"
_FUSED = f"they lie there below an adapter: {_FUSE}"
_SAID = (INDEX, "a Diffusers pipeline", "the pipeline's save_pretrained")


def load(config: ModelConfig, device: str, cache_dir: Path, progress: Progress | None = None) -> LoadedModel:
    """The pipeline at ``config.path`` (a local folder or a Hub id) on ``device``.

    ``components`` are those of ``config.components`` and the denoisers, which every run needs; the whole pipeline is in
    ``parts["pipeline"]``, the denoisers' names in ``parts["denoisers"]``. Raises ModelError beginning with
    ``model.path=...`` for what cannot be found, read or run, ConfigError for a component, an argument of the call or a
    dtype that is not there; all but the components of a Hub id before weights are read.
    """
    path = required_path(config, *NEEDS_PATH)
    key = f"model.path={path}"
    dtype = chosen_dtype(config, "bfloat16" if device.startswith("cuda") else "float32")
    folder = _folder(key, path, config)
    index = check_files(key, folder)
    _check_index(key, of_folder(folder), index, config)
    given: dict[str, Any] = dict(left_out(config, index))
    if device == HOLLOW:
        given |= _hollow_parts(key, folder, dtype, config)
    pipe = _read_pipeline(key, folder, dtype, device, config.variant, given)
    check_arguments(type(pipe), config.call)
    denoisers = denoisers_of(key, modules_of(pipe))
    components = _components(pipe, [*config.components, *denoisers])
    return LoadedModel(
        name=Path(path).name,
        protocol="diffusion",
        components=components,
        parts={"pipeline": pipe, "denoisers": denoisers, "scheduler": pipe.scheduler, "call": dict(config.call)},
        dtype=dtype,
        device=device,
        weights_sha256=_pipeline_sha256(pipe, folder, cache_dir, progress),
        default_exclusions={
            name: default_exclusions(part, config.default_exclusions, is_denoiser=name in denoisers)
            for name, part in components.items()
        },
        sample=sample,
    )


def look(config: ModelConfig, evaluation: EvaluationConfig, by_files: bool = False) -> type | None:
    """The class of a pipeline, known without loading it; None for a Hub id of which nothing can be had, and where only
    its files are looked at (``by_files``) and no library is imported.

    Raises ModelError and ConfigError for files, parts, arguments and components that are not there, for packages that
    are missing, and for sizes that the pipeline would round or refuse.
    """
    path = required_path(config, *NEEDS_PATH)
    key = f"model.path={path}"
    local = local_folder(key, path, *_SAID)
    files = of_folder(local) if local is not None else of_hub(key, path, config.revision, INDEX)
    if files is None:
        return None
    if INDEX not in files.names:
        raise ModelError(f"{key}: it has no {INDEX}, so it is not {_SAID[1]}; name the Hub id of one")
    index = read_index(key, files)
    if by_files:
        check_choice(files, index, config)
        _check_components(files, index, config)
        return None
    _check_index(key, files, index, config)
    if evaluation.tiled_decoding:
        check_tiles(index)
    made = pipeline_class(index)
    if made is not None and (sizes := asked_sizes(made, evaluation, config.call)):
        pipe = empty_pipeline(key, made, index, lambda name: json.loads(files.text(name) or "{}"), config)
        if pipe is not None:
            named = [name for name in modules_of(pipe) if DENOISER.fullmatch(name)]
            check_sides(pipe, named, sizes)
            check_frames(pipe, sizes)
            check_refusals(pipe, sizes)
    return made


def _check_index(key: str, files: Repository, index: Mapping[str, Any], config: ModelConfig) -> None:
    """What an index names, against the files, the class, and what the user chose."""
    check_choice(files, index, config)
    made = pipeline_class(index)
    if made is not None:
        check_parts(key, files, index, made, left_out(config, index))
        check_arguments(made, config.call)
    _check_components(files, index, config)


def _check_components(files: Repository, index: Mapping[str, Any], config: ModelConfig) -> None:
    """ConfigError for components that the files do not have."""
    listed = [name for name, (library, _) in listed_parts(index).items() if library is not None]
    weights = {name.partition("/")[0] for name in files.names if name.endswith((".safetensors", ".bin"))}
    parts = [name for name in listed if name in weights]
    for name in config.components:
        if name not in parts:
            raise ConfigError(
                f"model.components={name}: {index['_class_name']} has {', '.join(sorted(parts))}{nearest(name, parts)}"
            )


def modules_of(pipe: Pipeline) -> dict[str, nn.Module]:
    """Name -> module, for the components of a pipeline that are modules (not tokenizers or schedulers)."""
    from torch import nn

    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


# -- reading it


def _folder(key: str, path: str, config: ModelConfig) -> Path:
    """The local folder, or the Hub's snapshot of it (downloaded unless offline)."""
    local = local_folder(key, path, *_SAID)
    if local is not None:
        return local
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    way_out = "check the name and the network; without a network only what is in the local Hub cache can be named by id"
    with as_model_error(key, way_out):
        snapshot = Path(DiffusionPipeline.download(path, revision=config.revision, variant=config.variant))
    require_index(key, snapshot, *_SAID)
    return snapshot


def _hollow_parts(key: str, folder: Path, dtype: str, config: ModelConfig) -> dict[str, nn.Module]:
    """The pipeline's modules without the values of their weights, each saying in which folder they are."""
    found = {}
    for name, part in read_architecture(replace(config, path=str(folder))).parts.items():
        found[name] = module = empty(key, part, dtype)
        said: Any = module
        if isinstance(said.config, Mapping):
            said.register_to_config(_name_or_path=str(folder / name))
        else:
            said.config._name_or_path = str(folder / name)
    return found


def _read_pipeline(
    key: str, folder: Path, dtype: str, device: str, variant: str | None, given: Mapping[str, Any]
) -> Pipeline:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging

    with (
        as_model_error(key, "check that the folder is complete and was written by this or an older Diffusers"),
        quiet_loading(logging),
        quiet_loading(diffusers_logging),
    ):
        try:
            made = DiffusionPipeline.from_pretrained(folder, dtype=torch_dtype(dtype), variant=variant, **given)
        except (ImportError, NameError) as error:
            raise wanting(key, read_index(key, of_folder(folder))["_class_name"], error) or error from error
        pipe = cast(Pipeline, made)
    if (folder / _LORA).is_file():
        say(
            f"{key}: {_LORA} lies there, which Diffusers leaves out, and so it is not measured; to have it, load it "
            f"and {_FUSE}",
            "warning",
        )
    for name, module in modules_of(pipe).items():
        if getattr(module, "hf_quantizer", None) is not None or getattr(module.config, "quantization_config", None):
            raise ModelError(
                f"{key}: {name} is already quantized; the reference must not be: name the unquantized checkpoint"
            )
        unread = unread_tensors(key, folder / name, module, variant)
        if given.get(name) is None and any(p.device.type == "meta" for p in module.parameters()):
            again = _FUSED if any(".base_layer." in tensor for tensor in unread) else "copy or download it again"
            raise ModelError(f"{key}: weights of {name} are missing from its files; {again}")
        if unread:
            say(
                f"{key}: {len(unread)} tensors in the files of {name} are not of a {type(module).__name__}, such as "
                f"{unread[0]}: Diffusers leaves them out, and so what they belong to (an adapter) is not measured",
                "warning",
            )
        _require_dtype(name, module, dtype)
        frozen(module)
    return pipe if device == HOLLOW else pipe.to(device)


def _require_dtype(name: str, module: nn.Module, dtype: str) -> None:
    """ModelError for a part of which nothing is in the dtype that was asked for."""
    import diffusers

    found = {p.dtype for p in module.parameters() if p.is_floating_point()}
    if found and torch_dtype(dtype) not in found:
        raise ModelError(
            f"model.dtype={dtype}: Diffusers {diffusers.__version__} loaded {name} in "
            f"{', '.join(sorted(dtype_name(one) for one in found))}, so it does not hear the dtype; "
            "install diffusers>=0.40"
        )


def _components(pipe: Pipeline, names: Sequence[str]) -> dict[str, nn.Module]:
    modules = modules_of(pipe)
    for name in names:
        if name not in modules:
            raise ConfigError(
                f"model.components={name}: {type(pipe).__name__} has {', '.join(sorted(modules))}"
                f"{nearest(name, modules)}"
            )
    return {name: modules[name] for name in names}


def _pipeline_sha256(pipe: Pipeline, folder: Path, cache_dir: Path, progress: Progress | None) -> str:
    """sha256 over the names and bytes of all files of the pipeline's parts: weights, configs, scheduler, tokenizers.

    The digest of a file is remembered by what it is known by.
    """
    files = [file for name, part in pipe.components.items() if part is not None for file in _files_of(folder / name)]
    total = hashlib.sha256()
    for file, digest in zip(sorted(files), files_sha256(sorted(files), cache_dir, progress), strict=True):
        total.update(f"{file.relative_to(folder).as_posix()}|{digest}\n".encode())
    return "sha256:" + total.hexdigest()


def _files_of(folder: Path) -> list[Path]:
    weights = list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))
    return weights + [file for file in folder.glob("*") if file.suffix in (".json", ".txt", ".model")]
