"""What the scripts beside this file share: the cached digits model, its sampler, the metrics by their definitions."""

import json
import sys

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from safetensors import safe_open

NULL_CLASS, GUIDANCE = 10, 1.5


def load(folder):
    with safe_open(f"{folder}/model.safetensors", framework="pt") as file:
        sizes, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    model = DiTTransformer2DModel(
        num_attention_heads=int(sizes["num_heads"]),
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        num_layers=int(sizes["num_layers"]),
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=NULL_CLASS,
    )
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def sample(model, noise, labels, num_steps):
    scheduler = DDIMScheduler(
        1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=True,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(num_steps)
    both = torch.cat([labels, torch.full_like(labels, NULL_CLASS)])
    for t in scheduler.timesteps:
        velocity = model(torch.cat([noise, noise]), timestep=t.expand(len(both)), class_labels=both).sample
        conditional, null = velocity.chunk(2)
        guided = null + GUIDANCE * (conditional - null)
        noise = scheduler.step(guided, t, noise, use_clipped_model_output=True).prev_sample
    return noise


def main(quantize, count_bytes):
    """``script.py WEIGHTS_FOLDER REFERENCE_PT BATCH_SIZE [NUM_STEPS]`` prints the metrics as one JSON line."""
    folder, saved, size, *num_steps = sys.argv[1:]
    model, ref = load(folder), torch.load(saved, weights_only=True)
    quantize(model)
    parts = ref["noise"].split(int(size)), torch.tensor(ref["conditioning"]["class_label"]).split(int(size))
    got = torch.cat([sample(model, *part, int(*num_steps or [20])) for part in zip(*parts, strict=True)]).flatten(1)
    want, images = ref["latents"].flatten(1).double(), ((got + 1) / 2).clamp(0, 1).mul(255).round().double()
    rel_mse = (got - want).square().sum(1) / want.square().sum(1)
    psnr = -10 * ((images - ref["images"].flatten(1)) / 255).square().mean(1).clamp(min=1e-10).log10()
    print(
        json.dumps(
            {
                "latent_rel_mse": float(rel_mse.mean()),
                "psnr_db": float(psnr.mean()),
                "weights_bytes": count_bytes(model),
            }
        )
    )
