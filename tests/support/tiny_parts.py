"""Tokenizers, text encoders and image decoders of tiny, randomly initialised pipelines, of the real classes."""

from __future__ import annotations

import string
from typing import Any

_CHARACTERS = string.ascii_lowercase + string.digits + string.punctuation
_MERGES = ["t h", "e r</w>", "a n", "th e</w>", "i n", "o n</w>", "r e", "a t</w>"]
WIDTH = 64
"""Of every text encoder's output, unless it says another."""


def seeded(seed: int, make: Any, /, *args: Any, **config: Any) -> Any:
    """``make(*args, **config)`` in eval mode, its weights drawn from ``seed``, and none of them left at zero.

    Layers that begin at zero would hide a fault in what comes before them.
    """
    import torch

    torch.manual_seed(seed)
    module = make(*args, **config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.05)
    return module


def clip_tokenizer() -> Any:
    """A CLIP tokenizer over single characters and a few merges; its last two ids are start and end of text."""
    from transformers import CLIPTokenizer

    words = [*_CHARACTERS, *(f"{c}</w>" for c in _CHARACTERS), *(m.replace(" ", "") for m in _MERGES)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=[tuple(m.split()) for m in _MERGES], model_max_length=77
    )


def t5_tokenizer(length: int = 512) -> Any:
    """A T5 (unigram) tokenizer over single characters and a few words."""
    from transformers import T5TokenizerFast

    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    words += [(c, -4.0) for c in _CHARACTERS] + [(f"▁{w}", -3.0) for w in ("a", "the", "of", "red", "blue", "two")]
    return T5TokenizerFast(vocab=words, extra_ids=0, model_max_length=length)


def chat_tokenizer(**named: str) -> Any:
    """A byte-level tokenizer with the special tokens and a chat template of Qwen; ``named``: tokens it has names for."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    words = [*special, "<|video_pad|>", *sorted(ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(
        vocab={word: i for i, word in enumerate(words)},
        merges=[],
        additional_special_tokens=special[1:],
        **({"extra_special_tokens": named} if named else {}),
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def clip(seed: int, tokenizer: Any, projected: bool, **config: Any) -> Any:
    """A CLIP text encoder of one layer."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    settings = CLIPTextConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "projection_dim": WIDTH,
            "hidden_act": "gelu",
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **config,
        }
    )
    return seeded(seed, CLIPTextModelWithProjection if projected else CLIPTextModel, settings)


def clip_vision(seed: int, size: int = 32) -> Any:
    """A CLIP image encoder of one layer."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        projection_dim=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=size,
        patch_size=16,
    )
    return seeded(seed, CLIPVisionModelWithProjection, config)


def t5(seed: int, tokenizer: Any, width: int = WIDTH, kind: str = "T5") -> Any:
    """A T5 (or ``kind="UMT5"``) encoder of one layer."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=16,
        d_ff=128,
        num_layers=1,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    return seeded(seed, getattr(transformers, f"{kind}EncoderModel"), config)


def language_model(seed: int, tokenizer: Any, kind: str, num_layers: int = 2, **config: Any) -> Any:
    """A small model ``kind`` of transformers (``Qwen3Model``, ``Gemma2Model``...) as a text encoder."""
    import transformers

    family = kind.removesuffix("Model").removesuffix("ForCausalLM")
    settings = getattr(transformers, f"{family}Config")(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "intermediate_size": 128,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "pad_token_id": tokenizer.pad_token_id,
            **config,
        }
    )
    return seeded(seed, getattr(transformers, kind), settings)


def qwen_vl(seed: int, tokenizer: Any) -> Any:
    """A Qwen2.5-VL of two layers, which Qwen-Image reads its prompts with."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = tokenizer.get_vocab()
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"mrope_section": [2, 3, 3], "rope_type": "default", "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [0],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    return seeded(seed, Qwen2_5_VLForConditionalGeneration, config)


def vae(seed: int, latent_channels: int = 4, **config: Any) -> Any:
    """An AutoencoderKL with one halving."""
    from diffusers import AutoencoderKL

    return seeded(
        seed,
        AutoencoderKL,
        **{
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "latent_channels": latent_channels,
            "norm_num_groups": 4,
            "sample_size": 32,
            **config,
        },
    )


def wide_vae(seed: int, latent_channels: int = 4, **config: Any) -> Any:
    """An AutoencoderKL with three halvings: some pipelines take it for granted that a latent is 8 pixels."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return vae(seed, latent_channels, **blocks, block_out_channels=(8, 8, 8, 16), **config)


FLOW_VAE = {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1159, "scaling_factor": 0.3611}
"""Settings of the image decoders of flow-matching models."""
