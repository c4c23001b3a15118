"""The native config of GGUF. Torch-free."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from quantlab.backends.exclusions import build, exclusions_for
from quantlab.backends.gguf.diffusion_mixes import is_diffusion, is_kept
from quantlab.backends.gguf.imatrix import read_imatrix
from quantlab.backends.gguf.mixes import BASES, OTHERS, format_of, measures, measures_of
from quantlab.errors import ConfigError, nearest
from quantlab.modules.layers import resolve_exclusions
from quantlab.vocabulary.axes import QuantizationAxes
from quantlab.vocabulary.capabilities import OFFERS
from quantlab.vocabulary.dtypes import COMPUTE_DTYPES
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
    from torch import nn


def uses_importance(gguf_type: str) -> bool:
    """Whether ggml's quantizer of this type takes an importance matrix into account."""
    return "imatrix" in OFFERS["gguf"].rows[gguf_type].algorithms


@quantization_config
class GGUFQuantizationConfig(QuantizationConfigMixin):
    """Diffusers' ``GGUFQuantizationConfig``, and the type to write, which theirs cannot say (it only loads)."""

    quant_method: ClassVar[str] = QuantizationMethod.GGUF
    exclusion_rules: ClassVar[Mapping[str, Rule]] = {"diffusers": lambda entry, path: entry in path.split(".")}
    written_rule: ClassVar[str] = "diffusers"

    compute_dtype: Any = setting("dtype", default="float32", choices=COMPUTE_DTYPES)
    modules_to_not_convert: Sequence[str] | None = setting("names", default=None)
    gguf_type: str | None = setting("str", default=None, choices=tuple(OFFERS["gguf"].rows), ours=True)
    """The block format to write, also accepted in ggml's upper case; None: the first of the backend, q8_0."""
    tensor_types: Mapping[str, str] | None = setting("mapping", default=None, ours=True, node=True)
    """Entry of the matcher (module path, glob, ``re:`` expression) -> block format; the first that matches counts."""
    file_type: str | None = setting("str", default=None, choices=tuple(BASES), ours=True, node=True)
    """A file type of llama.cpp, such as ``q4_k_m``: its mix of formats over the layers, those of the dtype's base; of a
    diffusion model that of the files in circulation, where what stands outside of the blocks keeps 16 bits. The model's
    own output matrix and embeddings stay as they are; what the file would hold is in the plan."""
    file_type_measures: Mapping[str, Any] | None = setting("mapping", default=None, ours=True)
    """What the mix asks of the whole model (:class:`quantlab.backends.gguf.mixes.Measures`); None: not known yet."""
    algorithm: str = setting("str", default="max", choices=("max", "imatrix"), ours=True)
    """``imatrix``: ggml weighs each input channel's rounding errors by the mean of its squared inputs, the importance
    matrix, measured on calibration data or read from ``imatrix_file``."""
    imatrix_file: str | None = setting("str", default=None, ours=True, node=True)
    """An importance matrix of llama.cpp's (GGUF, or the older binary form); None: measured on calibration data."""
    exclusion_rule: str = setting("str", default="quantlab", choices=EXCLUSION_RULES, ours=True)

    @property
    def dtype(self) -> str:
        """quantlab's name of the format."""
        return self.gguf_type or next(iter(OFFERS["gguf"].rows))

    @classmethod
    def from_resolved(cls, axes: QuantizationAxes, settings: Mapping[str, Any] | None = None) -> Self:
        """``compute_dtype=auto`` is stored as Diffusers' float32."""
        own, known = dict(settings or {}), [f.name for f in cls._fields() if f.metadata["node"]]
        for key in own:
            if key not in known:
                raise ConfigError(
                    f"quantization.{key}: gguf has no such setting{nearest(key, known)} (it has {', '.join(known)})"
                )
        if axes.compute_dtype != "auto":
            own["compute_dtype"] = axes.compute_dtype
        exclusions = axes.exclusions() or None
        return cls(gguf_type=axes.dtype, algorithm=axes.algorithm, modules_to_not_convert=exclusions, **own)

    def axes(self) -> QuantizationAxes:
        """The axes that :meth:`from_axes` turns into this config."""
        return QuantizationAxes(
            backend="gguf",
            dtype=self.dtype,
            activation_dtype="none",
            compute_dtype=self.compute_dtype,
            algorithm=self.algorithm,
            modules_to_not_convert=self._exclusion_axes(),
        )

    def post_init(self) -> None:
        """Types of ``tensor_types`` in quantlab's lower case; an empty mapping is none."""
        if self.algorithm == "imatrix" and not uses_importance(self.dtype):
            taking = ", ".join(kind for kind in OFFERS["gguf"].rows if uses_importance(kind))
            raise ConfigError(
                f"algorithm=imatrix: ggml writes {self.dtype} without an importance matrix, which would "
                f"change nothing; choose {taking}, or leave algorithm at max"
            )
        if self.imatrix_file is not None and self.algorithm != "imatrix":
            raise ConfigError(
                f"imatrix_file={self.imatrix_file}: only algorithm=imatrix reads it; set "
                "algorithm=imatrix, or leave imatrix_file out"
            )
        if self.file_type is not None and (base := BASES[self.file_type]) != self.dtype:
            raise ConfigError(f"file_type={self.file_type}: most of its layers are {base}; set dtype={base}")
        if self.file_type is not None and self.tensor_types:
            raise ConfigError(
                f"file_type={self.file_type}: tensor_types says the same otherwise; leave one of them out"
            )
        given = dict(self.tensor_types or {})
        formats = tuple(OFFERS["gguf"].rows)
        for entry, kind in given.items():
            if not isinstance(kind, str) or kind.lower() not in formats:
                raise ConfigError(
                    f"tensor_types={entry}: {kind!r} is none of {', '.join(formats)}{nearest(str(kind), formats)}"
                )
        lowered = {entry: kind.lower() for entry, kind in given.items()}
        object.__setattr__(self, "tensor_types", lowered or None)

    @property
    def other_dtypes(self) -> tuple[str, ...]:
        """The types of ``tensor_types``, or of the file type."""
        if self.file_type is not None:
            return OTHERS[self.file_type]
        return tuple(dict.fromkeys((self.tensor_types or {}).values()))

    def layer_dtypes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        """The layers that ``tensor_types`` names, or that the file type gives another format; ConfigError for an entry
        that matches none of them."""
        if self.file_type is not None:
            model = measures_of(self.file_type_measures) if self.file_type_measures else measures(shapes)
            told = {p: format_of(self.file_type, p, shape[-1], model) for p, shape in shapes.items()}
            return {p: kind for p, kind in told.items() if kind in OTHERS[self.file_type]}
        entries = tuple(self.tensor_types or {})
        found = resolve_exclusions(list(shapes), entries, key="tensor_types") if entries else {}
        return {path: dict(self.tensor_types or {})[entry] for path, entry in found.items()}

    def disabled_layers(self, paths: Sequence[str]) -> dict[str, str]:
        """Of a diffusion model with a file type: what its files keep in 16 bits."""
        if self.file_type is None or not is_diffusion(paths):
            return {}
        reason = f"file_type={self.file_type}: it is outside of the blocks, and such files keep it in 16 bits"
        return {path: reason for path in paths if is_kept(path)}

    def measured(self, shapes: Mapping[str, tuple[int, ...]]) -> Self:
        """With the model's number of layers and heads, where a file type asks for them."""
        if self.file_type is None:
            return self
        return dataclasses.replace(self, file_type_measures=measures(shapes).data)

    def spelled_out(self) -> dict[str, Any]:
        """With the type by name."""
        return {**super().spelled_out(), "gguf_type": self.dtype}

    @property
    def needs_data(self) -> bool:
        """An importance matrix is measured, unless a file holds it already."""
        return self.algorithm == "imatrix" and self.imatrix_file is None

    def check_files(self) -> None:
        """ConfigError for an importance matrix that is not there or cannot be read."""
        if self.imatrix_file is not None:
            read_imatrix(self.imatrix_file)

    def without_data(self) -> Self | None:
        """The same types without an importance matrix; None where there is none anyway."""
        return None if self.algorithm == "max" else dataclasses.replace(self, algorithm="max", imatrix_file=None)

    def to_diffusers(self, model: nn.Module | None = None) -> diffusers.GGUFQuantizationConfig:
        """``diffusers.GGUFQuantizationConfig``, which only loads: the types are the file's, so ours are refused.

        How the blocks were found (``algorithm``) is dropped: they are ordinary blocks, and loading them needs neither
        the importance matrix nor its file.
        """
        import diffusers
        import torch

        if types := {k: v for k, v in self.extra_settings().items() if k in ("gguf_type", "tensor_types", "file_type")}:
            raise ConfigError(
                f"{', '.join(f'{k}={v!r}' for k, v in types.items())}: Diffusers only loads GGUF files "
                "and takes the types from the file; leave it out to load one"
            )
        arguments = {"compute_dtype": getattr(torch, self.compute_dtype)}
        made: Any = build(diffusers.GGUFQuantizationConfig, arguments, "to_diffusers")
        made.modules_to_not_convert = exclusions_for(self, model, "diffusers")  # no argument of its constructor
        return made

    @classmethod
    def _fold_arguments(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if kwargs.get("compute_dtype", "") is None:  # Diffusers' spelling of its default
            del kwargs["compute_dtype"]
        if isinstance(kwargs.get("gguf_type"), str):
            kwargs["gguf_type"] = kwargs["gguf_type"].lower()
        return super()._fold_arguments(args, kwargs)

    @classmethod
    def _read_dict(cls, data: dict[str, Any]) -> dict[str, Any]:
        if data.pop("pre_quantized", True) is not True:  # a constant of Diffusers' class
            raise ConfigError("pre_quantized=False: Diffusers' GGUF configs always say true; leave it out")
        return data


def resolve(config: GGUFQuantizationConfig, device: str, compute_dtype: str = "float32") -> GGUFQuantizationConfig:
    """The config with its type named; nothing depends on the device."""
    return GGUFQuantizationConfig.from_dict({**config.to_dict(), "gguf_type": config.dtype})
