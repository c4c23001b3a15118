"""Where the tensors of a component lie on the disk, and how one layer of it is brought to a device.

A component that is quantized while it is read is never whole in memory: its module has its parameters on the meta
device, and each layer's tensors come from the memory-mapped safetensors file when they are needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from quantlab.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_MMAP_THRESHOLD = -3
"""glibc's ``M_MMAP_THRESHOLD``."""
_LARGE = 1 << 20
"""From here on a tensor is to have pages of its own."""
_AGAIN = "copy or download it again"


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The tensors of a checkpoint by name, read one at a time."""

    key: str
    """What the user typed, as ``model.path=...``: with it messages begin."""
    files: Mapping[str, Path]
    """Name of a tensor -> the file that holds it."""
    made: Mapping[str, Callable[[torch.dtype], Tensor]] = field(default_factory=dict)
    """Name of a tensor that no file holds as it is -> what makes it, in a dtype, of those that they hold."""

    def __contains__(self, name: str) -> bool:
        return name in self.files or name in self.made

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor as it is stored, its memory is the file's; or in ``dtype``, by which others are made. ModelError
        where there is none or it is damaged."""
        from safetensors import SafetensorError, safe_open

        if name in self.made and dtype is not None:
            return self.made[name](dtype)
        if name not in self.files:
            raise ModelError(f"{self.key}: its files hold no {name}; {_AGAIN}, or pass memory.placement=resident")
        try:
            with safe_open(self.files[name], framework="pt", device="cpu") as file:
                found: Tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{self.key}: {self.files[name].name} is damaged ({error}); {_AGAIN}") from error
        return found if dtype is None else found.to(dtype)


def shards_of(key: str, folder: Path, variant: str | None = None) -> Shards:
    """The safetensors files of one component's folder, their headers read and checked against the index.

    Raises ModelError, beginning with ``key``, where there are none, where one is cut off, and where the index names
    files or tensors that are not there.
    """
    indices = [f for f in sorted(folder.glob("*.safetensors.index*.json")) if _is_of(f.name, variant)]
    mapped = indexed(key, indices[0]) if indices else {}
    names = sorted(set(mapped.values())) or [f.name for f in sorted(folder.glob("*.safetensors"))]
    names = [n for n in names if mapped or _is_of(n, variant)]
    if not names:
        raise ModelError(
            f"{key}: {folder.name} has no safetensors file to stream from; save it as safetensors, or pass "
            "memory.placement=resident"
        )
    files: dict[str, Path] = {}
    for name in names:
        if not (folder / name).is_file():
            raise ModelError(f"{key}: {indices[0].name} names {name}, which is not there; {_AGAIN}")
        files |= dict.fromkeys(tensor_names(f"{key}: {name}", folder / name), folder / name)
    if absent := [n for n, name in mapped.items() if files.get(n) != folder / name]:
        raise ModelError(f"{key}: {indices[0].name} says that {mapped[absent[0]]} holds {absent[0]}, which it does not")
    return Shards(key=key, files=files)


def tensor_names(what: str, file: Path) -> list[str]:
    """Of a safetensors file. ModelError, beginning with ``what``, for one that is damaged or cut off."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{what} is damaged or cut off ({error}); {_AGAIN}") from error


def indexed(key: str, index: Path) -> dict[str, str]:
    """Name of a tensor -> the file beside ``index`` that it names for it.

    ModelError, beginning with ``key``, where it cannot be read, or names a file that lies elsewhere: no digest of the
    folder would know of it.
    """
    try:
        mapped = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{key}: {index.name} cannot be read ({error}); {_AGAIN}") from error
    for name in mapped.values():
        if not isinstance(name, str) or name in ("", "..") or Path(name).name != name or "\\" in name or "\0" in name:
            raise ModelError(f"{key}: {index.name} names {str(name)[:80]!r}, which is no file beside it; {_AGAIN}")
    return mapped


def check_indices(key: str, folder: Path) -> None:
    """ModelError as :func:`indexed`, for any index of weights in a folder."""
    for index in sorted(folder.glob("*.index*.json")):
        indexed(key, index)


def _is_of(name: str, variant: str | None) -> bool:
    """Whether a file is of the variant: ``model.fp16.safetensors``, ``model.safetensors.index.fp16.json``."""
    parts = [p for p in name.removesuffix(".json").replace(".safetensors", "").replace(".index", "").split(".")[1:]]
    said = [p.partition("-")[0] for p in parts]
    return said == ([variant] if variant else [])


@dataclass(frozen=True, kw_only=True)
class Source:
    """A component that is on the disk: its empty module and its tensors."""

    module: nn.Module
    """Parameters on the meta device in the dtypes that they are loaded in; buffers that are in no file have values."""
    shards: Shards
    device: str
    where: Callable[[str], str] | None = None
    """Path of a part -> its device, where they lie on several."""
    _made: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """id of a tensor that several places share -> itself, and what was brought for it."""

    @functools.cached_property
    def _places(self) -> dict[str, list[str]]:
        """Path of a tensor that sits at several -> all of them."""
        found: dict[int, list[str]] = {}
        for path, part in self.module.named_modules(remove_duplicate=False):
            for name, tensor in (*part._parameters.items(), *part._buffers.items()):
                if tensor is not None:
                    found.setdefault(id(tensor), []).append(f"{path}.{name}".lstrip("."))
        return {path: paths for paths in found.values() if len(paths) > 1 for path in paths}

    def state(self) -> Mapping[str, Tensor]:
        """The component's state as it is loaded; each tensor is read when it is asked for, and kept by nobody."""
        return _State(self, self.module.state_dict(keep_vars=True))

    def lacking(self) -> list[str]:
        """Names of parameters that no file holds under any of their names: they are made of others as they load."""
        names = (name for name, _ in self.module.named_parameters())
        return [n for n in names if not any(known in self.shards for known in (n, *self._places.get(n, ())))]

    def fill(self, module: nn.Module, path: str) -> None:
        """Bring the own tensors of the part of ``module`` at ``path``, which has those of :attr:`module`."""
        part = module.get_submodule(path) if path else module
        self._fill(part, part, path)

    def fill_others(self, module: nn.Module, without: Collection[str]) -> None:
        """Bring all tensors but those of the parts at the paths ``without``."""
        for path, part in module.named_modules():
            if path not in without:
                self._fill(part, part, path)

    def forget(self) -> None:
        """Let go of the tensors that several places share; the module holds what was brought."""
        self._made.clear()

    def original(self, path: str) -> nn.Module:
        """The layer at ``path``, unquantized, with tensors of its own."""
        import copy

        empty = self.module.get_submodule(path)
        layer = copy.copy(empty)
        layer._parameters, layer._buffers = dict(empty._parameters), dict(empty._buffers)
        self._fill(layer, empty, path, alone=True)
        return layer

    def _fill(self, part: nn.Module, empty: nn.Module, path: str, alone: bool = False) -> None:
        import torch

        device = self.device if self.where is None else self.where(path)
        for name, tensor in list(part._parameters.items()):
            if tensor is None or not (tensor.is_meta or alone):
                continue
            full = f"{path}.{name}".lstrip(".")
            new = self._brought(full, tensor, alone, device)
            made = new if isinstance(new, torch.nn.Parameter) else torch.nn.Parameter(new, requires_grad=False)
            if full in self._places and not alone:
                self._made[id(tensor)] = tensor, made
            part._parameters[name] = made
        for name, buffer in list(part._buffers.items()):
            if buffer is None:
                continue
            full = f"{path}.{name}".lstrip(".")
            if name in part._non_persistent_buffers_set or full not in self.shards:
                if buffer.is_meta:
                    raise ModelError(f"{self.shards.key}: its files hold no {full}; pass memory.placement=resident")
                part._buffers[name] = buffer.to(device)
            else:
                part._buffers[name] = self._brought(full, buffer, alone, device)

    def _brought(self, path: str, like: Tensor, alone: bool, device: str | None = None) -> Tensor:
        if not alone and id(like) in self._made:
            return self._made[id(like)][1]
        names = [path, *self._places.get(path, ())]
        stored = self.shards.tensor(next((n for n in names if n in self.shards), path), like.dtype)
        if stored.shape != like.shape:
            raise ModelError(
                f"{self.shards.key}: {path} has shape {list(stored.shape)} in the file and {list(like.shape)} by the "
                "configuration; they are not of one model"
            )
        # what is only read may be the file's own pages, which are no memory of the process
        return stored.to(device or self.device, like.dtype, copy=not alone)


@dataclass(frozen=True)
class _State(Mapping[str, "Tensor"]):
    source: Source
    like: Mapping[str, Tensor]
    """Name -> the tensor of the empty module."""

    def __getitem__(self, name: str) -> Tensor:
        like = self.like[name]
        stored = name in self.source.shards or like.is_meta
        return self.source._brought(name, like, alone=True) if stored else like

    def __iter__(self) -> Iterator[str]:
        return iter(self.like)

    def __len__(self) -> int:
        return len(self.like)


@contextlib.contextmanager
def freed_at_once() -> Iterator[None]:
    """Inside, memory of tensors from 1 MiB goes back to the system as soon as they are freed.

    glibc keeps blocks of up to 32 MiB, between those that are in use; a model that comes layer by layer would leave a
    trail of them, as large as itself.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):  # not glibc
        yield
        return
    library.mallopt(_MMAP_THRESHOLD, _LARGE)
    holes = _fill_holes(library)
    try:
        yield
    finally:
        for hole in holes:
            library.free(hole)
        library.mallopt(_MMAP_THRESHOLD, 32 << 20)  # where its own choice ends
        trim()


def _fill_holes(library: ctypes.CDLL) -> list[int]:
    """Take what is free in the heap between blocks that are in use, in pieces from 64 MiB to 1 MiB; nothing is written
    to them, so that they hold no memory. glibc would put large tensors there, whatever the threshold, and keep the
    pages when they are freed. Returns the addresses; none where another allocator serves the process."""
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]
    trim()
    heap, holes, size = _heap(), list[int](), 64 * _LARGE
    while size >= _LARGE:
        taken = library.malloc(size) or 0
        if taken in heap:
            holes.append(taken)
        else:
            library.free(taken)
            size //= 2
    return holes


def _heap() -> range:
    """The addresses that Linux calls the heap."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    ends = [int(end, 16) for line in lines if line.endswith("[heap]") for end in line.split()[0].split("-")]
    return range(min(ends, default=0), max(ends, default=0))


def trim() -> None:
    """Give the system back what the heap holds and nothing uses: blocks below the size that goes back by itself."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # glibc
        library.malloc_trim(0)


@contextlib.contextmanager
def uninitialized() -> Iterator[None]:
    """Inside, modules are made with their parameters on the meta device, where values that are drawn for them cost
    nothing; buffers are real, as some are in no checkpoint."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        yield
