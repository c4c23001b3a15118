"""llama.cpp's file types: which block format each tensor of a model gets under a name such as ``Q4_K_M``. Torch-free.

Of a diffusion model the rules are those of the files in circulation (:mod:`quantlab.backends.gguf.diffusion_mixes`).
Of all others they are those of llama.cpp's ``src/llama-quant.cpp`` (``llama_tensor_get_type_impl``,
``tensor_type_fallback``) without an importance matrix, for models with the tensors of Llama; sizes agree with the table
of its ``tools/quantize/README.md`` to all four decimals.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from quantlab.backends.gguf.diffusion_mixes import (
    diffusion_format,
    first_values,
    has_fused_attention,
    is_diffusion,
    leaf_of,
)

BASES = {
    "q2_k": "q2_k",
    "q2_k_s": "q2_k",
    "q3_k_s": "q3_k",
    "q3_k_m": "q3_k",
    "q3_k_l": "q3_k",
    "iq4_xs": "iq4_xs",
    "iq4_nl": "iq4_nl",
    "q4_k_s": "q4_k",
    "q4_k_m": "q4_k",
    "q5_k_s": "q5_k",
    "q5_k_m": "q5_k",
    "q6_k": "q6_k",
    "q8_0": "q8_0",
    "q4_0": "q4_0",
    "q4_1": "q4_1",
    "q5_0": "q5_0",
    "q5_1": "q5_1",
}
"""File type -> the block format that most of its tensors have."""
FALLBACKS = {
    "q2_k": "q4_0",
    "q3_k": "q4_0",
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
    "iq4_xs": "iq4_nl",
}
"""Format of superblocks -> what a tensor gets whose rows do not divide by 256."""
OTHERS = {
    "q2_k": ("q3_k", "q4_k", "q4_0", "q5_0"),
    "q2_k_s": ("q4_k", "q4_0", "q5_0"),
    "q3_k_s": ("q4_0",),
    "q3_k_m": ("q4_k", "q5_k", "q4_0", "q5_0", "q5_1"),
    "q3_k_l": ("q4_k", "q5_k", "q4_0", "q5_0", "q5_1"),
    "iq4_xs": ("q5_k", "iq4_nl", "q5_1"),
    "iq4_nl": ("q5_k", "q5_1"),
    "q4_k_s": ("q5_k", "q5_0", "q5_1"),
    "q4_k_m": ("q5_k", "q6_k", "q5_0", "q5_1", "q8_0"),
    "q5_k_s": ("q5_1",),
    "q5_k_m": ("q6_k", "q5_1", "q8_0"),
    "q6_k": ("q8_0",),
    "q8_0": (),
    "q4_0": ("q4_1",),
    "q4_1": (),
    "q5_0": ("q5_1",),
    "q5_1": (),
}
"""File type -> the other formats that its layers may get."""
_SUPERBLOCK, _BLOCK = 256, 32
_V = ("v_proj", "attn_v", "v")
_Q = ("q_proj", "attn_q", "q")
_OUT = ("o_proj", "attn_output", "dense", "o")
_DOWN = ("down_proj", "ffn_down", "fc2", "wo")
_QKV = ("qkv_proj", "attn_qkv", "query_key_value", "c_attn")
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What the rules ask of a model as a whole."""

    num_layers: int
    heads_per_kv_head: int
    is_diffusion: bool = False
    has_fused_attention: bool = False
    """Of a diffusion model: its files hold queries, keys and values of a block as one tensor."""
    first_values: tuple[str, ...] = ()
    """Of a diffusion model: its first projections of values."""

    @property
    def data(self) -> dict[str, Any]:
        """As a config's ``file_type_measures`` holds it: of a language model without what is not of one."""
        found = {**asdict(self), "first_values": list(self.first_values)}
        return found if self.is_diffusion else {k: found[k] for k in ("num_layers", "heads_per_kv_head")}


def measures_of(data: Mapping[str, Any]) -> Measures:
    """The inverse of :attr:`Measures.data`."""
    return Measures(**{**data, "first_values": tuple(data.get("first_values", ()))})


def measures(shapes: Mapping[str, tuple[int, ...]]) -> Measures:
    """Of the model that the layers (path -> shape of the weight) are those of."""
    paths = [path.removesuffix(".weight") for path in shapes]
    if is_diffusion(paths):
        fused = has_fused_attention(paths)
        first = () if fused else first_values(paths)
        return Measures(
            num_layers=0, heads_per_kv_head=1, is_diffusion=True, has_fused_attention=fused, first_values=first
        )
    numbers = [layer for path in shapes if (layer := _layer(path)) is not None]
    keys = [shape[0] for path, shape in shapes.items() if leaf_of(path) in _V]
    queries = [shape[0] for path, shape in shapes.items() if leaf_of(path) in _Q]
    heads = max(queries) // max(keys) if keys and queries else 1
    return Measures(num_layers=max(numbers, default=-1) + 1, heads_per_kv_head=heads)


def format_of(file_type: str, path: str, columns: int, model: Measures) -> str:
    """The block format of the layer at ``path``, of rows of ``columns``, in a file of this type; ``float16`` where
    none fits."""
    if model.is_diffusion:
        wanted = diffusion_format(file_type, BASES[file_type], path, model.has_fused_attention, model.first_values)
        fits = columns % (_SUPERBLOCK if wanted in FALLBACKS and wanted != "iq4_nl" else _BLOCK) == 0
        return wanted if fits else "float16"
    wanted = _wanted(file_type, path, model)
    if columns % _SUPERBLOCK and wanted in FALLBACKS:
        wanted = FALLBACKS[wanted]
    return wanted if columns % _BLOCK == 0 else "float16"


def _wanted(file_type: str, path: str, model: Measures) -> str:
    base, leaf, layer = BASES[file_type], leaf_of(path), _layer(path) or 0
    first, many = layer < model.num_layers // 8, model.heads_per_kv_head >= 4
    more = _uses_more_bits(layer, model.num_layers)
    if leaf in _V or leaf in _QKV:
        chosen = {
            "q2_k": "q4_k" if many else "q3_k",
            "q2_k_s": "q4_k" if many else base,
            "q3_k_m": "q5_k" if layer < 2 else "q4_k",
            "q3_k_l": "q5_k",
            "iq4_nl": "q5_k" if many else base,
            "iq4_xs": "q5_k" if many else base,
            "q4_k_m": "q6_k" if more else base,
            "q5_k_m": "q6_k" if more else base,
            "q4_k_s": "q5_k" if layer < 4 else base,
        }
    elif leaf in _DOWN:
        chosen = {
            "q2_k": "q3_k",
            "q2_k_s": "q4_k" if first else base,
            "q3_k_m": "q5_k" if layer < model.num_layers // 16 else "q4_k",
            "q3_k_l": "q5_k",
            "q4_k_m": "q6_k" if more else base,
            "q5_k_m": "q6_k" if more else base,
            "iq4_nl": "q5_k" if first else base,
            "iq4_xs": "q5_k" if first else base,
            "q4_k_s": "q5_k" if first else base,
        }
    elif leaf in _OUT:
        chosen = {"q2_k": "q3_k", "q3_k_m": "q4_k", "q3_k_l": "q5_k"}
    else:
        chosen = {}
    return chosen.get(file_type, base)


def _uses_more_bits(layer: int, num_layers: int) -> bool:
    """The first and the last eighth of the layers, and every third between them."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def _layer(path: str) -> int | None:
    found = _LAYER.search(path)
    return int(found[1]) if found else None


def head_format(file_type: str, columns: int) -> str:
    """The format of the output matrix, or of the embedding that is tied to it."""
    if file_type == "q8_0" or columns % (_BLOCK if file_type == "iq4_nl" else _SUPERBLOCK):
        return "q8_0"
    return "q6_k"


def embedding_format(file_type: str, columns: int) -> str:
    """The format of an embedding that has its own weight."""
    base = BASES[file_type]
    return FALLBACKS.get(base, base) if columns % _SUPERBLOCK else base
