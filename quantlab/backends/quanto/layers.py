"""The library's layer in the place of a ``nn.Linear``, before its weight is quantized."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantlab.backends.casting import by_place, cast_around

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from quantlab.backends.quanto.library_types import QLinear, QTensor, qtype


def library_qtype(name: str | None) -> qtype | None:
    """The library's object for ``weights_dtype`` or ``activations``."""
    from optimum.quanto import qtypes

    return None if name is None else qtypes["qfloat8_e4m3fn" if name == "float8" else f"q{name}"]


def empty_layer(layer: nn.Linear, weights: qtype | None, activations: qtype | None, dtype: torch.dtype) -> QLinear:
    """A quanto layer with ``layer``'s unquantized weight and bias in ``dtype``, and its input and output dtype."""
    import torch
    from optimum.quanto.nn import QLinear

    source = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    source.weight = layer.weight if layer.weight.dtype == dtype else torch.nn.Parameter(layer.weight.detach().to(dtype))
    if layer.bias is not None:
        source.bias = layer.bias if layer.bias.dtype == dtype else torch.nn.Parameter(layer.bias.detach().to(dtype))
    new: QLinear = QLinear.from_module(source, weights=weights, activations=activations)
    new.train(layer.training)
    if activations is not None:
        new.disable_output_quantization()
        new._quantize_hooks["input"].remove()  # to come after the cast
        new.register_forward_pre_hook(by_place, with_kwargs=True)  # by name the library does not see it
    cast_around(new, dtype, layer.weight.dtype)
    if activations is not None:
        new._quantize_hooks["input"] = new.register_forward_pre_hook(new.quantize_input)
        if dtype == torch.float16:  # the library would multiply the two scales, which float16 is too narrow for
            new.register_forward_pre_hook(_multiply_values)
    return new


def _multiply_values(layer: nn.Module, args: tuple[QTensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].dequantize(),)
