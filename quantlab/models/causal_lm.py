"""``model.family=causal_lm``: any causal language model that transformers knows, from a folder or the Hub.

A multimodal model is loaded as what it is, and reads text: what stands beside its language model never runs, and is
left out of quantization by default.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from quantlab.errors import ModelError
from quantlab.models.checkpoint import load_checkpoint, weights_sha256
from quantlab.models.defaults import beside_the_language_model, default_exclusions, output_head
from quantlab.models.loaded import LoadedModel, Progress
from quantlab.models.reading import required_path
from quantlab.vocabulary.dtypes import dtype_name
from quantlab.vocabulary.schema import ModelConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.modeling_outputs import CausalLMOutput

NEEDS_PATH = ("a model", "HuggingFaceTB/SmolLM2-135M")
"""What ``model.path`` leads to, and an example."""


class CausalLM(Protocol):
    """What is used of a causal language model of transformers, whose own class leaves most of it untyped."""

    config: PreTrainedConfig

    def __call__(self, *, input_ids: torch.Tensor, use_cache: bool) -> CausalLMOutput: ...
    def get_input_embeddings(self) -> torch.nn.Embedding: ...
    def get_output_embeddings(self) -> torch.nn.Module: ...


def load(config: ModelConfig, device: str, cache_dir: Path, progress: Progress | None = None) -> LoadedModel:
    """The causal LM at ``config.path`` (a local folder or a Hub id) with its tokenizer.

    One component, ``model``. The output head is excluded from quantization by default, as is
    ``config.default_exclusions``. Raises ModelError beginning with ``model.path=...`` for whatever cannot be read.
    """
    path = required_path(config, *NEEDS_PATH)
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

    kinds = [AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM]
    model, tokenizer = load_checkpoint(kinds, path, config, device)
    digest = weights_sha256(model, path, config.revision, cache_dir)
    return as_language_model(model, tokenizer, config, device, Path(path).name, digest)


def as_language_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: ModelConfig,
    device: str,
    name: str,
    digest: str,
) -> LoadedModel:
    """A LoadedModel of the language protocol around a transformers causal LM."""
    if not output_head(model):
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
        default_exclusions={
            "model": default_exclusions(model, [*beside_the_language_model(model), *config.default_exclusions])
        },
    )


def network_of(component: torch.nn.Module) -> CausalLM:
    """The component of a model that :func:`as_language_model` made."""
    return cast(CausalLM, component)
