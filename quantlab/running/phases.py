"""The phases of a run and what lies on the device and on the host in each: weights exactly, activations estimated.

``resident``: the reference stays on the device, and a copy of the component is quantized beside it.
``streamed``: the reference stays, and a candidate's layers come from the checkpoint's files, one by one: no copy.
``alone``: a pipeline is loaded on the host, and each part lies on the device only while it works: one encoder after the
other, the reference's denoiser, a candidate that is streamed, and the decoder, for which a candidate waits on the host
(on a CPU, which has no other place, it stays).
``group_offload``: the unquantized model lies on the host, and its layers are on the device in groups; with a candidate,
which is streamed, the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from quantlab.models.outline import Outline
from quantlab.modules.groups import most_bytes
from quantlab.modules.remembered import remembered
from quantlab.modules.residence import moves
from quantlab.vocabulary.prices import ComponentPrice, Phase
from quantlab.vocabulary.schema import EvaluationConfig
from quantlab.vocabulary.sizes import item_bytes

if TYPE_CHECKING:
    from torch import nn

_WIDEST, _ORDINARY = 2, 7
"""Tensors that a transformer's block holds at once: of its widest layer's inputs, and of its own width. FLUX.1 at 1024
pixels: 0.448 GiB by this, 0.453 GiB by torch's MemTracker."""
_UNET_TENSORS = 12
"""Tensors of the first block's size that a UNet holds, with the skips that wait for the way up; SDXL at 1024 pixels
with guidance: 241 MB (MixDQ, arXiv 2405.17873)."""
_DECODER_TENSORS = 10
"""Tensors of the image's size and the decoder's first width. For the decoders of FLUX.1, Stable Diffusion 3.5 and XL
torch had 2.42 GiB allocated at 1024 pixels on an H200, 9.7 of these; its MemTracker counts 6, without cuDNN's."""
_SCORE_BYTES = 10
"""Of attention by plain products: torch holds two matrices of scores in float32, and scaled inputs; 9.2 to 10.1 by its
allocator."""
_LOOKED_AT = 3
"""How often its activations a denoiser holds while its layers are looked at, which are then there in float32, too. SDXL
at 1024 pixels on an H200: 2.4 times while it was calibrated, 2.9 and 3.1 while errors were measured."""
_PROMPT_TOKENS = 512
_SIDE = 1024


def phases(
    outline: Outline,
    prices: Sequence[ComponentPrice],
    evaluation: EvaluationConfig,
    needed_data: str,
    device_bytes: int,
    device: str,
    plain_attention: bool = False,
    is_looked_at: bool = False,
) -> dict[str, tuple[Phase, ...]]:
    """Placement -> its phases on ``device``. ``needed_data`` as :func:`quantlab.planning.placing.needs_of` says;
    ``device_bytes`` is the budget, 0 for none; ``plain_attention``: by no fused kernel; ``is_looked_at``: the errors of
    calibrated layers are measured, beside those of the plain algorithm."""
    told, needs_data = {p.name: p for p in prices}, bool(needed_data)
    needed = activations(outline, evaluation, plain_attention)
    active, decoding, reading = needed.running, needed.decoding, needed.reading
    modules = outline.components
    if not outline.denoiser:
        most = max(most_bytes(m) for m in modules.values())
        return _language(told, active, needed_data, most, sum(map(_head_bytes, modules.values())), is_looked_at)
    every = sum(p.original_bytes for p in prices)
    encoders = [p for p in prices if _is_encoder(p.name)]
    rest = [p for p in prices if not _is_encoder(p.name) and p.name != "vae"]
    decoder = told["vae"].memory.weights_bytes if "vae" in told else 0
    copied = sum(p.original_bytes for p in prices if p.scheme)
    made = sum(p.memory.weights_bytes for p in prices if p.scheme)
    layer = max((p.quantizing_bytes for p in prices if p.scheme), default=0)
    called = active + max((p.unpacked_bytes for p in prices if p.scheme), default=0)
    schemed = {p.name for p in prices if p.scheme}
    largest = max((p.original_bytes for p in rest), default=0)
    looked, evident = looking(outline, active), is_looked_at and needs_data and copied
    together = every + copied if copied else every
    found = {
        "resident": _made(
            ("encode prompts", every, reading),
            ("reference", every, max(active, decoding)),
            *([("calibrate", together, looked)] if needs_data and copied else []),
            *([("quantize", together + layer, 0)] if copied else []),
            *([("evidence", every + 2 * made, looked)] if evident else []),
            ("evaluate", every + made, called),
            ("decode", every + made, decoding),
        ),
        "streamed": _made(
            ("encode prompts", every, reading),
            ("reference", every, max(active, decoding)),
            *([("quantize", every + made + layer, 0)] if copied else []),
            ("evaluate", every + made, called),
            ("decode", every + made, decoding),
        ),
    }
    read = max((p.original_bytes for p in encoders), default=0)
    group = {name: most_bytes(module) for name, module in modules.items() if name != "vae"}
    ends: tuple[tuple[str, int, int], ...]
    if moves(device):  # candidates' parts take turns with the others, and are all there between two batches
        own = {p.name: p.memory.weights_bytes if p.scheme else p.original_bytes for p in prices}
        works = max((own[p.name] for p in rest), default=0)
        ends = (
            *([("quantize", made + layer, 0)] if copied else []),
            ("evaluate", max(made - called, works), called),
            ("decode", own.get("vae", 0), decoding),
        )
    else:
        others = [p.original_bytes for p in rest if p.name not in schemed]
        reading_with = [p.original_bytes for p in encoders if p.name not in schemed]
        is_read = any(p.name in schemed for p in encoders)
        read = max(read, made + max(reading_with, default=0)) if is_read else read
        ends = (
            *([("quantize", made + layer, 0)] if copied else []),
            ("evaluate", made + max(others, default=0), called),
            ("decode", made + (decoder if "vae" not in schemed else 0), decoding),
        )
    loading = Phase(name="load", device_bytes=0, host_bytes=every, activation_bytes=0)
    first = (loading, *_made(("encode prompts", read, reading)))
    if evident:
        ends = (ends[0], ("evidence", copied + 2 * made, looked), *ends[1:])
    *before, last = _made(*ends)
    waits = made - (told["vae"].memory.weights_bytes if "vae" in schemed else 0) if moves(device) else 0
    after = (*before, replace(last, host_bytes=waits))
    if needs_data and copied:
        found["alone"] = (*first, *_made(("reference", largest, active), ("calibrate", 2 * copied, looked)), *after)
    else:
        found["alone"] = (*first, *_made(("reference", largest, active)), *after)
    if device_bytes and largest + active > device_bytes:
        unquantized = [name for name in group if name not in schemed]
        reads = max((size for name, size in group.items() if _is_encoder(name)), default=0)
        works = max((size for name, size in group.items() if not _is_encoder(name)), default=0)
        beside = max((group[name] for name in unquantized if not _is_encoder(name)), default=0)
        with_decoder = made + (decoder if "vae" not in schemed else 0)
        rows = _made(
            ("encode prompts", decoder + reads, reading),
            ("reference", decoder + works, active),
            *([("calibrate", decoder + works, looked)] if needs_data and copied else []),
            *([("quantize", decoder + made + layer, 0)] if copied else []),
            *([("evidence", decoder + works + 2 * made, looked)] if evident else []),
            ("evaluate", with_decoder + beside, called),
            ("decode", with_decoder, decoding),
        )
        found["group_offload"] = (loading, *(replace(row, host_bytes=every - decoder) for row in rows))
    return _possible(found, needed_data)


def _language(
    told: Mapping[str, ComponentPrice], active: int, needed_data: str, most: int, head: int, is_looked_at: bool
) -> dict[str, tuple[Phase, ...]]:
    before, after = sum(p.original_bytes for p in told.values()), sum(p.memory.weights_bytes for p in told.values())
    layer = max((p.quantizing_bytes for p in told.values()), default=0)
    is_quantized = any(p.scheme for p in told.values())
    beside = before if is_quantized else 0
    resident = _made(
        ("reference", before, active),
        *([("calibrate", before + beside, active)] if needed_data else []),
        *([("quantize", before + beside + layer, 0)] if is_quantized else []),
        *([("evidence", before + 2 * after, active)] if needed_data and is_looked_at else []),
        ("evaluate", before + (after if is_quantized else 0), active),
    )
    streamed = _made(
        ("reference", before, active),
        *([("quantize", before + after + layer, 0)] if is_quantized else []),
        ("evaluate", before + (after if is_quantized else 0), active),
    )
    grouped = _made(
        ("reference", most, active),
        *([("calibrate", most, active)] if needed_data else []),
        *([("quantize", after + layer, 0)] if is_quantized else []),
        *([("evidence", most + 2 * after, active)] if needed_data and is_looked_at else []),
        # the reference's head, by which its logits are made again; what is not quantized runs in groups, too
        ("evaluate", (after if is_quantized else most) + head, active),
    )
    on_host = tuple(replace(row, host_bytes=before) for row in grouped)
    found = {"resident": resident, "streamed": streamed, "group_offload": on_host}
    return _possible(found, needed_data)


def looking(outline: Outline, active: int) -> int:
    """Bytes of activations while a model's layers are looked at: to calibrate them, to measure their errors."""
    return _LOOKED_AT * active if outline.denoiser else active


def _head_bytes(module: nn.Module) -> int:
    """Of what makes a language model's logits; 0 for another model."""
    find = getattr(module, "get_output_embeddings", None)
    head = None if find is None else find()
    return 0 if head is None else sum(p.nbytes for p in head.parameters())


def _possible(found: dict[str, tuple[Phase, ...]], needed_data: str) -> dict[str, tuple[Phase, ...]]:
    """What is calibrated needs the whole model, so it is not streamed; what looks at layers' inputs alone may see them
    in groups."""
    left = {"": (), "inputs": ("streamed",), "data": ("streamed", "group_offload")}[needed_data]
    return {name: rows for name, rows in found.items() if name not in left}


def _made(*rows: tuple[str, int, int]) -> tuple[Phase, ...]:
    return tuple(
        Phase(name=name, device_bytes=weights + active, host_bytes=0, activation_bytes=active)
        for name, weights, active in rows
    )


def _is_encoder(name: str) -> bool:
    return name.startswith(("text_encoder", "image_encoder"))


# -- activations


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes that a model's parts hold beside their weights, estimated; a model of one part is only running."""

    running: int
    decoding: int = 0
    reading: int = 0
    """Encoding prompts."""


def activations(outline: Outline, evaluation: EvaluationConfig, plain_attention: bool = False) -> Activations:
    """What a model holds while it works, in its dtype."""
    item, modules = item_bytes(outline.dtype), outline.components
    if not outline.denoiser:
        module = modules[outline.quantized[0]]
        scores = _language_scores(module, evaluation) if plain_attention else 0
        return Activations(running=_language_activations(module, evaluation, item) + scores)
    widest = max((_widths(m)[0] for n, m in modules.items() if _is_encoder(n)), default=0)
    scores = _denoiser_scores(modules, outline.denoiser, evaluation) if plain_attention else 0
    return Activations(
        running=_denoiser_activations(modules, outline.denoiser, evaluation, item) + scores,
        decoding=_decoder_activations(modules.get("vae"), evaluation, item),
        reading=_PROMPT_TOKENS * (_WIDEST + _ORDINARY) * widest * item,
    )


@remembered
def _widths(module: nn.Module) -> tuple[int, int]:
    """(inputs of the widest Linear layer in a block, inputs of most of them)."""
    from torch import nn

    widths = [p.in_features for n, p in module.named_modules() if isinstance(p, nn.Linear) and _in_block(n)]
    return (max(widths), max(set(widths), key=widths.count)) if widths else (0, 0)


def _in_block(path: str) -> bool:
    return any(part.isdigit() for part in path.split("."))


def _token_activations(module: nn.Module, tokens: int, item: int) -> int:
    widest, ordinary = _widths(module)
    return tokens * (_WIDEST * widest + _ORDINARY * ordinary) * item


def _language_activations(module: nn.Module, evaluation: EvaluationConfig, item: int) -> int:
    words = int(getattr(getattr(module, "config", None), "vocab_size", 0) or 0)
    logits = evaluation.context_length * words  # of one text at a time, whatever the batch
    by_both = 2 * (item + 4)  # as the reference and the candidate give them, and in float32
    return _token_activations(module, evaluation.batch_size * evaluation.context_length, item) + logits * by_both


def _language_scores(module: nn.Module, evaluation: EvaluationConfig) -> int:
    config = getattr(module, "config", None)
    told = getattr(config, "get_text_config", lambda: config)()
    heads = int(getattr(told, "num_attention_heads", 0) or 0)
    return evaluation.batch_size * heads * evaluation.context_length**2 * _SCORE_BYTES


def _denoiser_scores(modules: Mapping[str, nn.Module], denoiser: str, evaluation: EvaluationConfig) -> int:
    module = modules[denoiser]
    if not hasattr(module, "down_blocks"):
        heads = int(_config(module, "num_attention_heads", None) or _config(module, "num_heads", 1))
        return evaluation.batch_size * heads * _tokens(modules, denoiser, evaluation) ** 2 * _SCORE_BYTES
    area, rows = _area(modules, denoiser, evaluation), 2 * evaluation.batch_size
    each = (rows * heads * (area // 4**level) ** 2 * _SCORE_BYTES for level, heads in _heads(module))
    return max(each, default=0)


def _heads(unet: Any) -> list[tuple[int, int]]:
    """(How often sides are halved before it, heads) of each block of a UNet that has attention."""
    kinds = list(_config(unet, "down_block_types", ()))
    said = _config(unet, "num_attention_heads", None) or _config(unet, "attention_head_dim", 8)
    each = list(said) if isinstance(said, (list, tuple)) else [said] * len(kinds)
    return [(i, int(n)) for i, (kind, n) in enumerate(zip(kinds, each, strict=False)) if "Attn" in kind and n]


def _config(module: Any, name: str, default: Any) -> Any:
    found: Any = getattr(module, "config", None)
    value = found.get(name, default) if isinstance(found, Mapping) else getattr(found, name, default)
    return default if value is None else value


def _scale(vae: Any) -> int:
    """Pixels of a side that become one latent."""
    spatial = _config(vae, "scale_factor_spatial", 0)
    return int(spatial) if spatial else 2 ** max(len(_config(vae, "block_out_channels", (0, 0, 0, 0))) - 1, 0)


def _sides(modules: Mapping[str, nn.Module], denoiser: str, evaluation: EvaluationConfig) -> tuple[int, int]:
    side = _config(modules[denoiser], "sample_size", 0)
    default = int(side) * _scale(modules["vae"]) if isinstance(side, int) and side and "vae" in modules else _SIDE
    return evaluation.height or default, evaluation.width or default


def _denoiser_activations(
    modules: Mapping[str, nn.Module], denoiser: str, evaluation: EvaluationConfig, item: int
) -> int:
    module, is_of_pixels = modules[denoiser], "vae" not in modules
    if hasattr(module, "down_blocks") and not is_of_pixels:
        first = int(_config(module, "block_out_channels", (320,))[0])
        return 2 * evaluation.batch_size * _area(modules, denoiser, evaluation) * first * _UNET_TENSORS * item
    tokens = _tokens(modules, denoiser, evaluation)
    return _token_activations(module, (2 if is_of_pixels else 1) * evaluation.batch_size * tokens, item)


def _area(modules: Mapping[str, nn.Module], denoiser: str, evaluation: EvaluationConfig) -> int:
    """Of what is denoised, in latents; or in the model's own pixels."""
    if "vae" not in modules:
        return int(_config(modules[denoiser], "sample_size", 8)) ** 2
    height, width = _sides(modules, denoiser, evaluation)
    scale = _scale(modules["vae"])
    return (height // scale) * (width // scale)


def _tokens(modules: Mapping[str, nn.Module], denoiser: str, evaluation: EvaluationConfig) -> int:
    """That a transformer denoises at once of one sample."""
    module, vae, area = modules[denoiser], modules.get("vae"), _area(modules, denoiser, evaluation)
    if vae is None:
        return area
    latent = int(_config(vae, "latent_channels", 0) or _config(vae, "z_dim", 0))
    packs = latent and int(_config(module, "in_channels", latent)) >= 4 * latent
    patch = _config(module, "patch_size", 1)
    unit = 2 if packs else int(patch[-1] if isinstance(patch, (list, tuple)) else patch)
    return area // (unit * unit) + _PROMPT_TOKENS


def _decoder_activations(vae: Any, evaluation: EvaluationConfig, item: int) -> int:
    if vae is None:
        return 0
    height, width = _tile(vae, evaluation.height or _SIDE, evaluation.width or _SIDE, evaluation.tiled_decoding)
    pixels = height * width
    widths = _config(vae, "block_out_channels", None)
    first = int(widths[0] if widths else _config(vae, "decoder_base_dim", None) or _config(vae, "base_dim", 128))
    return pixels * first * _DECODER_TENSORS * item


def _tile(vae: Any, height: int, width: int, tiled: bool) -> tuple[int, int]:
    """The pixels that are decoded at once, by the sizes from which the decoder cuts what it decodes."""
    if not tiled:
        return height, width
    size = getattr(vae, "tile_sample_min_size", None)
    sides = (getattr(vae, f"tile_sample_min_{side}", None) or size for side in ("height", "width"))
    tile_height, tile_width = sides
    return min(height, int(tile_height or height)), min(width, int(tile_width or width))
