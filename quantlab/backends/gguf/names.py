"""What llama.cpp calls the tensors of a language model, and how it keeps those that it keeps otherwise.

Names are those of the ``gguf`` package. Llama's rotary embedding turns neighbours there and halves in transformers, so
that the rows of its queries and keys lie in another order; Gemma's norms are kept with the 1 that its forward adds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A kind of model as llama.cpp knows it."""

    name: str
    """Under ``general.architecture``."""
    turns_heads: bool = False
    """Rows of queries and keys lie as neighbours, not as halves of a head."""
    adds_one: bool = False
    """Norms are kept with 1 added."""


_LLAMA = Architecture(name="llama", turns_heads=True)
ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture(name="qwen2"),
    "qwen3": Architecture(name="qwen3"),
    "gemma": Architecture(name="gemma", adds_one=True),
    "gemma2": Architecture(name="gemma2", adds_one=True),
    "gemma3_text": Architecture(name="gemma3", adds_one=True),
}
"""``model_type`` of transformers -> architecture."""
UNUSED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that llama.cpp's converter computes from the configuration."""


def architecture_of(config: Any, key: str) -> Architecture:
    """Of a transformers configuration; ConfigError, which begins with ``key``, where no names are known."""
    kind = str(getattr(config, "model_type", ""))
    if kind not in ARCHITECTURES:
        raise ConfigError(
            f"{key}: llama.cpp's names are known here for {', '.join(ARCHITECTURES)}, not for {kind or 'this model'}; "
            "choose another format"
        )
    return ARCHITECTURES[kind]


def architecture_said(file: Path) -> str:
    """What a file says under ``general.architecture``; "" for nothing."""
    import gguf

    field = gguf.GGUFReader(file).get_field("general.architecture")
    return str(field.contents()) if field is not None else ""


def file_names(architecture: Architecture, num_layers: int, names: Iterable[str]) -> dict[str, str]:
    """Name of a parameter in transformers -> in the file; without those that the architecture has no name for."""
    import gguf

    kinds = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    known = gguf.get_tensor_name_map(kinds[architecture.name], num_layers)
    found = {name: known.get_name(name, (".weight", ".bias")) for name in names}
    return {name: told for name, told in found.items() if told is not None}


def num_heads(name: str, config: Any) -> int:
    """Heads whose rows a tensor of queries or keys holds; 0 for another tensor."""
    if ".q_proj." in name:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if ".k_proj." in name else 0


def to_file(rows: Tensor, name: str, architecture: Architecture, config: Any) -> Tensor:
    """A tensor of transformers (or the rows of its codes) in the order of llama.cpp; norms with what is added."""
    heads = num_heads(name, config) if architecture.turns_heads else 0
    if heads:
        half = rows.shape[0] // heads // 2
        return rows.reshape(heads, 2, half, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape).contiguous()
    return rows + 1 if architecture.adds_one and name.endswith("norm.weight") else rows


def from_file(rows: Tensor, name: str, architecture: Architecture, config: Any) -> Tensor:
    """The inverse of :func:`to_file`."""
    heads = num_heads(name, config) if architecture.turns_heads else 0
    if heads:
        half = rows.shape[0] // heads // 2
        return rows.reshape(heads, half, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape).contiguous()
    return rows - 1 if architecture.adds_one and name.endswith("norm.weight") else rows


def llama_names(layers: Iterable[str]) -> dict[str, str]:
    """Path of a layer in transformers -> llama.cpp's name of it, where each of ``layers`` has one of its own; else
    empty: a denoiser's stay as they are."""
    import gguf

    listed = list(layers)
    numbers = [int(part) for layer in listed for part in layer.split(".") if part.isdigit()]
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, max(numbers, default=0) + 1)
    found = {layer: told for layer in listed if (told := known.get_name(layer)) is not None}
    return found if len(set(found.values())) == len(listed) else {}
