"""The native config of bitsandbytes. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from quantlab.backends.exclusions import build, exclusions_for, refuse_ours, taken_by_transformers
from quantlab.errors import ConfigError, nearest
from quantlab.vocabulary.axes import QuantizationAxes
from quantlab.vocabulary.dtypes import COMPUTE_DTYPES
from quantlab.vocabulary.native import (
    EXCLUSION_RULES,
    LIBRARY_RULE,
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

_Made = TypeVar("_Made")
_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
LIBRARY_BLOCKSIZE = 64
_STORAGES = ("uint8", "int8", "float16", "bfloat16", "float32", "float64")
_NONE_MEANS_DEFAULT = ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage")
_FLAGS = ("load_in_8bit", "load_in_4bit")


def _taken_by_diffusers(entry: str, path: str) -> bool:
    return entry in (path, path.rpartition(".")[2]) or f"{entry}." in path


@quantization_config
class BitsAndBytesConfig(QuantizationConfigMixin):
    """Diffusers' and transformers' ``BitsAndBytesConfig``, and the block size that theirs cannot say."""

    quant_method: ClassVar[str] = QuantizationMethod.BITS_AND_BYTES
    exclusion_rules: ClassVar[Mapping[str, Rule]] = {
        "diffusers": _taken_by_diffusers,
        "transformers": taken_by_transformers,
    }
    written_rule: ClassVar[str] = LIBRARY_RULE
    _exclude_attributes_at_init: ClassVar[tuple[str, ...]] = ("_load_in_4bit", "_load_in_8bit", "quant_method")
    _exclusions_field: ClassVar[str] = "llm_int8_skip_modules"

    load_in_8bit: bool = setting("bool", default=False)
    load_in_4bit: bool = setting("bool", default=False)
    llm_int8_threshold: float = setting("float", default=6.0, node=True)
    """Input columns with a value of at least this magnitude are multiplied unrounded; 0: none. A rule that the inputs
    of each call decide, not a calibration."""
    llm_int8_skip_modules: Sequence[str] | None = setting("names", default=None)
    llm_int8_enable_fp32_cpu_offload: bool = setting("bool", default=False)
    """Only lets Diffusers' device map leave layers on the CPU; no influence here."""
    llm_int8_has_fp16_weight: bool = setting("bool", default=False)
    bnb_4bit_compute_dtype: Any = setting("dtype", default="float32", choices=COMPUTE_DTYPES)
    bnb_4bit_quant_type: str = setting("str", default="fp4", choices=("fp4", "nf4"))
    bnb_4bit_use_double_quant: bool = setting("bool", default=False, node=True)
    """Also quantize the scales, to 8 bits in blocks of 256."""
    bnb_4bit_quant_storage: Any = setting("dtype", default="uint8", choices=_STORAGES, node=True)
    bnb_4bit_blocksize: int | None = setting("int", default=None, choices=_BLOCKSIZES, ours=True)
    """Weights that share a scale; None: the library's 64."""
    exclusion_rule: str = setting("str", default="quantlab", choices=EXCLUSION_RULES, ours=True)

    @property
    def modules_to_not_convert(self) -> tuple[str, ...] | None:
        """The other backends' name of ``llm_int8_skip_modules``; also accepted by the constructor."""
        return self.exclusions

    @property
    def dtype(self) -> str:
        """quantlab's name of the format: ``int8``, ``nf4`` or ``fp4``."""
        return "int8" if self.load_in_8bit else self.bnb_4bit_quant_type

    def post_init(self) -> None:
        """One of the two flags must be set, and the block size belongs to 4 bit; ConfigError otherwise."""
        if self.load_in_8bit == self.load_in_4bit:
            state = "both true" if self.load_in_8bit else "neither is true"
            raise ConfigError(f"load_in_8bit, load_in_4bit: {state}; set exactly one of them")
        if self.bnb_4bit_blocksize is not None and self.load_in_8bit:
            raise ConfigError(
                f"bnb_4bit_blocksize={self.bnb_4bit_blocksize}: int8 has one scale a row; "
                "leave it out or set load_in_4bit"
            )
        if not 0 <= self.llm_int8_threshold < math.inf:
            raise ConfigError(f"llm_int8_threshold={self.llm_int8_threshold}: give a number from 0 (no outliers) on")

    @property
    def activation_granularity(self) -> str:
        """LLM.int8 scales each token by its largest value."""
        return "per-token" if self.load_in_8bit else ""

    @property
    def depends_on_neighbours(self) -> bool:
        """An outlier in one sample takes its column out of int8 for all samples of the call."""
        return self.load_in_8bit and self.llm_int8_threshold > 0

    def to_dict(self) -> dict[str, Any]:
        """As Diffusers writes it: each load flag under both of its spellings."""
        return {**super().to_dict(), **{f"_{flag}": getattr(self, flag) for flag in _FLAGS}}

    def spelled_out(self) -> dict[str, Any]:
        """Without what has no influence: the flag for device maps, and the settings of the other width."""
        data, other = super().spelled_out(), "bnb_4bit_" if self.load_in_8bit else "llm_int8_threshold"
        if self.load_in_4bit:
            data["bnb_4bit_blocksize"] = self.bnb_4bit_blocksize or LIBRARY_BLOCKSIZE
        kept = (k for k in data if not k.startswith(other) and k != "llm_int8_enable_fp32_cpu_offload")
        return {key: data[key] for key in kept}

    @classmethod
    def from_resolved(cls, axes: QuantizationAxes, settings: Mapping[str, Any] | None = None) -> Self:
        """``compute_dtype=auto`` is stored as the library's float32; ConfigError for what has no effect or meaning."""
        is_int8 = axes.dtype == "int8"
        native = {"load_in_8bit": is_int8, "load_in_4bit": not is_int8, **cls._own(axes.dtype, settings)}
        if not is_int8:
            native["bnb_4bit_quant_type"] = axes.dtype
            native["bnb_4bit_blocksize"] = None if axes.group_size == "auto" else axes.group_size
        if axes.compute_dtype != "auto":
            native["bnb_4bit_compute_dtype"] = axes.compute_dtype
        return cls(**native, llm_int8_skip_modules=axes.exclusions() or None)

    def axes(self) -> QuantizationAxes:
        """The axes; an int8 config's float32 is ``compute_dtype=auto``: LLM.int8 itself follows the input."""
        is_default = self.load_in_8bit and self.bnb_4bit_compute_dtype == "float32"
        return QuantizationAxes(
            backend="bitsandbytes",
            dtype=self.dtype,
            group_size=self.bnb_4bit_blocksize or "auto",
            activation_dtype="int8" if self.load_in_8bit else "none",
            compute_dtype="auto" if is_default else self.bnb_4bit_compute_dtype,
            algorithm="max",
            modules_to_not_convert=self._exclusion_axes(),
        )

    def to_diffusers(self, model: nn.Module | None = None) -> diffusers.BitsAndBytesConfig:
        """``diffusers.BitsAndBytesConfig``; a block size other than the library's 64 is refused."""
        import diffusers

        return self._to_library(diffusers.BitsAndBytesConfig, "diffusers", model)

    def to_transformers(self, model: nn.Module | None = None) -> transformers.BitsAndBytesConfig:
        """``transformers.BitsAndBytesConfig``; a block size other than the library's 64 is refused."""
        import transformers

        return self._to_library(transformers.BitsAndBytesConfig, "transformers", model)

    def _to_library(self, make: Callable[..., _Made], library: str, model: nn.Module | None) -> _Made:
        refuse_ours(self, library, ("bnb_4bit_blocksize",) if self.bnb_4bit_blocksize == LIBRARY_BLOCKSIZE else ())
        held = {f.name: getattr(self, f.name) for f in self._fields() if not f.metadata["ours"]}
        names = exclusions_for(self, model, library)
        return build(make, {**held, "llm_int8_skip_modules": names}, f"to_{library}")

    @classmethod
    def _own(cls, dtype: str, settings: Mapping[str, Any] | None) -> dict[str, Any]:
        """The node's settings, checked: known, and of effect with this dtype."""
        fields = {f.name: f for f in cls._fields() if f.metadata["node"]}
        prefix = "llm_int8" if dtype == "int8" else "bnb_4bit"
        for key, value in (settings or {}).items():
            if key not in fields:
                raise ConfigError(
                    f"quantization.{key}: bitsandbytes has no such setting{nearest(key, fields)} "
                    f"(it has {', '.join(fields)})"
                )
            if not key.startswith(prefix) and value not in (None, fields[key].default):
                raise ConfigError(f"quantization.{key}={value}: has no effect with dtype={dtype}; leave it out")
        return {k: v for k, v in (settings or {}).items() if v is not None}

    @classmethod
    def _fold_arguments(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = {k: v for k, v in kwargs.items() if v is not None or k not in _NONE_MEANS_DEFAULT}
        if (names := kwargs.pop("modules_to_not_convert", None)) is not None:
            other = kwargs.get("llm_int8_skip_modules")
            if other is not None and list(other) != list(names):
                raise ConfigError(
                    f"modules_to_not_convert={list(names)}: llm_int8_skip_modules says {list(other)}; "
                    "they are one setting, give one of them"
                )
            kwargs["llm_int8_skip_modules"] = names
        return super()._fold_arguments(args, kwargs)

    @classmethod
    def _read_dict(cls, data: dict[str, Any]) -> dict[str, Any]:
        for flag in _FLAGS:
            if f"_{flag}" in data:
                value = data.pop(f"_{flag}")
                if data.setdefault(flag, value) != value:
                    raise ConfigError(f"{flag}={data[flag]}: the same dictionary says _{flag}={value}; keep one")
        return data
