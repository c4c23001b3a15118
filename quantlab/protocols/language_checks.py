"""What must hold of a language model before its numbers mean anything, tried on one window of the text.

It is known how its logits are made of its hidden states; no position sees the tokens that it is scored on; and running
it changes nothing in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantlab.errors import ModelError
from quantlab.models.causal_lm import CausalLM, network_of
from quantlab.models.loaded import LoadedModel
from quantlab.progress import say
from quantlab.protocols.output_head import HEAD, OWN, logits_of, own_logits, with_settings
from quantlab.protocols.tried import tried
from quantlab.protocols.unchanged import must_stay_unchanged
from quantlab.vocabulary.dtypes import dtype_name

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LOG_PROB_ERROR = 1e-3
"""By how much two fp32 computations of one log-probability may differ, in nats."""
_NUM_TRIED = 32
"""Tokens of a window that are tried: logits are made of hidden states in the same way at each position."""
_NUM_TOKENS = 16
"""A short window, half of which is exchanged: of many tokens, one more that is seen moves the others by little."""
_HIDDEN_ERROR = {"float32": 1e-4}
_HIDDEN_ERROR_16_BIT = 1e-2
"""Relative difference of hidden states that rounding makes, where other rows of a batch or of an expert differ."""


def check_language_model(model: LoadedModel, window: Tensor, largest: int = 0) -> None:
    """Try ``model`` on the first tokens of ``window``, token ids (1, context_length) of at least 2; ``largest`` is the
    largest of all.

    Raises ModelError, naming what is wrong, for a model that reads no text alone, that changes itself when it runs,
    that sees later tokens, or whose logits depend on more than hidden states and tokens; and for tokens beyond its
    embedding.
    """
    module = network_of(model.components["model"])
    key = f"model.path: {model.name}"
    size = module.get_input_embeddings().weight.shape[0]
    if (largest := max(largest, int(window.max()))) >= size:
        raise ModelError(
            f"{key} has embeddings for {size} tokens, and its tokenizer gives the token {largest}; use the tokenizer "
            "that belongs to the weights"
        )
    ids = window[:, :_NUM_TRIED].to(model.device)
    with must_stay_unchanged(model):
        ran = tried(model, lambda: _run(key, module, ids))
    _check_causal(key, module, ids)
    if _way_of_logits(key, model, ids, ran) == OWN:
        say(
            f"{key} changes its logits after its output head in a way that is not known here: logits=own, they "
            "are taken from its own forward, in its own dtype, which takes longer",
            "warning",
        )


def way_of_logits(model: LoadedModel, window: Tensor) -> str:
    """``head`` where the model's own logits on the first tokens of ``window``, token ids (1, length), are what
    :func:`logits_of` makes of its hidden states, at every position; else ``own``. ModelError where they depend on more.
    """
    key, ids = f"model.path: {model.name}", window[:, :_NUM_TRIED].to(model.device)
    return _way_of_logits(key, model, ids, _run(key, network_of(model.components["model"]), ids))


@dataclass(frozen=True)
class _Ran:
    """One forward on one window, in the model's dtype."""

    hidden: Tensor
    """(1, length, width): what the output head was given."""
    projected: Tensor
    """(1, length, vocabulary): what it made of that."""
    logits: Tensor
    """(1, length, vocabulary)"""


def _run(key: str, module: CausalLM, ids: Tensor) -> _Ran:
    import torch

    caught: list[tuple[Tensor, Tensor]] = []

    def catch(_head: torch.nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        out = out.dequantize() if hasattr(out, "qtype") else out
        caught.append((args[0].detach(), out.detach().clone()))  # the model may change it in place

    hook = module.get_output_embeddings().register_forward_hook(catch)
    try:
        with torch.no_grad():
            logits = module(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    assert logits is not None, "a causal language model returns them"
    if not caught:
        raise ModelError(
            f"{key} makes its logits without running its output embedding, so that its last hidden states cannot be "
            "seen; use another model"
        )
    return _Ran(*caught[-1], logits.detach())


def _check_causal(key: str, module: CausalLM, ids: Tensor) -> None:
    """That other tokens in the second half of a short window move no position of the first."""
    short = ids[:, :_NUM_TOKENS]
    half, other = short.shape[1] // 2, short.clone()
    size = module.get_input_embeddings().weight.shape[0]
    other[:, half:] = (short[:, half:] + 1) % size
    hidden, again = (_run(key, module, given).hidden[:, :half] for given in (short, other))
    moved = (again.float() - hidden.float()).norm() / hidden.float().norm().clamp_min(1e-30)
    if not float(moved) < _HIDDEN_ERROR.get(dtype_name(hidden.dtype), _HIDDEN_ERROR_16_BIT):
        raise ModelError(
            f"{key} is no causal language model: other tokens at the end of a window move the positions before them "
            f"(relative difference {float(moved):.2g}), so it sees the tokens that it would be scored on; set "
            "is_decoder in its config.json, load it as model=encoder, or give the module and its inputs to "
            "quantlab.evaluate in Python"
        )


def _way_of_logits(key: str, model: LoadedModel, ids: Tensor, ran: _Ran) -> str:
    import torch

    eps = torch.finfo(ran.projected.dtype).eps
    rounding = 2 * eps * float(ran.projected.float().abs().nan_to_num(posinf=0.0).max())
    change = with_settings(model)
    # Each of the two ways of rounding in between that models have; where nothing is set, nothing may differ.
    after_head = (change(ran.projected.clone()), change(ran.projected.float().clone()))
    same_after = any(log_prob_error(ran.logits, one) < LOG_PROB_ERROR for one in after_head)
    ours = logits_of(model)(ran.hidden.float())
    if same_after and log_prob_error(after_head[1], ours) < LOG_PROB_ERROR + rounding:
        return HEAD
    again = own_logits(model, ids[0], ran.hidden[0].float())[None]
    if (error := log_prob_error(ran.logits, again)) < LOG_PROB_ERROR:
        return OWN
    raise ModelError(
        f"{key} gives other logits for the same tokens and hidden states when it runs again (a log-probability differs "
        f"by {error:.2g} nats); switch off what is random or remembered in it, or use another model"
    )


def log_prob_error(logits: Tensor, other: Tensor) -> float:
    """The largest difference of a log-probability, in nats; infinite where one alone excludes a token."""
    ours, theirs = logits.float().log_softmax(-1), other.to(logits.device).float().log_softmax(-1)
    return float((ours - theirs).abs().nan_to_num(nan=0.0, posinf=float("inf")).max())
