"""``TorchAoConfig``: a torchao scheme as a value, without torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, cast

from quantlab.backends.exclusions import build, excluded_layers, exclusions_for, refuse_ours, taken_by_transformers
from quantlab.backends.torchao.build import build_form
from quantlab.backends.torchao.forms import (
    DEFAULTS,
    DTYPES,
    FLOAT8,
    FLOAT8_FLOAT8,
    INT4,
    INT8,
    INT8_INT8,
    INT8_INTX,
    INTX,
    PER_AXIS_0,
    PER_MODULE,
    PER_ROW,
    PER_TENSOR,
    Form,
    float8_axes,
    form_of_layer,
    from_mapping,
    from_object,
    group_of,
    is_hqq,
    make,
    of_enum,
    per_group,
)
from quantlab.backends.torchao.rules import OPAQUE_GROUPS, check_calibration, granularity_of, opaque, static
from quantlab.backends.torchao.shorthands import expand
from quantlab.errors import ConfigError
from quantlab.modules.layers import linear_layers
from quantlab.vocabulary.amounts import some_of
from quantlab.vocabulary.axes import QuantizationAxes, custom_axes
from quantlab.vocabulary.native import (
    EXCLUSION_RULES,
    LIBRARY_RULE,
    QuantizationConfigMixin,
    QuantizationMethod,
    Rule,
    quantization_config,
    setting,
    to_json_data,
)

if TYPE_CHECKING:
    import diffusers
    import transformers
    from torch import nn

_Made = TypeVar("_Made")
_NF4, _NVFP4, _MX = "NF4WeightOnlyConfig", "NVFP4WeightOnlyConfig", "MXDynamicActivationMXWeightConfig"
_GRANULARITY = {INTX: "granularity", INT8_INTX: "weight_granularity", INT8: "granularity"}
_MAPPING = {INTX: "mapping_type", INT8_INTX: "weight_mapping_type"}
_TILE_GROUPS = (32, 64, 128, 256)
_SMALLER_GROUPS = (64, 32, 16)
_HQQ_SCALE_ONLY = of_enum("IntxChooseQParamsAlgorithm", "HQQ_SCALE_ONLY")
_MX_DTYPES = {"mxfp8": "float8_e4m3fn", "mxfp4": "float4_e2m1fn_x2"}


def _taken_by_diffusers(entry: str, path: str) -> bool:
    return entry == f"{path}.weight" or f"{entry}." in f"{path}.weight"


@quantization_config
class TorchAoConfig(QuantizationConfigMixin):
    """Diffusers' ``TorchAoConfig``, torch-free, and what Diffusers leaves to the caller: how 4-bit integers are kept.

    ``TorchAoConfig(quant_type, modules_to_not_convert=None, **kwargs)``: ``quant_type`` is a shorthand of earlier
    Diffusers with its keyword arguments (``TorchAoConfig("int4wo", group_size=64)``), a config object of torchao, or
    the dictionary that torchao or Diffusers wrote. All become one stored form, torchao's ``{_type, _version, _data}``.
    """

    quant_method: ClassVar[str] = QuantizationMethod.TORCHAO
    exclusion_rules: ClassVar[Mapping[str, Rule]] = {
        "diffusers": _taken_by_diffusers,
        "transformers": lambda entry, path: taken_by_transformers(entry, f"{path}.weight"),
    }
    written_rule: ClassVar[str] = LIBRARY_RULE

    quant_type: Any = setting("any")
    """torchao's config as plain data."""
    modules_to_not_convert: Sequence[str] | None = setting("names", default=None)
    int4_packing_format: str = setting(
        "str", default="auto", choices=("auto", "unpacked_to_int8", "tile_packed_to_4d", "opaque"), ours=True, node=True
    )
    """How weight-only int4 (``Int4WeightOnlyConfig``) is kept.

    ``tile_packed_to_4d``: two to a byte with an asymmetric zero point for the tinygemm kernel; CUDA with compute
    capability 8.0, bfloat16, groups of 32 to 256. ``unpacked_to_int8``: one to a byte (``IntxWeightOnlyConfig``), any
    device and dtype. ``opaque``: two to a byte with an asymmetric zero point for PyTorch's CPU kernel, a prototype
    (``PrototypeInt4WeightOnlyConfig``); groups of 32, 64 or 128, outputs in multiples of 16, no gradients, and tens of
    times slower in float32 and float16 than in bfloat16. ``auto`` is the first where the device and the dtype allow it
    and ``mapping_type`` is left alone, else the second; ``algorithm=awq`` and ``smoothquant`` need a packing with
    scaled inputs, so there it is the first on CUDA and the third on a CPU. The quantize stage resolves it. The
    library's other packings need kernels that are not published.
    """
    mapping_type: str = setting(
        "str", default="auto", choices=("auto", "SYMMETRIC", "ASYMMETRIC"), ours=True, node=True
    )
    """Zero point of unpacked int4, int3 and int2; ``auto``: as ``quant_type`` says, symmetric by the library's default.

    Asymmetric grids are nearer to what tile-packed int4 does (relative weight error .081 against .095 at groups of 32).
    """
    fit_group_size: bool = setting("bool", default=False, ours=True)
    """``group_size=auto``: a layer that the group of ``quant_type`` does not divide takes 64, 32 or 16, else one scale
    a row. False: such a layer is refused."""
    algorithm: str = setting("str", default="auto", choices=("auto", "awq", "smoothquant", "gptq"), ours=True)
    """``auto``: as ``quant_type`` says, the largest value or hqq. ``awq`` and ``smoothquant`` multiply the columns of
    the weight by scales that they choose on data, and divide the layer's input by them, for int8 and weight-only int4.
    """
    smoothquant_alpha: float = setting("float", default=0.5, ours=True, node=True)
    """How much of the inputs' outliers SmoothQuant moves into the weight, 0 to 1."""
    activation_scales: str = setting("str", default="dynamic", choices=("dynamic", "static"), ours=True, node=True)
    """``static``: activations are rounded with one scale a layer that is measured on data, not with a token's own.
    For int8, and for float8_e4m3 (a prototype that runs on a CPU too, with one scale for the whole weight)."""
    calibration_layers_at_once: int = setting("int", default=0, ours=True, node=True)
    """How many layers AWQ observes in one pass over the data; 0: all. The search reads every input of a layer, so all
    of them are kept in memory: N layers need the tokens x in_features of N inputs, and layers / N passes over the data.
    Results do not depend on it. The other algorithms keep one row a layer and always take one pass."""
    exclusion_rule: str = setting("str", default="quantlab", choices=EXCLUSION_RULES, ours=True)

    if TYPE_CHECKING:  # keywords that are no fields belong to a shorthand

        def __init__(
            self, quant_type: Any, modules_to_not_convert: Sequence[str] | None = None, **settings: Any
        ) -> None: ...

    def post_init(self) -> None:
        """Rules between the fields, and ``mapping_type`` written into ``quant_type``."""
        form = self.quant_type
        kind, data = form["_type"], form["_data"]
        packing, mapping = self.int4_packing_format, self.mapping_type
        is_int4 = kind == INT4 or (kind in _MAPPING and data["weight_dtype"]["_data"] == "int4")
        if packing != "auto" and not is_int4:
            raise ConfigError(
                f"int4_packing_format={packing}: it is for dtype=int4, and this is {kind}; leave it at auto"
            )
        if packing == "tile_packed_to_4d" and (kind != INT4 or data["group_size"] not in _TILE_GROUPS):
            raise ConfigError(
                "int4_packing_format=tile_packed_to_4d: it keeps weight-only int4 in groups of "
                f"{', '.join(map(str, _TILE_GROUPS))}; choose such a group_size, or unpacked_to_int8"
            )
        if packing == "tile_packed_to_4d" and mapping == "SYMMETRIC":
            raise ConfigError(
                "mapping_type=SYMMETRIC: tile-packed int4 is asymmetric; set "
                "int4_packing_format=unpacked_to_int8, or leave mapping_type at auto"
            )
        if self.fit_group_size and kind != INT4 and kind not in _MAPPING:
            raise ConfigError(f"fit_group_size=true: it is for int4, int3 and int2, and this is {kind}; leave it out")
        if packing == "opaque" and (kind != INT4 or data["group_size"] not in OPAQUE_GROUPS):
            raise ConfigError(
                "int4_packing_format=opaque: it keeps weight-only int4 in groups of "
                f"{', '.join(map(str, OPAQUE_GROUPS))}; choose such a group_size, or unpacked_to_int8"
            )
        if packing == "opaque" and mapping == "SYMMETRIC":
            raise ConfigError(
                "mapping_type=SYMMETRIC: opaque int4 is asymmetric; set "
                "int4_packing_format=unpacked_to_int8, or leave mapping_type at auto"
            )
        check_calibration(self)
        self._inner()
        if mapping != "auto":
            self._set_mapping(kind, data, mapping)

    def _inner(self) -> list[Self]:
        """The configs inside a per-module one; ConfigError for one that could not stand alone."""
        told = self.quant_type["_data"]["fqn_to_config"].values() if self.quant_type["_type"] == PER_MODULE else ()
        return [dataclasses.replace(self, quant_type=form) for form in told if form is not None]

    def of_layer(self, path: str) -> Self:
        """The config of one layer, which for a per-module one is what it says of this one."""
        form = form_of_layer(self.quant_type, path)
        return self if form is None or form is self.quant_type else dataclasses.replace(self, quant_type=form)

    def disabled_layers(self, paths: Sequence[str]) -> dict[str, str]:
        """The layers that a per-module config leaves alone."""
        return {path: f"quant_type: {PER_MODULE}" for path in paths if form_of_layer(self.quant_type, path) is None}

    def _canonical(self) -> str:
        """With the order of a per-module config's names, of which the first that matches counts."""
        return f"{super()._canonical()} {list(self.quant_type['_data'].get('fqn_to_config', ()))}"

    def spelled_out(self) -> dict[str, Any]:
        """Packing and zero point, where they are known, as what the library is told for a layer that fits."""
        data, kind = super().spelled_out(), self.quant_type["_type"]
        if kind == PER_MODULE:  # of which the order counts
            return {**data, "quant_type": [list(pair) for pair in self.quant_type["_data"]["fqn_to_config"].items()]}
        if kind in _MAPPING:  # it is in quant_type
            return {k: v for k, v in data.items() if k != "mapping_type"}
        if kind == INT4 and self.int4_packing_format != "auto":
            told = {k: v for k, v in data.items() if k not in ("mapping_type", "int4_packing_format")}
            return {**told, "quant_type": to_json_data(layer_form(self, 1 << 12))}
        return data

    def _set_mapping(self, kind: str, data: Mapping[str, Any], mapping: str) -> None:
        if kind != INT4 and kind not in _MAPPING:
            raise ConfigError(
                f"mapping_type={mapping}: it is for int4, int3 and int2, and this is {kind}; leave it at auto"
            )
        if mapping == "ASYMMETRIC" and is_hqq(data):
            raise ConfigError(
                "mapping_type=ASYMMETRIC: algorithm=hqq of torchao searches scales of symmetric grids "
                "only; leave mapping_type at auto, or set algorithm=max"
            )
        if kind in _MAPPING:
            changed = {**data, _MAPPING[kind]: of_enum("MappingType", mapping)}
            object.__setattr__(self, "quant_type", {**self.quant_type, "_data": changed})

    # -- spellings

    @classmethod
    def _fold_arguments(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``quant_type`` in its stored form; a shorthand takes the keywords that are no fields."""
        names = [f.name for f in cls._fields()]
        if len(args) > len(names):
            raise ConfigError(f"{cls.__name__} takes {len(names)} positional arguments, not {len(args)}")
        given = dict(zip(names, args, strict=False))
        if twice := sorted(given.keys() & kwargs.keys()):
            raise ConfigError(f"{twice[0]}: given twice, by position and by name")
        given |= {k: v for k, v in kwargs.items() if k in names}
        extra = {k: v for k, v in kwargs.items() if k not in names}
        value = given.get("quant_type")
        if value is None:
            raise ConfigError("quant_type: TorchAoConfig needs it, such as int8wo or a config object of torchao")
        if isinstance(value, str):
            given["quant_type"] = expand(str(value), extra)
        else:
            super()._fold_arguments((), extra)
            given["quant_type"] = from_mapping(value) if isinstance(value, Mapping) else from_object(value)
        return (), given

    @classmethod
    def _read_dict(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Diffusers up to 0.37 wrote a shorthand and ``quant_type_kwargs``; transformers writes flags."""
        for key in ("include_embedding", "include_input_output_embeddings", "untie_embedding_weights"):
            if data.pop(key, False) not in (False, None):
                raise ConfigError(
                    f"{key}=true: quantlab quantizes Linear layers only, and leaves tied weights tied; leave it out"
                )
        keywords = data.pop("quant_type_kwargs", None) or {}
        return {**data, **keywords}

    def to_dict(self) -> dict[str, Any]:
        """As Diffusers writes it: ``quant_type`` below the key ``default``."""
        data = super().to_dict()
        return {**data, "quant_type": {"default": data["quant_type"]}}

    def to_diff_dict(self) -> dict[str, Any]:
        """What differs from the defaults; ``quant_type`` has none and is always there."""
        data = super().to_diff_dict()
        return {**data, "quant_type": {"default": data["quant_type"]}}

    # -- to other libraries

    def to_diffusers(self, model: nn.Module | None = None) -> diffusers.TorchAoConfig:
        """``diffusers.TorchAoConfig``; ``auto`` packing of int4 is what ``quant_type`` says (CUDA's tile-packed)."""
        import diffusers

        return self._to_library(diffusers.TorchAoConfig, "diffusers", model)

    def to_transformers(self, model: nn.Module | None = None) -> transformers.TorchAoConfig:
        """``transformers.TorchAoConfig``; as :meth:`to_diffusers`."""
        import transformers

        return self._to_library(transformers.TorchAoConfig, "transformers", model)

    def _to_library(self, make: Callable[..., _Made], library: str, model: nn.Module | None) -> _Made:
        if self.fit_group_size and model is None:
            raise ConfigError(
                f"fit_group_size=true: {library} has one group size for all layers; give the model, and "
                "it is checked that this one divides them all, or set group_size"
            )
        refuse_ours(
            self, library, ("int4_packing_format", "mapping_type", "fit_group_size", "calibration_layers_at_once")
        )
        if self.int4_packing_format == "opaque":
            raise ConfigError(
                f"int4_packing_format=opaque: {library} does not offer this prototype; set it to auto, "
                "or quantize with quantlab"
            )
        form = self._one_form(model, library)
        names = exclusions_for(self, model, library)
        arguments = {"quant_type": build_form(form, sets_inductor=True), "modules_to_not_convert": names}
        return build(make, arguments, f"quant_type={form['_type']}")

    def _one_form(self, model: nn.Module | None, library: str) -> Form:
        """What every layer is told; ConfigError where ``fit_group_size`` tells some another group size."""
        kind, data = self.quant_type["_type"], self.quant_type["_data"]
        if self.fit_group_size and model is not None:
            group: int = data["group_size"] if kind == INT4 else cast("int", group_of(data[_GRANULARITY[kind]]))
            left = excluded_layers(self, model)
            if odd := [n for n, layer in linear_layers(model).items() if n not in left and layer.in_features % group]:
                raise ConfigError(
                    f"fit_group_size=true: {some_of(odd)} would take another group size than "
                    f"{group}, and {library} has one for all layers; exclude them, or set group_size"
                )
        is_unpacked = self.int4_packing_format == "unpacked_to_int8" or self.mapping_type != "auto"
        return unpacked(self, data["group_size"]) if kind == INT4 and is_unpacked else dict(self.quant_type)

    # -- calibration

    @property
    def needs_data(self) -> bool:
        """Whether scales of this config are measured on data."""
        return self.algorithm != "auto" or self.activation_scales == "static"

    @property
    def activation_granularity(self) -> str:
        """By the config that the library gets; static activations have one scale a layer."""
        if self.activation_scales == "static":
            return "per-tensor static"
        return granularity_of(self.quant_type)

    def without_data(self) -> Self | None:
        """This config with plain rounding and dynamic activation scales.

        None for a config that needs no data, and for static float8: the dynamic kind runs on CUDA only. Call it on a
        resolved config, so that int4 keeps its packing.
        """
        if not self.needs_data or self.quant_type["_type"] == FLOAT8_FLOAT8:
            return None
        plain: Self = dataclasses.replace(self, algorithm="auto", smoothquant_alpha=0.5, activation_scales="dynamic")
        return plain

    # -- axes

    @classmethod
    def from_resolved(cls, axes: QuantizationAxes, settings: Mapping[str, Any] | None = None) -> Self:
        """The config for these axes and the node's own keys; ConfigError where torchao does not offer them.

        ``group_size=auto`` is torchao's default: 128 for weight-only integers below 8 bits (its Int4WeightOnlyConfig),
        32 with int8 activations, lowered for layers that it does not divide; one scale a row for int8 and float8.
        """
        if axes.activation_dtype == "int8" and axes.dtype == "int8" and axes.group_size not in ("auto", "none"):
            raise ConfigError(
                f"group_size={axes.group_size}: torchao int8 with activation_dtype=int8 has one scale a "
                "row; set group_size=none, or activation_dtype=none"
            )
        is_scaled = axes.algorithm in ("awq", "smoothquant", "gptq")
        if (
            is_scaled
            and axes.dtype == "int4"
            and (axes.activation_dtype != "none" or axes.group_size not in ("auto", *OPAQUE_GROUPS))
        ):
            raise ConfigError(
                f"algorithm={axes.algorithm}: torchao int4 has it with activation_dtype=none and "
                f"group_size={', '.join(map(str, OPAQUE_GROUPS))} or auto, not activation_dtype="
                f"{axes.activation_dtype} group_size={axes.group_size}; change them, or take "
                "algorithm=max"
            )
        given = dict(settings or {})
        if (
            given.get("activation_scales") == "static"
            and axes.activation_dtype.startswith("float8")
            and (axes.group_size != "auto")
        ):
            raise ConfigError(
                f"group_size={axes.group_size}: torchao's static float8 has one scale for the whole "
                "weight; leave group_size=auto, or set activation_scales=dynamic"
            )
        is_fitted = axes.group_size == "auto" and axes.dtype in ("int4", "int3", "int2")
        return cls(
            quant_type=_form(axes),
            modules_to_not_convert=axes.exclusions() or None,
            fit_group_size=is_fitted,
            algorithm=axes.algorithm if is_scaled else "auto",
            **given,
        )

    def axes(self) -> QuantizationAxes:
        """The axes that, with the config's own settings, :meth:`from_axes` turns into this config; ``custom`` where no
        axes express it."""
        kind, data = self.quant_type["_type"], self.quant_type["_data"]
        axes = QuantizationAxes(
            backend="torchao", activation_dtype="none", algorithm="max", modules_to_not_convert=self._exclusion_axes()
        )
        if kind == INT4:
            found = {"dtype": "int4", "group_size": data["group_size"]}
        elif kind in _MAPPING:
            bits = DTYPES.get(data["weight_dtype"]["_data"])
            found = {
                "dtype": bits,
                "group_size": group_of(data[_GRANULARITY[kind]]),
                "activation_dtype": "int8" if kind == INT8_INTX else "none",
            }
        elif kind in (INT8, INT8_INT8):
            found = {
                "dtype": "int8",
                "group_size": group_of(data["granularity"]),
                "activation_dtype": "int8" if kind == INT8_INT8 else "none",
            }
        elif kind in (FLOAT8, FLOAT8_FLOAT8):
            found = float8_axes(kind, data)
        elif kind == _MX:
            dtype = next((d for d, name in _MX_DTYPES.items() if name == data["weight_dtype"]["_data"]), None)
            found = {"dtype": dtype, "group_size": data["block_size"], "activation_dtype": dtype}
        else:
            fixed = {_NF4: ("nf4", 64), _NVFP4: ("nvfp4", 16)}.get(kind)
            found = {"dtype": fixed[0], "group_size": fixed[1]} if fixed else {}
        if None in found.values() or not found:
            return custom_axes("torchao", self._exclusion_axes())
        found |= {"group_size": "auto"} if self.fit_group_size else {}
        algorithm = self.algorithm if self.algorithm != "auto" else "hqq" if is_hqq(data) else "max"
        return dataclasses.replace(axes, **found, algorithm=algorithm)


def _form(axes: QuantizationAxes) -> Form:
    """The stored form for resolved axes."""
    dtype, group = axes.dtype, axes.group_size
    granularity = per_group(group) if isinstance(group, int) else PER_ROW
    if dtype == "int8":
        return make(INT8, granularity=granularity) if axes.activation_dtype == "none" else make(INT8_INT8)
    if dtype in ("float8_e4m3", "float8_e5m2"):
        if axes.activation_dtype != "none":
            return make(FLOAT8_FLOAT8, granularity=PER_TENSOR if group == "auto" else PER_ROW)
        return make(FLOAT8, weight_dtype=next(name for name, d in DTYPES.items() if d == dtype))
    if dtype in _MX_DTYPES:
        name = _MX_DTYPES[dtype]
        return make(_MX, weight_dtype=name, activation_dtype=name, kernel_preference="EMULATED")
    if dtype in ("nf4", "nvfp4"):
        return make(_NF4 if dtype == "nf4" else _NVFP4)
    hqq = axes.algorithm == "hqq"
    if group == "auto":
        group = DEFAULTS[INT4][1]["group_size"] if axes.activation_dtype == "none" else 32
    if dtype == "int4" and axes.activation_dtype == "none" and group in _TILE_GROUPS:
        return make(
            INT4,
            group_size=group,
            int4_packing_format="tile_packed_to_4d",
            **({"int4_choose_qparams_algorithm": "hqq"} if hqq else {}),
        )
    kind = INTX if axes.activation_dtype == "none" else INT8_INTX
    return _intx(kind, dtype, PER_AXIS_0 if group == "none" else per_group(int(group)), hqq)


def _intx(kind: str, dtype: str, granularity: Form, hqq: bool) -> Form:
    algorithm = {"intx_choose_qparams_algorithm": _HQQ_SCALE_ONLY} if hqq else {}
    return make(kind, weight_dtype=dtype, **{_GRANULARITY[kind]: granularity}, **algorithm)


# -- one layer


def unpacked(config: TorchAoConfig, group_size: int | str) -> Form:
    """The ``IntxWeightOnlyConfig`` that keeps what an ``Int4WeightOnlyConfig`` asks for in int8."""
    form = _intx(
        INTX,
        "int4",
        PER_AXIS_0 if group_size == "none" else per_group(int(group_size)),
        is_hqq(config.quant_type["_data"]),
    )
    if config.mapping_type != "auto":
        form["_data"]["mapping_type"] = of_enum("MappingType", config.mapping_type)
    return form


def layer_form(config: TorchAoConfig, in_features: int) -> Form:
    """What torchao is told for a layer of ``in_features``: the packing chosen, the group size fitted.

    ``config.int4_packing_format`` is resolved (``auto`` keeps what ``quant_type`` says). Raises ConfigError where the
    group size does not divide ``in_features`` and may not be fitted.
    """
    form = config.quant_type
    kind, data = form["_type"], form["_data"]
    group = data["group_size"] if kind == INT4 else group_of(data.get(_GRANULARITY.get(kind, ""), PER_ROW))
    if isinstance(group, int) and in_features % group:
        if not config.fit_group_size:
            raise ConfigError(
                f"group_size={group}: in_features {in_features} does not divide by it; choose another "
                "group_size, exclude the layer, or leave group_size=auto"
            )
        group = next((g for g in _SMALLER_GROUPS if g < int(group) and not in_features % g), "none")
    if config.activation_scales == "static":
        return static(form)
    if kind == INT4 and config.int4_packing_format == "opaque":
        return opaque(form, group, in_features)
    if kind == INT4:
        if config.algorithm != "auto" and group not in OPAQUE_GROUPS:
            raise ConfigError(
                f"algorithm={config.algorithm}: torchao scales the inputs of packed int4 only, and in_features "
                f"{in_features} divides by none of its group sizes {', '.join(map(str, OPAQUE_GROUPS))}; exclude the "
                "layer, or set algorithm=max"
            )
        if config.int4_packing_format == "unpacked_to_int8" or group not in _TILE_GROUPS:
            return unpacked(config, group or "none")
        packing = {"int4_packing_format": of_enum("Int4PackingFormat", "TILE_PACKED_TO_4D")}
        chosen = packing if config.int4_packing_format == "tile_packed_to_4d" else {}
        return {**form, "_data": {**data, "group_size": group, **chosen}}
    if config.fit_group_size and group is not None:
        fitted = PER_AXIS_0 if group == "none" else per_group(int(group))
        return {**form, "_data": {**data, _GRANULARITY[kind]: fitted}}
    return dict(form)
