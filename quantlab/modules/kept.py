"""Trees of tensors and plain values that are kept in a file, and read back only if they are what was written.

A file is safetensors: tensors by their place in the tree, and in the header the tree as JSON and a digest of both. It
holds no code, and a file that ends early, was changed or is of another kind is told apart from a good one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.errors import is_out_of_memory
from quantlab.modules.trees import in_order
from quantlab.progress import say
from quantlab.vocabulary.dtypes import dtype_name

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".safetensors"
_TREE, _DIGEST = "quantlab.tree", "quantlab.sha256"


class Damaged(Exception):
    """A kept file that is not what was written; the message says why."""


def write_tree(tree: object, file: Path) -> None:
    """Write nested mappings, lists and tuples of tensors, dtypes and plain values; the file is there whole or not.

    A tensor that stands in several places is written once. Raises OSError where there is no room, and TypeError for
    values that are not data.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    text = json.dumps(_said(tree, "", tensors, {}))
    partial = file.with_name(f"{file.stem}.{os.getpid()}.part")
    try:
        save_file(tensors, partial, metadata={_TREE: text, _DIGEST: _digest(text, tensors)})
        os.replace(partial, file)
    except SafetensorError as error:
        raise OSError(f"{file}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)  # of a disk that is full


def read_tree(file: Path) -> Any:
    """What :func:`write_tree` wrote; :class:`Damaged` where the file is not that any more."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (not a dict)
        text = header[_TREE]
        if _digest(text, tensors) != header[_DIGEST]:
            raise Damaged("its contents are not those that were written")
        return _rebuilt(json.loads(text), tensors, {})
    except Damaged:
        raise
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        if is_out_of_memory(error):  # the file may be whole
            raise
        raise Damaged(str(error) or type(error).__name__) from error


def write_json(data: object, file: Path) -> None:
    """Write plain data with its digest; the file is there whole or not."""
    text = json.dumps(data)
    partial = file.with_name(f"{file.stem}.{os.getpid()}.part")
    try:
        partial.write_text(json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "data": text}))
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def read_json(file: Path) -> Any:
    """What :func:`write_json` wrote; :class:`Damaged` where the file is not that any more."""
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        text = held["data"]
        if hashlib.sha256(text.encode()).hexdigest() != held["sha256"]:
            raise Damaged("its contents are not those that were written")
        return json.loads(text)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(str(error) or type(error).__name__) from error


def set_aside(path: Path, error: Damaged) -> None:
    """Give a damaged file or folder another name, and say so: it is made again. The last one aside is kept."""
    aside = path.with_name(f"{path.name}.damaged")
    if aside.is_dir():
        shutil.rmtree(aside)
    path.replace(aside)
    say(f"{path}: damaged ({error}); it is made again, and what was there is kept as {aside.name}", "warning")


def _said(value: object, place: str, tensors: dict[str, Tensor], known: dict[int, str]) -> object:
    """``value`` as JSON data; its tensors go to ``tensors`` under their places."""
    import torch

    if isinstance(value, torch.Tensor):
        name = known.setdefault(id(value), place or "tensor")
        if name not in tensors:
            tensors[name] = in_order(value.detach().cpu())
        strides = {} if value.is_contiguous() else {"stride": list(value.stride())}
        return {"tensor": name, **strides}
    if isinstance(value, torch.dtype):
        return {"dtype": dtype_name(value)}
    if isinstance(value, Mapping):
        return {"map": [[k, _said(v, f"{place}.{k}".lstrip("."), tensors, known)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_said(v, f"{place}.{i}".lstrip("."), tensors, known) for i, v in enumerate(value)]}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"{place}: a {type(value).__name__} is not data")


def _rebuilt(said: Any, tensors: Mapping[str, Tensor], made: dict[str, Tensor]) -> Any:
    import torch

    if not isinstance(said, dict):
        return said
    ((kind, held),) = [(k, v) for k, v in said.items() if k != "stride"]
    if kind == "tensor":
        if "stride" in said and held not in made:
            stored = tensors[held]
            made[held] = torch.empty_strided(stored.shape, said["stride"], dtype=stored.dtype).copy_(stored)
        return made.get(held, tensors[held])
    if kind == "dtype":
        return getattr(torch, held)
    if kind == "map":
        return {k: _rebuilt(v, tensors, made) for k, v in held}
    items = [_rebuilt(v, tensors, made) for v in held]
    return tuple(items) if kind == "tuple" else items


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    import torch

    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"|{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        if tensor.numel():
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
