"""``dataset=digits_classes``: the ten digits, evenly, each with initial noise of its own."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, cast

from quantlab.errors import ConfigError
from quantlab.models.loaded import LoadedModel
from quantlab.protocols.diffusion_inputs import DiffusionInputs
from quantlab.vocabulary.schema import DatasetConfig, EvaluationConfig

if TYPE_CHECKING:
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

NUM_CLASSES = 10


def check_samples(num: int) -> None:
    """ConfigError for a number of samples that is no multiple of ten."""
    if num < 1 or num % NUM_CLASSES:
        below = num // NUM_CLASSES * NUM_CLASSES
        near = f"{below} or {below + NUM_CLASSES}" if below > 0 else str(NUM_CLASSES)
        raise ConfigError(
            f"evaluation.num_samples={num}: digits_classes has {NUM_CLASSES} classes of equal share; "
            f"take a multiple of {NUM_CLASSES}, such as {near}"
        )


def load(config: DatasetConfig, evaluation: EvaluationConfig, model: LoadedModel) -> DiffusionInputs:
    """``evaluation.num_samples`` samples, a tenth of each class; a sample is its own cluster, a class a stratum.

    The noise of a sample comes from a generator of its own, seeded by data set, class, replica and ``config.seed``: it
    depends neither on the number of samples nor on batches.
    Raises ConfigError for a number of samples that is no multiple of ten, and for a model that draws no digits.
    """
    import numpy as np
    import torch

    num = evaluation.num_samples
    check_samples(num)
    if model.name != "digits_dit":
        raise ConfigError(
            f"dataset={config.name}: its conditions are the digits 0 to 9, which model={model.name} does "
            "not draw; use model=digits_dit, or a data set of prompts"
        )
    network = cast("DiTTransformer2DModel", model.components["transformer"]).config
    shape = (network["in_channels"], network["sample_size"], network["sample_size"])
    labels = [i % NUM_CLASSES for i in range(num)]
    noise = [
        torch.randn(shape, generator=torch.Generator().manual_seed(_seed(config, label, i // NUM_CLASSES)))
        for i, label in enumerate(labels)
    ]
    return DiffusionInputs(
        noise=torch.stack(noise),
        conditioning={"class_label": labels},
        strata=np.array(labels),
        sample_ids=tuple(f"digit {label} replica {i // NUM_CLASSES}" for i, label in enumerate(labels)),
    )


def _seed(config: DatasetConfig, label: int, replica: int) -> int:
    text = f"{config.name}:{label}:{replica}:{config.seed}"
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)
