"""From a language model's last hidden states to its logits, in fp32, with the model's own output head."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from quantlab.models.causal_lm import network_of
from quantlab.models.loaded import LoadedModel
from quantlab.modules.compute_dtype import component_dtype

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig


def text_config(model: LoadedModel) -> PreTrainedConfig:
    return network_of(model.components["model"]).config.get_text_config()


LOGIT_SETTINGS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "final_logit_softcapping": lambda logits, cap: (logits / cap).tanh() * cap,  # Gemma
    "logits_scaling": lambda logits, scale: logits / scale,  # Granite
    "logit_scale": lambda logits, scale: logits * scale,  # Cohere
}
"""Keys of a model's config that change its logits after the output head."""


def logits_of(model: LoadedModel) -> Callable[[Tensor], Tensor]:
    """A function from hidden states (..., width) to fp32 logits (..., vocabulary) with the model's own output head.

    A plain head is applied in fp32 whatever its dtype; a quantized one runs as it is, in the model's dtype.
    """
    import torch

    head, config = network_of(model.components["model"]).get_output_embeddings(), text_config(model)
    weight: Tensor | None = None
    bias: Tensor | None = None
    if type(head) is torch.nn.Linear and type(head.weight) in (torch.nn.Parameter, torch.Tensor):
        weight = head.weight.detach().float() if head.weight.is_floating_point() else None
        bias = head.bias.detach().float() if weight is not None and head.bias is not None else None
    dtype = component_dtype(model.components["model"], model.dtype)
    settings = [
        (fn, getattr(config, name))
        for name, fn in LOGIT_SETTINGS.items()
        if isinstance(getattr(config, name, None), (int, float))
    ]

    def logits(hidden: Tensor) -> Tensor:
        with torch.no_grad():
            if weight is not None:
                out = torch.nn.functional.linear(hidden.to(weight.device), weight, bias)
            else:
                out = head(hidden.to(device=model.device, dtype=dtype))
                out = (out.dequantize() if hasattr(out, "qtype") else out).float()
            for change, value in settings:
                out = change(out, float(value))
            return out

    return logits
