"""From a ``BitsAndBytesConfig`` to quantized layers, and from their tensors back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from quantlab.backends.bitsandbytes.config import LIBRARY_BLOCKSIZE, BitsAndBytesConfig
from quantlab.backends.bitsandbytes.layers import decoded_4bit, layer_classes, library
from quantlab.backends.linears import linear_at
from quantlab.errors import ConfigError, ModelError, NotQuantized, require_package
from quantlab.modules.compute_dtype import torch_dtype
from quantlab.modules.layers import all_finite, places_of, replace_layer
from quantlab.vocabulary.dtypes import FLOAT16_SCALE
from quantlab.vocabulary.reports import StoredWeight

if TYPE_CHECKING:
    import torch
    from bitsandbytes.functional import QuantState
    from torch import Tensor, nn

ENCODED_AT_ONCE = 1 << 17
"""Weights whose four float32 copies stay below the size from which memory goes back to the system at once."""
_NESTED_ERROR = 0.01
"""Of scales that are 8-bit numbers themselves (double quantization): half of the widest gap of the library's map."""


def resolve(config: BitsAndBytesConfig, device: str, compute_dtype: str = "float32") -> BitsAndBytesConfig:
    """The config itself: nothing in it depends on the device."""
    return config


def quantize(
    model: nn.Module,
    layers: Sequence[str],
    config: BitsAndBytesConfig,
    compute_dtype: str | torch.dtype | None = None,
) -> None:
    """Replace each named ``nn.Linear`` by its quantized form, in place, on its device.

    ``compute_dtype`` (a name or a torch dtype; None: the config's) is what the matrix products run in; outputs have
    the inputs' dtype. Raises ModelError for weights that are not finite (int8: or exceed float16), ConfigError where
    the storage dtype does not fit a layer's size.
    """
    require_package("bitsandbytes", "backend=bitsandbytes", "quantlab-recipes[bitsandbytes]")
    if config.llm_int8_has_fp16_weight:
        raise ConfigError("llm_int8_has_fp16_weight=True: the weights would stay in float16; leave it out")
    compute = torch_dtype(compute_dtype or config.bnb_4bit_compute_dtype)
    places = places_of(model)
    for name in layers:
        linear = linear_at(model, name)
        build = _quantized_8bit if config.load_in_8bit else _quantized_4bit
        replace_layer(model, name, build(name, linear, config, compute).train(linear.training), places)


def read_back(layer: nn.Module) -> StoredWeight:
    """What the layer's codes and scales show. Raises NotQuantized where they do not belong together."""
    import torch

    bnb = library()
    if isinstance(layer, bnb.nn.Linear8bitLt):
        codes = layer.weight.data
        scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
        if codes.dtype != torch.int8 or scales is None or scales.numel() != codes.shape[0]:
            raise NotQuantized(
                f"an int8 layer of shape {tuple(codes.shape)} holds {codes.dtype} and "
                f"{0 if scales is None else scales.numel()} row scales; quantize it again"
            )
        return StoredWeight(
            dtype="int8",
            group_size=None,
            dense=codes.float().mul_(scales[:, None] / 127.0),
            floor=FLOAT16_SCALE,
            activation_dtype="int8",
            activation_granularity="per-token",
            note=_outlier_rule(layer.state.threshold),
        )
    if not isinstance(layer, bnb.nn.Linear4bit) or getattr(layer.weight, "quant_state", None) is None:
        raise NotQuantized(f"{type(layer).__name__} holds no bitsandbytes weight; quantize it first")
    state = layer.weight.quant_state
    num_blocks = math.ceil(math.prod(state.shape) / state.blocksize)
    num_nested = None if state.state2 is None else state.state2.absmax.numel()
    if state.absmax.numel() != num_blocks or num_nested not in (None, math.ceil(num_blocks / 256)):
        raise NotQuantized(
            f"a {state.quant_type} layer of shape {tuple(state.shape)} in blocks of {state.blocksize} "
            f"needs {num_blocks} scales and holds {state.absmax.numel()}; quantize it again"
        )
    dense = decoded_4bit(layer.weight, layer.compute_dtype or state.dtype, torch.float32)
    return StoredWeight(
        dtype=state.quant_type,
        group_size=state.blocksize,
        dense=dense,
        span=None if state.state2 is None else state.blocksize * state.state2.blocksize,
        span_error=_NESTED_ERROR,
    )


def adopt(layer: nn.Module, compute_dtype: str) -> nn.Module:
    """A layer that another library loaded, as this backend's own over the same tensors: on a CPU the library's forward
    would repack 4-bit codes and scales in place, lossily."""
    bnb, compute = library(), torch_dtype(compute_dtype)
    classes, theirs = layer_classes(), cast("Any", layer)
    if isinstance(layer, bnb.nn.Linear8bitLt):
        scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
        made = classes["QuantizedLinear8bit"](layer.weight.data, scales, layer.bias, layer.state.threshold, compute)
    else:
        made = classes["QuantizedLinear4bit"](theirs.weight.data, theirs.weight.quant_state, theirs.bias, compute)
    own: nn.Module = made.train(layer.training)
    return own


def _outlier_rule(threshold: float) -> str:
    """LLM.int8's threshold in words: no calibration, the inputs of each call decide; "" where it is off."""
    if not threshold:
        return ""
    return f"at each call, input columns with a value of {threshold:g} or more are multiplied unrounded"


# -- building the layers


def _finite_weight(name: str, linear: nn.Linear, dtype: torch.dtype) -> Tensor:
    """The layer's weight in ``dtype``; ModelError where a value is not finite in it."""
    weight = linear.weight.detach().to(dtype).contiguous()
    if not all_finite(weight):
        is_range = all_finite(linear.weight.detach())
        why = "weights beyond 65504, float16's largest, in which LLM.int8 works" if is_range else "NaN or infinities"
        raise ModelError(f"{name}.weight: holds {why}; exclude the layer with modules_to_not_convert")
    return weight


def _quantized_4bit(name: str, linear: nn.Linear, config: BitsAndBytesConfig, compute: torch.dtype) -> nn.Module:
    import torch

    supported = (torch.float32, torch.float16, torch.bfloat16)
    weight = _finite_weight(name, linear, linear.weight.dtype if linear.weight.dtype in supported else torch.float32)
    storage = torch_dtype(config.bnb_4bit_quant_storage)
    num_bytes = math.ceil(weight.numel() / 2)
    if num_bytes % storage.itemsize:
        shape = tuple(weight.shape)
        raise ConfigError(
            f"bnb_4bit_quant_storage={config.bnb_4bit_quant_storage}: {name} of shape {shape} takes "
            f"{num_bytes} bytes, no multiple of {storage.itemsize}; use uint8"
        )
    codes, state = _codes_4bit(weight, config, storage)
    return layer_classes()["QuantizedLinear4bit"](codes, state, linear.bias, compute)


def _codes_4bit(weight: Tensor, config: BitsAndBytesConfig, storage: torch.dtype) -> tuple[Tensor, QuantState]:
    """The library's codes and scales; on a CPU piece by piece, as its code there makes four float32 copies at once."""
    import torch

    functional, whole = library().functional, weight.device.type != "cpu" or weight.numel() <= ENCODED_AT_ONCE
    made = [
        functional.quantize_4bit(
            piece,
            blocksize=config.bnb_4bit_blocksize or LIBRARY_BLOCKSIZE,
            quant_type=config.bnb_4bit_quant_type,
            compress_statistics=whole and config.bnb_4bit_use_double_quant,
            quant_storage=storage,
        )
        for piece in ([weight] if whole else torch.split(weight.reshape(-1), ENCODED_AT_ONCE))
    ]
    codes, state = made[0]
    if whole:
        return codes, state
    state.shape, state.absmax = weight.shape, torch.cat([own.absmax for _, own in made])
    if config.bnb_4bit_use_double_quant:  # as the library does it, of all scales together
        state.nested, state.offset = True, state.absmax.mean()
        state.absmax, state.state2 = functional.quantize_blockwise(state.absmax - state.offset, blocksize=256)
    return torch.cat([own for own, _ in made]), state


def _quantized_8bit(name: str, linear: nn.Linear, config: BitsAndBytesConfig, compute: torch.dtype) -> nn.Module:
    import torch

    bnb = library()
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(_finite_weight(name, linear, torch.float16))
    return layer_classes()["QuantizedLinear8bit"](codes, scales, linear.bias, config.llm_int8_threshold, compute)


# -- what the layers compute
