"""A language model's GGUF file, whoever wrote it, into a module of transformers: blocks stay as they are in the file.

transformers itself reads such a file into dense weights, of which no bytes and no formats can be read back.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.backends.gguf.blocks import WEIGHTS_PER_SCALE, linear_class
from quantlab.backends.gguf.llama import write_keys
from quantlab.backends.gguf.names import UNUSED, Architecture, architecture_of, file_names, from_file
from quantlab.errors import ConfigError, ModelError
from quantlab.modules.compute_dtype import torch_dtype
from quantlab.modules.holders import REPLACE, TURN, Holder, holders
from quantlab.modules.layers import replace_layer
from quantlab.modules.packed import pack, read_by, share, stored_at, turn

if TYPE_CHECKING:
    import gguf
    from torch import Tensor, nn

_DENSE = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_NOT_ITS = "name the model that it was made from (model.path=...), or another file"
_HEADS = ("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length")
"""Keys that say how the rows of a weight are divided, which its shape does not."""
_SAYS_ONLY = ("context_length", "vocab_size")


def load_language_model(key: str, path: Path, module: nn.Module, dtype: str) -> None:
    """Put the file's tensors into ``module``, an unquantized model of its architecture, in place.

    ``dtype`` is what the layers compute in. Raises ModelError, beginning with ``key``, where the file's architecture,
    names, shapes or formats are not the model's.
    """
    tensors, architecture = check_language_model(key, path, module)
    _fill(key, module, tensors, architecture, dtype)


def check_language_model(key: str, path: Path, module: nn.Module) -> tuple[dict[str, gguf.ReaderTensor], Architecture]:
    """The file's tensors by the names of the module's parameters, and what llama.cpp calls the architecture; ModelError
    as :func:`load_language_model`. The ``module`` needs no values."""
    import gguf

    config: Any = getattr(module, "config", None)
    architecture = architecture_of(config, key)
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError, OverflowError) as error:
        raise ModelError(f"{key}: not a readable GGUF file ({error}); copy or download it again") from error
    field = reader.get_field("general.architecture")
    said = str(field.contents()) if field is not None else "(none)"
    if said != architecture.name:
        raise ModelError(f"{key}: its architecture is {said} and the model's {architecture.name}; {_NOT_ITS}")
    for said in _other_keys(reader, architecture, config, _HEADS):
        raise ModelError(f"{key}: it says {said}; {_NOT_ITS}")
    parameters = dict(module.named_parameters(remove_duplicate=False))
    names = file_names(architecture, int(config.num_hidden_layers), parameters)
    wanted = {told: name for name, told in names.items()}
    tensors = {t.name: t for t in reader.tensors if t.name not in UNUSED}
    for told, tensor in tensors.items():
        if told not in wanted:
            raise ModelError(f"{key}: the model has no place for {told}; {_NOT_ITS}")
        shape = tuple(int(n) for n in reversed(tensor.shape))
        if shape != tuple(parameters[wanted[told]].shape):
            raise ModelError(
                f"{key}: {told} has shape {list(shape)} and the model's {wanted[told]} "
                f"{list(parameters[wanted[told]].shape)}; {_NOT_ITS}"
            )
    in_file = {id(parameters[wanted[told]]) for told in tensors}
    for name, parameter in parameters.items():
        if id(parameter) not in in_file:
            raise ModelError(f"{key}: it lacks {names.get(name, name)}; {_NOT_ITS}")
    return {wanted[told]: t for told, t in tensors.items()}, architecture


def differing_keys(key: str, path: Path, module: nn.Module) -> list[str]:
    """``llama.rope.freq_base=500 (the model's: 10000)`` of each key by which llama.cpp would compute the file otherwise
    than ``module``, which is of its architecture, is computed."""
    import gguf

    return _other_keys(gguf.GGUFReader(path), architecture_of(module.config, key), module.config)


def _other_keys(
    reader: gguf.GGUFReader, architecture: Architecture, config: Any, only: tuple[str, ...] = ()
) -> list[str]:
    """Where numbers of the file are not those that a file of ours would say; lists, one a layer, are not compared."""
    import gguf

    writer = gguf.GGUFWriter(None, architecture.name)
    with contextlib.suppress(ConfigError):  # what no key says; what came before it is there
        write_keys(writer, architecture, config, None)
    found = []
    for name, own in writer.kv_data[0].items():
        word = name.removeprefix(f"{architecture.name}.")
        field = reader.get_field(name)
        if word == name or word in _SAYS_ONLY or (only and word not in only) or field is None:
            continue
        said = field.contents()
        if isinstance(said, int | float) and isinstance(own.value, int | float):
            if not math.isclose(said, own.value, rel_tol=1e-6):
                found.append(f"{name}={said:g} (the model's: {own.value:g})")
        elif isinstance(said, str) and isinstance(own.value, str) and said != own.value:
            found.append(f"{name}={said} (the model's: {own.value})")
    return found


def _fill(
    key: str, module: nn.Module, tensors: dict[str, gguf.ReaderTensor], architecture: Architecture, dtype: str
) -> None:
    import torch

    config: Any = module.config
    found = {holder.path: holder for holder in holders(module).values()}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    blocks = {}
    for name, tensor in tensors.items():
        kind = tensor.tensor_type.name
        if kind in _DENSE:
            values = from_file(_dense(tensor, kind).to(torch.float32), name, architecture, config)
            own = parameters[name]
            if any(other != name and p is own and other in tensors for other, p in parameters.items()):
                own = torch.nn.Parameter(
                    own.detach().clone(), requires_grad=False
                )  # tied in the model, not in the file
                owner, _, leaf = name.rpartition(".")
                module.get_submodule(owner)._parameters[leaf] = own
            own.data = values.reshape(own.shape).to(own)
        elif kind.lower() in WEIGHTS_PER_SCALE and name in found:
            blocks[name] = tensor
        else:
            raise ModelError(
                f"{key}: {tensor.name} is stored as {kind}, which is not read here; there are "
                f"{', '.join([*WEIGHTS_PER_SCALE, *(k.lower() for k in _DENSE)])}"
            )
    others = {path: h for path, h in found.items() if path not in tensors}
    ties = {name: [h for h in others.values() if h.weight is found[name].weight] for name in blocks}
    for name, tensor in blocks.items():
        _store(module, found[name], tensor, from_file(_codes(tensor), name, architecture, config), dtype)
        for holder in ties[name]:
            share(holder, found[name])


def _dense(tensor: gguf.ReaderTensor, kind: str) -> Tensor:
    import numpy as np
    import torch

    shape = tuple(int(n) for n in reversed(tensor.shape))
    flat = np.array(tensor.data).reshape(-1).view(np.uint8)
    return torch.from_numpy(flat).view(torch_dtype(_DENSE[kind])).reshape(shape)


def _codes(tensor: gguf.ReaderTensor) -> Tensor:
    import numpy as np
    import torch

    return torch.from_numpy(np.array(tensor.data))


def _store(module: nn.Module, holder: Holder, tensor: gguf.ReaderTensor, codes: Tensor, dtype: str) -> None:
    """The file's blocks in the place of the holder's weight, called or read as that was."""
    name = holder.name
    tied = sum(p is holder.weight for _, p in module.named_parameters(remove_duplicate=False)) > 1
    if holder.way == TURN:
        turn(module, holder)
    elif holder.way != REPLACE or tied:
        pack(holder)
    path = stored_at(module, name)
    plain: Any = module.get_submodule(path)
    made = linear_class()(
        codes.to(holder_device(module)), tensor.tensor_type.name.lower(), plain.bias, torch_dtype(dtype)
    )
    replace_layer(module, path, made.train(plain.training))
    read_by(module, path, _decoded)


def holder_device(module: nn.Module) -> Any:
    """The device of the module's parameters."""
    return next(iter(module.parameters())).device


def _decoded(layer: Any) -> Tensor:
    dense: Tensor = layer.dequantize().to(layer.compute_dtype).float()
    return dense
