"""A calibration set as a job makes it: inputs that the evaluation has not seen, recorded in batches that fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from quantlab.datasets.calibration import calibration_inputs, sampling_settings
from quantlab.models.loaded import LoadedModel
from quantlab.protocols.table import Inputs
from quantlab.stages.calibrate import CalibrationSet, calibration_set, in_smaller_batches
from quantlab.vocabulary.schema import CalibrationConfig, EvaluationConfig


def recorded_set(
    model: LoadedModel,
    components: Sequence[str],
    config: CalibrationConfig,
    evaluation: EvaluationConfig,
    seen: Inputs,
    cache_dir: Path,
    progress: Callable[[int, int], object] | None = None,
) -> CalibrationSet:
    """The calls of the components on the calibration data; ``seen`` are the evaluation's inputs."""
    inputs = calibration_inputs(config, evaluation, model, seen)

    def attempt(batch_size: int) -> CalibrationSet:
        settings = sampling_settings(replace(config, batch_size=batch_size), evaluation)
        return calibration_set(model, components, inputs, settings, cache_dir, progress)

    return in_smaller_batches(attempt, min(config.batch_size, config.num_samples), model.device)
