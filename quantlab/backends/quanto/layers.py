"""The library's layer in the place of a ``nn.Linear``, before its weight is quantized."""

from __future__ import annotations

from typing import Any

from quantlab.backends.casting import cast_around


def library_qtype(name: str | None) -> Any:
    """The library's object for ``weights_dtype`` or ``activations``."""
    from optimum.quanto import qtypes

    return None if name is None else qtypes["qfloat8_e4m3fn" if name == "float8" else f"q{name}"]


def empty_layer(layer: Any, weights: Any, activations: Any, dtype: Any) -> Any:
    """A quanto layer with ``layer``'s unquantized weight and bias in ``dtype``, and its input and output dtype."""
    import torch
    from optimum.quanto.nn import QLinear

    source = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    source.weight = layer.weight if layer.weight.dtype == dtype else torch.nn.Parameter(layer.weight.detach().to(dtype))
    if layer.bias is not None:
        source.bias = layer.bias if layer.bias.dtype == dtype else torch.nn.Parameter(layer.bias.detach().to(dtype))
    new = QLinear.from_module(source, weights=weights, activations=activations)
    new.train(layer.training)
    if activations is not None:
        new.disable_output_quantization()
        new._quantize_hooks["input"].remove()  # to come after the cast
    cast_around(new, dtype, layer.weight.dtype)
    if activations is not None:
        new._quantize_hooks["input"] = new.register_forward_pre_hook(new.quantize_input)
        if dtype == torch.float16:  # the library would multiply the two scales, which float16 is too narrow for
            new.register_forward_pre_hook(_multiply_values)
    return new


def _multiply_values(layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].dequantize(),)
