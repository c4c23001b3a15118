"""Linear layers to ggml's blocks, with and without an importance matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.backends.gguf.blocks import (
    SCALES,
    SUPERBLOCK,
    WEIGHTS_PER_SCALE,
    block_size,
    encode,
    linear_class,
)
from quantlab.backends.gguf.config import GGUFQuantizationConfig, uses_importance
from quantlab.backends.gguf.imatrix import (
    InputSquares,
    ggml_importance,
    observe,
    read_imatrix,
    write_imatrix,
)
from quantlab.backends.gguf.names import llama_names
from quantlab.backends.linears import linear_at
from quantlab.backends.unseen import never_ran
from quantlab.errors import ConfigError, NotQuantized, require_package
from quantlab.modules.compute_dtype import torch_dtype
from quantlab.modules.feed import CalibrationFeed
from quantlab.modules.layers import places_of, replace_layer
from quantlab.modules.packed import said_as
from quantlab.vocabulary.dtypes import FLOAT16_SCALE
from quantlab.vocabulary.reports import StoredWeight

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import nn


_OF_DIFFUSERS = "GGUFParameter"
"""The class of the weights of Diffusers' own layers of blocks."""


def calibrate(
    model: nn.Module,
    layers: Sequence[str],
    config: GGUFQuantizationConfig,
    compute_dtype: str | torch.dtype | None,
    feed: CalibrationFeed,
) -> dict[str, InputSquares]:
    """The importance matrix: layer -> squares of its inputs, for the named layers whose type takes one.

    The model is left as it is. Raises ConfigError naming a layer that never ran, or whose inputs are not finite.
    """
    types = layer_types(model, layers, config)
    return observe(model, [n for n in layers if uses_importance(types.get(n, config.dtype))], feed)


def layer_types(model: nn.Module, layers: Sequence[str], config: GGUFQuantizationConfig) -> dict[str, str]:
    """Layer -> its own type, where the config gives it another than most; what is packed goes by its holder's name."""
    names = {said_as(name): name for name in layers}
    found = config.layer_dtypes({said: tuple(linear_at(model, name).weight.shape) for said, name in names.items()})
    return {names[said]: kind for said, kind in found.items()}


def write_calibration(calibrated: dict[str, InputSquares], folder: str | Path, feed: CalibrationFeed) -> Path:
    """What :func:`calibrate` found to ``imatrix.gguf`` in the folder, a file for ``imatrix_file`` and, of a language
    model, for llama.cpp's tools, under whose names it is; returns the path."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    dataset = f"sha256:{feed.sha256}" if feed.sha256 else "calibration"
    told = llama_names(calibrated)
    named = {told.get(layer, layer): squares for layer, squares in calibrated.items()}
    return write_imatrix(Path(folder) / "imatrix.gguf", named, dataset, max(len(feed.calls), 1))


def quantize(
    model: nn.Module,
    layers: Sequence[str],
    config: GGUFQuantizationConfig,
    compute_dtype: str | torch.dtype | None = None,
    calibrated: Mapping[str, InputSquares] | None = None,
) -> None:
    """Replace each named ``nn.Linear`` by a :class:`GGUFLinear`, in place, on its device; codes are made on the CPU.

    ``compute_dtype`` (a name or a torch dtype; None: the config's) is what the matrix products run in; outputs have
    the inputs' dtype. ``calibrated`` is what :func:`calibrate` returned; without it, ``imatrix_file`` is read. Raises
    ConfigError for a layer whose rows do not divide into blocks, or without the importance that is asked for;
    ModelError for weights that are not finite or too large for the format's float16 scales.
    """
    require_package("libgguf", "backend=gguf", "quantlab-recipes[gguf]")
    compute = torch_dtype(compute_dtype or config.compute_dtype)
    types = layer_types(model, layers, config)
    statistics = _statistics(config, calibrated)
    theirs = llama_names(map(said_as, layers)) if statistics is not None and calibrated is None else {}
    places = places_of(model)
    for name in layers:
        linear, kind = linear_at(model, name), types.get(name, config.dtype)
        importance = None
        said = said_as(name)
        known = said if statistics is None or said in statistics else theirs.get(said, said)
        is_measured = said == name or (statistics is not None and known in statistics)  # what is read has no inputs
        if statistics is not None and uses_importance(kind) and is_measured:
            importance = _importance(statistics, known, linear.in_features, config.imatrix_file)
        codes = encode(name, linear.weight.detach(), kind, importance)
        made = linear_class()(codes, kind, linear.bias, compute)
        replace_layer(model, name, made.train(linear.training), places)


def _statistics(
    config: GGUFQuantizationConfig, calibrated: Mapping[str, InputSquares] | None
) -> Mapping[str, InputSquares] | None:
    """The importance matrix that the config asks for; None where it asks for none."""
    if config.algorithm != "imatrix":
        return None
    if config.imatrix_file is not None:
        return read_imatrix(config.imatrix_file)
    if calibrated is None:
        raise ConfigError(
            "algorithm=imatrix: the importance matrix is measured on calibration data, and there is "
            "none; give calibration data, name a recorded one with quantization.imatrix_file, or leave "
            "algorithm at max"
        )
    return calibrated


def _importance(
    statistics: Mapping[str, InputSquares], name: str, in_features: int, file: str | None
) -> NDArray[np.float32]:
    """The layer's vector for ggml; ConfigError where there is none, or one of another length."""
    squares = statistics.get(name)
    if squares is not None and squares.sums.shape == (1, in_features) and squares.counts[0]:
        return ggml_importance(squares)
    if file is None:
        raise never_ran([name])
    key, way_out = (
        f"quantization.imatrix_file={file}",
        "give one recorded on this model, or exclude the layer with modules_to_not_convert",
    )
    if squares is None:
        some = ", ".join(f"{n}.weight" for n in list(statistics)[:3]) + (", ..." if len(statistics) > 3 else "")
        raise ConfigError(f"{key}: holds no {name}.weight (it holds {some}); {way_out}")
    if squares.sums.shape != (1, in_features):
        raise ConfigError(
            f"{key}: {name}.weight has {squares.sums.size} values in {len(squares.counts)} matrices, and "
            f"the layer has {in_features} inputs; {way_out}"
        )
    raise ConfigError(f"{key}: {name}.weight was never used when it was recorded; {way_out}")


def read_back(layer: nn.Module) -> StoredWeight:
    """What the layer's bytes show. Raises NotQuantized where they are not whole blocks of the layer's type."""
    if not isinstance(layer, linear_class()):
        raise NotQuantized(f"{type(layer).__name__} holds no GGUF weight; quantize it first")
    import torch

    block, num_bytes = block_size(layer.gguf_type)
    rows, row_bytes = layer.qweight.shape
    if (rows, row_bytes) != (layer.out_features, layer.in_features // block * num_bytes):
        raise NotQuantized(
            f"{rows} rows of {row_bytes} bytes are not {layer.out_features} x {layer.in_features} "
            f"weights of {layer.gguf_type}; quantize the layer again"
        )
    dense = layer.dequantize()
    step = max(1, (1 << 20) // layer.in_features)
    for piece in torch.split(dense, step):  # as it multiplies by them, without a second copy of all
        piece.copy_(piece.to(layer.compute_dtype))
    factor, span_error = SCALES[layer.gguf_type]
    return StoredWeight(
        dtype=layer.gguf_type,
        group_size=WEIGHTS_PER_SCALE[layer.gguf_type],
        dense=dense,
        span=None if span_error is None else SUPERBLOCK,
        span_error=span_error,
        floor=FLOAT16_SCALE * factor,
    )


def owns(layer: nn.Module) -> bool:
    """Whether the layer is of blocks of ggml: this backend's own, or Diffusers'."""
    weight = layer._parameters.get("weight")
    return isinstance(layer, linear_class()) or type(weight).__name__ == _OF_DIFFUSERS


def adopt(layer: nn.Module, compute_dtype: str) -> nn.Module:
    """Diffusers' layer as this backend's own over the same blocks, whose scales it takes in float32; one whose weight
    is not in blocks as a plain Linear."""
    import torch

    if isinstance(layer, linear_class()):
        return layer
    theirs: Any = layer
    codes, kind = theirs.weight.as_tensor().detach(), theirs.weight.quant_type.name.lower()
    if kind in WEIGHTS_PER_SCALE:
        made: nn.Module = linear_class()(codes, kind, theirs.bias, torch_dtype(compute_dtype))
        return made.train(layer.training)
    if kind != "bf16":
        raise NotQuantized(f"{kind} is not read here; there are {', '.join(WEIGHTS_PER_SCALE)}, f32, f16 and bf16")
    dense = codes.view(torch.uint8).view(torch.bfloat16).to(torch_dtype(compute_dtype))
    plain = torch.nn.Linear(dense.shape[1], dense.shape[0], bias=False, device="meta")
    plain.weight = torch.nn.Parameter(dense, requires_grad=False)
    plain.bias = theirs.bias
    return plain.train(layer.training)
