"""What of a request a model that lies on several devices cannot do: known before anything runs."""

from __future__ import annotations

from quantlab.errors import ConfigError
from quantlab.vocabulary.schema import ExperimentConfig


def check_placement(config: ExperimentConfig) -> None:
    """ConfigError where ``memory.placement=spread`` and another key exclude each other."""
    memory, key = config.memory, "memory.placement=spread"
    if memory.placement != "spread":
        if memory.devices is not None:
            raise ConfigError(
                f"memory.devices={memory.devices}: a model lies on several devices with {key} alone; pass that, or "
                "leave memory.devices out"
            )
        return
    if config.device == "cpu" and memory.devices is None:
        raise ConfigError(
            f"{key}: device=cpu is one device; pass device=cuda, or memory.devices=2 for a rehearsal in its own memory"
        )
    if config.checkpoint is not None:
        raise ConfigError(
            f"{key}: checkpoint={config.checkpoint} is loaded whole on one device; pass memory.placement=resident"
        )
    if config.evaluation.compile:
        raise ConfigError(
            f"{key}: torch.compile makes graphs of one device; pass evaluation.compile=false, or another placement"
        )
