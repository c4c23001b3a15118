"""A sixth backend, outside quantlab: 8-bit integers with a scale a row, in plain torch.

It is what an author of another package writes: a config, seven functions and a row. An entry point of the group
``quantlab.backends`` makes it known (``rowint8 = rowint8:BACKEND``).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from quantlab.backends.table import Backend, offers
from quantlab.errors import ConfigError, ModelError, NotQuantized
from quantlab.modules.layers import replace_layer
from quantlab.vocabulary.axes import QuantizationAxes, resolve_axes
from quantlab.vocabulary.capabilities import Capability, Offer
from quantlab.vocabulary.native import EXCLUSION_RULES, QuantizationConfigMixin, quantization_config, setting
from quantlab.vocabulary.reports import StoredWeight
from quantlab.vocabulary.sizes import DenseLayer, StoredBytes

_FILE = "rowint8.safetensors"


@quantization_config
class RowInt8Config(QuantizationConfigMixin):
    """Nothing to choose but where the codes end."""

    quant_method: ClassVar[str] = "rowint8"

    modules_to_not_convert: Sequence[str] | None = setting("names", default=None)
    largest_code: int = setting("int", default=127, ours=True, node=True)
    """The largest weight of a row becomes this code."""
    exclusion_rule: str = setting("str", default="quantlab", choices=EXCLUSION_RULES, ours=True)

    def post_init(self) -> None:
        """A code fits into 8 bits."""
        if not 1 <= self.largest_code <= 127:
            raise ConfigError(f"largest_code={self.largest_code}: 1 to 127 is wanted")

    @classmethod
    def from_resolved(cls, axes: QuantizationAxes, settings: Mapping[str, Any] | None = None) -> Self:
        """The config for these axes."""
        return cls(modules_to_not_convert=axes.exclusions(), **dict(settings or {}))

    @classmethod
    def from_axes(cls, axes: QuantizationAxes, settings: Mapping[str, Any] | None = None) -> Self:
        """As :meth:`from_resolved`, for axes as they were typed."""
        return cls.from_resolved(resolve_axes(axes, offers()), settings)

    def axes(self) -> QuantizationAxes:
        """The axes that :meth:`from_resolved` turns into this config."""
        return QuantizationAxes(
            backend="rowint8",
            dtype="int8",
            group_size="none",
            activation_dtype="none",
            algorithm="max",
            modules_to_not_convert=self._exclusion_axes(),
        )


Config = RowInt8Config


class Codes:
    """Codes (out_features, in_features) and scales (out_features, 1): a plain object, as some libraries keep them."""

    def __init__(self, codes: Any, scales: Any) -> None:
        self.codes, self.scales = codes, scales

    def dense(self) -> Any:
        """The weight in fp32."""
        return self.codes.float() * self.scales


@functools.cache
def layer_class() -> Any:
    """The layer, made at first use because its base needs torch."""
    import torch

    class RowInt8Linear(torch.nn.Module):
        """``nn.Linear`` with :class:`Codes` for a weight."""

        def __init__(self, held: Codes, bias: Any) -> None:
            super().__init__()
            self.held = held
            self.bias = bias
            self.out_features, self.in_features = held.codes.shape

        def forward(self, x: Any) -> Any:
            """x (..., in_features) -> (..., out_features), in x's dtype."""
            return torch.nn.functional.linear(x, self.held.dense().to(x.dtype), self.bias)

    return RowInt8Linear


def resolve(config: RowInt8Config, device: str, compute_dtype: str = "float32") -> RowInt8Config:
    """The config itself: nothing in it depends on the device."""
    return config


def layer_bytes(config: RowInt8Config, layer: DenseLayer, dtype: str, compute_dtype: str, device: str) -> StoredBytes:
    """A byte a weight and a float32 scale a row."""
    return StoredBytes(codes=layer.numel, scales=4 * layer.rows, bias_dtype=layer.bias_dtype)


def quantize(model: Any, layers: Sequence[str], config: RowInt8Config, compute_dtype: Any = None) -> None:
    """Replace each named ``nn.Linear``, in place."""
    import torch

    for name in layers:
        linear = model.get_submodule(name)
        weight = linear.weight.detach().float()
        scales = (weight.abs().amax(1, keepdim=True) / config.largest_code).clamp_min(1e-30)
        codes = (weight / scales).round().to(torch.int8)
        replace_layer(model, name, layer_class()(Codes(codes, scales), linear.bias))


def read_back(layer: Any) -> StoredWeight:
    """What the layer's codes and scales show."""
    import torch

    held = getattr(layer, "held", None)
    if held is None or held.codes.dtype != torch.int8:
        raise NotQuantized(f"backend=rowint8: {type(layer).__name__} holds no codes; it was not converted")
    return StoredWeight(dtype="int8", group_size=None, dense=held.dense())


def save(model: Any, folder: Path) -> None:
    """Write codes and scales of the quantized layers."""
    from safetensors.torch import save_file

    tensors = {}
    for name, layer in model.named_modules():
        if isinstance(layer, layer_class()):
            tensors |= {f"{name}.codes": layer.held.codes, f"{name}.scales": layer.held.scales}
    save_file(tensors, Path(folder) / _FILE)


def load(model: Any, layers: Sequence[str], config: RowInt8Config, folder: Path) -> None:
    """Put what :func:`save` wrote into a fresh copy of the model, in place."""
    from safetensors.torch import load_file

    tensors = load_file(Path(folder) / _FILE)
    for name in layers:
        if f"{name}.codes" not in tensors:
            raise ModelError(f"{folder}: holds no {name}; load with the exclusions that it was quantized with")
        held = Codes(tensors[f"{name}.codes"], tensors[f"{name}.scales"])
        replace_layer(model, name, layer_class()(held, model.get_submodule(name).bias))


BACKEND = Backend(
    name="rowint8",
    module=sys.modules[__name__],  # type: ignore[arg-type]
    imports=("torch",),
    distributions=("rowint8",),
    install="rowint8",
    holds=("rowint8",),
    loggers=(),
    saves="layers",
    colour="#808000",
    same_bits=("largest_code",),
    input_algorithms=(),
    elsewhere=(),
    offer=Offer(rows={"int8": Capability(group_sizes=("none",), devices=("cpu",))}),
)
