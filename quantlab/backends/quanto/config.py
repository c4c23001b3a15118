"""The native config of optimum-quanto. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from quantlab.backends.exclusions import build, exclusions_for, refuse_ours, taken_by_transformers
from quantlab.errors import ConfigError
from quantlab.vocabulary.axes import QuantizationAxes
from quantlab.vocabulary.native import (
    EXCLUSION_RULES,
    QuantizationConfigMixin,
    QuantizationMethod,
    Rule,
    quantization_config,
    setting,
)

if TYPE_CHECKING:
    import diffusers
    import transformers
    from torch import nn

SPELLING = {"int8": "int8", "int4": "int4", "int2": "int2", "float8_e4m3": "float8", "float8_e5m2": "float8_e5m2"}
"""quantlab's dtype -> ``weights_dtype``."""
_CHOICES = ("float8", "int8", "int4", "int2", "float8_e5m2")
_E4M3 = ("float8_e4m3", "float8_e4m3fn", "qfloat8", "qfloat8_e4m3fn", "fp8", "fp8_e4m3", "e4m3")
_MEANS = {
    **dict.fromkeys(_E4M3, "float8"),
    **dict.fromkeys(("qfloat8_e5m2", "fp8_e5m2", "e5m2", "float8_e5m2fn"), "float8_e5m2"),
    **{f"q{name}": name for name in ("int8", "int4", "int2")},
}
ACTIVATIONS = {None: "none", "int8": "int8", "float8": "float8_e4m3", "float8_e5m2": "float8_e5m2"}
DTYPES = {
    "qint8": "int8",
    "qint4": "int4",
    "qint2": "int2",
    "qfloat8_e4m3fn": "float8_e4m3",
    "qfloat8_e5m2": "float8_e5m2",
}
"""The library's name of a format -> quantlab's dtype."""


@quantization_config
class QuantoConfig(QuantizationConfigMixin):
    """Diffusers' ``QuantoConfig``, and what it leaves to the library: the optimizer of the scales, e5m2."""

    quant_method: ClassVar[str] = QuantizationMethod.QUANTO
    exclusion_rules: ClassVar[Mapping[str, Rule]] = {
        "diffusers": lambda entry, path: entry == path.rpartition(".")[2],
        "transformers": taken_by_transformers,
    }
    written_rule: ClassVar[str] = "diffusers"

    weights_dtype: str = setting("str", default="int8", choices=_CHOICES, means=_MEANS)
    modules_to_not_convert: Sequence[str] | None = setting("names", default=None)
    optimizer: str = setting("str", default="max", choices=("max", "hqq"), ours=True)
    """``max``: from the extremes; ``hqq``: half-quadratic search of the shifts, 2 and 4 bits only."""
    activations: str | None = setting(
        "str", default=None, choices=("int8", "float8", "float8_e5m2"), means=_MEANS, ours=True
    )
    """What the inputs of the layers are rounded to, by scales measured on calibration data."""
    exclusion_rule: str = setting("str", default="quantlab", choices=EXCLUSION_RULES, ours=True)

    def post_init(self) -> None:
        """HQQ exists for 2 and 4 bits."""
        if self.optimizer == "hqq" and self.weights_dtype not in ("int4", "int2"):
            raise ConfigError(
                f"optimizer='hqq': quanto has it for weights_dtype int4 and int2, not "
                f"{self.weights_dtype}; leave optimizer at max"
            )

    @classmethod
    def from_resolved(cls, axes: QuantizationAxes, settings: Mapping[str, Any] | None = None) -> Self:
        """The config for these axes; ConfigError where quanto does not offer them. It has no settings of its own."""
        for key in settings or {}:
            raise ConfigError(f"quantization.{key}: quanto has no settings beside the axes; remove it")
        native: dict[str, Any] = {"weights_dtype": SPELLING[axes.dtype], "optimizer": axes.algorithm}
        native["activations"] = next(own for own, name in ACTIVATIONS.items() if name == axes.activation_dtype)
        return cls(**native, modules_to_not_convert=axes.exclusions())

    def axes(self) -> QuantizationAxes:
        """The axes that :meth:`from_axes` turns into this config."""
        return QuantizationAxes(
            backend="quanto",
            dtype=next(d for d, spelt in SPELLING.items() if spelt == self.weights_dtype),
            activation_dtype=ACTIVATIONS[self.activations],
            algorithm=self.optimizer,
            modules_to_not_convert=self._exclusion_axes(),
        )

    @property
    def needs_data(self) -> bool:
        """The scales of activations are measured."""
        return self.activations is not None

    @property
    def activation_granularity(self) -> str:
        """One scale for each layer's inputs, measured on data."""
        return "per-tensor static" if self.activations is not None else ""

    def to_diffusers(self, model: nn.Module | None = None) -> diffusers.QuantoConfig:
        """``diffusers.QuantoConfig``; it has no activations, no optimizer and no e5m2."""
        import diffusers

        refuse_ours(self, "diffusers")
        names = exclusions_for(self, model, "diffusers")
        arguments = {"weights_dtype": self.weights_dtype, "modules_to_not_convert": names}
        return build(diffusers.QuantoConfig, arguments, f"weights_dtype={self.weights_dtype}")

    def to_transformers(self, model: nn.Module | None = None) -> transformers.QuantoConfig:
        """``transformers.QuantoConfig``; it has activations, but no optimizer and no e5m2."""
        import transformers

        refuse_ours(self, "transformers", ("activations",) if self.activations in (None, "int8", "float8") else ())
        names = exclusions_for(self, model, "transformers")
        arguments = {"weights": self.weights_dtype, "activations": self.activations, "modules_to_not_convert": names}
        return build(transformers.QuantoConfig, arguments, f"weights_dtype={self.weights_dtype}")

    @classmethod
    def _read_dict(cls, data: dict[str, Any]) -> dict[str, Any]:
        """transformers writes ``weights`` for ``weights_dtype``."""
        if "weights" in data:
            if "weights_dtype" in data:
                raise ConfigError(
                    f"weights={data['weights']!r}: weights_dtype={data['weights_dtype']!r} is given too; "
                    "keep one of the two"
                )
            data["weights_dtype"] = data.pop("weights")
        return data
