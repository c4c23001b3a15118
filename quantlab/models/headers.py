"""The weights of a local model, looked at before they load: each file that is read is there, and as long as it says."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantlab.errors import ModelError
from quantlab.models.pipeline_files import INDEX, listed_parts
from quantlab.modules.source import indexed
from quantlab.vocabulary.files import object_in
from quantlab.vocabulary.schema import ModelConfig

_NAMES = ("model", "diffusion_pytorch_model")
"""What transformers and Diffusers call a file of weights."""
_AGAIN = "copy or download it again"


def check_whole(config: ModelConfig) -> None:
    """ModelError, beginning with ``model.path=``, for a file of safetensors that is cut off, or that an index names and
    that is not there. Headers alone are read; what is on no disk, and files of other kinds, are not looked at."""
    folder = Path(config.path or "").expanduser()
    if not config.path or not folder.is_dir():
        return
    said = object_in(folder / INDEX)
    parts = [name for name, of in listed_parts(said).items() if any(of)]
    for place in (folder, *(folder / name for name in parts if name.isidentifier() and name not in config.without)):
        check_folder(f"model.path={config.path}", place, config.variant, folder)


def check_folder(key: str, folder: Path, variant: str | None = None, whole: Path | None = None) -> None:
    """ModelError as :func:`check_whole`, for one component's files; they are named as from ``whole``."""
    for file in _files(key, folder, variant):
        _check(key, file, whole or folder)


def _files(key: str, folder: Path, variant: str | None) -> list[Path]:
    """Those of a folder that are read of it: one, or else those of an index."""
    infix = f".{variant}" if variant else ""
    for name in _NAMES:
        one, index = folder / f"{name}{infix}.safetensors", folder / f"{name}.safetensors.index{infix}.json"
        if one.is_file() and not index.is_file():
            return [one]
        if index.is_file() and not one.is_file():
            return [folder / file for file in sorted(set(indexed(key, index).values()))]
    return []


def _check(key: str, file: Path, folder: Path) -> None:
    name = file.relative_to(folder).as_posix()
    if not file.is_file():
        raise ModelError(f"{key}: its index names {name}, which is not there; {_AGAIN}")
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header: Mapping[str, Any] = json.loads(opened.read(length)) if 8 + length <= size else {}
        tensors = [said for tensor, said in header.items() if tensor != "__metadata__"]
        wanted = 8 + length + max((said["data_offsets"][1] for said in tensors), default=0)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError, struct.error) as error:
        raise ModelError(f"{key}: {name} is damaged or cut off ({error}); {_AGAIN}") from error
    if wanted != size:
        raise ModelError(f"{key}: {name} is damaged or cut off ({size:,} bytes, its header says {wanted:,}); {_AGAIN}")
