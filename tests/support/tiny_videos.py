"""Tiny pipelines of Diffusers' families that make videos and sound: each function builds one, of the real classes."""

from __future__ import annotations

from typing import Any

from tests.support.tiny_parts import (
    WIDTH,
    chat_tokenizer,
    clip,
    clip_tokenizer,
    clip_vision,
    language_model,
    seeded,
    t5,
    t5_tokenizer,
)


def _wan_transformer(seed: int, in_channels: int = 16, **config: Any) -> Any:
    from diffusers import WanTransformer3DModel

    return seeded(
        seed,
        WanTransformer3DModel,
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=in_channels,
        out_channels=16,
        text_dim=WIDTH,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
        **config,
    )


def _wan(name: str, transformer: Any, **parts: Any) -> Any:
    import diffusers

    pieces = t5_tokenizer()
    decoder = seeded(
        1,
        diffusers.AutoencoderKLWan,
        base_dim=4,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    return getattr(diffusers, name)(
        tokenizer=pieces,
        text_encoder=t5(3, pieces, kind="UMT5"),
        vae=decoder,
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=transformer,
        **parts,
    )


def wan_2_1() -> Any:
    return _wan("WanPipeline", _wan_transformer(0), transformer_2=None)


def wan_2_2() -> Any:
    return _wan("WanPipeline", _wan_transformer(0), transformer_2=_wan_transformer(7), boundary_ratio=0.9)


def wan_image_to_video() -> Any:
    from transformers import CLIPImageProcessor

    return _wan(
        "WanImageToVideoPipeline",
        _wan_transformer(0, 36, image_dim=WIDTH),
        image_encoder=clip_vision(4),
        image_processor=CLIPImageProcessor(size=32, crop_size=32),
        transformer_2=None,
    )


def ltx() -> Any:
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    pieces = t5_tokenizer()
    transformer = seeded(
        0,
        LTXVideoTransformer3DModel,
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=4,
        attention_head_dim=16,
        cross_attention_dim=64,
        num_layers=1,
        caption_channels=WIDTH,
    )
    decoder = seeded(
        1,
        AutoencoderKLLTXVideo,
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=decoder,
        text_encoder=t5(3, pieces),
        tokenizer=pieces,
        transformer=transformer,
    )


def ltx_image_to_video() -> Any:
    """Of its latents the scheduler steps all frames but the first, as a video: the denoiser predicts tokens."""
    from diffusers import LTXImageToVideoPipeline

    return LTXImageToVideoPipeline(**ltx().components)


def cogvideox() -> Any:
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    pieces = t5_tokenizer()
    transformer = seeded(
        0,
        CogVideoXTransformer3DModel,
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=WIDTH,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=16,
    )
    decoder = seeded(
        1,
        AutoencoderKLCogVideoX,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    return CogVideoXPipeline(
        tokenizer=pieces,
        text_encoder=t5(3, pieces),
        vae=decoder,
        transformer=transformer,
        scheduler=CogVideoXDDIMScheduler(prediction_type="v_prediction"),
    )


def hunyuan_video() -> Any:
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )

    chat, words = chat_tokenizer(), clip_tokenizer()
    transformer = seeded(
        0,
        HunyuanVideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        rope_axes_dim=(4, 6, 6),
    )
    decoder = seeded(
        1,
        AutoencoderKLHunyuanVideo,
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
    )
    return HunyuanVideoPipeline(
        text_encoder=language_model(2, chat, "LlamaModel"),
        tokenizer=chat,
        transformer=transformer,
        vae=decoder,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=clip(4, words, projected=False),
        tokenizer_2=words,
    )


def stable_audio() -> Any:
    from diffusers import (
        AutoencoderOobleck,
        EDMDPMSolverMultistepScheduler,
        StableAudioDiTModel,
        StableAudioPipeline,
        StableAudioProjectionModel,
    )

    pieces = t5_tokenizer(25)
    transformer = seeded(
        0,
        StableAudioDiTModel,
        sample_size=64,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        cross_attention_dim=32,
        time_proj_dim=16,
        global_states_input_dim=64,
        cross_attention_input_dim=32,
    )
    decoder = seeded(
        1,
        AutoencoderOobleck,
        encoder_hidden_size=8,
        downsampling_ratios=[2, 4],
        decoder_channels=8,
        decoder_input_channels=4,
        audio_channels=2,
        channel_multiples=[1, 2],
        sampling_rate=512,
    )
    projection = seeded(
        2, StableAudioProjectionModel, text_encoder_dim=WIDTH, conditioning_dim=32, min_value=0, max_value=32
    )
    return StableAudioPipeline(
        vae=decoder,
        text_encoder=t5(3, pieces),
        projection_model=projection,
        tokenizer=pieces,
        transformer=transformer,
        scheduler=EDMDPMSolverMultistepScheduler(prediction_type="v_prediction", sigma_schedule="exponential"),
    )
