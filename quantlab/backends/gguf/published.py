"""Under which names the weights of diffusion models are published, from Diffusers' own: what ``from_single_file`` and
ComfyUI-GGUF read.

Rules are the inverse of Diffusers' converters. Where published files keep several matrices as one (queries, keys,
values), rows are put under one another; Flux and SD 3 keep shift before scale where Diffusers keeps scale before shift.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One tensor of the file."""

    sources: tuple[str, ...]
    """Names in Diffusers, whose rows lie under one another."""
    swapped: bool = False
    """The halves of its rows change places."""


Rule = tuple[str, str]
"""A pattern for a whole name, and the published name; ``<0>`` behind it: the first of several, ``<swap>``: swapped."""


def _attention(prefix: str, inner: str, outer: str, names: tuple[str, ...]) -> list[Rule]:
    """Queries, keys, values (and more) of ``prefix`` as one matrix of ``outer``."""
    return [(rf"{prefix}{inner}{name}\.(weight|bias)", rf"{outer}.\2<{i}>") for i, name in enumerate(names)]


_TIME = r"time_text_embed\.{0}\.linear_{1}\.(weight|bias)"
_FLUX_BLOCK, _FLUX_SINGLE = r"transformer_blocks\.(\d+)\.", r"single_transformer_blocks\.(\d+)\."
_FLUX: list[Rule] = [
    *((_TIME.format(a, n), rf"{b}.{layer}.\1") for a, b in (
        ("timestep_embedder", "time_in"), ("text_embedder", "vector_in"), ("guidance_embedder", "guidance_in"),
    ) for n, layer in ((1, "in_layer"), (2, "out_layer"))),
    (r"context_embedder\.(weight|bias)", r"txt_in.\1"),
    (r"x_embedder\.(weight|bias)", r"img_in.\1"),
    (rf"{_FLUX_BLOCK}norm1\.linear\.(\w+)", r"double_blocks.\1.img_mod.lin.\2"),
    (rf"{_FLUX_BLOCK}norm1_context\.linear\.(\w+)", r"double_blocks.\1.txt_mod.lin.\2"),
    *_attention(_FLUX_BLOCK, r"attn\.", r"double_blocks.\1.img_attn.qkv", ("to_q", "to_k", "to_v")),
    *_attention(_FLUX_BLOCK, r"attn\.", r"double_blocks.\1.txt_attn.qkv", ("add_q_proj", "add_k_proj", "add_v_proj")),
    (rf"{_FLUX_BLOCK}attn\.norm_q\.weight", r"double_blocks.\1.img_attn.norm.query_norm.scale"),
    (rf"{_FLUX_BLOCK}attn\.norm_k\.weight", r"double_blocks.\1.img_attn.norm.key_norm.scale"),
    (rf"{_FLUX_BLOCK}attn\.norm_added_q\.weight", r"double_blocks.\1.txt_attn.norm.query_norm.scale"),
    (rf"{_FLUX_BLOCK}attn\.norm_added_k\.weight", r"double_blocks.\1.txt_attn.norm.key_norm.scale"),
    (rf"{_FLUX_BLOCK}ff\.net\.0\.proj\.(\w+)", r"double_blocks.\1.img_mlp.0.\2"),
    (rf"{_FLUX_BLOCK}ff\.net\.2\.(\w+)", r"double_blocks.\1.img_mlp.2.\2"),
    (rf"{_FLUX_BLOCK}ff_context\.net\.0\.proj\.(\w+)", r"double_blocks.\1.txt_mlp.0.\2"),
    (rf"{_FLUX_BLOCK}ff_context\.net\.2\.(\w+)", r"double_blocks.\1.txt_mlp.2.\2"),
    (rf"{_FLUX_BLOCK}attn\.to_out\.0\.(\w+)", r"double_blocks.\1.img_attn.proj.\2"),
    (rf"{_FLUX_BLOCK}attn\.to_add_out\.(\w+)", r"double_blocks.\1.txt_attn.proj.\2"),
    (rf"{_FLUX_SINGLE}norm\.linear\.(\w+)", r"single_blocks.\1.modulation.lin.\2"),
    *_attention(_FLUX_SINGLE, "", r"single_blocks.\1.linear1",
                (r"attn\.to_q", r"attn\.to_k", r"attn\.to_v", "proj_mlp")),
    (rf"{_FLUX_SINGLE}attn\.norm_q\.weight", r"single_blocks.\1.norm.query_norm.scale"),
    (rf"{_FLUX_SINGLE}attn\.norm_k\.weight", r"single_blocks.\1.norm.key_norm.scale"),
    (rf"{_FLUX_SINGLE}proj_out\.(\w+)", r"single_blocks.\1.linear2.\2"),
    (r"proj_out\.(weight|bias)", r"final_layer.linear.\1"),
    (r"norm_out\.linear\.(weight|bias)", r"final_layer.adaLN_modulation.1.\1<swap>"),
]  # fmt: skip

_SD3_BLOCK = r"transformer_blocks\.(\d+)\."
_QKV = ("to_q", "to_k", "to_v")
_SD3: list[Rule] = [
    (r"pos_embed\.pos_embed", "pos_embed"),
    (r"pos_embed\.proj\.(\w+)", r"x_embedder.proj.\1"),
    *((_TIME.format(a, n), rf"{b}.mlp.{layer}.\1") for a, b in (
        ("timestep_embedder", "t_embedder"), ("text_embedder", "y_embedder"),
    ) for n, layer in ((1, 0), (2, 2))),
    (r"context_embedder\.(\w+)", r"context_embedder.\1"),
    *_attention(_SD3_BLOCK, r"attn\.", r"joint_blocks.\1.x_block.attn.qkv", _QKV),
    *_attention(_SD3_BLOCK, r"attn2\.", r"joint_blocks.\1.x_block.attn2.qkv", _QKV),
    *_attention(_SD3_BLOCK, r"attn\.", r"joint_blocks.\1.context_block.attn.qkv",
                ("add_q_proj", "add_k_proj", "add_v_proj")),
    (rf"{_SD3_BLOCK}(attn2?)\.norm_([qk])\.weight", r"joint_blocks.\1.x_block.\2.ln_\3.weight"),
    (rf"{_SD3_BLOCK}attn\.norm_added_([qk])\.weight", r"joint_blocks.\1.context_block.attn.ln_\2.weight"),
    (rf"{_SD3_BLOCK}(attn2?)\.to_out\.0\.(\w+)", r"joint_blocks.\1.x_block.\2.proj.\3"),
    (rf"{_SD3_BLOCK}attn\.to_add_out\.(\w+)", r"joint_blocks.\1.context_block.attn.proj.\2"),
    (rf"{_SD3_BLOCK}norm1\.linear\.(\w+)", r"joint_blocks.\1.x_block.adaLN_modulation.1.\2"),
    (rf"{_SD3_BLOCK}norm1_context\.linear\.(\w+)", r"joint_blocks.\1.context_block.adaLN_modulation.1.\2<last>"),
    (rf"{_SD3_BLOCK}ff\.net\.0\.proj\.(\w+)", r"joint_blocks.\1.x_block.mlp.fc1.\2"),
    (rf"{_SD3_BLOCK}ff\.net\.2\.(\w+)", r"joint_blocks.\1.x_block.mlp.fc2.\2"),
    (rf"{_SD3_BLOCK}ff_context\.net\.0\.proj\.(\w+)", r"joint_blocks.\1.context_block.mlp.fc1.\2"),
    (rf"{_SD3_BLOCK}ff_context\.net\.2\.(\w+)", r"joint_blocks.\1.context_block.mlp.fc2.\2"),
    (r"proj_out\.(\w+)", r"final_layer.linear.\1"),
    (r"norm_out\.linear\.(\w+)", r"final_layer.adaLN_modulation.1.\1<swap>"),
]  # fmt: skip

_WAN_BLOCK = r"(blocks\.\d+\.)"
_WAN: list[Rule] = [
    (r"condition_embedder\.time_embedder\.linear_1\.(\w+)", r"time_embedding.0.\1"),
    (r"condition_embedder\.time_embedder\.linear_2\.(\w+)", r"time_embedding.2.\1"),
    (r"condition_embedder\.text_embedder\.linear_1\.(\w+)", r"text_embedding.0.\1"),
    (r"condition_embedder\.text_embedder\.linear_2\.(\w+)", r"text_embedding.2.\1"),
    (r"condition_embedder\.time_proj\.(\w+)", r"time_projection.1.\1"),
    (r"condition_embedder\.image_embedder\.norm1\.(\w+)", r"img_emb.proj.0.\1"),
    (r"condition_embedder\.image_embedder\.ff\.net\.0\.proj\.(\w+)", r"img_emb.proj.1.\1"),
    (r"condition_embedder\.image_embedder\.ff\.net\.2\.(\w+)", r"img_emb.proj.3.\1"),
    (r"condition_embedder\.image_embedder\.norm2\.(\w+)", r"img_emb.proj.4.\1"),
    *((rf"{_WAN_BLOCK}{a}\.{c}\.(\w+)", rf"\1{b}.{d}.\2") for a, b in (("attn1", "self_attn"), ("attn2", "cross_attn"))
      for c, d in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), (r"to_out\.0", "o"), ("add_k_proj", "k_img"),
                   ("add_v_proj", "v_img"), ("norm_added_k", "norm_k_img"), ("norm_q", "norm_q"),
                   ("norm_k", "norm_k"))),
    (rf"{_WAN_BLOCK}scale_shift_table", r"\1modulation"),
    (rf"{_WAN_BLOCK}ffn\.net\.0\.proj\.(\w+)", r"\1ffn.0.\2"),
    (rf"{_WAN_BLOCK}ffn\.net\.2\.(\w+)", r"\1ffn.2.\2"),
    (rf"{_WAN_BLOCK}norm2\.(\w+)", r"\1norm3.\2"),
    (rf"{_WAN_BLOCK}norm3\.(\w+)", r"\1norm2.\2"),
    (r"scale_shift_table", r"head.modulation"),
    (r"proj_out\.(\w+)", r"head.head.\1"),
    (r"(patch_embedding\.\w+)", r"\1"),
]  # fmt: skip

_Z_IMAGE: list[Rule] = [
    (r"all_final_layer\.2-1\.(.+)", r"final_layer.\1"),
    (r"all_x_embedder\.2-1\.(.+)", r"x_embedder.\1"),
    *_attention(r"(.+)\.", r"attention\.", r"\1.attention.qkv", _QKV),
    (r"(.+)\.attention\.to_out\.0\.(\w+)", r"\1.attention.out.\2"),
    (r"(.+)\.attention\.norm_([qk])\.weight", r"\1.attention.\2_norm.weight"),
    (r"(.+)", r"\1"),
]
_SAME: list[Rule] = [(r"(.+)", r"\1")]

_FAMILIES: dict[str, tuple[str, list[Rule]]] = {
    "FluxTransformer2DModel": ("flux", _FLUX),
    "SD3Transformer2DModel": ("sd3", _SD3),
    "WanTransformer3DModel": ("wan", _WAN),
    "ZImageTransformer2DModel": ("lumina2", _Z_IMAGE),
    "QwenImageTransformer2DModel": ("qwen_image", _SAME),
}
"""Class of Diffusers -> ``general.architecture`` by which ComfyUI-GGUF knows it, and the rules of its names."""
_UNET = "UNet2DConditionModel"


def architecture(kind: str, config: Mapping[str, Any]) -> str:
    """``general.architecture`` of a class of Diffusers; ``diffusers`` for one that ComfyUI-GGUF has no word for."""
    if kind == _UNET:
        return "sdxl" if config.get("addition_embed_type") == "text_time" else "sd1"
    return _FAMILIES[kind][0] if kind in _FAMILIES else "diffusers"


def published_names(kind: str, names: Iterable[str], config: Mapping[str, Any]) -> dict[str, Piece] | None:
    """Published name -> of which tensors of Diffusers it is made; None where a name has none, or the class."""
    listed = list(names)
    rules = _unet_rules(config) if kind == _UNET else _FAMILIES.get(kind, ("", []))[1]
    last = max((int(m[1]) for n in listed if (m := re.match(r"transformer_blocks\.(\d+)\.", n))), default=-1)
    parts: dict[str, dict[int, str]] = {}
    swapped = set()
    for name in listed:
        told = _told(name, rules)
        if told is None:
            return None
        target, _, mark = told.partition("<")
        mark = mark.rstrip(">")
        if mark == "swap" or (mark == "last" and name.startswith(f"transformer_blocks.{last}.")):
            swapped.add(target)
        parts.setdefault(target, {})[int(mark) if mark.isdigit() else 0] = name
    return {
        target: Piece(sources=tuple(found[i] for i in sorted(found)), swapped=target in swapped)
        for target, found in parts.items()
    }


def _told(name: str, rules: Iterable[Rule]) -> str | None:
    for pattern, target in rules:
        if (match := re.fullmatch(pattern, name)) is not None:
            return match.expand(target)
    return None


_RESNET = (("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("norm2", "out_layers.0"), ("conv2", "out_layers.3"),
           ("time_emb_proj", "emb_layers.1"), ("conv_shortcut", "skip_connection"))  # fmt: skip
_PREFIX = "model.diffusion_model."
_MAX_BLOCKS = 8


def _unet_rules(config: Mapping[str, Any]) -> list[Rule]:
    """Stable Diffusion's first layout: blocks are counted through, ``layers_per_block`` and one to a level."""
    per_level = int(config["layers_per_block"]) + 1
    places = {}
    for level in range(_MAX_BLOCKS):
        for i in range(per_level):
            places[f"down_blocks.{level}.resnets.{i}"] = f"input_blocks.{per_level * level + i + 1}.0"
            places[f"down_blocks.{level}.attentions.{i}"] = f"input_blocks.{per_level * level + i + 1}.1"
            places[f"up_blocks.{level}.resnets.{i}"] = f"output_blocks.{per_level * level + i}.0"
            places[f"up_blocks.{level}.attentions.{i}"] = f"output_blocks.{per_level * level + i}.1"
        places[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{per_level * (level + 1)}.0.op"
        attends = "Attn" in str((list(config.get("up_block_types", ())) + [""] * _MAX_BLOCKS)[level])
        up = f"output_blocks.{per_level * level + per_level - 1}.{2 if attends else 1}.conv"
        places[f"up_blocks.{level}.upsamplers.0.conv"] = up
    places |= {"mid_block.attentions.0": "middle_block.1"}
    places |= {f"mid_block.resnets.{i}": f"middle_block.{2 * i}" for i in (0, 1)}
    places |= {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    rules: list[Rule] = []
    for own, theirs in places.items():
        if ".resnets." in own:
            rules += [(rf"{re.escape(own)}\.{a}\.(\w+)", rf"{_PREFIX}{theirs}.{b}.\1") for a, b in _RESNET]
        else:
            rules.append((rf"{re.escape(own)}\.(.+)", rf"{_PREFIX}{theirs}.\1"))
    return rules
