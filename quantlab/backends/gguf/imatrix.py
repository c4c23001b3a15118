"""The importance matrix: squared inputs of the layers, summed over calibration tokens, and llama.cpp's files of them.

The GGUF form holds two float32 tensors for each weight, ``<weight>.in_sum2`` (sums of squares, one for each input
channel) and ``<weight>.counts`` (tokens), and the keys ``imatrix.datasets``, ``imatrix.chunk_count`` and
``imatrix.chunk_size``. The older binary form (``.dat``) is a little-endian list of name, calls, and mean times calls.
Layouts as llama.cpp's ``llama-imatrix`` writes them; weights are named ``<module path>.weight`` here.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.backends.gguf.header import check_header
from quantlab.backends.unseen import never_ran, only_zeros
from quantlab.errors import ConfigError
from quantlab.modules.feed import CalibrationFeed
from quantlab.vocabulary.files import MAX_TEXT_BYTES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

_SUMS, _COUNTS, _WEIGHT = ".in_sum2", ".counts", ".weight"
_NUMBERS_AT_ONCE = 1 << 22
"""Inputs that are squared at a time: in one go their wide copies take several times the room of a batch."""
_FLOOR = 2.0**-40
"""Importance of a channel that was never active, relative to the most important one. With zeros for all channels of a
block ggml would store zeros for its weights, which other inputs may need; any positive number keeps them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class InputSquares:
    """What one weight's inputs were like; kept as the file keeps it, so that writing and reading changes nothing."""

    sums: NDArray[np.float32]
    """float32 array (matrices, in_features): squares summed over tokens; a Linear has one matrix."""
    counts: NDArray[np.float32]
    """float32 array (matrices,): tokens summed over."""

    def mean(self) -> NDArray[np.float32]:
        """float32 array (matrices, in_features): mean squares; 1 where no token was seen."""
        import numpy as np

        counts = self.counts[:, None]
        return np.where(counts > 0, self.sums / np.where(counts > 0, counts, 1), 1).astype(np.float32)


def observe(model: nn.Module, layers: Sequence[str], feed: CalibrationFeed) -> dict[str, InputSquares]:
    """Layer -> the squares of its inputs over one pass of ``feed``; nothing but the sums is kept.

    Squares are taken in float32 and summed in float64. Raises ConfigError naming a layer whose inputs are not finite
    (the first that ran with such) or that never ran.
    """
    import numpy as np
    import torch

    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(layers, 0)

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def add(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = (args[0] if args else kwargs["input"]).detach()
            rows = inputs.reshape(-1, inputs.shape[-1])
            for some in rows.split(max(1, _NUMBERS_AT_ONCE // max(1, rows.shape[1]))):
                squares = some.float().square().sum(0, dtype=torch.float64)
                sums[name] = sums[name] + squares if name in sums else squares
            counts[name] += len(rows)

        return add

    handles = [model.get_submodule(n).register_forward_pre_hook(hook_of(n), with_kwargs=True) for n in layers]
    try:
        feed(model)
    finally:
        for handle in handles:
            handle.remove()
    totals = {name: value.float().cpu().numpy() for name, value in sums.items()}
    for name, total in totals.items():
        if not np.isfinite(total).all():
            raise ConfigError(
                f"calibration: {name} got NaN, infinities, or values too large to square in float32; "
                "use other data, or exclude it with modules_to_not_convert"
            )
    for name in layers:
        if not counts[name]:
            raise never_ran([name])
        if not totals[name].any():
            raise only_zeros([name])
    return {n: InputSquares(sums=totals[n][None], counts=np.array([counts[n]], np.float32)) for n in layers}


def ggml_importance(squares: InputSquares) -> NDArray[np.float32]:
    """The vector for ggml, float32 (in_features,): mean squares, scaled by a power of two to at most 1, none of them 0.

    The scaling changes no byte of the result, and keeps ggml's float32 sums from overflowing.
    """
    import numpy as np

    mean = squares.mean()[0]
    largest = float(mean.max())
    if largest == 0:
        return np.ones_like(mean)
    scaled = np.ldexp(mean.astype(np.float64), -int(np.frexp(largest)[1]))
    return np.maximum(scaled, _FLOOR).astype(np.float32)


# -- files


def write_imatrix(
    path: str | Path, statistics: Mapping[str, InputSquares], dataset: str = "calibration", num_chunks: int = 1
) -> Path:
    """llama.cpp's GGUF form, weights in name order; returns the path.

    ``dataset`` says what the statistics were measured on, ``num_chunks`` in how many calls; tokens a call are computed.
    """
    import gguf
    import numpy as np

    class Writer(gguf.GGUFWriter):
        def add_architecture(self) -> None:
            """An importance matrix belongs to no architecture."""

    writer = Writer(path, "")
    writer.add_type(gguf.GGUFType.IMATRIX)
    writer.add_array(gguf.Keys.IMatrix.DATASETS, [dataset])
    tokens = max((int(s.counts.max()) for s in statistics.values()), default=0)
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_COUNT, num_chunks)
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_SIZE, min(-(-tokens // num_chunks), 2**32 - 1))
    for name, squares in sorted(statistics.items()):
        writer.add_tensor(f"{name}{_WEIGHT}{_SUMS}", np.ascontiguousarray(squares.sums, np.float32))
        writer.add_tensor(f"{name}{_WEIGHT}{_COUNTS}", np.ascontiguousarray(squares.counts[:, None], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def read_imatrix(path: str | Path) -> dict[str, InputSquares]:
    """Weight (its name without ``.weight``) -> statistics, from the GGUF form or the older binary one.

    Raises ConfigError for a file that is absent, cut, of another kind, empty, or holds negative or non-finite values.
    """
    import numpy as np

    key, path = f"quantization.imatrix_file={path}", Path(path)
    if not path.is_file():
        raise ConfigError(f"{key}: there is no such file; leave imatrix_file out to measure it on calibration data")
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        if not is_gguf and path.stat().st_size > MAX_TEXT_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes, where a layer has a few thousand")
        found = _read_gguf(path) if is_gguf else _read_legacy(path.read_bytes())
    except (OSError, ValueError, IndexError, KeyError, OverflowError, struct.error) as error:
        raise ConfigError(
            f"{key}: not a readable importance matrix ({error}); record it again, or leave imatrix_file "
            "out to measure it on calibration data"
        ) from error
    if not found:
        raise ConfigError(f"{key}: holds no weight's importance; give a file that llama-imatrix or quantlab wrote")
    for name, squares in found.items():
        for values in (squares.sums, squares.counts):
            if not np.isfinite(values).all() or (values < 0).any():
                raise ConfigError(f"{key}: {name} holds values that are negative or not finite; record it again")
    return {name.removesuffix(_WEIGHT): squares for name, squares in found.items()}


def _read_gguf(path: Path) -> dict[str, InputSquares]:
    import gguf
    import numpy as np

    check_header(path)
    reader = gguf.GGUFReader(path)
    tensors = {t.name: t for t in reader.tensors}
    for name, tensor in tensors.items():
        if name.endswith((_SUMS, _COUNTS)) and tensor.tensor_type != gguf.GGMLQuantizationType.F32:
            raise ValueError(f"{name} is {tensor.tensor_type.name}, not F32")
    names = [n.removesuffix(_SUMS) for n in tensors if n.endswith(_SUMS)]
    found = {}
    for name in names:
        counts = np.array(tensors[name + _COUNTS].data).reshape(-1)
        sums = np.array(tensors[name + _SUMS].data).reshape(len(counts), -1)
        found[name] = InputSquares(sums=sums, counts=counts)
    return found


def _read_legacy(data: bytes) -> dict[str, InputSquares]:
    """The entries of a ``.dat``; what follows them (number of calls, name of the data set) is not needed."""
    import numpy as np

    at = 0

    def take(num_bytes: int) -> bytes:
        nonlocal at
        if not 0 <= num_bytes <= len(data) - at:
            raise ValueError("it ends early, or is of another kind")
        at += num_bytes
        return data[at - num_bytes : at]

    def number() -> int:
        return int.from_bytes(take(4), "little", signed=True)

    found = {}
    for _ in range(number()):
        name = take(number()).decode("utf-8")
        num_calls, num_values = number(), number()
        values = np.frombuffer(take(4 * num_values), "<f4").astype(np.float32)
        if not name or not num_values or num_calls < 0:
            raise ValueError(f"an entry {name!r} of {num_values} values over {num_calls} calls")
        found[name] = InputSquares(sums=values[None], counts=np.array([num_calls or 1], np.float32))
    return found
