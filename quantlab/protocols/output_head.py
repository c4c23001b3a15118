"""From a language model's last hidden states to its logits.

In one of two ways. ``head``: its output head in fp32, and the settings of :data:`LOGIT_SETTINGS`; 16-bit logits would
inflate divergences. ``own``: the model's own forward, for models that make their logits otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from quantlab.models.causal_lm import network_of
from quantlab.models.loaded import LoadedModel
from quantlab.modules.compute_dtype import component_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedConfig

HEAD, OWN = "head", "own"


def text_config(model: LoadedModel) -> PreTrainedConfig:
    return network_of(model.components["model"]).config.get_text_config()


LOGIT_SETTINGS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "final_logit_softcapping": lambda logits, cap: logits.div_(cap).tanh_().mul_(cap),  # Gemma
    "logits_soft_cap": lambda logits, cap: logits.div_(cap).tanh_().mul_(cap),  # RecurrentGemma
    "logits_scaling": lambda logits, scale: logits.div_(scale),  # Granite
    "logit_scale": lambda logits, scale: logits.mul_(scale),  # Cohere
}
"""Keys of a model's config that change its logits, in place, after the output head."""


def with_settings(model: LoadedModel) -> Callable[[Tensor], Tensor]:
    """A function that changes what the output head gave, in place, as the model's config says."""
    config = text_config(model)
    settings = [
        (change, float(value))
        for name, change in LOGIT_SETTINGS.items()
        if isinstance(value := getattr(config, name, None), (int, float))
    ]

    def changed(logits: Tensor) -> Tensor:
        for change, value in settings:
            logits = change(logits, value)
        return logits

    return changed


def logits_of(model: LoadedModel) -> Callable[[Tensor], Tensor]:
    """A function from hidden states (..., width) to fp32 logits (..., vocabulary) with the model's own output head.

    A plain head is applied in fp32 whatever its dtype; a quantized one runs as it is, in the model's dtype.
    """
    import torch

    head, changed = network_of(model.components["model"]).get_output_embeddings(), with_settings(model)
    weight: Tensor | None = None
    bias: Tensor | None = None
    if type(head) is torch.nn.Linear and type(head.weight) in (torch.nn.Parameter, torch.Tensor):
        weight = head.weight.detach().float() if head.weight.is_floating_point() else None
        bias = head.bias.detach().float() if weight is not None and head.bias is not None else None
    dtype = component_dtype(model.components["model"], model.dtype)

    def logits(hidden: Tensor) -> Tensor:
        with torch.no_grad():
            if weight is not None:
                return changed(torch.nn.functional.linear(hidden.to(weight.device), weight, bias))
            out = head(hidden.to(device=model.device, dtype=dtype))
            return changed((out.dequantize() if hasattr(out, "qtype") else out).float())

    return logits


def own_logits(model: LoadedModel, ids: Tensor, hidden: Tensor) -> Tensor:
    """fp32 logits (length, vocabulary) of the model's own forward on one window, in the model's dtype until its end.

    ``ids`` are the window's tokens (length,), ``hidden`` (length, width) what its head was given when the window ran in
    some batch: the head gets it again, so that the logits are those of that run.
    """
    import torch

    module = network_of(model.components["model"])

    def replace(_head: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (hidden[None].to(args[0]), *args[1:])

    hook = module.get_output_embeddings().register_forward_pre_hook(replace)
    try:
        with torch.no_grad():
            logits = module(input_ids=ids[None].to(model.device), use_cache=False).logits
    finally:
        hook.remove()
    assert logits is not None, "a causal language model returns them"
    return logits[0].detach().float()


LogitsByParts = Callable[["Tensor", "Tensor", Sequence[slice]], Iterator["Tensor"]]
"""(token ids (length,), hidden states (length, width), parts of the positions) -> fp32 logits of one part after the
other."""


def logits_by_parts(model: LoadedModel, way: str) -> LogitsByParts:
    """Logits of a window's parts, made ``way`` (``head`` or ``own``) when they are asked for.

    ``head`` has one part's in memory, ``own`` the whole window's.
    """
    if way == HEAD:
        head = logits_of(model)
        return lambda ids, hidden, parts: (head(hidden[part]) for part in parts)

    def own(ids: Tensor, hidden: Tensor, parts: Sequence[slice]) -> Iterator[Tensor]:
        logits = own_logits(model, ids, hidden)
        yield from (logits[part] for part in parts)

    return own
