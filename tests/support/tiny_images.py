"""Tiny pipelines of Diffusers' families that make images with a transformer: each function builds one, of the real classes."""

from __future__ import annotations

from typing import Any

from tests.support.tiny_parts import (
    FLOW_VAE,
    WIDTH,
    chat_tokenizer,
    clip,
    clip_tokenizer,
    language_model,
    qwen_vl,
    seeded,
    t5,
    t5_tokenizer,
    vae,
    wide_vae,
)


def _flow(**config: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**config)


# -- transformers on Flux's plan


def _flux_transformer(in_channels: int = 16, **config: Any) -> Any:
    from diffusers import FluxTransformer2DModel

    return seeded(
        0,
        FluxTransformer2DModel,
        patch_size=1,
        in_channels=in_channels,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
        **config,
    )


def _flux(name: str, transformer: Any) -> Any:
    import diffusers

    words, pieces = clip_tokenizer(), t5_tokenizer()
    return getattr(diffusers, name)(
        scheduler=_flow(),
        transformer=transformer,
        vae=vae(1, 4, **FLOW_VAE),
        text_encoder=clip(2, words, projected=False),
        tokenizer=words,
        text_encoder_2=t5(3, pieces),
        tokenizer_2=pieces,
    )


def flux() -> Any:
    return _flux("FluxPipeline", _flux_transformer())


def flux_kontext() -> Any:
    return _flux("FluxKontextPipeline", _flux_transformer())


def flux_fill() -> Any:
    # 16 of the latent, 16 of the masked picture, and 4 x 4 pixels of the mask for a packed latent of 2 x 2
    return _flux("FluxFillPipeline", _flux_transformer(48, out_channels=16))


def flux_control() -> Any:
    return _flux("FluxControlPipeline", _flux_transformer(32, out_channels=16))  # beside the latent, the picture's


def flux2_klein() -> Any:
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel

    words = chat_tokenizer()
    transformer = seeded(
        0,
        Flux2Transformer2DModel,
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    decoder = seeded(
        1,
        AutoencoderKLFlux2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return Flux2KleinPipeline(
        scheduler=_flow(),
        vae=decoder,
        text_encoder=language_model(2, words, "Qwen3ForCausalLM"),
        tokenizer=words,
        transformer=transformer,
    )


def chroma() -> Any:
    from diffusers import ChromaPipeline, ChromaTransformer2DModel

    pieces = t5_tokenizer()
    transformer = seeded(
        0,
        ChromaTransformer2DModel,
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    return ChromaPipeline(
        scheduler=_flow(),
        vae=vae(1, 4, **FLOW_VAE),
        text_encoder=t5(3, pieces),
        tokenizer=pieces,
        transformer=transformer,
        image_encoder=None,
        feature_extractor=None,
    )


# -- other transformers


def sd3() -> Any:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    words, pieces = clip_tokenizer(), t5_tokenizer()
    transformer = seeded(
        0,
        SD3Transformer2DModel,
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=16,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=_flow(shift=3.0),
        vae=vae(1, 4, **FLOW_VAE),
        text_encoder=clip(2, words, projected=True),
        tokenizer=words,
        text_encoder_2=clip(4, words, projected=True),
        tokenizer_2=words,
        text_encoder_3=t5(3, pieces, 2 * WIDTH),
        tokenizer_3=pieces,
    )


def _qwen_parts(halvings: int = 2) -> dict[str, Any]:
    """Denoiser, image decoder and text encoder of Qwen-Image; each halving makes a latent of twice the pixels."""
    import diffusers

    words = chat_tokenizer()
    transformer = seeded(
        0,
        diffusers.QwenImageTransformer2DModel,
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    )
    decoder = seeded(
        1,
        diffusers.AutoencoderKLQwenImage,
        base_dim=8 if halvings == 2 else 4,
        z_dim=4,
        dim_mult=[1, 2, 2] if halvings == 2 else [1] * (halvings + 1),
        num_res_blocks=1,
        temperal_downsample=[False] * (halvings - 1) + [True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return {
        "scheduler": _flow(),
        "vae": decoder,
        "text_encoder": qwen_vl(2, words),
        "tokenizer": words,
        "transformer": transformer,
    }


def qwen_image() -> Any:
    import diffusers

    return diffusers.QwenImagePipeline(**_qwen_parts())


def qwen_image_edit() -> Any:
    """Its processor is of another class than the published one, which reads videos, too, and wants torchvision."""
    import diffusers
    from transformers import PaddleOCRVLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    parts = _qwen_parts(halvings=4)  # a picture is edited at a million pixels
    words = chat_tokenizer(image_token="<|image_pad|>")
    pictures = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56})
    parts |= {"tokenizer": words, "processor": PaddleOCRVLProcessor(pictures, words)}
    return diffusers.QwenImageEditPipeline(**parts)


def z_image() -> Any:
    import torch
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    words = chat_tokenizer()
    transformer = seeded(
        0,
        ZImageTransformer2DModel,
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=64,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[512, 32, 32],
    )
    with torch.no_grad():  # of these the class makes whatever lies in memory
        transformer.x_pad_token.fill_(0.5)
        transformer.cap_pad_token.fill_(0.5)
    return ZImagePipeline(
        scheduler=_flow(),
        vae=vae(1, 4, **FLOW_VAE),
        text_encoder=language_model(2, words, "Qwen3Model"),
        tokenizer=words,
        transformer=transformer,
    )


def pixart_sigma() -> Any:
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    pieces = t5_tokenizer()
    transformer = seeded(
        0,
        PixArtTransformer2DModel,
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=WIDTH,
        in_channels=4,
        cross_attention_dim=32,
        out_channels=8,
    )
    return PixArtSigmaPipeline(
        tokenizer=pieces,
        text_encoder=t5(3, pieces),
        vae=vae(1, 4),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )


def sana() -> Any:
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    words = chat_tokenizer()
    transformer = seeded(
        0,
        SanaTransformer2DModel,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=WIDTH,
        sample_size=16,
    )
    decoder = seeded(
        1,
        AutoencoderDC,
        in_channels=3,
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    return SanaPipeline(
        tokenizer=words,
        text_encoder=language_model(2, words, "Gemma2Model"),
        vae=decoder,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )


def lumina2() -> Any:
    from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

    words = chat_tokenizer()
    transformer = seeded(
        0,
        Lumina2Transformer2DModel,
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=64,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(512, 64, 64),
        cap_feat_dim=WIDTH,
    )
    return Lumina2Pipeline(
        transformer=transformer,
        scheduler=_flow(),
        vae=wide_vae(1, 4, **FLOW_VAE),
        text_encoder=language_model(2, words, "Gemma2Model"),
        tokenizer=words,
    )


def hunyuan_dit() -> Any:
    from diffusers import DDPMScheduler, HunyuanDiT2DModel, HunyuanDiTPipeline
    from transformers import BertConfig, BertModel

    words, pieces = clip_tokenizer(), t5_tokenizer(256)
    transformer = seeded(
        0,
        HunyuanDiT2DModel,
        sample_size=4,
        num_layers=2,
        patch_size=2,
        attention_head_dim=16,
        num_attention_heads=4,
        in_channels=4,
        cross_attention_dim=WIDTH,
        cross_attention_dim_t5=WIDTH,
        pooled_projection_dim=16,
        hidden_size=64,
        activation_fn="gelu-approximate",
    )
    config = BertConfig(
        vocab_size=len(words), hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128
    )
    return HunyuanDiTPipeline(
        vae=wide_vae(1, 4),
        text_encoder=seeded(2, BertModel, config),
        tokenizer=words,
        transformer=transformer,
        scheduler=DDPMScheduler(prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=t5(3, pieces),
        tokenizer_2=pieces,
    )


def cogview4() -> Any:
    from diffusers import CogView4Pipeline, CogView4Transformer2DModel

    words = t5_tokenizer()  # it has an end for the empty prompt
    transformer = seeded(
        0,
        CogView4Transformer2DModel,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=WIDTH,
        time_embed_dim=32,
        condition_dim=16,
        rope_axes_dim=(32, 32),
        sample_size=16,
    )
    return CogView4Pipeline(
        tokenizer=words,
        text_encoder=language_model(2, words, "GlmModel"),
        vae=vae(1, 4, **FLOW_VAE),
        transformer=transformer,
        scheduler=_flow(
            base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"
        ),
    )


def aura_flow() -> Any:
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel

    pieces = t5_tokenizer()
    transformer = seeded(
        0,
        AuraFlowTransformer2DModel,
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        caption_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=64,
    )
    return AuraFlowPipeline(
        tokenizer=pieces,
        text_encoder=t5(3, pieces, kind="UMT5"),
        vae=vae(1, 4),
        transformer=transformer,
        scheduler=_flow(),
    )


def dit() -> Any:
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = seeded(
        0,
        DiTTransformer2DModel,
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=16,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        attention_bias=True,
        num_embeds_ada_norm=1000,
    )
    return DiTPipeline(transformer=transformer, vae=vae(1, 4), scheduler=DDIMScheduler())
