"""A torchao layer made to take every input that ``nn.Linear`` takes: of any rank, empty, and transposed views."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from quantlab.backends.torchao.readback import is_quantized

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quantlab.backends.torchao.library_types import TorchAOBaseTensor


def take_any_input(layer: nn.Linear) -> None:
    """Let a quantized layer take empty inputs and views, and with a static scale those of any rank."""
    import torch

    if is_quantized(layer) and type(layer).forward is torch.nn.Linear.forward:
        layer.__class__ = linear_class()
    if getattr(layer.weight, "act_quant_scale", None) is not None:
        layer.register_forward_pre_hook(_fit_scale, with_kwargs=True)


def _fit_scale(layer: nn.Linear, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """The library wants the scale to have the input's number of dimensions; it has those of the calibration data."""
    weight, rank = cast("TorchAOBaseTensor", layer.weight), (args[0] if args else kwargs["input"]).ndim
    scale = cast("Tensor", weight.act_quant_scale)
    if scale.ndim != rank:
        weight.act_quant_scale = scale.reshape((1,) * rank)


@functools.cache
def linear_class() -> type[nn.Linear]:
    """The layer's class, made at first use because its base needs torch."""
    import torch

    class QuantizedLinear(torch.nn.Linear):
        """An expert that no token chose gets an empty batch, which has no maximum to round by.

        Views: the block formats take none (UNets with linear projections hand them over), and which layout the other
        kernels expect of a matrix is nowhere said.
        """

        def forward(self, input: Tensor) -> Tensor:
            """(..., in_features) -> (..., out_features)."""
            if not input.numel():
                return input.new_zeros(*input.shape[:-1], self.out_features)
            return super().forward(input.contiguous())

    QuantizedLinear.__qualname__ = "QuantizedLinear"  # found by pickle through __getattr__ below
    return QuantizedLinear


def __getattr__(name: str) -> Any:
    if name == "QuantizedLinear":
        return linear_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
