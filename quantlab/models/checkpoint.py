"""Reading transformers checkpoints: one clear error for all that can be wrong, and a digest of the weights."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.errors import ModelError
from quantlab.models.auto import HEADS, another_family
from quantlab.models.loaded import Progress
from quantlab.models.reading import (
    ADAPTER,
    HOLLOW,
    as_model_error,
    check_no_adapter,
    check_settings,
    frozen,
    local_folder,
    quiet_loading,
)
from quantlab.models.sources import component_source
from quantlab.models.stored_dtype import dtype_on
from quantlab.modules.compute_dtype import torch_dtype
from quantlab.modules.layers import state_digest
from quantlab.modules.source import check_indices
from quantlab.progress import say
from quantlab.vocabulary.amounts import some_of
from quantlab.vocabulary.dtypes import dtype_name
from quantlab.vocabulary.files import object_in
from quantlab.vocabulary.schema import ModelConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

_WAY_OUT = "check the path, that the files are complete, and, for a Hub id, the network or the local Hub cache"

_NO_TOKENIZER = "the folder has no file of one: write it there as well (tokenizer.save_pretrained(FOLDER))"
_TOKENIZERS = re.compile("token|vocab|merges|spiece|bpe|[.]model$").search
"""Finds it in the names of the files that tokenizers are kept in."""


def load_checkpoint(
    auto_classes: Sequence[type[_BaseAutoModelClass] | type[PreTrainedModel]],
    path: str,
    config: ModelConfig,
    device: str,
    key: str = "",
    is_base: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A transformers model in eval mode on ``device``, and its tokenizer, from a local folder or a Hub id.

    Of ``auto_classes`` one that knows the checkpoint's architecture loads it, see :func:`load_model`; ModelError also
    for a checkpoint without a tokenizer.
    """
    key = key or f"model.path={path}"
    model = load_model(auto_classes, path, config, device, key, is_base)
    return model, load_tokenizer(path, config, key)


def load_tokenizer(path: str, config: ModelConfig, key: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; ModelError, beginning with ``key``, where it has none that reads text."""
    from transformers import AutoTokenizer

    path = str(Path(path).expanduser()) if Path(path).expanduser().exists() else path
    where = {"revision": config.revision, "trust_remote_code": False}
    way_out = _NO_TOKENIZER if Path(path).is_dir() and not any(map(_TOKENIZERS, os.listdir(path))) else _WAY_OUT
    with as_model_error(f"{key} (tokenizer)", way_out, lambda: _has_own_tokenizer(path, config.revision)):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, **where)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # some versions make one of no files, which reads no text
        raise ModelError(f"{key} (tokenizer): it knows {len(tokenizer)} tokens and none of text; {way_out}")
    return tokenizer


def load_model(
    auto_classes: Sequence[type[_BaseAutoModelClass] | type[PreTrainedModel]],
    path: str,
    config: ModelConfig,
    device: str,
    key: str,
    is_base: bool = False,
    is_half: bool = False,
) -> PreTrainedModel:
    """A transformers model in eval mode on ``device``, whole; without values on ``reading.HOLLOW``.

    ``auto_classes`` are ``AutoModelForCausalLM``, ``AutoModel``..., or one class; ``key`` begins the messages. Code
    that a checkpoint brings along is never run. ``is_base``: only what gives hidden states is measured, so a head in
    the checkpoint is left (and told of), and a pooler that it lacks is not built. Raises one ModelError for a path
    that is missing, unreachable, not a model, incomplete, damaged or already quantized, and for a checkpoint with
    weights that the class does not use, unless ``is_half`` says that it is meant to.
    """
    local = local_folder(key, path, "config.json", "a transformers model", "save_pretrained")
    if local is not None:
        check_indices(key, local)
    check_no_adapter(key, _has_adapter(path, config.revision))
    path = str(local) if local is not None else path  # a home folder's ~ is no name that transformers knows
    stored = read_config(path, config, key)
    said = "" if stored.dtype is None else dtype_name(stored.dtype)
    dtype = torch_dtype(dtype_on(replace(config, path=path), device, said))
    auto_class = _of(auto_classes, stored, key, config.family)
    parts = (stored, stored.get_text_config())  # a multimodal model's language model may be what is quantized
    quantized = next((q for part in parts if (q := getattr(part, "quantization_config", None)) is not None), None)
    if quantized is not None:
        method = quantized.get("quant_method", "") if isinstance(quantized, dict) else type(quantized).__name__
        raise ModelError(
            f"{key}: these weights are already quantized ({method}); the reference must not be: "
            "name the unquantized checkpoint"
        )
    where: dict[str, object] = {"device_map": HOLLOW} if device == HOLLOW else {}
    model, info = _read(auto_class, path, config, dtype, key, **where)
    missing = sorted(info.get("missing_keys", ()))
    if missing and is_base and all("pooler" in name.split(".") for name in missing):
        model, info = _read(auto_class, path, config, dtype, key, add_pooling_layer=False, **where)
        missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise ModelError(
            f"{key}: the checkpoint lacks {len(missing)} of the weights of {type(model).__name__} "
            f"({some_of(missing, 3)}), which would stay random; name a checkpoint that was saved from this architecture"
        )
    unused, architecture = sorted(info.get("unexpected_keys", ())), saved_from(stored)
    if is_half:  # whoever loads it tells
        unused = []
    if unused and is_base and is_base_with_head(stored):
        told = f"{key}: {len(unused)} weights of the head of {architecture} ({some_of(unused, 3)}) are not measured"
        say(told, "warning")
    elif unused:
        raise ModelError(
            f"{key}: {type(model).__name__} does not use {len(unused)} weights of the checkpoint "
            f"({some_of(unused, 3)}), which was saved from {architecture or 'another class'}: a part of the model "
            f"would be measured as if it were whole; {another_family(architecture, stored.to_dict(), config.family)}"
        )
    whole: PreTrainedModel = frozen(model).to(device)
    return whole


def _has_adapter(path: str, revision: str | None) -> bool:
    """Whether transformers would find an adapter's configuration in a folder or a Hub id."""
    from transformers.utils.peft_utils import find_adapter_config_file

    folder = Path(path).expanduser()
    if folder.is_dir():
        return (folder / ADAPTER).is_file()
    try:
        return find_adapter_config_file(path, revision=revision) is not None
    except (OSError, ValueError):  # whoever loads it says what is wrong
        return False


def read_config(path: str, config: ModelConfig, key: str) -> PreTrainedConfig:
    """The checkpoint's configuration; ModelError where it cannot be read."""
    from transformers import AutoConfig, PreTrainedConfig

    with as_model_error(key, _WAY_OUT):
        said = PreTrainedConfig.get_config_dict(path, revision=config.revision)[0]
        check_settings(key, "config.json", said)  # before lists of so many layers are made
        found: PreTrainedConfig = AutoConfig.from_pretrained(path, revision=config.revision, trust_remote_code=False)
    return found


def _read(
    auto_class: Any, path: str, config: ModelConfig, dtype: torch.dtype, key: str, **more: object
) -> tuple[Any, Mapping[str, Any]]:
    """The model and what transformers says of its loading, with the keys that a class of another architecture than the
    checkpoint's is written to pass over."""
    from transformers.utils import logging

    with as_model_error(key, _WAY_OUT), quiet_loading(logging), _ignoring_nothing(auto_class, path, config):
        model, info = auto_class.from_pretrained(
            path,
            dtype=dtype,
            output_loading_info=True,
            variant=config.variant,
            revision=config.revision,
            trust_remote_code=False,
            **more,
        )
    return model, info


@contextlib.contextmanager
def _ignoring_nothing(auto_class: Any, path: str, config: ModelConfig) -> Iterator[None]:
    """T5's encoder passes over a decoder without a word, where the checkpoint is that of the whole model."""
    from transformers import AutoConfig

    stored = AutoConfig.from_pretrained(path, revision=config.revision, trust_remote_code=False)
    kind = next(iter(_classes(auto_class, stored)), None) if hasattr(auto_class, "_model_mapping") else auto_class
    name = "_keys_to_ignore_on_load_unexpected"
    if kind is None or kind.__name__ == saved_from(stored) or not getattr(kind, name, None):
        yield
        return
    own, kept = name in vars(kind), getattr(kind, name)
    setattr(kind, name, None)
    try:
        yield
    finally:
        if own:
            setattr(kind, name, kept)
        else:
            delattr(kind, name)


def _of(auto_classes: Sequence[Any], stored: PreTrainedConfig, key: str, family: str) -> Any:
    """The one that builds the class which the checkpoint was saved from, as some make the language model alone of a
    multimodal configuration (Qwen 3.5, Llama 4); else the first that knows it. ModelError where none does."""
    kinds = {auto: _classes(auto, stored) for auto in auto_classes}
    name = saved_from(stored)
    brings_code = getattr(stored, "auto_map", None)  # which is refused as that
    if not (any(kinds.values()) or brings_code) and all(hasattr(auto, "_model_mapping") for auto in auto_classes):
        builders = " and ".join(auto.__name__ for auto in auto_classes)
        raise ModelError(
            f"{key}: {name or type(stored).__name__} is none of the classes that {builders} of transformers build; "
            f"{another_family(name, stored.to_dict(), family)}"
        )
    exact = (auto for auto, made in kinds.items() if name in [kind.__name__ for kind in made])
    return next(exact, next((auto for auto, made in kinds.items() if made), auto_classes[0]))


def _classes(auto_class: Any, stored: PreTrainedConfig) -> Sequence[type]:
    """What an auto class builds of a configuration; nothing where it does not know it, or is a class itself."""
    found = getattr(auto_class, "_model_mapping", {}).get(type(stored), ())
    return found if isinstance(found, (tuple, list)) else (found,)


def saved_from(stored: PreTrainedConfig) -> str:
    """The class that a checkpoint was saved from; "" where it does not say."""
    return (getattr(stored, "architectures", None) or [""])[0]


def is_base_with_head(stored: PreTrainedConfig) -> bool:
    """Whether a checkpoint is of a model that only encodes, with a head on it (MLM, classification)."""
    if getattr(stored, "is_encoder_decoder", False):
        return False
    return saved_from(stored).rpartition("For")[2] in HEADS


# -- digests

_NUM_BLOCKS, _BLOCK_BYTES = 16, 4096
_FILES_AT_ONCE = 8
"""Hashed in threads, by which the interpreter is not held."""


def weights_sha256(model: PreTrainedModel, path: str | Path, revision: str | None, cache_dir: Path) -> str:
    """:func:`~quantlab.modules.layers.state_digest` of the model as loaded, remembered in ``cache_dir/digests.json``.

    The key is what the weight files are known by and the dtype they were loaded in; a model whose
    files are not found on disk is hashed each time.
    """
    files = _weight_files(str(path), revision)
    if not files:
        return state_digest(model.state_dict())
    return remembered_digest(files, cache_dir, lambda: state_digest(_state(model)), dtype_name(model.dtype))


def _state(model: PreTrainedModel) -> Mapping[str, object]:
    """The model's tensors by name; of one without values each from its file, when it is asked for."""
    if not any(p.is_meta for p in model.parameters()):
        return model.state_dict()
    return component_source("model", model, dtype_name(model.dtype), "cpu").state()


def file_sha256(file: Path, cache_dir: Path) -> str:
    """sha256 of one file, remembered like :func:`weights_sha256`."""
    return files_sha256([file], cache_dir)[0]


def files_sha256(files: Sequence[Path], cache_dir: Path, progress: Progress | None = None) -> list[str]:
    """sha256 of each file, remembered like :func:`weights_sha256`; those that are not known are read side by side."""
    stopped = threading.Event()

    def compute(unknown: Sequence[int]) -> Iterator[tuple[int, str]]:
        largest_first = sorted(unknown, key=lambda i: -files[i].stat().st_size)
        with ThreadPoolExecutor(min(_FILES_AT_ONCE, os.cpu_count() or 1)) as pool:
            try:
                found = pool.map(lambda i: _sha256_of(files[i], stopped), largest_first)
                for done, (i, digest) in enumerate(zip(largest_first, found, strict=True)):
                    if progress is not None:
                        progress("hash weights", done + 1, len(unknown))
                    yield i, digest
            finally:  # the others need not be read to their end where one cannot be, or the user has had enough
                stopped.set()

    return _remembered([file_stamp(file) for file in files], cache_dir, compute)


def _sha256_of(file: Path, stopped: threading.Event) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with open(file, "rb", buffering=0) as stream:
        while num := stream.readinto(buffer):
            if stopped.is_set():
                raise InterruptedError(f"{file.name} was not read to its end")
            digest.update(buffer[:num])
    return digest.hexdigest()


def remembered_digest(files: Sequence[Path], cache_dir: Path, compute: Callable[[], str], also: str = "") -> str:
    """``compute()``, or what it returned for the same files and ``also`` before.

    A file is the same by its path, size, times and inode, and by a sample of its blocks: tools that copy files may set
    the time of what they replace.
    """
    stamp = ";".join([*map(file_stamp, files), also])
    return _remembered([stamp], cache_dir, lambda _: iter([(0, compute())]))[0]


def _remembered(
    stamps: Sequence[str], cache_dir: Path, compute: Callable[[Sequence[int]], Iterator[tuple[int, str]]]
) -> list[str]:
    """The digest of each stamp; ``compute`` gives those that are asked for by their places, as they come."""
    from filelock import FileLock

    store = Path(cache_dir) / "digests.json"
    store.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{store}.lock"):
        known = object_in(store)  # absent or cut off: it only saves time, so start again
        unknown = [i for i, stamp in enumerate(stamps) if stamp not in known]
        if not unknown:
            return [known[stamp] for stamp in stamps]
        try:
            for i, digest in compute(unknown):
                known[stamps[i]] = digest
        finally:  # what was read stays known
            fresh = store.with_suffix(f".tmp{os.getpid()}")
            fresh.write_text(json.dumps(known, indent=1, sort_keys=True), encoding="utf-8")
            os.replace(fresh, store)
    return [known[stamp] for stamp in stamps]


def file_stamp(file: Path) -> str:
    """What a file is known by, without reading it whole."""
    found = file.stat()
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        for i in range(_NUM_BLOCKS):
            stream.seek(i * max(found.st_size - _BLOCK_BYTES, 0) // (_NUM_BLOCKS - 1))
            digest.update(stream.read(_BLOCK_BYTES))
    times = f"{found.st_mtime_ns}|{found.st_ctime_ns}|{found.st_ino}"
    return f"{file.resolve()}|{found.st_size}|{times}|{digest.hexdigest()[:32]}"


def _has_own_tokenizer(path: str, revision: str | None) -> bool:
    """Whether the checkpoint says that the class of its tokenizer is in a file of its own."""
    folder = _folder(path, revision)
    return folder is not None and "AutoTokenizer" in (object_in(folder / "tokenizer_config.json").get("auto_map") or {})


def _weight_files(path: str, revision: str | None) -> list[Path]:
    folder = _folder(path, revision)
    return sorted(folder.glob("*.safetensors")) if folder else []


def _folder(path: str, revision: str | None) -> Path | None:
    """The local folder, or that of a Hub id in the local Hub cache; None where it is not there."""
    from transformers.utils.hub import cached_file

    folder = Path(path).expanduser()
    if not folder.is_dir():
        config = cached_file(
            path,
            "config.json",
            revision=revision,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if config is None else Path(config).parent
    return folder
