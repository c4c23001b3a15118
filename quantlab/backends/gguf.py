"""GGUF: ggml's block formats, written by libgguf (byte for byte what ggml writes) and read by every GGUF reader.

Stored bytes of a layer are exactly ``n / block * bytes_per_block`` for n weights (``gguf.GGML_QUANT_SIZES``). Layers
dequantize at every forward: the format saves memory, not time.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Self

from quantlab.axes import QuantizationAxes, resolve_axes
from quantlab.capabilities import CAPABILITIES
from quantlab.config import EXCLUSION_RULES, QuantizationConfigMixin, QuantizationMethod, quantization_config, setting
from quantlab.dtypes import COMPUTE_DTYPES, dtype_name
from quantlab.errors import ConfigError, ModelError, NotQuantized, nearest, require_package
from quantlab.interop import build, exclusions_for
from quantlab.layers import replace_layer, resolve_exclusions
from quantlab.reports import StoredWeight

_FILE = "model.gguf"
_KEY = "quantlab.tensors"
_WEIGHTS_PER_SCALE = {
    "q8_0": 32, "q5_0": 32, "q5_1": 32, "q4_0": 32, "q4_1": 32, "iq4_nl": 32,
    "q6_k": 16, "q5_k": 32, "q4_k": 32, "q3_k": 16, "q2_k": 16, "iq4_xs": 32,
}
"""The block that has a scale of its own; in the 256-weight superblocks these scales are themselves 4 to 8 bits."""
_NATIVE = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
           "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8"}
"""torch dtypes that GGUF has; the others are written as bytes (I8) and restored by the file's own table."""
_MAX_DIMENSIONS = 4


@quantization_config
class GGUFQuantizationConfig(QuantizationConfigMixin):
    """Diffusers' ``GGUFQuantizationConfig``, and the type to write, which theirs cannot say (it only loads)."""

    quant_method: ClassVar[QuantizationMethod] = QuantizationMethod.GGUF

    compute_dtype: str = setting("dtype", "float32", choices=COMPUTE_DTYPES)
    modules_to_not_convert: tuple[str, ...] | None = setting("names", None)
    gguf_type: str | None = setting("str", None, choices=tuple(CAPABILITIES["gguf"]), ours=True)
    """The block format to write, also accepted in ggml's upper case; None: the first of the backend, q8_0."""
    tensor_types: Mapping[str, str] | None = setting("mapping", None, ours=True, node=True)
    """Entry of the matcher (module path, glob, ``re:`` expression) -> block format; the first that matches counts."""
    exclusion_rule: str = setting("str", "quantlab", choices=EXCLUSION_RULES, ours=True)

    @property
    def dtype(self) -> str:
        """quantlab's name of the format."""
        return self.gguf_type or next(iter(CAPABILITIES["gguf"]))

    @classmethod
    def from_axes(cls, axes: QuantizationAxes, settings: Mapping[str, Any] | None = None) -> Self:
        """``compute_dtype=auto`` is stored as Diffusers' float32; ``tensor_types`` is the only setting."""
        own = dict(settings or {})
        for key in own:
            if key != "tensor_types":
                raise ConfigError(f"quantization.{key}: gguf has no such setting{nearest(key, ['tensor_types'])} "
                                  "(it has tensor_types)")
        axes = resolve_axes(axes)
        if axes.compute_dtype != "auto":
            own["compute_dtype"] = axes.compute_dtype
        return cls(gguf_type=axes.dtype, modules_to_not_convert=axes.exclusions() or None, **own)

    def axes(self) -> QuantizationAxes:
        """The axes that :meth:`from_axes` turns into this config."""
        return resolve_axes(QuantizationAxes(
            backend="gguf", dtype=self.dtype, compute_dtype=self.compute_dtype,
            modules_to_not_convert=self._exclusion_axes(),
        ))

    def post_init(self) -> None:
        """Types of ``tensor_types`` in quantlab's lower case; an empty mapping is none."""
        given = dict(self.tensor_types or {})
        formats = tuple(CAPABILITIES["gguf"])
        for entry, kind in given.items():
            if not isinstance(kind, str) or kind.lower() not in formats:
                raise ConfigError(f"tensor_types={entry}: {kind!r} is none of {', '.join(formats)}"
                                  f"{nearest(str(kind), formats)}")
        lowered = {entry: kind.lower() for entry, kind in given.items()}
        object.__setattr__(self, "tensor_types", lowered or None)

    def layer_dtypes(self, paths: Sequence[str]) -> dict[str, str]:
        """The layers that ``tensor_types`` names; ConfigError for an entry that matches none of ``paths``."""
        entries = tuple(self.tensor_types or {})
        found = resolve_exclusions(paths, entries, key="tensor_types") if entries else {}
        return {path: dict(self.tensor_types or {})[entry] for path, entry in found.items()}

    def to_diffusers(self, model: Any = None) -> Any:
        """``diffusers.GGUFQuantizationConfig``, which only loads: the types are the file's, so ours are refused."""
        import diffusers
        import torch

        if types := {k: v for k, v in self.extra_settings().items() if k != "exclusion_rule"}:
            raise ConfigError(f"{', '.join(f'{k}={v!r}' for k, v in types.items())}: Diffusers only loads GGUF files "
                              "and takes the types from the file; leave it out to load one")
        arguments = {"compute_dtype": getattr(torch, self.compute_dtype)}
        made = build(diffusers.GGUFQuantizationConfig, arguments, "to_diffusers")
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


Config: type[QuantizationConfigMixin] = GGUFQuantizationConfig


def resolve(config: GGUFQuantizationConfig, device: str, compute_dtype: str = "float32") -> GGUFQuantizationConfig:
    """The config with its type named; nothing depends on the device."""
    return GGUFQuantizationConfig.from_dict({**config.to_dict(), "gguf_type": config.dtype})


def quantize(model: Any, layers: Sequence[str], config: GGUFQuantizationConfig, compute_dtype: Any = None) -> None:
    """Replace each named ``nn.Linear`` by a :class:`GGUFLinear`, in place, on its device; codes are made on the CPU.

    ``compute_dtype`` (a name or a torch dtype; None: the config's) is what the matrix products run in; outputs have
    the inputs' dtype. Raises ConfigError for a layer whose rows do not divide into blocks, ModelError for weights that
    are not finite or too large for the format's float16 scales.
    """
    require_package("libgguf", "backend=gguf", "gguf")
    compute = _torch_dtype(compute_dtype or config.compute_dtype)
    types = config.layer_dtypes(list(layers))
    for name in layers:
        linear, kind = model.get_submodule(name), types.get(name, config.dtype)
        codes = _encode(name, linear.weight.detach(), kind)
        made = _linear_class()(codes, kind, linear.bias, compute)
        replace_layer(model, name, made.train(linear.training))


def read_back(layer: Any) -> StoredWeight:
    """What the layer's bytes show. Raises NotQuantized where they are not whole blocks of the layer's type."""
    if not isinstance(layer, _linear_class()):
        raise NotQuantized(f"{type(layer).__name__} holds no GGUF weight; quantize it first")
    block, num_bytes = _block(layer.gguf_type)
    rows, row_bytes = layer.qweight.shape
    if (rows, row_bytes) != (layer.out_features, layer.in_features // block * num_bytes):
        raise NotQuantized(f"{rows} rows of {row_bytes} bytes are not {layer.out_features} x {layer.in_features} "
                           f"weights of {layer.gguf_type}; quantize the layer again")
    dense = layer.dequantize().to(layer.compute_dtype).float()
    return StoredWeight(dtype=layer.gguf_type, group_size=_WEIGHTS_PER_SCALE[layer.gguf_type], dense=dense)


def save(model: Any, folder: str | Path) -> None:
    """All tensors of the model to one GGUF file, ``model.gguf``, named by their module paths.

    A quantized weight is an ordinary GGUF tensor of its type, ``<path>.weight``; the key ``quantlab.tensors`` holds as
    JSON what GGUF cannot say: compute dtypes of layers, dtypes and shapes of the other tensors.
    """
    import gguf

    Path(folder).mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(Path(folder) / _FILE, "quantlab")
    layers, plain, seen = {}, {}, set()
    for name, layer in model.named_modules():
        if isinstance(layer, _linear_class()):
            layers[name] = dtype_name(layer.compute_dtype)
            writer.add_tensor(f"{name}.weight", layer.qweight.cpu().numpy(),
                              raw_dtype=gguf.GGMLQuantizationType[layer.gguf_type.upper()])
    for name, tensor in model.state_dict().items():
        key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        if name.removesuffix(".qweight") in layers or (tensor.numel() and key in seen):  # a tied tensor is written once
            continue
        seen.add(key)
        plain[name] = [dtype_name(tensor.dtype), list(tensor.shape)]
        array, kind = _as_array(tensor.detach().cpu().contiguous())
        writer.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.add_string(_KEY, json.dumps({"layers": layers, "plain": plain}))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(model: Any, layers: Sequence[str], config: GGUFQuantizationConfig, folder: str | Path) -> None:
    """What :func:`save` wrote into a fresh, unquantized copy of the model, in place; outputs are bit-equal.

    Compute dtypes are the file's. Raises ModelError where the file differs from the model or the config.
    """
    path = Path(folder) / _FILE
    tensors, table = _read(path)
    quantized = table["layers"]
    if unknown := [name for name in layers if name not in quantized]:
        raise ModelError(f"{path}: {unknown[0]} is not quantized in this file; quantize the model again")
    plain = {name: _as_tensor(tensors[name].data, *entry) for name, entry in table["plain"].items()}
    own = model.state_dict()
    weights = [f"{name}.weight" for name in quantized]
    if missing := [k for k in (*plain, *weights) if k not in own]:
        raise ModelError(f"{path}: the model has no {missing[0]}; load it into the model that was quantized")
    known, written = {*plain, *weights}, {own[k].data_ptr() for k in plain}
    if missing := [k for k in own if k not in known and own[k].data_ptr() not in written]:
        raise ModelError(f"{path}: the file has no {missing[0]}; load it into the model that was quantized")
    made = {name: _loaded(model.get_submodule(name), tensors[f"{name}.weight"], dtype, f"{path}: {name}")
            for name, dtype in quantized.items()}
    types = config.layer_dtypes(list(layers))
    for name in layers:
        if made[name].gguf_type != (wanted := types.get(name, config.dtype)):
            raise ModelError(f"{path}: {name} is stored as {made[name].gguf_type}, not {wanted}; load with the config "
                             "it was quantized with")
    try:
        model.load_state_dict(plain, strict=False)
    except RuntimeError as error:  # shapes differ
        raise ModelError(f"{path}: {error}; load it into the model that was quantized") from error
    for name, layer in made.items():
        replace_layer(model, name, layer)


# -- blocks


def _torch_dtype(name: Any) -> Any:
    import torch

    return getattr(torch, dtype_name(name))


def _block(gguf_type: str) -> tuple[int, int]:
    """(weights, bytes) of one block."""
    import gguf

    sizes: tuple[int, int] = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[gguf_type.upper()]]
    return sizes


def _encode(name: str, weight: Any, gguf_type: str) -> Any:
    """A weight (out_features, in_features) as blocks: uint8 tensor (out_features, bytes of a row), on its device."""
    import libgguf
    import numpy as np
    import torch

    block, _ = _block(gguf_type)
    if weight.shape[1] % block:
        raise ConfigError(f"dtype={gguf_type}: {name} of shape {tuple(weight.shape)}: in_features {weight.shape[1]} "
                          f"does not divide by {block}; exclude it with modules_to_not_convert or choose another dtype")
    dense = weight.float().cpu()
    if not bool(torch.isfinite(dense).all()):
        raise ModelError(f"{name}.weight: holds NaN or infinities; exclude the layer with modules_to_not_convert")
    kind = libgguf.GGMLQuantizationType[gguf_type.upper()]
    chunks = np.array_split(dense.numpy(), max(1, min(torch.get_num_threads(), len(dense))))  # rows are independent
    with ThreadPoolExecutor(len(chunks)) as pool:
        codes = np.concatenate(list(pool.map(lambda rows: libgguf.quantize_rows(rows, kind), chunks)))
    if float(dense.abs().max()) > 65504 and not np.isfinite(libgguf.dequantize_rows(codes, kind)).all():
        raise ModelError(f"{name}.weight: holds weights too large for the float16 scales of {gguf_type}; "
                         "exclude the layer with modules_to_not_convert")
    return torch.from_numpy(codes).to(weight.device)


def _decode(codes: Any, gguf_type: str) -> Any:
    """Blocks (out_features, bytes of a row) -> fp32 weight (out_features, in_features): the same values everywhere."""
    import torch

    if codes.device.type == "cpu":
        import libgguf

        kind = libgguf.GGMLQuantizationType[gguf_type.upper()]
        return torch.from_numpy(libgguf.dequantize_rows(codes.numpy(), kind))
    from libgguf import libgguf_torch  # torch operations; exact when the scales are taken in fp32

    block, num_bytes = _block(gguf_type)
    shape = (codes.shape[0], codes.shape[1] // num_bytes * block)
    kind = libgguf_torch.GGMLQuantizationType[gguf_type.upper()]
    return libgguf_torch.dequantize(codes, kind, shape, dtype=torch.float32)


# -- the file


def _as_array(tensor: Any) -> tuple[Any, str]:
    """A contiguous CPU tensor as the array and the type name that the writer takes."""
    import torch

    kind = _NATIVE.get(dtype_name(tensor.dtype))
    if kind is None or not 1 <= tensor.ndim <= _MAX_DIMENSIONS:
        return tensor.reshape(-1).view(torch.int8).numpy(), "I8"
    if kind == "BF16":  # numpy has none: bytes, whose last dimension is twice as long
        return tensor.view(torch.uint8).numpy(), kind
    return tensor.numpy(), kind


def _as_tensor(data: Any, dtype: str, shape: Sequence[int]) -> Any:
    """The inverse of :func:`_as_array`, from the reader's array; the memory is the tensor's own."""
    import numpy as np
    import torch

    flat = np.array(data).reshape(-1).view(np.uint8)
    return torch.from_numpy(flat).view(_torch_dtype(dtype)).reshape(tuple(shape))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The file's tensors by name, and quantlab's table; ModelError for a file that has none or cannot be read."""
    import gguf

    if not path.is_file():
        raise ModelError(f"{path}: there is no such file; save the quantized model there first")
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:  # what the reader raises for a cut or foreign file
        raise ModelError(f"{path}: not a readable GGUF file ({error}); save the quantized model again") from error
    field = reader.get_field(_KEY)
    if field is None:
        raise ModelError(f"{path}: was not written by quantlab (no {_KEY}); save the quantized model again")
    return {t.name: t for t in reader.tensors}, json.loads(field.contents())


def _loaded(linear: Any, tensor: Any, compute_dtype: str, where: str) -> Any:
    """A quantized layer from the file's tensor; its bias is the replaced layer's, whose values are loaded with it."""
    import numpy as np
    import torch

    gguf_type = tensor.tensor_type.name.lower()
    shape = tuple(int(n) for n in reversed(tensor.shape))
    if gguf_type not in _WEIGHTS_PER_SCALE or shape != tuple(linear.weight.shape):
        raise ModelError(f"{where} is {gguf_type} of shape {shape} in the file, and the model's has shape "
                         f"{tuple(linear.weight.shape)}; load it into the model that was quantized")
    codes = torch.from_numpy(np.array(tensor.data)).to(linear.weight.device)
    return _linear_class()(codes, gguf_type, linear.bias, _torch_dtype(compute_dtype)).train(linear.training)


# -- the layer


@functools.cache
def _linear_class() -> Any:
    """The layer's class, made at first use because its base needs torch."""
    import torch

    class GGUFLinear(torch.nn.Module):
        """A Linear whose weight is kept as ggml blocks: ``qweight``, uint8 (out_features, bytes of a row)."""

        def __init__(self, codes: Any, gguf_type: str, bias: Any, compute_dtype: Any) -> None:
            super().__init__()
            block, num_bytes = _block(gguf_type)
            self.gguf_type = gguf_type
            self.compute_dtype = compute_dtype
            self.out_features = codes.shape[0]
            self.in_features = codes.shape[1] // num_bytes * block
            self.register_buffer("qweight", codes)
            self.bias = bias

        def dequantize(self) -> Any:
            """The weight, fp32 (out_features, in_features)."""
            return _decode(self.qweight, self.gguf_type)

        def forward(self, x: Any) -> Any:
            """x (..., in_features) -> (..., out_features), in x's dtype."""
            weight = self.dequantize().to(self.compute_dtype)
            bias = None if self.bias is None else self.bias.to(self.compute_dtype)
            return torch.nn.functional.linear(x.to(self.compute_dtype), weight, bias).to(x.dtype)

        def extra_repr(self) -> str:
            return f"in_features={self.in_features}, out_features={self.out_features}, {self.gguf_type}"

    GGUFLinear.__qualname__ = "GGUFLinear"  # found by pickle through __getattr__ below
    return GGUFLinear


def __getattr__(name: str) -> Any:
    if name == "GGUFLinear":
        return _linear_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
