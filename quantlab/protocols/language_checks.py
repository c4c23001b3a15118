"""What must hold of a language model before its numbers mean anything, tried on one window of the text.

Its logits are what is made here of its hidden states; no position sees the tokens that it is scored on; and running it
changes nothing in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantlab.errors import ModelError
from quantlab.models.causal_lm import CausalLM, network_of
from quantlab.models.loaded import LoadedModel
from quantlab.protocols.output_head import LOGIT_SETTINGS, logits_of
from quantlab.protocols.unchanged import must_stay_unchanged

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_LOG_PROB_ERROR = 1e-3
"""By how much two fp32 computations of one log-probability may differ, in nats."""
_HIDDEN_ERROR = 1e-2
"""Relative difference of hidden states that rounding makes; a token that is seen makes one of order 1."""


def check_language_model(model: LoadedModel, window: Tensor) -> None:
    """Try ``model`` on ``window``, token ids (1, context_length) of at least 2.

    Raises ModelError, naming what is wrong, for a model that changes itself when it runs, that sees later tokens, or
    that makes its logits in a way that is not known here; and for tokens beyond its embedding.
    """
    import torch

    module = network_of(model.components["model"])
    key = f"model.path: {model.name}"
    size = module.get_input_embeddings().weight.shape[0]
    if (largest := int(window.max())) >= size:
        raise ModelError(
            f"{key} has embeddings for {size} tokens, and its tokenizer gives the token {largest}; use the tokenizer "
            "that belongs to the weights"
        )
    ids = window.to(model.device)
    with must_stay_unchanged(model), torch.no_grad():
        hidden, logits = _hidden_and_logits(module, ids)
    _check_causal(key, module, ids, hidden)
    _check_head(key, model, hidden, logits)


def _hidden_and_logits(module: CausalLM, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What the output head is given, and the model's own logits, both fp32: (1, length, width), (1, length, words)."""
    caught: list[Tensor] = []

    def catch(_head: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        caught.append(args[0].detach())

    hook = module.get_output_embeddings().register_forward_pre_hook(catch)
    try:
        logits = module(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    assert logits is not None, "a causal language model returns them"
    return caught[-1].float(), logits.float()


def _check_causal(key: str, module: CausalLM, ids: Tensor, hidden: Tensor) -> None:
    """That another last token moves no earlier position."""
    import torch

    other = ids.clone()
    other[:, -1] = ids[:, 0] if int(ids[0, 0]) != int(ids[0, -1]) else (ids[:, -1] + 1) % int(ids.max() + 1)
    with torch.no_grad():
        again, _ = _hidden_and_logits(module, other)
    moved = (again - hidden)[:, :-1].norm() / hidden[:, :-1].norm().clamp_min(1e-30)
    if not float(moved) < _HIDDEN_ERROR:
        raise ModelError(
            f"{key} is no causal language model: another last token moves the positions before it (relative "
            f"difference {float(moved):.2g}), so it sees the tokens that it would be scored on; set is_decoder in its "
            "config.json, or load it as model=encoder"
        )


def _check_head(key: str, model: LoadedModel, hidden: Tensor, logits: Tensor) -> None:
    """That the model's own logits are what :func:`logits_of` makes of its hidden states, at every position."""
    import torch

    ours = logits_of(model)(hidden).to(logits.device)
    dtype = next(p.dtype for p in network_of(model.components["model"]).get_output_embeddings().parameters())
    rounding = 2 * torch.finfo(dtype).eps * float(logits.abs().max()) if dtype.is_floating_point else 0.0
    error = float((logits.log_softmax(-1) - ours.log_softmax(-1)).abs().max())
    if not error < _LOG_PROB_ERROR + rounding:
        raise ModelError(
            f"{key} changes its logits after the output head in a way that is not known here (a log-probability "
            f"differs by {error:.2g} nats); known settings are {', '.join(LOGIT_SETTINGS)}: use another model"
        )
