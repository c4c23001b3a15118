"""Pipelines whose scheduler steps tokens (Amused): ids have no distance, so none is measured; what is made has."""

from __future__ import annotations

import pytest

from quantlab.datasets import prompts
from quantlab.models import diffusers_pipeline
from quantlab.protocols import diffusion
from quantlab.vocabulary.schema import DatasetConfig, EvaluationConfig, ModelConfig
from tests.support.tiny_parts import WIDTH, clip, clip_tokenizer, seeded

NUM_TOKENS = 32
EVALUATION = EvaluationConfig(
    num_samples=2,
    batch_size=1,
    num_teacher_forced=1,
    num_inference_steps=2,
    guidance_scale=3.0,
    height=16,
    width=16,
    num_bootstrap=20,
)


def amused():
    from diffusers import AmusedPipeline, AmusedScheduler, UVit2DModel, VQModel

    words = clip_tokenizer()
    transformer = seeded(
        0,
        UVit2DModel,
        hidden_size=32,
        cond_embed_dim=WIDTH,
        micro_cond_encode_dim=8,
        micro_cond_embed_dim=5 * 8,
        encoder_hidden_size=WIDTH,
        vocab_size=NUM_TOKENS,
        codebook_size=NUM_TOKENS,
        in_channels=32,
        block_out_channels=32,
        num_res_blocks=1,
        downsample=True,
        upsample=True,
        block_num_heads=2,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
    )
    decoder = seeded(
        1,
        VQModel,
        block_out_channels=[8],
        down_block_types=["DownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D"],
        latent_channels=8,
        layers_per_block=1,
        norm_num_groups=4,
        num_vq_embeddings=NUM_TOKENS,
        sample_size=8,
        mid_block_add_attention=False,
        lookup_from_codebook=True,
    )
    return AmusedPipeline(
        vqvae=decoder,
        tokenizer=words,
        text_encoder=clip(2, words, projected=True),
        transformer=transformer,
        scheduler=AmusedScheduler(mask_token_id=NUM_TOKENS - 1),
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("amused")
    amused().save_pretrained(folder / "p")
    return diffusers_pipeline.load(ModelConfig(family="diffusers", path=str(folder / "p")), "cpu", folder / "cache")


def test_no_distance_is_measured_between_ids(model):
    inputs = prompts.load(DatasetConfig(name="prompts"), EVALUATION, model)
    reference = diffusion.observe(model, inputs, EVALUATION)
    assert {"latents", "steps"}.isdisjoint(reference)
    candidate = model.with_components({"transformer": model.copy_of("transformer")})
    for parameter in candidate.components["transformer"].parameters():
        parameter.data.mul_(1.2)
    found = diffusion.measure(candidate, inputs, EVALUATION, reference, model)
    assert {"latent_rel_mse", "latent_cosine"}.isdisjoint(found.samples)
    assert "steps tokens, which have no distance" in found.undefined["latent_rel_mse"]
    assert set(found.steps) == {"step_sqnr_db"}  # of what is predicted of each token
    assert len(found.steps["step_sqnr_db"]) == EVALUATION.num_inference_steps
    assert (found.samples["psnr_db"] < 100).any()
