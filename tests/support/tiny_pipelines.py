"""Tiny, randomly initialised pipelines of the real Diffusers classes, written to a folder as any checkpoint is.

Two CLIP text encoders or a CLIP and a T5, an AutoencoderKL with one halving (16 px -> 8 latents) and a denoiser whose
linear layers take a multiple of 64 inputs (those of the entry and of the time embedding excepted). Each is below 3 MB.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from quantlab.vocabulary.schema import EvaluationConfig
from tests.support.tiny_parts import clip, clip_tokenizer, t5, t5_tokenizer, vae

SMALL = EvaluationConfig(
    num_samples=3,
    batch_size=3,
    num_inference_steps=2,
    guidance_scale=3.0,
    height=16,
    width=32,
    num_teacher_forced=2,
    num_bootstrap=50,
)
"""What a tiny pipeline is run with: images of 16 by 32 pixels in two steps."""


def build_tiny_flux(folder: Path) -> Path:
    """A FluxPipeline with guidance embeddings, as FLUX.1-dev: packed latents of 16 channels, 16 px at least."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    words, pieces = clip_tokenizer(), t5_tokenizer()
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        transformer=transformer.eval(),
        vae=vae(1, 4, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(2, words, projected=False),
        tokenizer=words,
        text_encoder_2=t5(3, pieces, 64),
        tokenizer_2=pieces,
    ).save_pretrained(folder)
    return folder


def build_tiny_sd3(folder: Path) -> Path:
    """A StableDiffusion3Pipeline: plain latents of 4 channels, two CLIP text encoders and a T5."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    words, pieces = clip_tokenizer(), t5_tokenizer()
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=128,
        caption_projection_dim=64,
        pooled_projection_dim=128,
        pos_embed_max_size=16,
    )
    StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(1, 4, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(2, words, projected=True),
        tokenizer=words,
        text_encoder_2=clip(4, words, projected=True),
        tokenizer_2=words,
        text_encoder_3=t5(3, pieces, 128),
        tokenizer_3=pieces,
    ).save_pretrained(folder)
    return folder


def build_tiny_sdxl(folder: Path) -> Path:
    """A StableDiffusionXLPipeline: a UNet with convolutions, time ids, classifier-free guidance."""
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    words = clip_tokenizer()
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 64),
        mid_block_type=None,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        cross_attention_dim=128,
        transformer_layers_per_block=1,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=6 * 16 + 64,
    )
    StableDiffusionXLPipeline(
        unet=unet.eval(),
        vae=vae(1, 4, scaling_factor=0.13025),
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        text_encoder=clip(2, words, projected=False),
        tokenizer=words,
        text_encoder_2=clip(4, words, projected=True),
        tokenizer_2=words,
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


BUILDERS: dict[str, Callable[[Path], Path]] = {"flux": build_tiny_flux, "sd3": build_tiny_sd3, "sdxl": build_tiny_sdxl}
