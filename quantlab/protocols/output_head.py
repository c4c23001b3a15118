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
from quantlab.modules.device import kind_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

HEAD, OWN = "head", "own"
_WEIGHTS_AT_ONCE = 2**26
"""Of a head in 16 bit; a larger one is widened in parts of so many, as its whole copy in fp32 may have no room."""


LOGIT_SETTINGS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "final_logit_softcapping": lambda logits, cap: logits.div_(cap).tanh_().mul_(cap),  # Gemma
    "logits_soft_cap": lambda logits, cap: logits.div_(cap).tanh_().mul_(cap),  # RecurrentGemma
    "logits_scaling": lambda logits, scale: logits.div_(scale),  # Granite
    "logit_scale": lambda logits, scale: logits.mul_(scale),  # Cohere
}
"""Keys of a model's config that change its logits, in place, after the output head."""


def with_settings(model: LoadedModel) -> Callable[[Tensor], Tensor]:
    """A function that changes what the output head gave, in place, as the model's config says."""
    config = network_of(model.components["model"]).config.get_text_config()
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
        # one that waits on the host while others run is multiplied where the model runs: sums differ between devices
        is_away = head.weight.device.type == "cpu" and kind_of(model.device) != "cpu"
        where = model.device if is_away else head.weight.device
        if head.weight.is_floating_point():
            weight = head.weight.detach().to(where)
            bias = head.bias.detach().to(where).float() if head.bias is not None else None
            weight = weight.float() if weight.numel() <= _WEIGHTS_AT_ONCE else weight
    dtype = component_dtype(model.components["model"], model.dtype)

    def logits(hidden: Tensor) -> Tensor:
        with torch.no_grad():
            if weight is not None:
                return changed(_widened(hidden.to(weight.device), weight, bias))
            out = head(hidden.to(device=model.device, dtype=dtype))
            return changed((out.dequantize() if hasattr(out, "qtype") else out).float())

    return logits


def _widened(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``linear`` in fp32, a part of the vocabulary after the other."""
    import torch

    out = hidden.new_empty(*hidden.shape[:-1], len(weight), dtype=torch.float32)
    step = max(1, _WEIGHTS_AT_ONCE // weight.shape[1])
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        own = None if bias is None else bias[part]
        out[..., part] = torch.nn.functional.linear(hidden, weight[part].float(), own)
    return out


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
