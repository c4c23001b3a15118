"""Where ModelOpt's algorithms fail on what calibration data leave out (channels, blocks, whole batches), and on inputs
of several numbers of dimensions."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from quantlab.backends.modelopt.algorithms import CLIPPING, PRE_SCALED
from quantlab.backends.unseen import with_silent_channels

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quantlab.backends.modelopt.library_types import QuantLinear

    Named = Mapping[str, QuantLinear]

_TINY = 2.0**-24
"""What stands in a weight's columns of zeros while the library smooths, as a share of the largest weight."""


@contextlib.contextmanager
def shielded(named: Named, loudest: Mapping[str, Tensor], algorithm: str) -> Iterator[None]:
    """While open, the library's algorithms scale silent channels by 1, and take columns of zeros and empty batches.

    ``loudest`` (layer -> largest magnitude in each input channel) may be filled while this is open.
    """
    with contextlib.ExitStack() as opened:
        if algorithm in PRE_SCALED:
            opened.enter_context(_neutral_factors({id(layer): name for name, layer in named.items()}, loudest))
            opened.enter_context(_as_rows())
        if algorithm == "smoothquant":
            opened.enter_context(_no_column_of_zeros(named))
        if algorithm in CLIPPING:
            opened.enter_context(_a_row_for_none(named))
        yield


@contextlib.contextmanager
def _neutral_factors(names: Mapping[int, str], loudest: Mapping[str, Tensor]) -> Iterator[None]:
    """The library gives a silent channel the largest factor that it knows, 1e4 in ``smoothquant``."""
    library: Any = importlib.import_module("modelopt.torch.quantization.model_calib")
    smooth = library.apply_pre_quant_scale_and_smooth

    def neutral(layer: nn.Module, factors: Tensor) -> None:
        is_silent = loudest[names[id(layer)]].to(factors.device) == 0
        smooth(layer, with_silent_channels(factors.flatten(), is_silent).reshape(factors.shape))

    library.apply_pre_quant_scale_and_smooth = neutral
    try:
        yield
    finally:
        library.apply_pre_quant_scale_and_smooth = smooth


@contextlib.contextmanager
def _as_rows() -> Iterator[None]:
    """The maxima of input channels, which the library compares only among inputs of one number of dimensions."""
    kind: Any = importlib.import_module("modelopt.torch.quantization.calib").MaxCalibrator
    collect = kind.collect

    def of_rows(self: Any, x: Tensor) -> None:
        collect(self, x.reshape(-1, x.shape[-1]) if self._axis == -1 else x)

    kind.collect = of_rows
    try:
        yield
    finally:
        kind.collect = collect


@contextlib.contextmanager
def _no_column_of_zeros(named: Named) -> Iterator[None]:
    """``smoothquant`` fails on a factor of 0, and its own remedy for one has a wrong index."""
    import torch

    zeros = {name: (layer.weight == 0).all(dim=0) for name, layer in named.items()}
    with torch.no_grad():
        for name, layer in named.items():
            layer.weight[0, zeros[name]] = float(layer.weight.abs().max()) * _TINY
    try:
        yield
    finally:
        with torch.no_grad():
            for name, layer in named.items():
                layer.weight[:, zeros[name]] = 0


@contextlib.contextmanager
def _a_row_for_none(named: Named) -> Iterator[None]:
    """The search for clipping cannot reshape an empty batch: it gets a row of zeros instead, which changes no error.
    Nor can it what is not contiguous."""
    shapes: dict[int, tuple[int, ...]] = {}

    def fill(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        inputs = args[0] if args else kwargs["input"]
        if inputs.numel():
            return (inputs.contiguous(),), {}
        shapes[id(layer)] = tuple(inputs.shape[:-1])
        return (inputs.new_zeros(1, inputs.shape[-1]),), {}

    def empty(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        shape = shapes.pop(id(layer), None)
        return output if shape is None else output[:0].reshape(*shape, output.shape[-1])

    handles = [layer.register_forward_pre_hook(fill, with_kwargs=True) for layer in named.values()]
    handles += [layer.register_forward_hook(empty) for layer in named.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def unclip(layer: QuantLinear, is_silent: Tensor, algorithm: str) -> None:
    """Blocks whose input channels were all silent get their maximum's scale back.

    To the library all candidates are as good there, and it takes the first, which cuts most.
    """
    import torch

    quantizer = layer.weight_quantizer
    block = (quantizer.block_sizes or {}).get(-1)
    if algorithm not in (*CLIPPING, "local_hessian") or not isinstance(block, int):
        return
    blocks = is_silent.reshape(-1, block).all(1)
    if bool(blocks.any()):
        with torch.no_grad():
            largest = layer.weight.abs().float().reshape(-1, block).amax(1).reshape(quantizer._amax.shape)
            mask = blocks.repeat(layer.weight.shape[0]).reshape(quantizer._amax.shape)
            quantizer._amax.copy_(torch.where(mask, largest.to(quantizer._amax.dtype), quantizer._amax))
