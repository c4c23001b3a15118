"""The header of a GGUF file, walked before any of it is believed: every count against the bytes that are there.

The library's reader trusts what a header says: 49 bytes that claim an array of 2^33 items keep it busy until memory
ends. Layout: the GGUF specification of ggml, versions 2 and 3.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import IO

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Value type -> bytes; 8 is a string, 9 an array."""
_UINT32, _STRING, _ARRAY = 4, 8, 9
_ALIGNMENT, _BLOCKS, _MAX_BLOCKS = b"general.alignment", b".block_count", 10_000
_MAX_DEPTH, _MAX_DIMENSIONS, _MAX_NAME = 4, 5, 2**16  # ggml has 4 dimensions, files of video models one of 5


EMBEDDING = "token_embd.weight"
"""A tensor of every language model of llama.cpp, and of no denoiser."""


def check_header(path: Path) -> frozenset[str]:
    """The names of a file's tensors; ValueError for one whose header does not fit into it, or whose tensors do not.

    Nothing else is read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        walk = _Walk(file, size)
        if walk.take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = walk.number("<I")
        if version not in (2, 3):
            raise ValueError(f"version {version} of GGUF is not known")
        num_tensors, num_keys = walk.count("tensors", 24), walk.count("keys", 13)
        alignment, keys = 32, set[bytes]()
        for _ in range(num_keys):
            key, kind = walk.string(_MAX_NAME), walk.number("<I")
            if key in keys:
                raise ValueError(f"two keys are called {key.decode(errors='replace')}")
            keys.add(key)
            if key.endswith(_BLOCKS) and kind == _UINT32:
                if (num := walk.number("<I")) > _MAX_BLOCKS:
                    raise ValueError(f"{key.decode(errors='replace')} is {num}, and no model has so many layers")
            elif key != _ALIGNMENT:
                walk.value(kind, _MAX_DEPTH)
            elif kind == _UINT32:
                alignment = walk.number("<I")
            else:
                raise ValueError(f"{_ALIGNMENT.decode()} is of type {kind}")
        if not 0 < alignment <= 2**20 or alignment & (alignment - 1):
            raise ValueError(f"an alignment of {alignment} bytes")
        tensors = [walk.tensor() for _ in range(num_tensors)]
        start = -(-file.tell() // alignment) * alignment
        end = 0
        for name, offset, num_bytes in sorted(tensors, key=lambda tensor: tensor[1:]):
            if offset % alignment or start + offset + num_bytes > size:
                raise ValueError(f"tensor {name!r} of {num_bytes} bytes at {offset} does not lie in the file")
            if offset < end:
                raise ValueError(f"tensor {name!r} at {offset} begins in the one before it, which ends at {end}")
            end = offset + num_bytes
        names = frozenset(name for name, _, _ in tensors)
        if len(names) < len(tensors):
            raise ValueError("two tensors have one name")
        return names


class _Walk:
    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.size = file, size

    def take(self, num_bytes: int) -> bytes:
        if not 0 <= num_bytes <= self.size - self.file.tell():
            raise ValueError("it ends early, or is of another kind")
        return self.file.read(num_bytes)

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def count(self, what: str, least_bytes: int) -> int:
        """A number of items of at least so many bytes each."""
        num = self.number("<Q")
        if num * least_bytes > self.size - self.file.tell():
            raise ValueError(f"{num} {what} do not fit into what is left of the file")
        return num

    def string(self, longest: int | None = None) -> bytes:
        length = self.number("<Q")
        if longest is not None and length > longest:
            raise ValueError(f"a name of {length} bytes")
        return self.take(length)

    def value(self, kind: int, depth: int) -> None:
        if kind in _SIZES:
            self.take(_SIZES[kind])
        elif kind == _STRING:
            self.string()
        elif kind == _ARRAY and depth:
            inner = self.number("<I")
            num = self.count("items of an array", _SIZES.get(inner, 8))
            if inner in _SIZES:
                self.take(num * _SIZES[inner])
            else:
                for _ in range(num):
                    self.value(inner, depth - 1)
        else:
            raise ValueError(f"a value of type {kind}")

    def tensor(self) -> tuple[str, int, int]:
        """Name, offset and bytes of the next tensor."""
        import gguf

        name = self.string(_MAX_NAME).decode("utf-8")
        num_dimensions = self.number("<I")
        if num_dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"tensor {name!r} of {num_dimensions} dimensions")
        sizes = [self.number("<Q") for _ in range(num_dimensions)]
        if 0 in sizes:
            raise ValueError(f"tensor {name!r} has a size of 0")
        numel = math.prod(sizes)
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(self.number("<I"))]
        if sizes and sizes[0] % per_block:
            raise ValueError(f"tensor {name!r} has rows of {sizes[0]} values, in blocks of {per_block}")
        return name, self.number("<Q"), -(-numel // per_block) * block_bytes
