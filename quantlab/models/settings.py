"""Where two models of one class were configured otherwise: the settings that compute, and not those that only say."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from quantlab.models.identity import settings_of, without_place

if TYPE_CHECKING:
    from torch import nn

_SILENT = frozenset(
    {
        "architectures",
        "chunk_size_feed_forward",
        "id2label",
        "initializer_range",
        "is_encoder_decoder",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pretraining_tp",
        "problem_type",
        "quantization_config",
        "return_dict",
        "task_specific_params",
        "tie_word_embeddings",
        "tokenizer_class",
        "use_cache",
    }
)
_SILENT_KINDS = re.compile(r"^_|_token_ids?$|dropout|drop_rate|drop_path|layerdrop|_pdrop$|_loss_coef$|^initializer_")
"""Of training, of generation, and of who wrote it. What is tied shows in the tensors."""


_HEADS = re.compile(r"(?:^|_)(?:n|num)_(?:\w+_)?heads?$|(?:^|_)head_dim$")
"""How the rows of a weight are divided: of other heads it is another model, whatever the shapes of its tensors."""


def other_heads(said: Mapping[str, Any], original: nn.Module) -> str:
    """``num_key_value_heads=4 (the model's: 2)`` of the first such setting of a ``config.json``; "" for none."""
    ours = computing_settings(original)
    for name, value in _flat("", said_settings(said, original)):
        own = ours.get(name)
        if _HEADS.search(name.rpartition(".")[2]) and None not in (own, value) and value != own:
            return f"{name}={value} (the model's: {own})"
    return ""


def said_settings(said: Mapping[str, Any], original: nn.Module) -> dict[str, Any]:
    """What :func:`settings_of` will tell of a module like ``original`` that is made of this ``config.json``."""
    return without_place(_as_loaded(said, original))


def _as_loaded(said: Mapping[str, Any], original: nn.Module) -> Mapping[str, Any]:
    """What the class of the model's configuration makes of a file: some fill in or change what it says."""
    kind: Any = type(getattr(original, "config", None))
    if not hasattr(kind, "from_dict"):
        return said
    try:
        made: Mapping[str, Any] = kind.from_dict(
            {k: v for k, v in said.items() if k != "quantization_config"}
        ).to_dict()
    except Exception:  # noqa: BLE001  whatever a class refuses: loading tells it
        return {}
    return made


def differing_settings(said: Mapping[str, Any], original: nn.Module) -> list[str]:
    """``rope_theta=500.0 (the model's: 10000.0)`` of each setting by which a module that is so configured may compute
    otherwise."""
    theirs, ours = dict(_flat("", said)), computing_settings(original)
    return [
        f"{name}={value} (the model's: {ours[name]})"
        for name, value in theirs.items()
        if name in ours and not _is_same(value, ours[name])
    ]


def computing_settings(module: nn.Module) -> dict[str, Any]:
    """A module's own settings without those that move no output, those of a group as ``rope_parameters.rope_theta``."""
    return dict(_flat("", settings_of(module)))


def _flat(prefix: str, settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if name in _SILENT or _SILENT_KINDS.search(name):
            continue
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{name}.", value)
        else:
            yield f"{prefix}{name}", value


def _is_same(one: object, other: object) -> bool:
    """Equal; of floats also where one is the other in 32 bits."""
    if isinstance(one, float) and isinstance(other, float):
        return one == other or math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)
