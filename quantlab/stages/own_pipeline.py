"""``quantlab.to_pipeline_config``: Diffusers' object of native configs, and what a run does beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from quantlab.backends import pipelines
from quantlab.backends.exclusions import excluded_layers
from quantlab.models.defaults import default_exclusions
from quantlab.models.pipeline_files import DENOISER
from quantlab.modules.layers import linear_layers, resolve_exclusions
from quantlab.progress import say
from quantlab.vocabulary.native import QuantizationConfigMixin

if TYPE_CHECKING:
    from diffusers.quantizers.pipe_quant_config import PipelineQuantizationConfig
    from torch import nn


def to_pipeline_config(
    configs: Mapping[str, QuantizationConfigMixin], modules: Mapping[str, nn.Module] | None = None
) -> PipelineQuantizationConfig:
    """The installed Diffusers' ``PipelineQuantizationConfig`` that means the same.

    It leaves out what the configs leave out. A run leaves out more by default (a denoiser's way in and out): where
    ``modules`` has such layers, that is told with the exclusions to add, as Diffusers would quantize them.

    Args:
        configs: component -> native config.
        modules: component -> its module, needed where layers are excluded: the object holds layers' names by the rule
            of the library that loads the component. ``pipe.components`` is taken as it is. Without modules the names
            say which library that is, and nothing tells whether the pipeline has such a component.

    Raises:
        ConfigError: beginning with ``components.NAME``, for what that library's class cannot hold, and for a name that
            ``modules`` does not have: Diffusers would leave that part of the pipeline unquantized.
    """
    made = pipelines.to_pipeline_config(configs, modules)
    for name, config in configs.items():
        module = (modules or {}).get(name)
        if module is not None and config.exclusion_rule == "quantlab":  # a library's rule stays that library's
            _tell_defaults(name, config, module)
    return made


def _tell_defaults(name: str, config: QuantizationConfigMixin, module: nn.Module) -> None:
    layers, left = [*linear_layers(module)], excluded_layers(config, module)
    entries = default_exclusions(module, is_denoiser=DENOISER.fullmatch(name) is not None)
    paths = [path for path, _ in module.named_modules()]
    by_default = resolve_exclusions(layers, entries, paths, optional_entries=entries)
    taken = {layer: entry for layer, entry in by_default.items() if layer not in left}
    if taken:
        missing = list(dict.fromkeys(taken.values()))
        told = f"by this object Diffusers quantizes {len(taken)} layers that a run leaves out by default"
        way_out = f"add {missing} to modules_to_not_convert, as far as Diffusers' rule can say it"
        other = "run with quantization.replace_default_exclusions=true"
        say(f"components.{name}: {told}; for the same layers {way_out}, or {other}", "warning")
