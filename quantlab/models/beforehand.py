"""What tells two checkpoints apart before either is loaded: some values of tensors and configurations, in the files."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantlab.errors import ModelError
from quantlab.models.identity import without_place
from quantlab.models.pipeline_files import INDEX, listed_parts
from quantlab.modules.source import Shards, shards_of
from quantlab.vocabulary.files import object_in
from quantlab.vocabulary.schema import ModelConfig

CONFIG = "config.json"
NUM_TENSORS, NUM_VALUES = 64, 16
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The floating ones in safetensors' spelling."""


def sampled_weights(config: ModelConfig, dtype: str) -> dict[str, str]:
    """Name of a tensor (of a pipeline behind its part's) -> its shape and a digest of its first and last values in
    ``dtype``, of 64 tensors at most, however they are cut into files; empty for what is no folder of safetensors."""
    folder = folder_of(config)
    if folder is None:
        return {}
    parts = {"": folder} if (folder / CONFIG).is_file() else {f"{f.name}/": f for f in sorted(folder.iterdir())}
    files: dict[str, tuple[Path, str]] = {}
    for name, place in parts.items():
        for tensor, file in weight_files(place, config.variant).items():
            files[f"{name}{tensor}"] = file, tensor
    names = sorted(files)
    chosen = names[:: max(1, -(-len(names) // NUM_TENSORS))]
    headers: dict[Path, tuple[int, Mapping[str, Any]]] = {}
    return {name: said for name in chosen if (said := _sample(*files[name], dtype, headers))}


def stored_configs(config: ModelConfig) -> dict[str, Any]:
    """``config.json: rope_theta`` -> what the file says, of the configurations that are loaded; empty for what is no
    folder, and for a model of several models, of which only some may be.

    Nothing is filled in: of two checkpoints a value is known to differ where both say it.
    """
    folder = folder_of(config)
    if folder is None:
        return {}
    index = object_in(folder / INDEX)
    if not index:
        names = (CONFIG, "generation_config.json")
        return {} if config.family == "vision" else _values("", folder, names)
    found = {f"{INDEX}: {k}": v for k, v in index.items() if isinstance(v, (bool, int, float))}
    for name, said in listed_parts(index).items():
        if name.isidentifier() and any(said) and name not in config.without:
            found |= _values(name, folder / name, (CONFIG, "scheduler_config.json"))
    return found


def _values(part: str, folder: Path, names: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in names:
        said = object_in(folder / name)
        if any(key.endswith("_config") and isinstance(value, dict) for key, value in said.items()):
            continue
        where = f"{part}/{name}" if part else name
        found |= {f"{where}: {k}": v for k, v in without_place(said).items() if not k.startswith("_")}
    return found


def differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The first value that both say and that is another one here; "" where none is known to be."""
    return next((name for name, said in there.items() if name in here and here[name] != said), "")


def folder_of(config: ModelConfig) -> Path | None:
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


def weight_files(folder: Path, variant: str | None) -> Mapping[str, Path]:
    """Name of a tensor -> its safetensors file; empty where there are none that can be read."""
    if not folder.is_dir():
        return {}
    try:
        found: Shards = shards_of("", folder, variant)
    except ModelError:  # whoever loads it says what is wrong
        return {}
    return found.files


def read_header(file: Path) -> tuple[int, Mapping[str, Any]]:
    """Where the tensors of a safetensors file begin, and name -> ``dtype``, ``shape`` and ``data_offsets``; of a file
    that safetensors has read."""
    with file.open("rb") as opened:
        (size,) = struct.unpack("<Q", opened.read(8))
        return 8 + size, json.loads(opened.read(size))


def _sample(file: Path, name: str, dtype: str, headers: dict[Path, tuple[int, Mapping[str, Any]]]) -> str:
    import torch

    if file not in headers:
        headers[file] = read_header(file)
    start, header = headers[file]
    said = header[name]
    with file.open("rb") as opened:
        if said["dtype"] not in DTYPES:
            return ""
        stored = getattr(torch, DTYPES[said["dtype"]])
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
