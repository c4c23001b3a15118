"""What a user would write instead, for a denoiser: Diffusers loads and quantizes it, a loop draws from the same seeds.

``images.py FOLDER SEEDS STEPS SCHEME...`` prints one JSON line.
"""

import json
import sys
from pathlib import Path

import diffusers
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from schemes import load

NULL_CLASS, GUIDANCE, BATCH = 10, 1.5, 100


def loaded(folder, scheme):
    """Diffusers quantizes by bitsandbytes on GPUs alone: its layers are put in by hand."""
    if not scheme.startswith("bitsandbytes"):
        return load(DiTTransformer2DModel, diffusers, folder, scheme)
    import bitsandbytes

    model, (_, kind, *double) = load(DiTTransformer2DModel, diffusers, folder, "none"), scheme.split()
    for name, linear in [(n, m) for n, m in model.named_modules() if type(m) is torch.nn.Linear]:
        layer = bitsandbytes.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            quant_type=kind,
            compress_statistics=bool(double),
        )
        layer.load_state_dict(linear.state_dict())
        layer.support_avx512bf16_for_cpu = False  # that path repacks the weight lossily at the first call
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.to("cpu"))
    return model


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


def main(folder, seeds, steps, *schemes):
    asked = json.loads(Path(seeds).read_text(encoding="utf-8"))
    noise = torch.stack([torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(s)) for s in asked["seeds"]])
    labels = torch.tensor(asked["labels"])

    def draw(model):
        parts = zip(noise.split(BATCH), labels.split(BATCH), strict=True)
        return torch.cat([sample(model, *part, int(steps)) for part in parts])

    def pixels(latents):
        return ((latents + 1) / 2).clamp(0, 1).mul(255).round().double().flatten(1)

    want, found = pixels(draw(loaded(folder, "none"))), {}
    for scheme in schemes:
        error = ((pixels(draw(loaded(folder, scheme))) - want) / 255).square().mean(1)
        found[scheme] = {"psnr_db": float(-10 * error.clamp(min=1e-10).log10().mean())}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
