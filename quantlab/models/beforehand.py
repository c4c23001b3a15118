"""What tells two checkpoints apart before either is loaded: some values of some tensors, read from the files."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path

from quantlab.errors import ModelError
from quantlab.modules.source import Shards, shards_of
from quantlab.vocabulary.schema import ModelConfig

NUM_TENSORS, NUM_VALUES = 64, 16
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def sampled_weights(config: ModelConfig, dtype: str) -> dict[str, str]:
    """Name of a tensor (of a pipeline behind its part's) -> its shape and a digest of its first and last values in
    ``dtype``, of 64 tensors at most, however they are cut into files; empty for what is no folder of safetensors."""
    folder = _folder(config)
    if folder is None:
        return {}
    parts = {"": folder} if (folder / "config.json").is_file() else {f"{f.name}/": f for f in sorted(folder.iterdir())}
    files: dict[str, tuple[Path, str]] = {}
    for name, place in parts.items():
        for tensor, file in _shards(place, config.variant).items():
            files[f"{name}{tensor}"] = file, tensor
    names = sorted(files)
    chosen = names[:: max(1, -(-len(names) // NUM_TENSORS))]
    headers: dict[Path, tuple[int, Mapping[str, object]]] = {}
    return {name: said for name in chosen if (said := _sample(*files[name], dtype, headers))}


def other_tensor(there: Mapping[str, str], here: Mapping[str, str]) -> str:
    """A tensor that both have and that is another one here; "" where none is known to be."""
    return next((name for name, said in there.items() if here.get(name, said) != said), "")


def _folder(config: ModelConfig) -> Path | None:
    """The checkpoint's folder, or that of a Hub id in the local cache."""
    if not config.path:
        return None
    folder = Path(config.path).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(config.path, revision=config.revision, local_files_only=True))
    except Exception:  # noqa: BLE001  it is not here, in the library's many ways of saying so
        return None


def _shards(folder: Path, variant: str | None) -> Mapping[str, Path]:
    if not folder.is_dir():
        return {}
    try:
        found: Shards = shards_of("", folder, variant)
    except ModelError:  # whoever loads it says what is wrong
        return {}
    return found.files


def _sample(file: Path, name: str, dtype: str, headers: dict[Path, tuple[int, Mapping[str, object]]]) -> str:
    import torch

    with file.open("rb") as opened:
        if file not in headers:
            (size,) = struct.unpack("<Q", opened.read(8))
            headers[file] = 8 + size, json.loads(opened.read(size))
        start, header = headers[file]
        said = header[name]
        assert isinstance(said, dict), "a header that safetensors has read"
        if said["dtype"] not in _DTYPES:
            return ""
        stored = getattr(torch, _DTYPES[said["dtype"]])
        begin, end = said["data_offsets"]
        length = min(NUM_VALUES * stored.itemsize, end - begin)
        read = bytearray()
        for place in (begin, end - length):
            opened.seek(start + place)
            read += opened.read(length)
    if not read:
        return ""
    values = torch.frombuffer(read, dtype=stored).to(getattr(torch, dtype)).float()
    return f"{said['shape']} {hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]}"
