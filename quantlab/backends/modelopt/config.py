"""``NVIDIAModelOptConfig`` and the quantizer list of ModelOpt that it stands for, both without torch."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from quantlab.backends.exclusions import build, excluded_layers, exclusions_for, refuse_ours
from quantlab.backends.modelopt.algorithms import (
    ALGORITHMS,
    DATA_FREE,
    PRE_SCALED,
    checked_settings,
    library_algorithm,
    without_effect,
)
from quantlab.backends.modelopt.pasted import (
    algorithm_of,
    entries_of,
    for_diffusers,
    granularity,
    is_static,
    scheme,
    settings_of,
    sides,
    switched_off,
    with_dynamic_activations,
)
from quantlab.backends.modelopt.published import from_published, is_published, taken_by_export
from quantlab.backends.modelopt.quantizers import BLOCKS, NUM_BITS, WIDTHS, activation_cfg, weight_cfg
from quantlab.errors import ConfigError, nearest
from quantlab.modules.layers import linear_layers
from quantlab.vocabulary.amounts import some_of
from quantlab.vocabulary.axes import QuantizationAxes, custom_axes
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

_SPELLING = {
    "int8": "INT8",
    "int4": "INT4",
    "int3": "INT3",
    "int2": "INT2",
    "float8_e4m3": "FP8",
    "nvfp4": "NVFP4",
    "mxfp8": "MXFP8",
    "mxfp4": "MXFP4",
}
_ALWAYS_OFF = {"*", "*input_quantizer", "*output_quantizer"}
_DEFAULT_BLOCK = {"INT4": 128, "INT3": 128, "INT2": 32}
_DIFFUSERS_TYPES = ("FP8", "INT8", "INT4")


def _taken_by_diffusers(entry: str, path: str) -> bool:
    return fnmatch.fnmatch(f"{path}.weight_quantizer", f"*{entry}*")


@quantization_config
class NVIDIAModelOptConfig(QuantizationConfigMixin):
    """Diffusers' ``NVIDIAModelOptConfig``, checked where the original replaces or ignores, and the packing.

    ``modelopt_config`` takes the place of everything but ``quant_type``'s name: the entries ``*weight_quantizer`` and
    ``*input_quantizer`` of a pasted ModelOpt config. Its other entries may only switch quantizers off; the layers that
    they take are left out beside those of ``modules_to_not_convert``.
    """

    quant_method: ClassVar[str] = QuantizationMethod.MODELOPT
    exclusion_rules: ClassVar[Mapping[str, Rule]] = {"diffusers": _taken_by_diffusers, "modelopt": taken_by_export}
    written_rule: ClassVar[str] = "diffusers"

    quant_type: str = setting("str")
    """``W`` or ``W_A`` (weights, activations), each FP8, INT8, INT4, NVFP4, MXFP8 or MXFP4; W also INT3 or INT2, which
    Diffusers has not, with codes in a byte each: ModelOpt packs 8 and 4 bits."""
    modules_to_not_convert: Sequence[str] | None = setting("names", default=None)
    weight_only: bool = setting("bool", default=True)
    """False where ``quant_type`` has an activation half."""
    channel_quantize: int | None = setting("int", default=None)
    """0: one scale a row; -1 with ``block_quantize``: blocks along a row; None: one scale for the tensor."""
    block_quantize: int | None = setting("int", default=None)
    scale_channel_quantize: int | None = setting("int", default=None)
    scale_block_quantize: int | None = setting("int", default=None)
    algorithm: str = setting("str", default="max", choices=ALGORITHMS)
    modelopt_config: Mapping[str, Any] | None = setting("mapping", default=None)
    disable_conv_quantization: bool = setting("bool", default=False)
    """Kept for Diffusers; only Linear layers are quantized here."""
    compress: bool = setting("bool", default=True, ours=True, node=True)
    """True: weights are packed after calibration. False: they stay dense and are rounded at every use (simulated)."""
    algorithm_settings: Mapping[str, Any] | None = setting("mapping", default=None, ours=True, node=True)
    """What :data:`~quantlab.backends.modelopt.algorithms.PARAMETERS` lists for the algorithm."""
    activation_scales: str = setting("str", default="dynamic", choices=("dynamic", "static"), ours=True, node=True)
    """``dynamic``: taken from each input at run time. ``static``: measured once on the calibration data."""
    fit_group_size: bool = setting("bool", default=False, ours=True)
    """``group_size=auto``: a layer that ``block_quantize`` does not divide takes 64, 32 or 16, else one scale a row."""
    exclusion_rule: str = setting("str", default="quantlab", choices=EXCLUSION_RULES, ours=True)

    def post_init(self) -> None:
        """Rules between the fields."""
        weight, activation = _halves(self.quant_type)
        if self.modelopt_config is not None:
            self._check_pasted(self.modelopt_config, weight)
        elif activation and self.weight_only:
            raise ConfigError(
                f"weight_only=true: the activation half of quant_type={self.quant_type} would be "
                f"ignored; set weight_only=false, or quant_type={weight}"
            )
        elif not activation and not self.weight_only:
            raise ConfigError(
                f"weight_only=false: quant_type={self.quant_type} names no activations; "
                f"write {weight}_INT8 or {weight}_FP8, or set weight_only=true"
            )
        self._check_blocks(weight)
        self._check_calibration(weight)
        if self.modelopt_config is not None and _is_derived(self):
            object.__setattr__(self, "modelopt_config", None)  # Diffusers always writes it

    def _check_calibration(self, weight: str) -> None:
        told = activation_cfg(self)
        if self.modelopt_config is not None:
            self._adopt_pasted(self.modelopt_config, told)
        settings = checked_settings(self.algorithm, self.algorithm_settings)
        object.__setattr__(self, "algorithm_settings", settings or None)
        if self.activation_scales == "static" and told is None:
            raise ConfigError(
                f"activation_scales=static: quant_type={self.quant_type} leaves activations alone; leave "
                "it out, or set activation_dtype=int8 (quant_type=INT8_INT8, weight_only=false)"
            )
        if self.activation_scales == "static" and scheme(told or {})[0][1] == (8, 0):
            raise ConfigError(
                f"activation_scales=static: {self.activation_type} scales each block at run time; leave it out"
            )
        if why := without_effect(self.algorithm, weight, told and told.get("num_bits", 8)):
            raise ConfigError(f"algorithm={self.algorithm}: {why}")
        if (
            self.algorithm in PRE_SCALED
            and told
            and (told.get("axis") is not None or scheme(told)[1] and not scheme(told)[0][1])
        ):
            raise ConfigError(
                f"algorithm={self.algorithm}: it takes activations with one scale for the tensor, and "
                "modelopt_config asks for more; leave axis and block_sizes of *input_quantizer out"
            )

    def _adopt_pasted(self, pasted: Mapping[str, Any], activation: Mapping[str, Any] | None) -> None:
        """Take settings and kind of activation scales from a pasted config that says them."""
        settings = settings_of(pasted)
        own = dict(self.algorithm_settings or {})
        if settings and own not in ({}, settings, checked_settings(self.algorithm, settings)):
            raise ConfigError(f"algorithm_settings={own}: modelopt_config says {settings}; make them agree")
        object.__setattr__(self, "algorithm_settings", settings or own)
        if activation is not None and is_static(activation):
            object.__setattr__(self, "activation_scales", "static")
        elif activation is not None and self.activation_scales == "static" and activation.get("type") == "dynamic":
            raise ConfigError("activation_scales=static: modelopt_config says type: dynamic; make them agree")

    def _check_pasted(self, pasted: Mapping[str, Any], weight: str) -> None:
        told = sides(pasted)[0]
        width, block = scheme(told)
        if width != WIDTHS[weight]:
            said = next((t for t, w in WIDTHS.items() if w == width), f"num_bits={width[0]}")
            raise ConfigError(f"quant_type={self.quant_type}: modelopt_config says {said}; make them agree")
        if self.block_quantize not in (None, block):
            raise ConfigError(f"block_quantize={self.block_quantize}: modelopt_config says {block}; make them agree")
        if self.block_quantize is None and self.channel_quantize not in (None, told.get("axis")):
            raise ConfigError(
                f"channel_quantize={self.channel_quantize}: modelopt_config says "
                f"axis={told.get('axis')}; make them agree"
            )
        if (algorithm := algorithm_of(pasted)) is not None and algorithm != self.algorithm:
            raise ConfigError(f"algorithm={self.algorithm}: modelopt_config says {algorithm}; make them agree")

    def _check_blocks(self, weight: str) -> None:
        channel, block = self.channel_quantize, self.block_quantize
        if block is not None and channel is None:
            raise ConfigError(
                f"block_quantize={block}: it needs channel_quantize=-1, the axis that its blocks run along"
            )
        if block is not None and (block < 1 or channel not in (-1, 1)):
            raise ConfigError(
                f"block_quantize={block}: blocks of 1 or more run along in_features; set "
                f"channel_quantize=-1 (it is {channel})"
            )
        if block is None and channel not in (None, 0, -2):
            raise ConfigError(f"channel_quantize={channel}: without block_quantize it is 0, one scale a row")
        if weight in BLOCKS and (block not in (None, BLOCKS[weight][0]) or channel in (0, -2)):
            raise ConfigError(
                f"block_quantize={block}: {weight} has blocks of {BLOCKS[weight][0]} along in_features; "
                "leave block_quantize and channel_quantize out"
            )
        given = (self.scale_channel_quantize, self.scale_block_quantize)
        if any(v is not None for v in given) and (None in given or block is None or weight != "NVFP4"):
            raise ConfigError(
                f"scale_channel_quantize={given[0]}, scale_block_quantize={given[1]}: they come "
                "together, with block_quantize, for NVFP4; leave both out"
            )
        if self.fit_group_size and (block is None or weight in BLOCKS):
            raise ConfigError("fit_group_size=true: it lowers block_quantize of INT8, INT4 or FP8; set that too")

    @property
    def weight_type(self) -> str:
        """The weight half of ``quant_type``."""
        return _halves(self.quant_type)[0]

    @property
    def activation_type(self) -> str:
        """The activation half of ``quant_type``; "" where activations are left alone."""
        return "" if self.weight_only else _halves(self.quant_type)[1]

    # -- spellings

    @classmethod
    def _fold_arguments(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``forward_loop`` of Diffusers holds code, which a config does not."""
        kwargs = dict(kwargs)
        if kwargs.pop("forward_loop", None) is not None:
            raise ConfigError(
                "forward_loop: a config holds data, not code; leave it out, and give the calibration "
                "data to quantize: calibration=[batch]"
            )
        if not args and "quant_type" not in kwargs:
            raise ConfigError(f"quant_type: {cls.__name__} needs it, such as {' or '.join(list(NUM_BITS)[:2])}")
        return super()._fold_arguments(args, kwargs)

    @classmethod
    def _read_dict(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Diffusers writes ``algorithm`` as ``calib_cfg``, and always the ``modelopt_config`` that it derived;
        ModelOpt's own exporter writes a format's name (:mod:`quantlab.backends.modelopt.published`)."""
        if is_published(data):
            return from_published(data)
        calib = data.pop("calib_cfg", None)
        if isinstance(calib, Mapping) and "method" in calib:
            data.setdefault("algorithm", calib["method"])
            if more := {k: v for k, v in calib.items() if k != "method"}:
                data.setdefault("algorithm_settings", more)
        pasted = data.get("modelopt_config")
        algorithm = algorithm_of(pasted) if isinstance(pasted, Mapping) else None
        if algorithm is not None:
            data["algorithm"] = algorithm  # calib_cfg is reset by each round trip through Diffusers; this is used
        return data

    # -- to Diffusers

    def to_diffusers(self, model: nn.Module | None = None) -> diffusers.NVIDIAModelOptConfig:
        """``diffusers.NVIDIAModelOptConfig``, built around its constructor, which fails with ModelOpt 0.44 and later.

        What the settings mean goes into ``modelopt_config``; all but Linear layers are switched off.
        """
        import diffusers

        refuse_ours(self, "diffusers", ("fit_group_size", "algorithm_settings", "activation_scales"))
        if self.algorithm in PRE_SCALED and activation_cfg(self) and self.activation_scales == "dynamic":
            raise ConfigError(
                f"activation_scales=dynamic: with algorithm={self.algorithm} ModelOpt alone, as "
                "Diffusers calls it, does something else; set activation_scales=static, or quantize "
                "with quantlab"
            )
        weight, activation = self._diffusers_sides(model)
        names = exclusions_for(self, model, "diffusers")
        off = [g for g in _globs_off(self.modelopt_config) if g not in _ALWAYS_OFF]
        arguments = {f.name: getattr(self, f.name) for f in self._fields() if not f.metadata["ours"]}
        arguments["modelopt_config"] = for_diffusers(weight, activation, self._algorithm_for_diffusers(), off)
        arguments["modules_to_not_convert"] = names
        return build(diffusers.NVIDIAModelOptConfig, arguments, f"quant_type={self.quant_type}")

    def _algorithm_for_diffusers(self) -> dict[str, Any]:
        told = library_algorithm(self.algorithm, self.algorithm_settings, self.block_quantize)
        if self.algorithm == "local_hessian":
            raise ConfigError(
                "algorithm=local_hessian: Diffusers has one block_size for all layers, and ModelOpt's "
                "default for it does nothing to integers; quantize with quantlab"
            )
        return dict(told) if isinstance(told, Mapping) else {"method": told}

    def _diffusers_sides(self, model: nn.Module | None) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """What every layer's quantizers are told; ConfigError where Diffusers would say or do something else."""
        for kind in (self.weight_type, self.activation_type):
            if kind and kind not in _DIFFUSERS_TYPES:
                raise ConfigError(
                    f"quant_type={self.quant_type}: Diffusers cannot load {kind} (it sorts the keys of "
                    "its config, here numbers and words, or takes it for FP8); quantize with quantlab"
                )
        if self.fit_group_size and model is None:
            raise ConfigError(
                "fit_group_size=true: Diffusers has one block size for all layers; give the model, and "
                "it is checked that this one divides them all, or set group_size"
            )
        block = self.block_quantize or 1
        fitted = model if self.fit_group_size else None
        left = excluded_layers(self, fitted) if fitted is not None else set()
        shapes = {n: tuple(m.weight.shape) for n, m in linear_layers(fitted).items()} if fitted is not None else {}
        odd = [n for n, shape in shapes.items() if n not in left and shape[1] % block]
        if odd:
            raise ConfigError(
                f"fit_group_size=true: {some_of(odd)} would take another block than {block}, and "
                "Diffusers has one for all layers; exclude them, or set group_size"
            )
        if self.weight_type == "INT4" and self.modelopt_config is None and self.block_quantize is None:
            raise ConfigError(
                f"channel_quantize={self.channel_quantize}: ModelOpt packs 4 bits in blocks only, and "
                "Diffusers packs always; set block_quantize"
            )
        return weight_cfg(self, "", (block, block)), activation_cfg(self)

    @property
    def needs_data(self) -> bool:
        """Static activation scales, and every algorithm that looks at activations."""
        return self.algorithm not in DATA_FREE or self.activation_scales == "static"

    @property
    def activation_granularity(self) -> str:
        """One scale for all inputs of a layer's call, or one a block of the microscaled formats."""
        told = activation_cfg(self)
        return "" if told is None else granularity(told)

    def without_data(self) -> Self | None:
        """The same bits by ``max`` with dynamic activation scales; None where this config is that already."""
        pasted = with_dynamic_activations(self.modelopt_config) if self.modelopt_config is not None else None
        changes = {"algorithm": "max", "algorithm_settings": None, "activation_scales": "dynamic"}
        plain = dataclasses.replace(self, modelopt_config=pasted, **changes)  # type: ignore[arg-type]
        return None if plain == self else plain

    def disabled_layers(self, paths: Sequence[str]) -> dict[str, str]:
        """The layers that entries of ``modelopt_config`` switch off."""
        return {} if self.modelopt_config is None else switched_off(self.modelopt_config, paths)

    def spelled_out(self) -> dict[str, Any]:
        """Without the setting for convolutions, which are not quantized."""
        return {k: v for k, v in super().spelled_out().items() if k != "disable_conv_quantization"}

    # -- axes

    @classmethod
    def from_resolved(cls, axes: QuantizationAxes, settings: Mapping[str, Any] | None = None) -> Self:
        """The config for these axes and the node's own keys; ConfigError where ModelOpt does not offer them.

        ``group_size=auto`` is the library's own preset: one scale a row for int8, one for the tensor for float8_e4m3,
        128 for int4 (lowered for layers that it does not divide).
        """
        weight, group, is_weight_only = _SPELLING[axes.dtype], axes.group_size, axes.activation_dtype == "none"
        shape: dict[str, Any] = {}
        if weight not in BLOCKS:
            if group == "auto" and weight in _DEFAULT_BLOCK:
                shape = {"channel_quantize": -1, "block_quantize": _DEFAULT_BLOCK[weight], "fit_group_size": True}
            elif isinstance(group, int):
                shape = {"channel_quantize": -1, "block_quantize": group}
            elif group == "none" or weight == "INT8":
                shape = {"channel_quantize": 0}
        quant_type = weight if is_weight_only else f"{weight}_{_SPELLING[axes.activation_dtype]}"
        return cls(
            quant_type=quant_type,
            weight_only=is_weight_only,
            algorithm=axes.algorithm,
            modules_to_not_convert=axes.exclusions() or None,
            **shape,
            **dict(settings or {}),
        )

    def axes(self) -> QuantizationAxes:
        """The axes that, with the config's own settings, :meth:`from_axes` turns into this config.

        A pasted ``modelopt_config`` has axes too, which say the same of the weights. They read ``custom`` for what no
        axes say: one scale for an integer tensor, blocks along out_features.
        """
        dtype = next(d for d, spelt in _SPELLING.items() if spelt == self.weight_type)
        weight, activation = self._told()
        (_, block), activation_type = scheme(weight), self.activation_type
        group: int | str = "auto"
        if self.weight_type in BLOCKS:
            group = BLOCKS[self.weight_type][0]
        elif block is not None:
            group = "auto" if self.fit_group_size else block
        elif weight.get("axis") is not None:
            group = "none"
        elif self.weight_type != "FP8" or weight.get("block_sizes"):
            return custom_axes("modelopt", self._exclusion_axes())
        if self.modelopt_config is not None:
            width = scheme(activation)[0] if activation else None
            activation_type = next((t for t, w in WIDTHS.items() if w == width), "")
        return QuantizationAxes(
            backend="modelopt",
            dtype=dtype,
            group_size=group,
            algorithm=self.algorithm,
            activation_dtype=next((d for d, spelt in _SPELLING.items() if spelt == activation_type), "none"),
            modules_to_not_convert=self._exclusion_axes(),
        )

    def _told(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """What the quantizers of a layer are told that every block size divides."""
        if self.modelopt_config is not None:
            return sides(self.modelopt_config)
        size = self.block_quantize or (BLOCKS[self.weight_type][0] if self.weight_type in BLOCKS else 1)
        if self.block_quantize is None and self.channel_quantize is not None:
            return {"num_bits": NUM_BITS[self.weight_type], "axis": 0}, activation_cfg(self)
        return weight_cfg(self, "", (size, size)), activation_cfg(self)


def _globs_off(modelopt_config: Mapping[str, Any] | None) -> list[str]:
    """Globs of a pasted config that switch quantizers of Linear layers off, in order."""
    found = entries_of(modelopt_config) if modelopt_config is not None else []
    return [str(e["quantizer_name"]) for e in found if not e["enable"] and e["parent_class"] in (None, "nn.Linear")]


def _is_derived(config: NVIDIAModelOptConfig) -> bool:
    """Whether ``modelopt_config`` says no more than the other settings do by themselves."""
    pasted = config.modelopt_config or {}
    try:
        bare = dataclasses.replace(config, modelopt_config=None)
        return sides(pasted) == bare._told() and set(_globs_off(pasted)) <= _ALWAYS_OFF
    except ConfigError:
        return False


def _halves(quant_type: str) -> tuple[str, str]:
    """(weight, activation or "") of a ``quant_type``; ConfigError for a half that there is not."""
    weight, _, activation = quant_type.partition("_")
    halves = (weight, activation) if "_" in quant_type else (weight,)
    for i, half in enumerate(halves):
        if half == "NF4":
            raise ConfigError(
                f"quant_type={quant_type!r}: ModelOpt's NF4 is not offered (what Diffusers calls so is "
                "plain INT4); nf4 is offered by bitsandbytes and torchao"
            )
        offered = [kind for kind in NUM_BITS if not i or kind not in ("INT3", "INT2")]
        if half not in offered:
            near = nearest(half.upper(), offered) if half else ""
            raise ConfigError(f"quant_type={quant_type!r}: W or W_A is wanted, each of {', '.join(offered)}{near}")
    return weight, activation
