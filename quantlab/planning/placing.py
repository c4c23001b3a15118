"""What of a request a model that is not whole on one device cannot do: known before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from quantlab.backends.scheme import Scheme
from quantlab.errors import ConfigError
from quantlab.models.table import family_of
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


def check_family(config: ExperimentConfig) -> None:
    """ConfigError for a placement that models of the family cannot have, whichever they are."""
    placement, family = config.memory.placement, family_of(config.model)
    if placement in ("auto", "resident"):
        return
    if family.trained is not None:
        raise ConfigError(
            f"memory.placement={placement}: a model of family {family.name} is trained here, and not read from "
            "files of its own; pass memory.placement=resident"
        )
    if placement == "alone" and family.look is None:
        raise ConfigError(
            f"memory.placement=alone: a model of family {family.name} is one model and no pipeline of parts; pass "
            "memory.placement=streamed"
        )


def needs_of(schemes: Mapping[str, Scheme]) -> Literal["", "inputs", "data"]:
    """What the schemes of a job must see of a model that runs: nothing, its layers' inputs, or all of it."""
    wanting = [scheme for scheme in schemes.values() if scheme.native.needs_data]
    if all(scheme.axes.algorithm in scheme.backend.input_algorithms for scheme in wanting):
        return "inputs" if wanting else ""
    return "data"


def check_streamed(scheme: Scheme, placement: str) -> None:
    """ConfigError where a scheme needs data, which are measured on the whole model; but what looks at layers' inputs
    alone (an importance matrix) is measured on an unquantized model that runs in groups."""
    axes, needed = scheme.axes, needs_of({"": scheme})
    if not needed or (needed == "inputs" and placement == "group_offload"):
        return
    of_activations = axes.algorithm == "max"
    what = f"activation_dtype={axes.activation_dtype}" if of_activations else f"algorithm={axes.algorithm}"
    raise ConfigError(
        f"memory.placement={placement}: {axes.backend} wants the whole model while it measures {what}; pass "
        f"memory.placement=resident, or {'activation_dtype=none' if of_activations else 'algorithm=max'}"
    )


def is_possible(config: ExperimentConfig, placement: str) -> bool:
    """Whether models of the family may have a placement."""
    try:
        check_family(replace(config, memory=replace(config.memory, placement=placement)))
    except ConfigError:
        return False
    return True
