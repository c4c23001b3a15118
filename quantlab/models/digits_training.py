"""How the denoiser of ``model=digits_dit`` is made: the network, its data, its training on the CPU."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from quantlab.models.loaded import Progress
from quantlab.models.reading import frozen
from quantlab.vocabulary.schema import DigitsModelConfig

if TYPE_CHECKING:
    import torch
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from torch import Tensor

RECIPE_VERSION = 1
"""Raise it with every change to the training here or of the judge: it is part of the cache key."""
NUM_CLASSES = 10
NUM_HELD_OUT = 360
IMAGE_SIZE = 8
NUM_NOISE_LEVELS = 1000
PEAK_LR = 1e-3
LABEL_DROPOUT = 0.1
EMA_DECAY = 0.998


def build_transformer(num_layers: int, num_heads: int) -> DiTTransformer2DModel:
    """The untrained network: heads of 32, 2x2 patches of an 8x8 image, 10 classes and the null class 10."""
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=num_heads,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        num_layers=num_layers,
        sample_size=IMAGE_SIZE,
        patch_size=2,
        num_embeds_ada_norm=NUM_CLASSES,
    )
    for block in model.transformer_blocks:
        # Each block would drop labels on its own, so that the null class is never seen by all blocks at once;
        # training drops them once for all blocks instead.
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    return model


def training_scheduler() -> DDPMScheduler:
    """The 1000 noise levels of training: squared-cosine schedule (arXiv 2102.09672), v-prediction (2202.00512)."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    return DDPMScheduler(
        NUM_NOISE_LEVELS, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=True
    )


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's digits as float tensors (n, 8, 8, 1) in [0, 1] and labels: training part, held-out part (360)."""
    import torch
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = (data.images / 16.0).astype("float32")[..., None]
    parts = train_test_split(images, data.target, test_size=NUM_HELD_OUT, random_state=0, stratify=data.target)
    train_images, held_out_images, train_labels, held_out_labels = (torch.from_numpy(p) for p in parts)
    return train_images, train_labels.long(), held_out_images, held_out_labels.long()


def train_denoiser(
    images: Tensor, labels: Tensor, config: DigitsModelConfig, progress: Progress | None = None
) -> DiTTransformer2DModel:
    """Train on the CPU from ``config.train_seed``; the global random state is left as it was.

    Velocity prediction with AdamW (1e-3, warm-up, cosine to 3 %), gradients clipped at 1, one in ten labels replaced by
    the null class. Returns the exponential moving average of the weights, whose decay rises as (1 + k) / (10 + k) to
    0.998 so that a short training forgets its start.
    """
    import torch

    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.train_seed)
        model = build_transformer(config.num_layers, config.num_heads).train()
        _zero_init(model)
        average = [p.detach().clone() for p in model.parameters()]
        optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.99), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: _lr_factor(k, config.num_train_steps))
        scheduler = training_scheduler()
        draw = torch.Generator().manual_seed(config.train_seed)
        for step in range(config.num_train_steps):
            chosen = torch.randint(len(images), (config.train_batch_size,), generator=draw)
            loss = _loss(model, scheduler, images[chosen], labels[chosen], draw)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            decay = min(EMA_DECAY, (1 + step) / (10 + step))
            with torch.no_grad():
                for kept, parameter in zip(average, model.parameters(), strict=True):
                    kept.lerp_(parameter, 1 - decay)
            if progress is not None:
                progress("train digits_dit", step + 1, config.num_train_steps)
        with torch.no_grad():
            for kept, parameter in zip(average, model.parameters(), strict=True):
                parameter.copy_(kept)
    return frozen(model)


def _loss(
    model: DiTTransformer2DModel, scheduler: DDPMScheduler, images: Tensor, labels: Tensor, draw: torch.Generator
) -> Tensor:
    """Mean squared error of the velocity on one batch; noise, levels and dropped labels come from ``draw``."""
    import torch

    clean = images.permute(0, 3, 1, 2) * 2 - 1
    dropped = torch.rand(len(labels), generator=draw) < LABEL_DROPOUT
    noise = torch.randn(clean.shape, generator=draw)
    timesteps = torch.randint(NUM_NOISE_LEVELS, (len(labels),), generator=draw)
    noisy = scheduler.add_noise(clean, noise, timesteps)  # type: ignore[arg-type]  # any integers will do
    predicted = model(noisy, timestep=timesteps, class_labels=torch.where(dropped, NUM_CLASSES, labels)).sample
    wanted = scheduler.get_velocity(clean, noise, timesteps)  # type: ignore[arg-type]
    return torch.nn.functional.mse_loss(predicted, wanted)


def _zero_init(model: DiTTransformer2DModel) -> None:
    """Every block starts as the identity and the output as zero (adaLN-Zero, arXiv 2212.09748)."""
    from torch import nn

    for layer in [*(block.get_submodule("norm1.linear") for block in model.transformer_blocks), model.proj_out_2]:
        nn.init.zeros_(layer.get_parameter("weight"))
        nn.init.zeros_(layer.get_parameter("bias"))


def _lr_factor(step: int, num_steps: int) -> float:
    """Linear warm-up over 100 steps (a fifth of a short training), then a cosine down to 3 %."""
    warm_up = min(100, max(1, num_steps // 5))
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, num_steps - warm_up)
    return 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
