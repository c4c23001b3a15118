"""One run as it was planned: its typed config, its native config, its name. A plan is several of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from quantlab.backends.table import own_settings
from quantlab.planning.recipe import replay_yaml
from quantlab.vocabulary.axes import QuantizationAxes, resolve_axes
from quantlab.vocabulary.native import QuantizationConfigMixin, to_json_data
from quantlab.vocabulary.schema import ExperimentConfig

REFERENCE, FLOOR_BF16, FLOOR_BATCH = "reference", "floor_bf16", "floor_batch"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run: its typed config, its native quantization config (None: the reference), and how to ask for it again."""

    name: str
    config: ExperimentConfig
    native: QuantizationConfigMixin | None = None
    overrides: tuple[str, ...] = ()
    batch_size: int | None = None
    """Another batch size than the reference's (the ``floor_batch`` row)."""

    choices: Mapping[str, str] = field(default_factory=dict)
    """Option chosen of each config group."""
    point: Mapping[str, str] = field(default_factory=dict)
    """Its place in the grid: swept key -> value as typed."""

    @property
    def recipe_yaml(self) -> str:
        """The job as a recipe that anyone can run again."""
        return replay_yaml(self.resolved, self.choices)

    @functools.cached_property
    def resolved(self) -> dict[str, Any]:
        """The whole resolved config as plain data."""
        data: dict[str, Any] = to_json_data(OmegaConf.to_container(OmegaConf.structured(self.config), resolve=True))
        return data


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The checked jobs of a request. ``invalid`` pairs a combination with the reason why it cannot run."""

    jobs: tuple[Job, ...]
    is_sweep: bool
    recipe: Path | None = None
    invalid: tuple[tuple[str, str], ...] = ()
    dry_run: bool = False


def scheme_name(axes: QuantizationAxes) -> str:
    """A short name of what is asked for: ``torchao int4 g64``, ``bitsandbytes nf4 bnb_4bit_use_double_quant``."""
    resolved = resolve_axes(axes)
    if resolved.backend == "none":
        return REFERENCE if resolved.dtype == "auto" else f"none {resolved.dtype}"
    words = [resolved.backend, resolved.dtype]
    if resolved.group_size != "auto":
        words.append(f"g{resolved.group_size}" if isinstance(resolved.group_size, int) else "per-row")
    default = resolve_axes(replace(QuantizationAxes(), backend=resolved.backend, dtype=resolved.dtype))
    for key in ("activation_dtype", "algorithm", "compute_dtype", "on_mismatch"):
        if getattr(resolved, key) not in (getattr(default, key), "skip"):  # what was skipped is the coverage
            words.append(f"a-{resolved.activation_dtype}" if key == "activation_dtype" else str(getattr(resolved, key)))
    for name, own in own_settings(axes.backend).items():
        value = getattr(axes, name, own.default)
        if value != own.default:
            words.append(_setting_words(name, value))
    return " ".join(words)


def _setting_words(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{k}={v}" for k, v in value.items())
    return name if value is True else str(value) if name == "activation_scales" else f"{name}={value}"


def floor_jobs(config: ExperimentConfig) -> list[Job]:
    """The rows that every comparison needs: the reference through the candidates' path, and the two noise floors."""
    bare = replace(config, quantization=QuantizationAxes(), name="")
    bf16 = replace(bare, quantization=QuantizationAxes(dtype="bfloat16"))
    return [
        Job(name=REFERENCE, config=bare),
        Job(name=FLOOR_BF16, config=bf16),
        Job(name=FLOOR_BATCH, config=bare, batch_size=config.evaluation.floor_batch_size),
    ]
