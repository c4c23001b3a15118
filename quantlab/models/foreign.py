"""``checkpoint=...``: quantized checkpoints that others made, found, looked at, and loaded by their own library.

Nothing that a checkpoint brings along is run: no code of its own, and no pickle that holds more than tensors.
"""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from quantlab.backends.checkpoints import method_of, require_method
from quantlab.backends.gguf.header import EMBEDDING, check_header
from quantlab.backends.gguf.language import check_language_model, differing_keys, load_language_model
from quantlab.backends.modelopt.restore import STATE, loading_arguments, restoring, rewrap
from quantlab.errors import ConfigError, ModelError, first_line
from quantlab.models.checkpoint import files_sha256
from quantlab.models.exported import check_digests
from quantlab.models.headers import check_folder
from quantlab.models.loaded import LoadedModel, class_names
from quantlab.models.outline import is_of_diffusers
from quantlab.models.pipeline_files import INDEX
from quantlab.models.reading import (
    ADAPTER,
    as_model_error,
    check_no_adapter,
    check_settings,
    frozen,
    quiet_loading,
    remote_code,
)
from quantlab.models.settings import differing_settings, other_heads, said_settings
from quantlab.modules.compute_dtype import torch_dtype
from quantlab.modules.groups import KEY as GROUPED
from quantlab.modules.source import check_indices, tensor_names
from quantlab.progress import say
from quantlab.vocabulary.amounts import some_of
from quantlab.vocabulary.files import read_json
from quantlab.vocabulary.native import QuantizationMethod

if TYPE_CHECKING:
    import torch
    from torch import nn

CONFIG = "config.json"
_WAY_OUT = "check that it is complete and that its library's version reads it"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_WEIGHTS = (".safetensors", ".gguf", *_PICKLES)
_NAME_ONE = "name a folder that save_pretrained wrote, a GGUF file, or the Hub id of one"


def check_checkpoint(checkpoint: str) -> None:
    """ModelError, before anything is loaded, for a path that can only be a local one and leads nowhere, and for what
    lies there and is no checkpoint."""
    place = Path(checkpoint).expanduser()
    if place.exists():
        _check_kind(f"checkpoint={checkpoint}", place)
    elif not _is_id(checkpoint):
        raise ModelError(f"checkpoint={checkpoint}: there is no such file or folder; {_NAME_ONE}")


def _check_kind(key: str, place: Path) -> None:
    if place.is_file():
        if place.suffix != ".gguf":
            raise ModelError(
                f"{key}: a single {place.suffix or 'file'} says neither its format nor its model; {_NAME_ONE}"
            )
        return
    files = sorted(place.glob("*.gguf"))
    if len(files) != 1 and not any((place / name).is_file() for name in (INDEX, CONFIG)):
        found = f"it holds {some_of((f.name for f in files), 4)}: name one" if files else f"{_NAME_ONE}"
        raise ModelError(f"{key}: the folder has neither {CONFIG} nor {INDEX}; {found}")


def _is_id(checkpoint: str) -> bool:
    parts = checkpoint.split("/")
    if checkpoint.startswith(("/", ".", "~")) or not all(parts):
        return False
    return len(parts) == 2 or (len(parts) > 2 and checkpoint.endswith(".gguf"))


# -- where it lies


def sources_of(checkpoint: str, names: Sequence[str], classes: Mapping[str, str]) -> dict[str, Path]:
    """Chosen component -> its file or folder; a Hub id is downloaded. ``classes``: component -> name of its class.

    Raises ModelError for what is no checkpoint, and ConfigError where it cannot be told which component it is of.
    """
    key = f"checkpoint={checkpoint}"
    check_checkpoint(checkpoint)
    place = Path(checkpoint).expanduser()
    if not place.exists():
        place = _downloaded(key, checkpoint)
        _check_kind(key, place)
    if place.is_file():
        return {_only(key, names): place}
    if (place / INDEX).is_file():
        return {name: _part(key, place, name) for name in names}
    if (place / CONFIG).is_file():
        return {_by_class(key, place, names, classes): _its_weights(place)}
    [file] = place.glob("*.gguf")
    return {_only(key, names): file}


def _downloaded(key: str, checkpoint: str) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    parts = checkpoint.split("/")
    with as_model_error(key, "check the name and the network, or name a local folder"):
        if len(parts) > 2:
            return Path(hf_hub_download("/".join(parts[:2]), "/".join(parts[2:])))
        kept = ["*.json", "*.safetensors", "*.txt", "*.model", f"*{STATE}"]
        return Path(snapshot_download(checkpoint, allow_patterns=kept))


def _only(key: str, names: Sequence[str]) -> str:
    if len(names) != 1:
        raise ConfigError(f"{key}: one file is of one component; choose it with model.components=[{names[0]}]")
    return names[0]


def _part(key: str, place: Path, name: str) -> Path:
    if not (place / name / CONFIG).is_file():
        raise ModelError(f"{key}: the pipeline has no {name}/{CONFIG}; choose what it has with model.components=[...]")
    return _its_weights(place / name)


def also_quantized(key: str, sources: Mapping[str, Path]) -> list[str]:
    """Components that the same pipeline has quantized too, and that are none of those chosen."""
    folders = [source.parent if source.is_file() else source for source in sources.values()]
    return sorted(
        place.name
        for root in {folder.parent for folder in folders if (folder.parent / INDEX).is_file()}
        for place in root.iterdir()
        if place not in folders and place.is_dir() and _is_quantized(key, place)
    )


def _is_quantized(key: str, folder: Path) -> bool:
    is_told = (folder / CONFIG).is_file() and bool(_config(key, folder).get("quantization_config"))
    return is_told or (folder / STATE).is_file() or _its_weights(folder) != folder


def _its_weights(folder: Path) -> Path:
    """The one GGUF file of a folder without other weights, as an export of a denoiser is; else the folder."""
    if any(file.suffix in (".safetensors", *_PICKLES) for file in folder.iterdir()):
        return folder
    files = list(folder.glob("*.gguf"))
    return files[0] if len(files) == 1 else folder


def _by_class(key: str, place: Path, names: Sequence[str], classes: Mapping[str, str]) -> str:
    said = _class_of(_config(key, place))
    same = [name for name in names if classes[name] == said]
    if len(names) > 1 and len(same) > 1:
        raise ConfigError(
            f"{key}: {' and '.join(same)} are both a {said}; choose one with model.components=[{same[0]}]"
        )
    return same[0] if same else names[0]  # of another class: told when it is loaded


def _config(key: str, place: Path) -> dict[str, Any]:
    data = read_json(place / CONFIG, f"{key}: {CONFIG}", "copy or download it again")
    if not isinstance(data, dict):
        raise ConfigError(f"{key}: {CONFIG}: a mapping is wanted; copy or download it again")
    check_settings(key, CONFIG, data)
    return data


def _class_of(config: Mapping[str, Any]) -> str:
    listed = config.get("architectures")
    return str(config.get("_class_name") or (listed[0] if isinstance(listed, list) and listed else ""))


def checkpoint_files(sources: Mapping[str, Path]) -> list[Path]:
    """The files that a checkpoint's components are read from."""
    return [
        file
        for source in sources.values()
        for file in (
            [source]
            if source.is_file()
            else sorted(f for f in source.iterdir() if f.is_file() and f.suffix in (".json", *_WEIGHTS))
        )
    ]


def checkpoint_bytes(sources: Mapping[str, Path]) -> int:
    """Bytes of its files of weights."""
    return sum(file.stat().st_size for file in checkpoint_files(sources) if file.suffix in _WEIGHTS)


def checkpoint_sha256(sources: Mapping[str, Path], cache_dir: Path) -> str:
    """sha256 over the components' names, the names of their files and what is in them."""
    named = [(name, file) for name, source in sorted(sources.items()) for file in checkpoint_files({name: source})]
    total = hashlib.sha256()
    for (name, file), digest in zip(named, files_sha256([f for _, f in named], cache_dir), strict=True):
        total.update(f"{name}/{file.name if sources[name].is_dir() else ''}|{digest}\n".encode())
    return "sha256:" + total.hexdigest()


# -- loading it


def load_part(key: str, source: Path, name: str, model: LoadedModel) -> tuple[nn.Module, str]:
    """A component as its own library loads it, in eval mode on the model's device; and its ``quant_method``.

    Raises ModelError for what cannot be read, is of another class, or would run code; MissingPackage for a method
    whose library is not installed.
    """
    check_digests(key, source)
    original, dtype = model.components[name], torch_dtype(model.dtype)
    if source.is_file():
        return _on_device(key, _read_gguf(key, source, name, model), model.device), QuantizationMethod.GGUF.value
    method = _method(key, source, original)
    require_method(method, key)
    _check_files(key, source)
    with as_model_error(key, _WAY_OUT), restoring(type(original), source):
        found = _read_folder(key, source, original, dtype)
    rewrap(found, source)
    return _on_device(key, found, model.device), method


def check_class(checkpoint: str, components: Mapping[str, nn.Module], names: Sequence[str]) -> None:
    """ConfigError as :func:`load_part`, for files on this disk that are not of the component which they are for.

    The ``components`` need no values.
    """
    if not Path(checkpoint).expanduser().exists():
        return
    key = f"checkpoint={checkpoint}"
    for name, source in sources_of(checkpoint, names, class_names(components)).items():
        if source.is_dir():
            require_method(_method(key, source, components[name]), key)
            check_folder(key, source)
        else:
            _check_file(key, source, components[name])
            if not is_of_diffusers(components[name]):
                check_language_model(key, source, components[name])


def _method(key: str, source: Path, original: nn.Module) -> str:
    config = _config(key, source)
    _check_class(key, config, original)
    return method_of(config, (source / STATE).is_file(), key)


def _check_class(key: str, config: Mapping[str, Any], original: nn.Module) -> None:
    said, own = _class_of(config), type(original).__name__
    if said != own:
        if config.get("auto_map"):
            raise remote_code(key, f"its {CONFIG} names the class {said or '(none)'} of its own files (auto_map)")
        raise ModelError(f"{key}: it is a {said or 'nameless class'} and the model's component a {own}; {_not_its()}")
    if heads := other_heads(config, original):
        raise ModelError(f"{key}: its {CONFIG} says {heads}; {_not_its()}")


def _not_its() -> str:
    return "name the model that it was made from (model.path=...), or another checkpoint"


def _check_files(key: str, source: Path) -> None:
    """ModelError for a damaged file of tensors, an index of files elsewhere, and a pickle that holds anything else than
    tensors."""
    import pickle

    import torch

    check_indices(key, source)
    check_folder(key, source)
    for file in sorted(source.glob("*.safetensors")):
        tensor_names(f"{key}: {file.name}", file)
    if any(source.glob("*.safetensors")):
        return
    for file in sorted(f for f in source.iterdir() if f.suffix in _PICKLES and f.name != STATE):
        try:
            torch.load(file, map_location="meta", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
            raise ModelError(
                f"{key}: {file.name} is a pickle that holds more than tensors, or is damaged ({first_line(error)}): "
                "not loaded, as it would run code; name a checkpoint in safetensors"
            ) from error


def _read_folder(key: str, source: Path, original: nn.Module, dtype: torch.dtype) -> nn.Module:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging

    made: Any = type(original)
    with quiet_loading(logging), quiet_loading(diffusers_logging), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if is_of_diffusers(original):
            more = loading_arguments(made, source)
            module: nn.Module = made.from_pretrained(source, torch_dtype=dtype, **more)
        else:
            check_no_adapter(key, (source / ADAPTER).is_file())
            module, info = made.from_pretrained(source, dtype=dtype, trust_remote_code=False, output_loading_info=True)
            if missing := sorted(info.get("missing_keys", ())):
                raise ModelError(f"{key}: it lacks {missing[0]} ({len(missing)} tensors in all); {_not_its()}")
            if unused := sorted(info.get("unexpected_keys", ())):
                say(f"{key}: {len(unused)} of its tensors are not used ({unused[0]}, ...)", "warning")
    return module


def _read_gguf(key: str, file: Path, name: str, model: LoadedModel) -> nn.Module:
    from diffusers.utils import logging as diffusers_logging

    original = model.components[name]
    _check_file(key, file, original)
    if not is_of_diffusers(original):
        if "groups" in model.parts:
            raise ConfigError(
                f"{GROUPED}: {key} is read into a copy of the whole model; pass memory.placement=resident"
            )
        module = model.copy_of(name)
        load_language_model(key, file, module, model.dtype)
        return module
    import diffusers

    blocks: Any = diffusers.GGUFQuantizationConfig
    dtype, made = torch_dtype(model.dtype), cast("Any", type(original))
    with (
        tempfile.TemporaryDirectory(prefix="quantlab-config-") as folder,
        as_model_error(key, f"{_WAY_OUT}; {_not_its()}"),
        quiet_loading(diffusers_logging),
    ):
        said: Any = original
        said.save_config(folder)
        loaded: nn.Module = made.from_single_file(
            str(file),
            config=folder,
            quantization_config=blocks(compute_dtype=dtype),
            dtype=dtype,
        )
    return loaded


def differing_keys_of(key: str, source: Path, original: nn.Module) -> list[str]:
    """Of a file that has settings of its own, which the model's stand for: those that compute otherwise."""
    return differing_keys(key, source, original) if source.is_file() and not is_of_diffusers(original) else []


def differing_settings_of(key: str, source: Path, original: nn.Module) -> list[str]:
    """The same of a folder's ``config.json``, by which it is measured."""
    said = _config(key, source) if source.is_dir() else {}
    return differing_settings(said_settings(said, original), original) if said else []


def _check_file(key: str, file: Path, original: nn.Module) -> None:
    """Raise where a GGUF file is damaged, or cannot be of the component, as its kind and the header tell."""
    require_method(QuantizationMethod.GGUF.value, key)
    try:
        names = check_header(file)
    except (OSError, ValueError, KeyError, OverflowError) as error:
        raise ModelError(f"{key}: not a readable GGUF file ({error}); copy or download it again") from error
    if not is_of_diffusers(original):
        return
    if not hasattr(type(original), "from_single_file"):
        raise ModelError(f"{key}: Diffusers reads no single file into a {type(original).__name__}; name a folder")
    if EMBEDDING in names:
        own = type(original).__name__
        raise ModelError(f"{key}: it is a language model and the model's component a {own}; {_not_its()}")


def _on_device(key: str, module: nn.Module, device: str) -> nn.Module:
    import torch

    there = {name: {t.device.type for t in _plain(p)} for name, p in module.named_parameters()}
    meta = [name for name, kinds in there.items() if "meta" in kinds]
    if meta:
        raise ModelError(f"{key}: it lacks {meta[0]} ({len(meta)} tensors in all); {_not_its()}")
    frozen(module)
    wanted = torch.device(device)
    if any(kinds != {wanted.type} for kinds in there.values()):
        with as_model_error(key, "pass device=cpu, or device=cuda"):
            module.to(wanted)
    return module


def _plain(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that hold a tensor's values: of a subclass its inner ones, whatever device it says it is on."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names = tensor.__tensor_flatten__()[0]
    return [inner for name in names for inner in _plain(getattr(tensor, name))]
