"""What is left out of a model by default, by what it is: the same from the command line and from Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_UNET = ("conv_in", "conv_out", "time_embedding", "add_embedding", "*.time_emb_proj")
_MMDIT = ("x_embedder", "context_embedder", "time_text_embed", "norm_out", "proj_out")
FAMILY_EXCLUSIONS: dict[str, tuple[str, ...]] = {
    # The way in, the way out and the conditioning on time: every pixel of every step passes them, and they hold below
    # 1 % of a DiT's weights. SVDQuant (arXiv 2411.05007), the GGUF files in circulation and ModelOpt's recipes keep
    # them in 16 bits as well. The modulation layers inside the blocks (a quarter of Flux) are quantized.
    "FluxTransformer2DModel": _MMDIT,
    "ChromaTransformer2DModel": (
        "x_embedder",
        "context_embedder",
        "time_text_embed",
        "distilled_guidance_layer",
        "norm_out",
        "proj_out",
    ),
    "SD3Transformer2DModel": ("pos_embed", "context_embedder", "time_text_embed", "norm_out", "proj_out"),
    "AuraFlowTransformer2DModel": ("pos_embed", "context_embedder", "time_step_proj", "norm_out", "proj_out"),
    "SanaTransformer2DModel": ("patch_embed", "caption_projection", "time_embed", "proj_out"),
    # A UNet's time projections sit in every residual block; ModelOpt's diffusion recipes leave them out.
    "UNet2DConditionModel": _UNET,
}
_OUTSIDE = 0.1
"""Most that stands outside of the blocks and is left out for that, as a share of the weights."""


def default_exclusions(module: nn.Module, own: Sequence[str] = (), *, is_denoiser: bool = False) -> tuple[str, ...]:
    """Entries of ``modules_to_not_convert`` for a module: what its class has, its output head, and ``own``.

    Of a denoiser whose class has none: what stands outside of its blocks.
    """
    head = output_head(module)
    family = FAMILY_EXCLUSIONS.get(type(module).__name__)
    if family is None:
        family = _outside_blocks(module) if is_denoiser else ()
    return tuple(dict.fromkeys((*family, *([head] if head else []), *own)))


def _outside_blocks(module: nn.Module) -> tuple[str, ...]:
    """The parts with Linear layers and no list of blocks: the way in, the way out, the conditioning on time.

    None where they hold more than a tenth of the weights.
    """
    from torch import nn

    kinds = {name: list(part.modules()) for name, part in module.named_children()}
    found = {
        name: sum(p.numel() for p in module.get_submodule(name).parameters())
        for name, parts in kinds.items()
        if any(isinstance(p, nn.Linear) for p in parts) and not any(isinstance(p, nn.ModuleList) for p in parts)
    }
    return tuple(found) if sum(found.values()) <= _OUTSIDE * sum(p.numel() for p in module.parameters()) else ()


def output_head(module: nn.Module) -> str:
    """Path of the layer that turns hidden states into logits, as the classes of transformers name it; "" for none."""
    find = getattr(module, "get_output_embeddings", None)
    head = find() if callable(find) else None
    return next((name for name, part in module.named_modules() if part is head and name), "")


def beside_the_language_model(model: Any) -> list[str]:
    """Paths of the parts of a multimodal model that text does not reach: its towers, and what joins them to it.

    Of one that reads and writes (T5Gemma 2) they are in its encoder, beside what encodes text.
    """
    if model.config.get_text_config() is model.config:
        return []
    is_pair = getattr(model.config, "is_encoder_decoder", False)
    whole: nn.Module = model.get_encoder() if is_pair else model
    reader: nn.Module = getattr(whole, "text_model", whole) if is_pair else model.get_decoder()
    text, inside = ({id(part) for part in these.modules()} for these in (reader, whole))
    found: list[str] = []
    for name, part in model.named_modules():
        is_beside = id(part) in inside and not any(id(inner) in text for inner in part.modules())
        if name and is_beside and not name.startswith(tuple(f"{path}." for path in found)):
            found.append(name)
    return found
