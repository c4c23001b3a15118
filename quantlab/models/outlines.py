"""The outline of each family: what its ``load`` would give, from configurations alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from quantlab.errors import ConfigError, ModelError, nearest
from quantlab.models.architectures import Architecture, Part, class_of, read_architecture
from quantlab.models.auto import HEADS
from quantlab.models.defaults import beside_the_language_model, default_exclusions
from quantlab.models.digits_training import build_transformer
from quantlab.models.outline import Outline, build, cast_as_loaded
from quantlab.models.pipeline_files import denoisers_of
from quantlab.models.reading import chosen_dtype, frozen
from quantlab.models.sources import named_as_in, untie
from quantlab.models.stored_dtype import dtype_on
from quantlab.modules.source import shards_of
from quantlab.modules.ties import tied_parameters
from quantlab.vocabulary.schema import DigitsModelConfig, ModelConfig

if TYPE_CHECKING:
    from torch import nn

Shipped = Callable[[str | None], Architecture | None]
"""Hub id -> the architecture that comes with quantlab; None where there is none."""
OWN_MODELS = {
    "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "encoder": "sentence-transformers/all-MiniLM-L6-v2",
}
"""Family -> the model that it has of its own."""


def outline(config: ModelConfig, device: str, shipped: Shipped) -> Outline:
    """What the family's ``load`` would give on ``device`` (``cpu`` or ``cuda``), on the meta device.

    Raises ModelError, beginning with ``model.path=``, for a model that cannot be found, read or built.
    """
    if config.family == "digits_dit":
        return _digits(config)
    path = config.path or OWN_MODELS.get(config.family)
    if not path:
        raise ModelError(
            f"model.path=null: family {config.family} needs a model; give a local folder or a Hub id, such as "
            "model.path=black-forest-labs/FLUX.1-schnell"
        )
    key = f"model.path={path}"
    is_pipeline = config.family == "diffusers"
    known = shipped(path) or read_architecture(config, "" if is_pipeline else "model")
    made = _pipeline(key, config, known, device) if is_pipeline else _one_model(key, config, known, device)
    folder = Path(path).expanduser()
    for name, module in made.components.items():
        part = folder / name if is_pipeline else folder
        if part.is_dir() and tied_parameters(module):
            with contextlib.suppress(ModelError):  # no safetensors, or damaged ones, of which loading tells
                untie(module, named_as_in(module, shards_of(key, part, config.variant)))
    return made


def _pipeline(key: str, config: ModelConfig, known: Architecture, device: str) -> Outline:
    dtype = chosen_dtype(config, "bfloat16" if device.startswith("cuda") else "float32")
    without = set(config.without)
    parts = {name: part for name, part in known.parts.items() if name not in without}
    modules = build(key, Architecture(path=known.path, dtype=known.dtype, parts=parts), dtype)
    denoisers = denoisers_of(key, modules)
    chosen = config.components or list(denoisers)
    for name in chosen:
        if name not in modules:
            raise ConfigError(
                f"model.components={name}: {key} has {', '.join(sorted(modules))}{nearest(name, modules)}"
            )
    return Outline(
        components={name: modules[name] for name in dict.fromkeys([*chosen, *modules])},
        quantized=tuple(dict.fromkeys(chosen)),
        dtype=dtype,
        denoiser=denoisers[0],
        default_exclusions=_exclusions(modules, config, denoisers),
    )


def _one_model(key: str, config: ModelConfig, known: Architecture, device: str) -> Outline:
    dtype = dtype_on(config, device, known.dtype)
    if config.family == "vision":
        known = replace(known, parts={name: _seeing_half(part) for name, part in known.parts.items()})
    modules = build(key, known, dtype)
    if config.family in ("encoder", "vision"):
        heads = {name: part.class_name.rpartition("For")[2] for name, part in known.parts.items()}
        modules = {name: _without_head(module, heads[name]) for name, module in modules.items()}
    for name in config.components:
        if name not in modules:
            raise ConfigError(f"model.components={name}: {key} has {', '.join(modules)}{nearest(name, modules)}")
    return Outline(
        components=modules, quantized=tuple(modules), dtype=dtype, default_exclusions=_exclusions(modules, config)
    )


def _seeing_half(part: Part) -> Part:
    """Of a model of images and texts the half that reads images, which is what is loaded."""
    half = part.class_name.removesuffix("Model") + "VisionModel"
    own = part.config.get("vision_config")
    return replace(part, class_name=half, config=own) if isinstance(own, Mapping) and class_of(half) else part


def _without_head(module: nn.Module, head: str) -> nn.Module:
    """What gives hidden states, of a class with a head that is not measured."""
    base: nn.Module = getattr(module, "base_model", module)
    return base if head in HEADS else module


def _digits(config: ModelConfig) -> Outline:
    import torch

    if not isinstance(config, DigitsModelConfig):
        raise ConfigError("model.family=digits_dit: it has settings of its own; choose it by model=digits_dit")
    dtype = chosen_dtype(config, "float32")
    with torch.device("meta"):
        module = build_transformer(config.num_layers, config.num_heads)
    modules: dict[str, nn.Module] = {"transformer": frozen(cast_as_loaded(module, dtype))}
    return Outline(
        components=modules,
        quantized=("transformer",),
        dtype=dtype,
        denoiser="transformer",
        default_exclusions={"transformer": tuple(config.default_exclusions)},
    )


def _exclusions(
    modules: dict[str, nn.Module], config: ModelConfig, denoisers: Collection[str] = ()
) -> dict[str, tuple[str, ...]]:
    own = {name: list(config.default_exclusions) for name in modules}
    if config.family in ("causal_lm", "smollm2", "seq2seq"):
        own = {name: [*beside_the_language_model(m), *own[name]] for name, m in modules.items()}
    return {name: default_exclusions(m, own[name], is_denoiser=name in denoisers) for name, m in modules.items()}
