"""A quantized component as a GGUF file that others read.

A language model is as llama.cpp reads it, a denoiser as Diffusers' ``from_single_file`` and ComfyUI-GGUF do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.backends.gguf.blocks import decode, linear_class
from quantlab.backends.gguf.llama import write_keys
from quantlab.backends.gguf.names import Architecture, architecture_of, file_names, from_file, to_file
from quantlab.backends.gguf.published import Piece, architecture, published_names
from quantlab.backends.part import Part, Written
from quantlab.errors import ConfigError

if TYPE_CHECKING:
    import gguf
    from torch import Tensor, nn

FILE, _CONFIG = "model.gguf", "config.json"
_HAS_BIASES = "qwen2"
"""The architecture whose queries, keys and values have biases."""
_OF_DIFFUSERS, _PACKED = "diffusers", ".packed."
_DENSE = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_OF_THE_PLACE = ("_name_or_path", "quantization_config")


@dataclass(frozen=True, kw_only=True, eq=False)
class Stored:
    """One tensor as the file has it."""

    rows: Tensor
    """Codes, uint8 (rows, bytes of a row), or the values."""
    kind: str
    """ggml's word for it: ``Q4_K``, ``F32``."""


def export(part: Part, folder: Path) -> Written:
    """Write ``model.gguf`` into ``folder``; ConfigError naming what no GGUF file can hold.

    Of a language model tensors and keys are llama.cpp's, tokenizer and chat template included. Of a component of
    Diffusers names are the published ones (:mod:`quantlab.backends.gguf.published`), or Diffusers' own where its
    converter would not give the same tensors back; its configuration is written beside the file.
    """
    part.require_own_compute_dtype()
    if part.library == _OF_DIFFUSERS:
        return _export_denoiser(part, folder)
    return _export_language_model(part, folder)


def check_export(part: Part) -> None:
    """ConfigError for what :func:`export` would refuse of a part, where that is known before anything is written."""
    import gguf

    part.require_own_compute_dtype()
    if part.library == _OF_DIFFUSERS:
        _require_single_file(type(part.original).__name__)
        return
    config: Any = part.original.config
    known = architecture_of(config, "export.path")
    shared = {n for n, _ in part.original.named_parameters(remove_duplicate=False)}
    shared -= {n for n, _ in part.original.named_parameters()}
    names = [name for name in part.original.state_dict() if name not in shared]
    _names(known, config, names)
    _require_reader(known, names)
    write_keys(gguf.GGUFWriter(None, known.name), known, config, part.tokenizer)


def stored_tensors(module: nn.Module) -> dict[str, Stored]:
    """Name of each tensor of the unquantized module -> how the quantized one stores it; a tied one once."""
    found: dict[str, Stored] = {}
    for path, layer in module.named_modules():
        if isinstance(layer, linear_class()):
            owner, _, parameter = path.partition(_PACKED)
            name = f"{owner}.{parameter or 'weight'}"
            found[name] = Stored(rows=layer.qweight.detach().cpu(), kind=layer.gguf_type.upper())
    seen = set()
    for name, tensor in module.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape)
        if name.endswith(".qweight") or (tensor.numel() and key in seen):
            continue
        seen.add(key)
        kind = _DENSE.get(str(tensor.dtype).removeprefix("torch."), "")
        if not kind or not tensor.dim():
            raise ConfigError(
                f"export.path: {name} is {tensor.dtype} of {tensor.dim()} dimensions, which a GGUF file has no place "
                "for; export another component"
            )
        found[name] = Stored(rows=tensor.detach().cpu().contiguous(), kind=kind)
    return found


def _written_as(stored: Stored) -> Stored:
    """Vectors, and 16-bit values that no matrix holds, in float32: what every reader takes."""
    is_matrix = stored.rows.dim() == 2
    if stored.kind in ("F16", "BF16") and not (is_matrix and min(stored.rows.shape) > 1):
        return Stored(rows=stored.rows.float(), kind="F32")
    return stored


def _add(writer: gguf.GGUFWriter, name: str, stored: Stored) -> None:
    import gguf
    import torch

    rows = stored.rows.contiguous()
    data = rows.view(torch.uint8) if stored.kind == "BF16" else rows
    writer.add_tensor(name, data.numpy(), raw_dtype=gguf.GGMLQuantizationType[stored.kind])


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def file_type(part: Part, tensors: Mapping[str, Stored]) -> int:
    """``general.file_type``: the mix that was asked for, else the format of most weights."""
    import gguf

    asked = getattr(part.config, "file_type", None)
    sizes: dict[str, int] = {}
    for stored in tensors.values():
        if stored.rows.dim() == 2:
            sizes[stored.kind] = sizes.get(stored.kind, 0) + stored.rows.numel()
    most = max(sizes, key=sizes.__getitem__, default="F32")
    for word in (str(asked).upper(), most, f"{most}_S", f"{most}_M"):
        if hasattr(gguf.LlamaFileType, f"MOSTLY_{word}"):
            return int(gguf.LlamaFileType[f"MOSTLY_{word}"])
    return int(gguf.LlamaFileType.ALL_F32 if most == "F32" else gguf.LlamaFileType.GUESSED)


# -- language models


def _export_language_model(part: Part, folder: Path) -> Written:
    import gguf

    config: Any = part.original.config
    known = architecture_of(config, "export.path")
    tensors = stored_tensors(part.module)
    names = _names(known, config, tensors)
    writer = gguf.GGUFWriter(folder / FILE, known.name)
    write_keys(writer, known, config, part.tokenizer)
    writer.add_file_type(file_type(part, tensors))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, stored in tensors.items():
        kept = _written_as(stored)
        _add(writer, names[name], Stored(rows=to_file(kept.rows, name, known, config), kind=kept.kind))
    _finish(writer)
    kind = type(part.original).__name__
    return Written(
        loader=f"transformers {kind}.from_pretrained(gguf_file=...), which makes it dense (named for llama.cpp)",
        target=f"transformers:{kind}",
        arguments={"gguf_file": FILE, "dtype": part.dtype},
        state=_dense_state(part, tensors, known),
    )


def _names(known: Architecture, config: Any, tensors: Collection[str]) -> dict[str, str]:
    """Name of each tensor -> in the file; ConfigError where llama.cpp has none."""
    names = file_names(known, int(config.num_hidden_layers), tensors)
    if missing := [name for name in tensors if name not in names]:
        raise ConfigError(
            f"export.path: llama.cpp has no name for {missing[0]} in {known.name}; export with another backend"
        )
    return names


def _require_reader(known: Architecture, names: Collection[str]) -> None:
    """ConfigError for a file that transformers would not read back, so that nobody could compare it."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    if known.name not in GGUF_SUPPORTED_ARCHITECTURES:
        raise ConfigError(
            f"export.path: transformers reads no GGUF file of {known.name}, so that it could not be checked; export "
            "with another backend"
        )
    if known.name != _HAS_BIASES and (biases := [name for name in names if name.endswith(".bias")]):
        raise ConfigError(
            f"export.path: {biases[0]}: transformers reads no biases from a GGUF file of {known.name}; export with "
            "another backend"
        )


def _dense_state(part: Part, tensors: Mapping[str, Stored], known: Architecture) -> dict[str, str]:
    """What transformers makes of the file: every tensor dense, in the model's dtype."""
    import torch

    dtype = getattr(torch, part.dtype)
    found = {}
    for name in part.original.state_dict():
        stored = tensors.get(name) or tensors[_tied_to(part.original, name, tensors)]
        dense = stored.rows if stored.kind in _DENSE.values() else decode(stored.rows, stored.kind.lower())
        if stored.kind in _DENSE.values() and name.endswith("norm.weight"):  # Gemma's lose a bit on the way
            config = part.original.config
            dense = from_file(to_file(dense.float(), name, known, config), name, known, config)
        found[name] = digest(dense.to(dtype))
    return found


def _tied_to(original: nn.Module, name: str, tensors: Mapping[str, Stored]) -> str:
    """The first of the stored tensors that is the one called ``name``; ``original`` may be without values, and then
    tensors have no address that would tell them apart."""
    same = dict(original.named_parameters(remove_duplicate=False)) | dict(
        original.named_buffers(remove_duplicate=False)
    )
    own = same[name]

    def is_own(other: Tensor | None) -> bool:
        if other is None or other is own or own.is_meta:
            return other is own
        return other.data_ptr() == own.data_ptr()

    return next(stored for stored in tensors if is_own(same.get(stored)))


# -- denoisers


def _require_single_file(kind: str) -> None:
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    if kind not in SINGLE_FILE_LOADABLE_CLASSES:
        raise ConfigError(
            f"export.path: Diffusers reads no single file into a {kind}, so that nobody would load its GGUF file; "
            "export with another backend"
        )


def _export_denoiser(part: Part, folder: Path) -> Written:
    import gguf

    said: Any = part.original
    kind, config = type(part.original).__name__, dict(said.config)
    _require_single_file(kind)
    tensors = stored_tensors(part.module)
    pieces = published_names(kind, tensors, config)
    is_published = pieces is not None and _holds(pieces, tensors) and _reads_back(kind, pieces, tensors, config)
    if pieces is None or not is_published:
        pieces = {name: Piece(sources=(name,)) for name in tensors}
    writer = gguf.GGUFWriter(folder / FILE, architecture(kind, config))
    writer.add_file_type(file_type(part, tensors))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, piece in pieces.items():
        _add(writer, name, _joined(piece, tensors))
    _finish(writer)
    kept = {k: v for k, v in json.loads(said.to_json_string()).items() if k not in _OF_THE_PLACE}
    (folder / _CONFIG).write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    also = "ComfyUI-GGUF" if is_published else "named as Diffusers names its tensors"
    return Written(
        loader=f"diffusers {kind}.from_single_file ({also})",
        target=f"diffusers:{kind}",
        method="from_single_file",
        file=FILE,
        arguments={"config": ".", "compute_dtype": part.compute_dtype, "dtype": part.dtype},
        state={name: _loaded_digest(stored) for name, stored in tensors.items()},
    )


def _holds(pieces: Mapping[str, Piece], tensors: Mapping[str, Stored]) -> bool:
    """Whether the matrices that are one in the file have one format."""
    return all(len({tensors[name].kind for name in piece.sources}) == 1 for piece in pieces.values())


def _joined(piece: Piece, tensors: Mapping[str, Stored]) -> Stored:
    import torch

    parts = [_written_as(tensors[name]) for name in piece.sources]
    rows = torch.cat([part.rows for part in parts]) if len(parts) > 1 else parts[0].rows
    if piece.swapped:
        first, second = rows.chunk(2, dim=0)
        rows = torch.cat([second, first])
    return Stored(rows=rows, kind=parts[0].kind)


def _reads_back(
    kind: str, pieces: Mapping[str, Piece], tensors: Mapping[str, Stored], config: Mapping[str, Any]
) -> bool:
    """Whether Diffusers' own converter makes every tensor again, row by row, of the names that the file would have.

    It is asked with rows' numbers in the place of rows: its sizes may be those of one published model alone.
    """
    import torch
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    if set(pieces) == set(tensors):
        return True
    own, start = {}, 0
    for name, stored in tensors.items():
        shape = stored.rows.shape
        own[name] = torch.arange(start, start + shape[0]).reshape(shape[0], *(1 for _ in shape[1:]))
        start += shape[0]
    marks = {name: Stored(rows=rows, kind="I64") for name, rows in own.items()}
    asked = {name: _joined(piece, marks).rows for name, piece in pieces.items()}
    convert: Any = SINGLE_FILE_LOADABLE_CLASSES[kind]
    try:
        made = convert["checkpoint_mapping_fn"](checkpoint=asked, config=config)
    except (KeyError, IndexError, RuntimeError, ValueError, AttributeError):
        return False
    return set(made) == set(own) and all(torch.equal(made[name], rows) for name, rows in own.items())


def _loaded_digest(stored: Stored) -> str:
    """Of the tensor as Diffusers loads it: blocks, and bfloat16, as bytes; others in the dtype that they have here."""
    import torch

    is_bytes = _written_as(stored).kind == "BF16"
    return digest(stored.rows.view(torch.uint8) if is_bytes else stored.rows)


def digest(tensor: Tensor) -> str:
    """sha256 of dtype, shape and bits, the first 32 digits, as exports are checked by it."""
    import torch

    data = tensor.detach().cpu().contiguous()
    made = hashlib.sha256(f"{data.dtype}|{tuple(data.shape)}|".encode())
    if data.numel():
        made.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return made.hexdigest()[:32]
