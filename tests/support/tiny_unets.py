"""Tiny pipelines of Diffusers' families that make images with a UNet: each function builds one, of the real classes."""

from __future__ import annotations

from typing import Any

from tests.support.tiny_parts import WIDTH, clip, clip_tokenizer, clip_vision, seeded, vae


def _unet(**config: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return seeded(
        0,
        UNet2DConditionModel,
        **{
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "layers_per_block": 1,
            "block_out_channels": (16, 32),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "norm_num_groups": 8,
            "attention_head_dim": 4,
            "cross_attention_dim": WIDTH,
            **config,
        },
    )


def _stable_diffusion(name: str, in_channels: int = 4, **parts: Any) -> Any:
    import diffusers

    words = clip_tokenizer()
    return getattr(diffusers, name)(
        **{
            "unet": _unet(in_channels=in_channels),
            "vae": vae(1, 4),
            "scheduler": diffusers.DDIMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
            ),
            "text_encoder": clip(2, words, projected=False),
            "tokenizer": words,
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
            **parts,
        }
    )


def stable_diffusion() -> Any:
    return _stable_diffusion("StableDiffusionPipeline")


def stable_diffusion_pag() -> Any:
    """Perturbed attention: while it runs it gives its UNet's attention other processors, and its own back afterwards."""
    return _stable_diffusion("StableDiffusionPAGPipeline", pag_applied_layers="mid")


def text_to_video() -> Any:
    """Its scheduler steps the frames of all samples as rows, its UNet answers whole videos."""
    from diffusers import TextToVideoSDPipeline, UNet3DConditionModel

    unet = seeded(
        0,
        UNet3DConditionModel,
        block_out_channels=(8, 8),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=2,
    )
    parts = _stable_diffusion("StableDiffusionPipeline").components
    kept = {name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    return TextToVideoSDPipeline(unet=unet, **kept)


def stable_diffusion_img2img() -> Any:
    return _stable_diffusion("StableDiffusionImg2ImgPipeline")


def stable_diffusion_inpaint() -> Any:
    return _stable_diffusion("StableDiffusionInpaintPipeline", in_channels=9)


def instruct_pix2pix() -> Any:
    from diffusers import PNDMScheduler

    return _stable_diffusion(
        "StableDiffusionInstructPix2PixPipeline", in_channels=8, scheduler=PNDMScheduler(skip_prk_steps=True)
    )


def sdxl() -> Any:
    from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionXLPipeline

    words = clip_tokenizer()
    return StableDiffusionXLPipeline(
        unet=_unet(
            cross_attention_dim=2 * WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=16,
            projection_class_embeddings_input_dim=6 * 16 + WIDTH,
        ),
        vae=vae(1, 4),
        scheduler=EulerAncestralDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        text_encoder=clip(2, words, projected=False),
        tokenizer=words,
        text_encoder_2=clip(4, words, projected=True),
        tokenizer_2=words,
        add_watermarker=False,
    )


def ddpm() -> Any:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = seeded(
        0,
        UNet2DModel,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return DDPMPipeline(unet=unet, scheduler=DDPMScheduler())


def kandinsky_2_2() -> Any:
    """Two pipelines in one: the prior makes an image's embedding of the prompt, the decoder an image of that."""
    import torch
    from diffusers import DDIMScheduler, KandinskyV22CombinedPipeline, PriorTransformer, UnCLIPScheduler, VQModel
    from transformers import CLIPImageProcessor

    words = clip_tokenizer()
    unet = _unet(
        out_channels=8,
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        encoder_hid_dim=WIDTH,
        encoder_hid_dim_type="image_proj",
        resnet_time_scale_shift="scale_shift",
    )
    prior = seeded(5, PriorTransformer, num_attention_heads=2, attention_head_dim=32, embedding_dim=WIDTH, num_layers=1)
    prior.clip_std = torch.nn.Parameter(torch.ones(1, WIDTH))
    movq = seeded(
        1,
        VQModel,
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=4,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )
    return KandinskyV22CombinedPipeline(
        unet=unet,
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1),
        movq=movq,
        prior_prior=prior,
        prior_image_encoder=clip_vision(3),
        prior_text_encoder=clip(2, words, projected=True),
        prior_tokenizer=words,
        prior_scheduler=UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample=True, clip_sample_range=10.0
        ),
        prior_image_processor=CLIPImageProcessor(size=32, crop_size=32),
    )
