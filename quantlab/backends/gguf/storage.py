"""The quantized model as one GGUF file, and back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.backends.gguf.blocks import WEIGHTS_PER_SCALE, linear_class
from quantlab.backends.gguf.config import GGUFQuantizationConfig
from quantlab.backends.gguf.header import check_header
from quantlab.backends.gguf.quantize import layer_types
from quantlab.backends.linears import linear_at
from quantlab.errors import ModelError, is_of_the_machine
from quantlab.modules.compute_dtype import torch_dtype
from quantlab.modules.layers import places_of, replace_layer
from quantlab.vocabulary.dtypes import dtype_name

if TYPE_CHECKING:
    import gguf
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from quantlab.backends.gguf.blocks import GGUFLinear

_FILE = "model.gguf"
_KEY = "quantlab.tensors"
_NATIVE = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
}
"""torch dtypes that GGUF has; the others are written as bytes (I8) and restored by the file's own table."""
_MAX_DIMENSIONS = 4


def save(model: nn.Module, folder: str | Path) -> None:
    """All tensors of the model to one GGUF file, ``model.gguf``, named by their module paths.

    A quantized weight is an ordinary GGUF tensor of its type, ``<path>.weight``; the key ``quantlab.tensors`` holds as
    JSON what GGUF cannot say: compute dtypes of layers, dtypes and shapes of the other tensors.
    """
    import gguf

    Path(folder).mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(Path(folder) / _FILE, "quantlab")
    layers, plain, seen = {}, {}, set()
    for name, layer in model.named_modules():
        if isinstance(layer, linear_class()):
            layers[name] = dtype_name(layer.compute_dtype)
            writer.add_tensor(
                f"{name}.weight",
                layer.qweight.cpu().numpy(),
                raw_dtype=gguf.GGMLQuantizationType[layer.gguf_type.upper()],
            )
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


def load(model: nn.Module, layers: Sequence[str], config: GGUFQuantizationConfig, folder: str | Path) -> None:
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
    made = {
        name: _loaded(linear_at(model, name), tensors[f"{name}.weight"], dtype, f"{path}: {name}")
        for name, dtype in quantized.items()
    }
    types = layer_types(model, layers, config)
    for name in layers:
        if made[name].gguf_type != (wanted := types.get(name, config.dtype)):
            raise ModelError(
                f"{path}: {name} is stored as {made[name].gguf_type}, not {wanted}; load with the config "
                "it was quantized with"
            )
    try:
        model.load_state_dict(plain, strict=False)
    except RuntimeError as error:  # shapes differ
        if is_of_the_machine(error):
            raise
        raise ModelError(f"{path}: {error}; load it into the model that was quantized") from error
    places = places_of(model)
    for name, layer in made.items():
        replace_layer(model, name, layer, places)


def _as_array(tensor: Tensor) -> tuple[NDArray[Any], str]:
    """A contiguous CPU tensor as the array and the type name that the writer takes."""
    import torch

    kind = _NATIVE.get(dtype_name(tensor.dtype))
    if kind is None or not 1 <= tensor.ndim <= _MAX_DIMENSIONS:
        return tensor.reshape(-1).view(torch.int8).numpy(), "I8"
    if kind == "BF16":  # numpy has none: bytes, whose last dimension is twice as long
        return tensor.view(torch.uint8).numpy(), kind
    return tensor.numpy(), kind


def _as_tensor(data: NDArray[Any], dtype: str, shape: Sequence[int]) -> Tensor:
    """The inverse of :func:`_as_array`, from the reader's array; the memory is the tensor's own."""
    import numpy as np
    import torch

    flat = np.array(data).reshape(-1).view(np.uint8)
    return torch.from_numpy(flat).view(torch_dtype(dtype)).reshape(tuple(shape))


def _read(path: Path) -> tuple[dict[str, gguf.ReaderTensor], dict[str, Any]]:
    """The file's tensors by name, and quantlab's table; ModelError for a file that has none or cannot be read."""
    import gguf

    if not path.is_file():
        raise ModelError(f"{path}: there is no such file; save the quantized model there first")
    try:
        check_header(path)
        reader = gguf.GGUFReader(path)
    except (
        OSError,
        ValueError,
        IndexError,
        KeyError,
        OverflowError,
    ) as error:  # what the reader raises for a cut or foreign file
        raise ModelError(f"{path}: not a readable GGUF file ({error}); save the quantized model again") from error
    field = reader.get_field(_KEY)
    if field is None:
        raise ModelError(f"{path}: was not written by quantlab (no {_KEY}); save the quantized model again")
    return {t.name: t for t in reader.tensors}, json.loads(field.contents())


def _loaded(linear: nn.Linear, tensor: gguf.ReaderTensor, compute_dtype: str, where: str) -> GGUFLinear:
    """A quantized layer from the file's tensor; its bias is the replaced layer's, whose values are loaded with it."""
    import numpy as np
    import torch

    gguf_type = tensor.tensor_type.name.lower()
    shape = tuple(int(n) for n in reversed(tensor.shape))
    if gguf_type not in WEIGHTS_PER_SCALE or shape != tuple(linear.weight.shape):
        raise ModelError(
            f"{where} is {gguf_type} of shape {shape} in the file, and the model's has shape "
            f"{tuple(linear.weight.shape)}; load it into the model that was quantized"
        )
    codes = torch.from_numpy(np.array(tensor.data)).to(linear.weight.device)
    return linear_class()(codes, gguf_type, linear.bias, torch_dtype(compute_dtype)).train(linear.training)
