"""Reading transformers checkpoints: one clear error for all that can be wrong, and a digest of the weights."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from quantlab.errors import ModelError
from quantlab.models.reading import as_model_error, chosen_dtype, frozen, local_folder, quiet_loading
from quantlab.modules.compute_dtype import torch_dtype
from quantlab.modules.layers import state_digest
from quantlab.vocabulary.dtypes import dtype_name
from quantlab.vocabulary.schema import ModelConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

_WAY_OUT = "check the path, that the files are complete, and, for a Hub id, the network or the local Hub cache"


def load_checkpoint(
    auto_classes: Sequence[type[_BaseAutoModelClass]], path: str, config: ModelConfig, device: str, key: str = ""
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A transformers model in eval mode on ``device``, and its tokenizer, from a local folder or a Hub id.

    Of ``auto_classes`` the first that knows the checkpoint's architecture loads it; ``key`` begins the messages
    (default ``model.path=<path>``). Code that a checkpoint brings along is never run. Raises one ModelError for a path
    that is missing, unreachable, not a model, incomplete, damaged, already quantized or without a tokenizer.
    """
    key = key or f"model.path={path}"
    dtype = torch_dtype_argument(config, device)
    local = local_folder(key, path, "config.json", "a transformers model", "save_pretrained")
    path = str(local) if local is not None else path  # a home folder's ~ is no name that transformers knows
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging

    where = {"revision": config.revision, "trust_remote_code": False}
    with as_model_error(key, _WAY_OUT):
        stored = AutoConfig.from_pretrained(path, **where)
    auto_class = next((auto for auto in auto_classes if type(stored) in auto._model_mapping), auto_classes[0])
    parts = (stored, stored.get_text_config())  # a multimodal model's language model may be what is quantized
    quantized = next((q for part in parts if (q := getattr(part, "quantization_config", None)) is not None), None)
    if quantized is not None:
        method = quantized.get("quant_method", "") if isinstance(quantized, dict) else type(quantized).__name__
        raise ModelError(
            f"{key}: these weights are already quantized ({method}); the reference must not be: "
            "name the unquantized checkpoint"
        )
    with as_model_error(key, _WAY_OUT), quiet_loading(logging):
        model, info = auto_class.from_pretrained(
            path, dtype=dtype, output_loading_info=True, variant=config.variant, **where
        )
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise ModelError(
            f"{key}: the checkpoint lacks {len(missing)} of the weights of {type(model).__name__} "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}), which would stay random; "
            "name a checkpoint that was saved from this architecture"
        )
    with as_model_error(f"{key} (tokenizer)", _WAY_OUT, lambda: _has_own_tokenizer(path, config.revision)):
        tokenizer = AutoTokenizer.from_pretrained(path, **where)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # some versions make one of no files, which reads no text
        raise ModelError(f"{key} (tokenizer): it knows {len(tokenizer)} tokens and none of text; {_WAY_OUT}")
    return frozen(model).to(device), tokenizer


def torch_dtype_argument(config: ModelConfig, device: str) -> torch.dtype | Literal["auto"]:
    """``model.dtype`` as ``from_pretrained`` takes it: ``auto`` is float32 on a CPU (16-bit is slower there and adds
    its own error), as stored elsewhere. ConfigError for a dtype that models do not compute in."""
    name = chosen_dtype(config, "float32" if device.startswith("cpu") else "auto")
    return "auto" if name == "auto" else torch_dtype(name)


# -- digests

_NUM_BLOCKS, _BLOCK_BYTES = 16, 4096


def weights_sha256(model: PreTrainedModel, path: str | Path, revision: str | None, cache_dir: Path) -> str:
    """:func:`~quantlab.modules.layers.state_digest` of the model as loaded, remembered in ``cache_dir/digests.json``.

    The key is what the weight files are known by and the dtype they were loaded in; a model whose
    files are not found on disk is hashed each time.
    """
    files = _weight_files(str(path), revision)
    if not files:
        return state_digest(model.state_dict())
    return remembered_digest(files, cache_dir, lambda: state_digest(model.state_dict()), dtype_name(model.dtype))


def file_sha256(file: Path, cache_dir: Path) -> str:
    """sha256 of one file, remembered like :func:`weights_sha256`."""

    def compute() -> str:
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    return remembered_digest([file], cache_dir, compute)


def remembered_digest(files: Sequence[Path], cache_dir: Path, compute: Callable[[], str], also: str = "") -> str:
    """``compute()``, or what it returned for the same files and ``also`` before.

    A file is the same by its path, size, times and inode, and by a sample of its blocks: tools that copy files may set
    the time of what they replace.
    """
    from filelock import FileLock

    stamp = ";".join([*map(_stamp, files), also])
    store = Path(cache_dir) / "digests.json"
    store.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{store}.lock"):
        known = _read_digests(store)
        if stamp not in known:
            known[stamp] = compute()
            fresh = store.with_suffix(f".tmp{os.getpid()}")
            fresh.write_text(json.dumps(known, indent=1, sort_keys=True), encoding="utf-8")
            os.replace(fresh, store)
    return known[stamp]


def _stamp(file: Path) -> str:
    """What a file is known by, without reading it whole."""
    found = file.stat()
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        for i in range(_NUM_BLOCKS):
            stream.seek(i * max(found.st_size - _BLOCK_BYTES, 0) // (_NUM_BLOCKS - 1))
            digest.update(stream.read(_BLOCK_BYTES))
    times = f"{found.st_mtime_ns}|{found.st_ctime_ns}|{found.st_ino}"
    return f"{file.resolve()}|{found.st_size}|{times}|{digest.hexdigest()[:32]}"


def _read_digests(store: Path) -> dict[str, str]:
    try:
        data = json.loads(store.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # absent or cut off: it only saves time, so start again
        return {}
    return data if isinstance(data, dict) else {}


def _has_own_tokenizer(path: str, revision: str | None) -> bool:
    """Whether the checkpoint says that the class of its tokenizer is in a file of its own."""
    folder = _folder(path, revision)
    try:
        data = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")) if folder else {}
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and "AutoTokenizer" in (data.get("auto_map") or {})


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
