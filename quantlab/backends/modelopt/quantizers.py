"""What a config means to ModelOpt: the settings of each layer's weight and input quantizer. Torch-free."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from typing import Any, Protocol

from quantlab.backends.modelopt.algorithms import CLIPPING, library_algorithm
from quantlab.backends.modelopt.pasted import scheme, sides
from quantlab.errors import ConfigError


class Settings(Protocol):
    """What is read of a ``NVIDIAModelOptConfig``, which itself asks these functions what it means."""

    @property
    def weight_type(self) -> str: ...
    @property
    def activation_type(self) -> str: ...
    @property
    def modelopt_config(self) -> Mapping[str, Any] | None: ...
    @property
    def channel_quantize(self) -> int | None: ...
    @property
    def block_quantize(self) -> int | None: ...
    @property
    def scale_channel_quantize(self) -> int | None: ...
    @property
    def scale_block_quantize(self) -> int | None: ...
    @property
    def algorithm(self) -> str: ...
    @property
    def algorithm_settings(self) -> Mapping[str, Any] | None: ...
    @property
    def activation_scales(self) -> str: ...
    @property
    def compress(self) -> bool: ...
    @property
    def fit_group_size(self) -> bool: ...


NUM_BITS: dict[str, int | tuple[int, int]] = {
    "FP8": (4, 3),
    "INT8": 8,
    "INT4": 4,
    "INT3": 3,
    "INT2": 2,
    "NVFP4": (2, 1),
    "MXFP8": (4, 3),
    "MXFP4": (2, 1),
}
"""Half of a ``quant_type`` -> bits, or (exponent bits, mantissa bits)."""
BLOCKS: dict[str, tuple[int, tuple[int, int]]] = {"NVFP4": (16, (4, 3)), "MXFP8": (32, (8, 0)), "MXFP4": (32, (8, 0))}
"""Format with blocks of its own -> block size, (exponent, mantissa) bits of the scale (OCP MX 1.0; NVFP4)."""
_SMALLER_BLOCKS = (64, 32, 16)
WIDTHS = {
    "INT8": (8, None),
    "INT4": (4, None),
    "INT3": (3, None),
    "INT2": (2, None),
    "FP8": ((4, 3), None),
    "NVFP4": ((2, 1), (4, 3)),
    "MXFP8": ((4, 3), (8, 0)),
    "MXFP4": ((2, 1), (8, 0)),
}
"""Half of a ``quant_type`` -> (bits of a weight, bits of its block's scale)."""


def build_quant_cfg(config: Settings, layers: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """What ``modelopt.torch.quantization.quantize`` is told: everything off, then the named layers on.

    The library's presets are never used: they switch layers off by name (``proj_out``, ``lm_head``).

    Args:
        layers: path of each layer that is to be quantized -> (out_features, in_features).

    Raises:
        ConfigError: naming a layer whose in_features the block does not divide.
    """
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    activation, blocks = calibrated_activation_cfg(config), set()
    for name, shape in layers.items():
        path = glob.escape(name)
        weight = weight_cfg(config, name, shape)
        blocks.add(scheme(weight)[1] or shape[1])
        entries.append({"quantizer_name": f"{path}.weight_quantizer", "cfg": weight, "enable": True})
        if activation is not None:
            entries.append({"quantizer_name": f"{path}.input_quantizer", "cfg": activation, "enable": True})
    algorithm = library_algorithm(config.algorithm, config.algorithm_settings, min(blocks, default=None))
    return {"quant_cfg": entries, "algorithm": algorithm}


def block_of(config: Settings, name: str, shape: tuple[int, int]) -> int:
    """Weights of the layer that share a scale; in_features for one scale a row or tensor."""
    return scheme(weight_cfg(config, name, shape))[1] or shape[1]


def weight_cfg(config: Settings, name: str, shape: tuple[int, int]) -> dict[str, Any]:
    kind, in_features = config.weight_type, shape[1]
    if config.modelopt_config is not None:
        pasted = dict(sides(config.modelopt_config)[0])
        block = (pasted.get("block_sizes") or {}).get(-1)
        if isinstance(block, int) and in_features % block:
            raise ConfigError(f"modelopt_config: {_indivisible(name, shape, block)}")
        return pasted
    if kind in BLOCKS:
        cfg = _block_cfg(kind)
        if in_features % BLOCKS[kind][0]:
            raise ConfigError(f"quant_type={kind}: {_indivisible(name, shape, BLOCKS[kind][0])}")
        if config.scale_block_quantize is not None:
            cfg["block_sizes"]["scale_block_sizes"] = {config.scale_channel_quantize: config.scale_block_quantize}
        return cfg
    block = asked = config.block_quantize
    if block is not None and asked is not None and in_features % block:
        if not config.fit_group_size:
            raise ConfigError(f"group_size={block}: {_indivisible(name, shape, block)}")
        block = next((b for b in _SMALLER_BLOCKS if b < asked and not in_features % b), None)
        by_row = block is None
    else:
        by_row = block is None and config.channel_quantize is not None
    is_packed_4_bit = kind == "INT4" and config.compress and not in_features % 2
    if by_row and kind != "FP8" and (is_packed_4_bit or config.algorithm in CLIPPING):
        block = in_features  # the library packs 4 bits, and clips, in blocks only; a whole row is one scale a row
    if block is not None:
        return {"num_bits": NUM_BITS[kind], "block_sizes": {-1: block}}
    return {"num_bits": NUM_BITS[kind], "axis": 0 if by_row else None}


def _indivisible(name: str, shape: tuple[int, int], block: int) -> str:
    return (
        f"{name} {list(shape)}: in_features {shape[1]} does not divide by {block}; choose another group_size or "
        "dtype, or exclude it with modules_to_not_convert"
    )


def _block_cfg(kind: str) -> dict[str, Any]:
    block, scale_bits = BLOCKS[kind]
    return {"num_bits": NUM_BITS[kind], "block_sizes": {-1: block, "type": "dynamic", "scale_bits": scale_bits}}


def activation_cfg(config: Settings) -> dict[str, Any] | None:
    """Activations: one scale for the tensor, or the format's own blocks; None: left alone."""
    if config.modelopt_config is not None:
        return sides(config.modelopt_config)[1]
    kind = config.activation_type
    if not kind:
        return None
    if kind in BLOCKS:
        return _block_cfg(kind)
    cfg = {"num_bits": NUM_BITS[kind], "axis": None}
    return cfg if config.activation_scales == "static" else {**cfg, "type": "dynamic"}


def calibrated_activation_cfg(config: Settings) -> dict[str, Any] | None:
    """What the activations' quantizer is told while it is calibrated; None: there is none.

    The library smooths by measured maxima only, so that for ``smoothquant`` the scales are static until it has run.
    """
    cfg = activation_cfg(config)
    if cfg is not None and config.algorithm == "smoothquant":
        cfg = {k: v for k, v in cfg.items() if k != "type"}
    return cfg


def is_packable(config: Settings, weight_cfg: Mapping[str, Any]) -> bool:
    """Whether there is a packed form of a weight of this cfg: all but blocks of an odd number of 4-bit codes."""
    bits, block = scheme(weight_cfg)[0][0], scheme(weight_cfg)[1]
    if bits == 4:
        return config.compress and block is not None and not block % 2
    return config.compress
