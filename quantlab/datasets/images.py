"""``dataset=images dataset.path=FOLDER``: pictures of the user's own, for models that read images."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast

from quantlab.datasets.image_prompts import opened, read, tell_transparent
from quantlab.errors import ConfigError
from quantlab.models.loaded import LoadedModel
from quantlab.protocols.vision import VisionInputs
from quantlab.vocabulary.schema import DatasetConfig, EvaluationConfig


def load(config: DatasetConfig, evaluation: EvaluationConfig, model: LoadedModel) -> VisionInputs:
    """``evaluation.num_samples`` of the pictures, evenly spaced, as the model's own processor makes them.

    ConfigError beginning with ``dataset.path=...`` where there are fewer, or where one cannot be read.
    """
    key, files = f"dataset.path={config.path}", [row.image for row in read(config.path)]
    wanted = evaluation.num_samples
    check_number(files, wanted, key)
    chosen = [files[i * len(files) // wanted] for i in range(wanted)]
    tell_transparent(chosen, key)
    pictures = [opened(file, key, "RGB") for file in chosen]
    processor = cast(Any, model.parts)["processor"]
    made = processor(images=pictures, return_tensors="pt")
    pixels = made["pixel_values"]
    if len(pixels) != wanted:
        raise ConfigError(
            f"{key}: of {wanted} pictures {type(processor).__name__} makes {len(pixels)} inputs, not one "
            "of each (one of a video's frames, or one of each part); give module and inputs to quantlab.evaluate"
        )
    takes = inspect.signature(model.components["model"].forward).parameters
    others = {k: v for k, v in made.items() if k in takes and k != "pixel_values" and hasattr(v, "numpy")}
    ids = tuple(file.name for file in chosen)
    return VisionInputs(pixel_values=pixels.float(), sample_ids=ids, others=others)


def check_number(rows: Sequence[object], wanted: int, key: str) -> None:
    """ConfigError where there are fewer pictures than samples: a model that sees draws no noise to vary them."""
    if len(rows) < wanted:
        raise ConfigError(
            f"{key}: there are {len(rows)} pictures and not evaluation.num_samples={wanted}; give more pictures or "
            "fewer samples"
        )
