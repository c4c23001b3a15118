"""bitsandbytes: LLM.int8 (arXiv 2208.07339) and 4-bit nf4 / fp4 blocks (QLoRA, arXiv 2305.14314).

Stored bytes of a layer with n weights and o rows, blocks of b: 4 bit ``ceil(n/2) + 4 ceil(n/b) + 64``; with double
quantization ``ceil(n/2) + ceil(n/b) + 4 ceil(ceil(n/b)/256) + 64 + 1024 + 4``; int8 ``n + 4 o``.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from quantlab.backends.exclusions import build, exclusions_for, refuse_ours
from quantlab.errors import ConfigError, ModelError, NotQuantized, nearest, require_package
from quantlab.modules.layers import replace_layer
from quantlab.vocabulary.axes import QuantizationAxes, resolve_axes
from quantlab.vocabulary.dtypes import COMPUTE_DTYPES, dtype_name
from quantlab.vocabulary.native import (
    EXCLUSION_RULES,
    QuantizationConfigMixin,
    QuantizationMethod,
    quantization_config,
    setting,
)
from quantlab.vocabulary.reports import StoredWeight

_FILE = "model.safetensors"
_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_LIBRARY_BLOCKSIZE = 64
_STORAGES = ("uint8", "int8", "float16", "bfloat16", "float32", "float64")
_NONE_MEANS_DEFAULT = ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage")
_FLAGS = ("load_in_8bit", "load_in_4bit")


@quantization_config
class BitsAndBytesConfig(QuantizationConfigMixin):
    """Diffusers' and transformers' ``BitsAndBytesConfig``, and the block size that theirs cannot say."""

    quant_method: ClassVar[QuantizationMethod] = QuantizationMethod.BITS_AND_BYTES
    _exclude_attributes_at_init: ClassVar[tuple[str, ...]] = ("_load_in_4bit", "_load_in_8bit", "quant_method")
    _exclusions_field: ClassVar[str] = "llm_int8_skip_modules"

    load_in_8bit: bool = setting("bool", False)
    load_in_4bit: bool = setting("bool", False)
    llm_int8_threshold: float = setting("float", 6.0, node=True)
    """Input columns with a value of at least this magnitude are multiplied unrounded; 0: none. A rule that the inputs
    of each call decide, not a calibration."""
    llm_int8_skip_modules: tuple[str, ...] | None = setting("names", None)
    llm_int8_enable_fp32_cpu_offload: bool = setting("bool", False)
    """Only lets Diffusers' device map leave layers on the CPU; no influence here."""
    llm_int8_has_fp16_weight: bool = setting("bool", False)
    bnb_4bit_compute_dtype: str = setting("dtype", "float32", choices=COMPUTE_DTYPES)
    bnb_4bit_quant_type: str = setting("str", "fp4", choices=("fp4", "nf4"))
    bnb_4bit_use_double_quant: bool = setting("bool", False, node=True)
    """Also quantize the scales, to 8 bits in blocks of 256."""
    bnb_4bit_quant_storage: str = setting("dtype", "uint8", choices=_STORAGES, node=True)
    bnb_4bit_blocksize: int | None = setting("int", None, choices=_BLOCKSIZES, ours=True)
    """Weights that share a scale; None: the library's 64."""
    exclusion_rule: str = setting("str", "quantlab", choices=EXCLUSION_RULES, ours=True)

    @property
    def modules_to_not_convert(self) -> tuple[str, ...] | None:
        """The other backends' name of ``llm_int8_skip_modules``; also accepted by the constructor."""
        return self.llm_int8_skip_modules

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

    def to_dict(self) -> dict[str, Any]:
        """As Diffusers writes it: each load flag under both of its spellings."""
        return {**super().to_dict(), **{f"_{flag}": getattr(self, flag) for flag in _FLAGS}}

    @classmethod
    def from_axes(cls, axes: QuantizationAxes, settings: Mapping[str, Any] | None = None) -> Self:
        """``compute_dtype=auto`` is stored as the library's float32; ConfigError for what has no effect or meaning."""
        axes = resolve_axes(axes)
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
        return resolve_axes(
            QuantizationAxes(
                backend="bitsandbytes",
                dtype=self.dtype,
                group_size=self.bnb_4bit_blocksize or "auto",
                compute_dtype="auto" if is_default else self.bnb_4bit_compute_dtype,
                modules_to_not_convert=self._exclusion_axes(),
            )
        )

    def to_diffusers(self, model: Any = None) -> Any:
        """``diffusers.BitsAndBytesConfig``; a block size other than the library's 64 is refused."""
        import diffusers

        return self._to_library(diffusers.BitsAndBytesConfig, "diffusers", model)

    def to_transformers(self, model: Any = None) -> Any:
        """``transformers.BitsAndBytesConfig``; a block size other than the library's 64 is refused."""
        import transformers

        return self._to_library(transformers.BitsAndBytesConfig, "transformers", model)

    def _to_library(self, make: Any, library: str, model: Any) -> Any:
        refuse_ours(self, library, ("bnb_4bit_blocksize",) if self.bnb_4bit_blocksize == _LIBRARY_BLOCKSIZE else ())
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


Config: type[QuantizationConfigMixin] = BitsAndBytesConfig


def resolve(config: BitsAndBytesConfig, device: str, compute_dtype: str = "float32") -> BitsAndBytesConfig:
    """The config itself: nothing in it depends on the device."""
    return config


def quantize(model: Any, layers: Sequence[str], config: BitsAndBytesConfig, compute_dtype: Any = None) -> None:
    """Replace each named ``nn.Linear`` by its quantized form, in place, on its device.

    ``compute_dtype`` (a name or a torch dtype; None: the config's) is what the matrix products run in; outputs have
    the inputs' dtype. Raises ModelError for weights that are not finite (int8: or exceed float16), ConfigError where
    the storage dtype does not fit a layer's size.
    """
    require_package("bitsandbytes", "backend=bitsandbytes", "bitsandbytes")
    if config.llm_int8_has_fp16_weight:
        raise ConfigError("llm_int8_has_fp16_weight=True: the weights would stay in float16; leave it out")
    compute = _torch_dtype(compute_dtype or config.bnb_4bit_compute_dtype)
    for name in layers:
        linear = model.get_submodule(name)
        build = _quantized_8bit if config.load_in_8bit else _quantized_4bit
        replace_layer(model, name, build(name, linear, config, compute).train(linear.training))


def read_back(layer: Any) -> StoredWeight:
    """What the layer's codes and scales show. Raises NotQuantized where they do not belong together."""
    import torch

    bnb = _library()
    if isinstance(layer, bnb.nn.Linear8bitLt):
        codes = layer.weight.data
        scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
        if codes.dtype != torch.int8 or scales is None or scales.numel() != codes.shape[0]:
            raise NotQuantized(
                f"an int8 layer of shape {tuple(codes.shape)} holds {codes.dtype} and "
                f"{0 if scales is None else scales.numel()} row scales; quantize it again"
            )
        return StoredWeight(
            dtype="int8",
            group_size=None,
            dense=codes.float() * (scales[:, None] / 127.0),
            activation_dtype="int8",
            note=_outlier_rule(layer.state.threshold),
        )
    if not isinstance(layer, bnb.nn.Linear4bit) or getattr(layer.weight, "quant_state", None) is None:
        raise NotQuantized(f"{type(layer).__name__} holds no bitsandbytes weight; quantize it first")
    state = layer.weight.quant_state
    num_blocks = math.ceil(math.prod(state.shape) / state.blocksize)
    num_nested = None if state.state2 is None else state.state2.absmax.numel()
    if state.absmax.numel() != num_blocks or num_nested not in (None, math.ceil(num_blocks / 256)):
        raise NotQuantized(
            f"a {state.quant_type} layer of shape {tuple(state.shape)} in blocks of {state.blocksize} "
            f"needs {num_blocks} scales and holds {state.absmax.numel()}; quantize it again"
        )
    dense = _dense_4bit(layer.weight, layer.compute_dtype or state.dtype).float()
    return StoredWeight(dtype=state.quant_type, group_size=state.blocksize, dense=dense)


def _outlier_rule(threshold: float) -> str:
    """LLM.int8's threshold in words: no calibration, the inputs of each call decide; "" where it is off."""
    if not threshold:
        return ""
    return f"at each call, input columns with a value of {threshold:g} or more are multiplied unrounded"


def save(model: Any, folder: str | Path) -> None:
    """All tensors of the model to ``model.safetensors``, under the names that Diffusers and transformers use."""
    from safetensors.torch import save_file

    bnb = _library()
    layers: dict[str, dict[str, Any]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            threshold = layer.state.threshold if isinstance(layer, bnb.nn.Linear8bitLt) else None
            layers[name] = {"compute_dtype": dtype_name(layer.compute_dtype), "threshold": threshold}
    tensors: dict[str, Any] = {}
    seen = set()
    for name, tensor in model.state_dict().items():
        key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        if tensor.numel() and key in seen:  # a tied tensor is written once
            continue
        seen.add(key)
        tensors[name] = tensor.detach().cpu().contiguous()
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(folder) / _FILE, metadata={"format": "pt", "quantlab": json.dumps({"layers": layers})})


def load(model: Any, layers: Sequence[str], config: BitsAndBytesConfig, folder: str | Path) -> None:
    """What :func:`save` wrote into a fresh, unquantized copy of the model, in place; outputs are bit-equal.

    Compute dtypes and thresholds are the file's. Raises ModelError where the file differs from the model or the config.
    """
    from safetensors import safe_open

    path = Path(folder) / _FILE
    if not path.is_file():
        raise ModelError(f"{path}: there is no such file; save the quantized model there first")
    with safe_open(path, framework="pt") as file:
        stored = json.loads((file.metadata() or {}).get("quantlab", '{"layers": {}}'))["layers"]
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
    if unknown := [name for name in layers if name not in stored]:
        raise ModelError(f"{path}: {unknown[0]} is not quantized in this file; quantize the model again")
    parts: dict[str, dict[str, Any]] = {name: {} for name in stored}
    plain = {}
    for key, tensor in tensors.items():
        owner = _owner(key, parts)
        if owner is None:
            plain[key] = tensor
        else:
            parts[owner][key[len(owner) + 1 :]] = tensor
    made = {
        name: _loaded(model.get_submodule(name), own, stored[name], f"{path}: {name}") for name, own in parts.items()
    }
    for name in layers:
        _check_format(made[name], config, f"{path}: {name}")
    _load_plain(model, plain, parts, path)
    for name, layer in made.items():
        replace_layer(model, name, layer.train(model.get_submodule(name).training))


# -- building the layers


def _library() -> Any:
    import bitsandbytes

    return bitsandbytes


def _torch_dtype(name: Any) -> Any:
    import torch

    return getattr(torch, dtype_name(name))


def _finite_weight(name: str, linear: Any, dtype: Any) -> Any:
    """The layer's weight in ``dtype``; ModelError where a value is not finite in it."""
    import torch

    weight = linear.weight.detach().to(dtype).contiguous()
    if not bool(torch.isfinite(weight).all()):
        is_range = bool(torch.isfinite(linear.weight).all())
        why = "weights beyond 65504, float16's largest, in which LLM.int8 works" if is_range else "NaN or infinities"
        raise ModelError(f"{name}.weight: holds {why}; exclude the layer with modules_to_not_convert")
    return weight


def _quantized_4bit(name: str, linear: Any, config: BitsAndBytesConfig, compute: Any) -> Any:
    import torch

    bnb = _library()
    supported = (torch.float32, torch.float16, torch.bfloat16)
    weight = _finite_weight(name, linear, linear.weight.dtype if linear.weight.dtype in supported else torch.float32)
    storage = _torch_dtype(config.bnb_4bit_quant_storage)
    num_bytes = math.ceil(weight.numel() / 2)
    if num_bytes % storage.itemsize:
        shape = tuple(weight.shape)
        raise ConfigError(
            f"bnb_4bit_quant_storage={config.bnb_4bit_quant_storage}: {name} of shape {shape} takes "
            f"{num_bytes} bytes, no multiple of {storage.itemsize}; use uint8"
        )
    codes, state = bnb.functional.quantize_4bit(
        weight,
        blocksize=config.bnb_4bit_blocksize or _LIBRARY_BLOCKSIZE,
        quant_type=config.bnb_4bit_quant_type,
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_storage=storage,
    )
    return _layer_classes()["QuantizedLinear4bit"](codes, state, linear.bias, compute)


def _quantized_8bit(name: str, linear: Any, config: BitsAndBytesConfig, compute: Any) -> Any:
    import torch

    bnb = _library()
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(_finite_weight(name, linear, torch.float16))
    return _layer_classes()["QuantizedLinear8bit"](codes, scales, linear.bias, config.llm_int8_threshold, compute)


def _loaded(linear: Any, own: dict[str, Any], stored: dict[str, Any], where: str) -> Any:
    """One quantized layer from its tensors; ``own`` has the layer's keys without its name."""
    import torch

    bnb = _library()
    device, compute = linear.weight.device, _torch_dtype(stored["compute_dtype"])
    bias = torch.nn.Parameter(own["bias"].to(device), requires_grad=False) if "bias" in own else None
    if "SCB" in own:
        shape = tuple(own["weight"].shape)
        args = (own["weight"].to(device), own["SCB"].to(device), bias, stored["threshold"], compute)
        layer = _layer_classes()["QuantizedLinear8bit"](*args)
    else:
        stats = {k.removeprefix("weight."): v for k, v in own.items() if k.startswith("weight.")}
        state = bnb.functional.QuantState.from_dict(stats, device=device)
        shape = tuple(state.shape)
        layer = _layer_classes()["QuantizedLinear4bit"](own["weight"].to(device), state, bias, compute)
    if shape != tuple(linear.weight.shape):
        raise ModelError(
            f"{where} has shape {shape} in the file and {tuple(linear.weight.shape)} in the model; "
            "load it into the model that was quantized"
        )
    return layer


def _check_format(layer: Any, config: BitsAndBytesConfig, where: str) -> None:
    """ModelError where a loaded layer is another format than the config's."""
    state = getattr(layer.weight, "quant_state", None)
    has_nested = None if state is None else state.nested
    found = ("int8", None, None) if state is None else (state.quant_type, state.blocksize, has_nested)
    asked = (
        ("int8", None, None)
        if config.load_in_8bit
        else (config.dtype, config.bnb_4bit_blocksize or _LIBRARY_BLOCKSIZE, config.bnb_4bit_use_double_quant)
    )
    if found != asked:
        raise ModelError(
            f"{where} is stored as (format, block size, double quantization) {found}, not {asked}; load "
            "with the config it was quantized with"
        )


def _owner(key: str, names: Mapping[str, Any]) -> str | None:
    """The quantized layer that the state-dict key belongs to."""
    while key:
        key = key.rpartition(".")[0]
        if key in names:
            return key
    return None


def _load_plain(model: Any, plain: Mapping[str, Any], quantized: Mapping[str, Any], path: Path) -> None:
    """The tensors that are not quantized; each of the model must come from the file, itself or by its tied twin."""
    own = model.state_dict()
    if unknown := [k for k in plain if k not in own] + [k for k in quantized if f"{k}.weight" not in own]:
        raise ModelError(f"{path}: the model has no {unknown[0]}; load it into the model that was quantized")
    written = {own[k].data_ptr() for k in plain}
    missing = [k for k in own if k not in plain and _owner(k, quantized) is None and own[k].data_ptr() not in written]
    if missing:
        raise ModelError(f"{path}: the file has no {missing[0]}; load it into the model that was quantized")
    try:
        model.load_state_dict(dict(plain), strict=False)
    except RuntimeError as error:  # shapes differ
        raise ModelError(f"{path}: {error}; load it into the model that was quantized") from error


# -- what the layers compute


def _dense_4bit(weight: Any, dtype: Any) -> Any:
    """The dequantized weight, (out_features, in_features), in ``dtype``."""
    import torch

    bnb = _library()
    state = weight.quant_state
    absmax = state.absmax
    if state.state2 is not None:
        absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    is_compiled = state.shape[-1] % 2 or state.blocksize >= 2048
    if weight.device.type != "cpu" or not is_compiled:
        return torch.ops.bitsandbytes.dequantize_4bit.default(
            weight.data, absmax, state.blocksize, state.quant_type, state.shape, dtype
        )
    # The library would compile C++ here at the first call of each shape; the same arithmetic without a compiler:
    codes, num = weight.data.reshape(-1).view(torch.uint8), math.prod(state.shape)
    values = state.code[torch.stack((codes >> 4, codes & 15), dim=-1).reshape(-1)[:num].int()]
    return (values * absmax.repeat_interleave(state.blocksize)[:num]).to(dtype).reshape(state.shape)


def _is_wanted(record: logging.LogRecord) -> bool:
    """The library logs its cast to float16 at every int8 product."""
    return "inputs will be cast from" not in record.getMessage()


@functools.cache
def _layer_classes() -> dict[str, Any]:
    """The two layers, made at first use because their bases need torch."""
    import torch

    bnb = _library()
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_wanted)

    class QuantizedLinear4bit(bnb.nn.Linear4bit):  # type: ignore[misc, name-defined]
        """Linear4bit that never repacks its weight, takes every shape, and leaves its bias as it is."""

        def __init__(self, codes: Any, state: Any, bias: Any, compute_dtype: Any) -> None:
            out_features, in_features = state.shape
            super().__init__(
                in_features,
                out_features,
                bias is not None,
                compute_dtype,
                state.nested,
                state.quant_type,
                codes.dtype,
                device="meta",
            )
            # On CPUs with AVX512-BF16 the library's forward would repack codes and scales in place, lossily.
            self.support_avx512bf16_for_cpu = False
            self.weight = bnb.nn.Params4bit(
                codes,
                quant_state=state,
                blocksize=state.blocksize,
                compress_statistics=state.nested,
                quant_type=state.quant_type,
                quant_storage=codes.dtype,
                bnb_quantized=True,
            )
            self.bias = bias

        def forward(self, x: Any) -> Any:
            """x (..., in_features) -> (..., out_features), in x's dtype."""
            inputs = x.to(self.compute_dtype)
            bias = None if self.bias is None else self.bias.to(self.compute_dtype)
            if x.device.type == "cpu":
                dense = _dense_4bit(self.weight, self.compute_dtype)
                return torch.nn.functional.linear(inputs, dense, bias).to(x.dtype)
            return bnb.matmul_4bit(inputs, self.weight, bias=bias, quant_state=self.weight.quant_state).to(x.dtype)

    class QuantizedLinear8bit(bnb.nn.Linear8bitLt):  # type: ignore[misc, name-defined]
        """Linear8bitLt for inputs of any rank, the same in train and eval mode, that leaves its bias as it is."""

        def __init__(self, codes: Any, scales: Any, bias: Any, threshold: float, compute_dtype: Any) -> None:
            out_features, in_features = codes.shape
            super().__init__(
                in_features, out_features, bias is not None, has_fp16_weights=False, threshold=threshold, device="meta"
            )
            self.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
            self.init_8bit_state()
            self.state.is_training = False  # the library's train mode would not round the inputs
            self.bias = bias
            self.compute_dtype = compute_dtype

        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            super()._apply(fn, recurse)
            self.state.CB, self.state.SCB = self.weight.data, self.state.SCB.to(self.weight.device)
            return self

        def forward(self, x: Any) -> Any:
            """x (..., in_features) -> (..., out_features), in x's dtype."""
            inputs = x.to(self.compute_dtype).reshape(-1, x.shape[-1])
            bias = None if self.bias is None else self.bias.to(self.compute_dtype)
            state = self.state
            if self.in_features == 1:  # torch._int_mm returns unset memory on CPUs then: a column of zeros beside it
                inputs, state = torch.nn.functional.pad(inputs, (0, 1)), copy.copy(state)
                state.CB = torch.nn.functional.pad(state.CB, (0, 1))
            out = bnb.matmul(inputs, self.weight, bias=bias, state=state)
            return out.reshape(*x.shape[:-1], self.out_features).to(x.dtype)

    classes: dict[str, Any] = {c.__name__: c for c in (QuantizedLinear4bit, QuantizedLinear8bit)}
    for name, made in classes.items():
        made.__qualname__ = name  # found by pickle through __getattr__ below
    return classes


def __getattr__(name: str) -> Any:
    if name in ("QuantizedLinear4bit", "QuantizedLinear8bit"):
        return _layer_classes()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
