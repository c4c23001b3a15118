"""The keys of a language model's GGUF file: sizes, rotary embedding, tokenizer, as llama.cpp writes them."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.backends.gguf.names import Architecture
from quantlab.errors import ConfigError

if TYPE_CHECKING:
    import gguf

_WAY_OUT = "export with another backend"
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 3, 4, 5, 6
"""Kinds of tokens, by llama.cpp's numbers."""
_LEAST_SCORE = -1000.0
_BYTE_TOKEN_CHARACTERS = 6
"""Of ``<0x0A>``."""


def write_keys(writer: gguf.GGUFWriter, architecture: Architecture, config: Any, tokenizer: Any) -> None:
    """All keys but the file's type; ConfigError for what llama.cpp computes otherwise or does not know."""
    heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    writer.add_context_length(_context(architecture, config))
    writer.add_embedding_length(int(config.hidden_size))
    writer.add_block_count(int(config.num_hidden_layers))
    writer.add_feed_forward_length(int(config.intermediate_size))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.num_key_value_heads))
    writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_vocab_size(int(config.vocab_size))
    if architecture.turns_heads:
        writer.add_rope_dimension_count(head_dim)
    _require_same_model(architecture, config)
    _rotary(writer, config, head_dim)
    _others(writer, config, head_dim)
    if tokenizer is not None:
        _tokenizer(writer, tokenizer, int(config.vocab_size))


_TANH = ("gelu_pytorch_tanh",)
_ACTIVATIONS = {"gemma": _TANH, "gemma2": _TANH, "gemma3": _TANH}
"""Architecture -> the activations that llama.cpp computes for it; those of the others are SiLU."""
_FULL_EVERY = {"gemma2": 2, "gemma3": 6}
"""Architecture -> of how many layers the last attends to everything, the others to a window."""
_LOCAL_BASE = 10000.0
"""Of the rotary embedding in the local layers of Gemma 3."""


def _context(architecture: Architecture, config: Any) -> int:
    """How long a text may be: where llama.cpp knows no windows, it computes the same up to the first one's length."""
    longest, window = int(config.max_position_embeddings), getattr(config, "sliding_window", None)
    if not window or architecture.name in _FULL_EVERY or not getattr(config, "use_sliding_window", True):
        return longest
    return min(longest, int(window))


def _require_same_model(architecture: Architecture, config: Any) -> None:
    """ConfigError for a setting that no key of a file says, and that llama.cpp has otherwise."""
    name, rope = architecture.name, dict(getattr(config, "rope_parameters", None) or {})
    told = {key: getattr(config, key, None) for key in ("hidden_activation", "hidden_act")}
    key, said = next(((k, v) for k, v in told.items() if v), ("hidden_act", "silu"))
    if said not in (known := _ACTIVATIONS.get(name, ("silu", "swish"))):
        raise ConfigError(f"export.path: {key}={said}: llama.cpp computes {known[0]} in {name}; {_WAY_OUT}")
    every, kinds = _FULL_EVERY.get(name), list(getattr(config, "layer_types", None) or ())
    pattern = ["full_attention" if every and (i + 1) % every == 0 else "sliding_attention" for i in range(len(kinds))]
    if every and kinds != pattern:
        raise ConfigError(
            f"export.path: layer_types: in {name} llama.cpp attends to everything in each layer {every} of {every}, "
            f"and this model in others; {_WAY_OUT}"
        )
    local = float(dict(rope.get("sliding_attention") or {}).get("rope_theta", _LOCAL_BASE))
    if local != _LOCAL_BASE:
        raise ConfigError(
            f"export.path: rope_theta={local:g} of the sliding layers: llama.cpp has {_LOCAL_BASE:g} there; {_WAY_OUT}"
        )


_OTHER_SCALES = (46, 62)
"""Layers of the Gemmas 27B, whose queries are divided by another root than that of the head's size."""


def _others(writer: gguf.GGUFWriter, config: Any, head_dim: int) -> None:
    """Gemma's caps and windows; ConfigError for queries that llama.cpp would scale otherwise."""
    scale = getattr(config, "query_pre_attn_scalar", head_dim)
    per_head = config.hidden_size // config.num_attention_heads
    if scale != (per_head if config.num_hidden_layers in _OTHER_SCALES else head_dim):
        raise ConfigError(
            f"export.path: query_pre_attn_scalar={scale}: llama.cpp divides queries by the root of {head_dim}, the "
            f"size of a head; {_WAY_OUT}"
        )
    if cap := getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(float(cap))
    if cap := getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(float(cap))
    kinds = set(getattr(config, "layer_types", None) or ())
    if (window := getattr(config, "sliding_window", None)) and "sliding_attention" in kinds:
        writer.add_sliding_window(int(window))


_YARN = {
    "attention_factor": None,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": None,
    "mscale_all_dim": None,
    "truncate": True,
}
"""Settings of yarn -> what llama.cpp has for each."""


def _rotary(writer: gguf.GGUFWriter, config: Any, head_dim: int) -> None:
    import gguf
    import numpy as np

    said = dict(getattr(config, "rope_parameters", None) or {})
    said = dict(said.get("full_attention") or said)  # Gemma 3's local layers have a base that llama.cpp knows
    base, kind = float(said.get("rope_theta", 10000.0)), str(said.get("rope_type", "default"))
    writer.add_rope_freq_base(base)
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(said["factor"]))
    elif kind == "yarn":
        if odd := [key for key, usual in _YARN.items() if said.get(key) not in (None, usual)]:
            raise ConfigError(
                f"export.path: {odd[0]}={said[odd[0]]} of yarn: no key of a GGUF file says it; {_WAY_OUT}"
            )
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(said["factor"]))
        writer.add_rope_scaling_orig_ctx_len(int(said["original_max_position_embeddings"]))
    elif kind == "llama3":
        writer.add_tensor("rope_freqs.weight", np.array(_llama3_factors(said, base, head_dim), np.float32))
    elif kind != "default":
        raise ConfigError(f"export.path: rope_type={kind}: it is not known how llama.cpp keeps it; {_WAY_OUT}")


def _llama3_factors(said: dict[str, Any], base: float, head_dim: int) -> list[float]:
    """By how much each frequency is lowered (transformers, ``_compute_llama3_parameters``)."""
    factor, context = float(said["factor"]), float(said["original_max_position_embeddings"])
    low, high = float(said["low_freq_factor"]), float(said["high_freq_factor"])
    found = []
    for i in range(0, head_dim, 2):
        length = 2 * math.pi * base ** (i / head_dim)
        if length < context / high:
            found.append(1.0)
        elif length > context / low:
            found.append(factor)
        else:
            smooth = (context / length - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return found


# -- the tokenizer


def _tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, vocab_size: int) -> None:
    import gguf

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(f"export.path: {type(tokenizer).__name__} has no tokenizer.json to be read; {_WAY_OUT}")
    data = json.loads(backend.to_str())
    core = data["model"]
    if core.get("type") != "BPE":
        raise ConfigError(f"export.path: a {core.get('type')} tokenizer is not one of Llama, Qwen or Gemma; {_WAY_OUT}")
    is_bytewise = not core.get("byte_fallback")
    words = {**core["vocab"], **{added["content"]: added["id"] for added in data.get("added_tokens", ())}}
    special = {added["id"]: bool(added["special"]) for added in data.get("added_tokens", ())}
    by_id = {number: word for word, number in words.items()}
    tokens, kinds, scores = [], [], []
    for number in range(vocab_size):
        word = by_id.get(number)
        tokens.append(f"[PAD{number}]" if word is None else word)
        kinds.append(_kind(word, special.get(number), is_bytewise))
        scores.append(-float(number) if kinds[-1] == _NORMAL else _LEAST_SCORE)
    if is_bytewise:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer(data))
    else:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_merge_scores(core, tokens, scores))
        writer.add_add_space_prefix(_adds_space(data))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    with tempfile.TemporaryDirectory(prefix="quantlab-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        found = gguf.SpecialVocab(Path(folder), load_merges=is_bytewise, n_vocab=vocab_size)
    found.add_special_token["bos"] = _begins(tokenizer)
    found.add_to_gguf(writer, quiet=True)


def _begins(tokenizer: Any) -> bool:
    """Whether a text begins with the token that says so, by asking."""
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def _kind(word: str | None, is_special: bool | None, is_bytewise: bool) -> int:
    if word is None:
        return _UNUSED
    if is_special is not None:
        return _CONTROL if is_special else _USER_DEFINED
    is_byte = word.startswith("<0x") and word.endswith(">") and len(word) == _BYTE_TOKEN_CHARACTERS
    return _BYTE if is_byte and not is_bytewise else _NORMAL


def _merge_scores(core: dict[str, Any], tokens: list[str], scores: list[float]) -> list[float]:
    """Scores by which llama.cpp merges in the order of the merges: the first is the best."""
    order = {
        "".join(merge if isinstance(merge, list) else merge.split(" ")): i for i, merge in enumerate(core["merges"])
    }
    return [-float(order[word]) if word in order else score for word, score in zip(tokens, scores, strict=True)]


def _adds_space(data: dict[str, Any]) -> bool:
    normalizer = data.get("normalizer") or {}
    parts = normalizer.get("normalizers", [normalizer])
    pre = data.get("pre_tokenizer") or {}
    return any(part.get("type") == "Prepend" for part in parts) or pre.get("prepend_scheme") in ("always", "first")


def pre_tokenizer(data: dict[str, Any]) -> str:
    """llama.cpp's word for how a byte-level tokenizer cuts a text before it merges, by what it does.

    ConfigError for one that is not known: another cut gives other tokens.
    """
    pre = data.get("pre_tokenizer") or {}
    parts = pre.get("pretokenizers", [pre])
    kinds = [part.get("type") for part in parts]
    splits = [str((part.get("pattern") or {}).get("Regex", "")) for part in parts if part.get("type") == "Split"]
    if splits and "\\p{N}{1,3}" in splits[0]:
        return "llama-bpe"
    if splits and "\\p{N}|" in splits[0] and "\\p{L}+" in splits[0]:
        return "qwen2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        return "smollm"
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    raise ConfigError(
        f"export.path: it is not known how llama.cpp calls a pre-tokenizer of {', '.join(map(str, kinds))}; {_WAY_OUT}"
    )
