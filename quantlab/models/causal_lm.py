"""``model.family=causal_lm``: any causal language model that transformers knows, from a folder or the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantlab.errors import ModelError
from quantlab.models.checkpoint import load_checkpoint, output_head_name, weights_sha256
from quantlab.models.loaded import LoadedModel
from quantlab.vocabulary.dtypes import dtype_name
from quantlab.vocabulary.schema import ModelConfig


def load(config: ModelConfig, device: str, cache_dir: Path, progress: Any = None) -> LoadedModel:
    """The causal LM at ``config.path`` (a local folder or a Hub id) with its tokenizer.

    One component, ``model``. The output head is excluded from quantization by default, as is
    ``config.default_exclusions``. Raises ModelError beginning with ``model.path=...`` for whatever cannot be read.
    """
    if not config.path:
        raise ModelError(
            "model.path=null: family causal_lm needs a model; give a local folder or a Hub id, "
            "such as model.path=HuggingFaceTB/SmolLM2-135M"
        )
    from transformers import AutoModelForCausalLM

    model, tokenizer = load_checkpoint(AutoModelForCausalLM, config.path, config, device)
    return as_language_model(
        model,
        tokenizer,
        config,
        device,
        Path(config.path).name,
        weights_sha256(model, config.path, config.revision, cache_dir),
    )


def as_language_model(
    model: Any, tokenizer: Any, config: ModelConfig, device: str, name: str, digest: str
) -> LoadedModel:
    """A LoadedModel of the language protocol around a transformers causal LM."""
    head = output_head_name(model)
    if head is None:
        raise ModelError(
            f"model.path={config.path}: {type(model).__name__} has no output embedding, so it gives no "
            "token probabilities; name a causal language model"
        )
    return LoadedModel(
        name=name,
        protocol="language",
        components={"model": model},
        parts={"tokenizer": tokenizer},
        dtype=dtype_name(model.dtype),
        device=device,
        weights_sha256=digest,
        default_exclusions={"model": tuple(dict.fromkeys((head, *config.default_exclusions)))},
    )
