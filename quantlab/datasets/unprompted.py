"""``dataset=classes`` and ``dataset=none``: pipelines that take a class, or nothing but noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quantlab.datasets.prompts import require_pipeline, require_samples, seed_of
from quantlab.errors import ConfigError
from quantlab.models.loaded import LoadedModel
from quantlab.protocols.diffusion_inputs import DiffusionInputs
from quantlab.vocabulary.schema import DatasetConfig, EvaluationConfig

_NUM_CLASSES = ("num_embeds_ada_norm", "num_class_embeds", "num_classes")
"""Keys of a denoiser's configuration that say how many classes it knows."""


def load_classes(config: DatasetConfig, evaluation: EvaluationConfig, model: LoadedModel) -> DiffusionInputs:
    """``evaluation.num_samples`` samples of classes that are spread evenly over those that the model knows.

    Where there are more samples than classes, each class is drawn again with other noise. The samples of a class are a
    cluster; the noise of a sample is seeded by class, replica and ``config.seed``.
    Raises ConfigError for a model whose pipeline takes no classes, or does not say how many.
    """
    require_pipeline(config, model, ("class_labels",))
    num, known = require_samples(evaluation), _num_classes(config, model)
    chosen = min(num, known)
    labels = [i % chosen * known // chosen for i in range(num)]
    return _inputs(config, [f"class {label}" for label in labels], labels, {"class_label": labels})


def load_none(config: DatasetConfig, evaluation: EvaluationConfig, model: LoadedModel) -> DiffusionInputs:
    """``evaluation.num_samples`` samples of noise alone, seeded by their number and ``config.seed``.

    Raises ConfigError for a model whose pipeline needs more than that.
    """
    require_pipeline(config, model, ())
    num = require_samples(evaluation)
    return _inputs(config, [f"sample {i}" for i in range(num)], list(range(num)), {})


def _inputs(
    config: DatasetConfig, names: Sequence[str], numbers: Sequence[int], conditioning: dict[str, list[int]]
) -> DiffusionInputs:
    import numpy as np
    import torch

    seen: dict[int, int] = {}
    replicas = []
    for number in numbers:
        replicas.append(seen.get(number, 0))
        seen[number] = replicas[-1] + 1
    rows = list(zip(numbers, replicas, strict=True))
    return DiffusionInputs(
        noise=torch.tensor([seed_of(config.name, number, replica, config.seed) for number, replica in rows]),
        conditioning=conditioning,
        sample_ids=tuple(
            f"{name} replica {r}" if conditioning else name for name, r in zip(names, replicas, strict=True)
        ),
        clusters=np.array(numbers) if conditioning else None,
    )


def _num_classes(config: DatasetConfig, model: LoadedModel) -> int:
    for name in model.parts["denoisers"]:
        settings: Any = model.components[name].config
        for key in _NUM_CLASSES:
            if isinstance(found := settings.get(key), int) and found > 0:
                return found
    raise ConfigError(
        f"dataset={config.name}: the configuration of {model.name} does not say how many classes it knows "
        f"({', '.join(_NUM_CLASSES)}); take a data set of prompts"
    )
