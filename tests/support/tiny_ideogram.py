"""Ideogram 4, tiny: a denoiser of its own for no prompt, and prompts that stand before the image in the other's input."""

from __future__ import annotations

from typing import Any

from tests.support.tiny_images import flux2_klein
from tests.support.tiny_parts import chat_tokenizer, seeded

_LAYERS, _READ, _WIDTH = 36, 13, 16
"""Layers of the text encoder, how many of them the pipeline reads, and how wide they are."""


def _transformer(seed: int) -> Any:
    from diffusers import Ideogram4Transformer2DModel

    return seeded(
        seed,
        Ideogram4Transformer2DModel,
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        intermediate_size=48,
        adaln_dim=16,
        llm_features_dim=_READ * _WIDTH,
        rope_theta=10000,
        mrope_section=(4, 2, 2),
    )


def _encoder(tokenizer: Any) -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLModel

    ids = tokenizer.get_vocab()
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": _WIDTH,
            "intermediate_size": 32,
            "num_hidden_layers": _LAYERS,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "rope_parameters": {"mrope_section": [2, 1, 1], "rope_type": "default", "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": _WIDTH,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    return seeded(2, Qwen3VLModel, config)


def ideogram_4() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, Ideogram4Pipeline

    words = chat_tokenizer()
    words.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}{{ part.text }}{% endfor %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return Ideogram4Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=flux2_klein().vae,
        text_encoder=_encoder(words),
        tokenizer=words,
        transformer=_transformer(0),
        unconditional_transformer=_transformer(5),
        prompt_enhancer_head=None,
    )
