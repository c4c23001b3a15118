"""What a model was built from beside its weights, as the loaded objects hold it: a digest of each part.

The same weights under another ``hidden_act``, ``rope_theta``, scheduler or chat template are another model. What is
digested is the effective configuration of what was loaded, not the files: a value that a library fills in, or ignores,
counts as it is used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

_OF_THE_PLACE = frozenset(
    {
        "_commit_hash",
        "_diffusers_version",
        "_name_or_path",
        "_use_default_values",
        "dtype",
        "is_local",
        "local_files_only",
        "name_or_path",
        "torch_dtype",
        "transformers_version",
        "trust_remote_code",
    }
)
"""Keys of a configuration that say where it came from, or what has a place of its own in a key (the dtype)."""
_STATES = ("truncation", "padding")
"""Keys of a fast tokenizer's JSON that its last call set."""


def identity_of(components: Mapping[str, nn.Module], parts: Mapping[str, object]) -> dict[str, str]:
    """Name of a part (``model.config``, ``tokenizer``, ``scheduler``...) -> sha256 of what it is, as hexadecimal.

    ``components`` and ``parts`` are a loaded model's; of a pipeline among the parts, every part and its own settings.
    """
    named: dict[str, object] = {**components}
    pipeline = parts.get("pipeline")
    if pipeline is not None:
        named |= {**cast("Mapping[str, object]", getattr(pipeline, "components", {})), "pipeline": pipeline}
    named |= {name: parts[name] for name in ("tokenizer", "scheduler", "processor") if name in parts}
    found: dict[str, str] = {}
    for name, part in sorted(named.items()):
        for what, data in _described(part).items():
            text = json.dumps(data, sort_keys=True, default=str)
            found[f"{name}.{what}" if what else name] = hashlib.sha256(text.encode()).hexdigest()
    if parts.get("call"):
        text = json.dumps(parts["call"], sort_keys=True, default=str)
        found["call"] = hashlib.sha256(text.encode()).hexdigest()
    return found


def _described(part: object) -> dict[str, object]:
    """What a part is, under a word for each of its sides; empty for what has no configuration."""
    if hasattr(part, "get_vocab"):
        return {"": _tokenizer(cast("PreTrainedTokenizerBase", part))}
    config = getattr(part, "config", None)
    if config is None and hasattr(part, "to_dict"):  # a processor
        return {"": _plain(part)}
    found = {"config": [type(part).__name__, _plain(config)]} if config is not None else {}
    generation = getattr(part, "generation_config", None)
    return {**found, **({"generation_config": _plain(generation)} if generation is not None else {})}


def _plain(config: object) -> object:
    """A configuration as data, without what says where it came from; and the attention that was chosen."""
    data = config if isinstance(config, Mapping) else getattr(config, "to_dict", lambda: str(config))()
    if not isinstance(data, Mapping):
        return str(data)
    attention = getattr(config, "_attn_implementation", None)
    return {**without_place(data), **({"attention": attention} if attention else {})}


def settings_of(module: nn.Module) -> dict[str, Any]:
    """The effective configuration of a module, as data; empty for one without."""
    config = getattr(module, "config", None)
    data = config if isinstance(config, Mapping) else getattr(config, "to_dict", dict)()
    return without_place(data)


def without_place(config: Mapping[Any, Any]) -> dict[str, Any]:
    """A configuration as data, without what says where it came from, and the dtype."""
    return {str(k): _cleaned(v) for k, v in config.items() if k not in _OF_THE_PLACE}


def _cleaned(value: object) -> object:
    if isinstance(value, Mapping):
        return without_place(value)
    return [_cleaned(v) for v in value] if isinstance(value, (list, tuple)) else value


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """Vocabulary, rules, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = {k: v for k, v in json.loads(backend.to_str()).items() if k not in _STATES}
    else:
        rules = {"vocabulary": tokenizer.get_vocab()}
    settings = {
        k: v
        for k, v in tokenizer.init_kwargs.items()
        if k not in _OF_THE_PLACE and not k.endswith("_file") and isinstance(v, (bool, int, float, str))
    }
    return {
        "class": type(tokenizer).__name__,
        "rules": rules,
        "settings": settings,
        "special": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
        "sides": [tokenizer.padding_side, tokenizer.truncation_side],
    }
