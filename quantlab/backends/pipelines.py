"""Diffusers' ``PipelineQuantizationConfig`` both ways: a scheme for each component of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quantlab.backends.stored import config_from_dict
from quantlab.errors import ConfigError, nearest
from quantlab.vocabulary.native import QuantizationConfigMixin, to_json_data

if TYPE_CHECKING:
    from diffusers.quantizers.pipe_quant_config import PipelineQuantizationConfig
    from torch import nn

_KEYS = ("quant_backend", "quant_kwargs", "components_to_quantize", "quant_mapping")
_LOADS = {"bitsandbytes_4bit": "load_in_4bit", "bitsandbytes_8bit": "load_in_8bit"}
"""Backend of Diffusers that says the width -> the key that says the same."""
_ENCODERS = ("text_encoder", "image_encoder")
"""How the components begin that are modules of transformers."""


def is_of_a_pipeline(block: Mapping[str, Any]) -> bool:
    """Whether a dictionary has the keys of a ``PipelineQuantizationConfig``."""
    return "quant_mapping" in block or "quant_backend" in block


def components_of(config: Mapping[str, Any] | PipelineQuantizationConfig) -> dict[str, dict[str, Any]]:
    """Component -> its ``quantization_config``, as plain data.

    Args:
        config: the object, or its arguments: ``quant_mapping``, whose values are dictionaries or configs of Diffusers
            and transformers; or ``quant_backend``, ``quant_kwargs`` and ``components_to_quantize``.

    Raises:
        ConfigError: keys that it does not have, no component, one that is named twice, or no known library.
    """
    said = dict(config) if isinstance(config, Mapping) else {key: getattr(config, key, None) for key in _KEYS}
    if unknown := [key for key in said if key not in _KEYS]:
        raise ConfigError(f"{unknown[0]}: a PipelineQuantizationConfig has {', '.join(_KEYS)}")
    mapping, backend = said.get("quant_mapping"), said.get("quant_backend")
    if mapping and backend:
        raise ConfigError("quant_backend: quant_mapping has the schemes; leave one of them out")
    if mapping:
        if not isinstance(mapping, Mapping):
            raise ConfigError(f"quant_mapping: a mapping of components is wanted, not {str(mapping)[:80]!r}")
        return {str(name): _block(f"quant_mapping.{name}", found) for name, found in mapping.items()}
    names = said.get("components_to_quantize")
    names = [names] if isinstance(names, str) else names
    if not names or not isinstance(names, (list, tuple)):
        raise ConfigError("components_to_quantize: is missing, which means every module of the pipeline; name them")
    if twice := [name for name in names if list(names).count(name) > 1]:
        raise ConfigError(f"components_to_quantize: {twice[0]} is named twice; keep one")
    method = str(backend).removesuffix("_4bit").removesuffix("_8bit")
    loads = {_LOADS[backend]: True} if backend in _LOADS else {}
    kwargs = said.get("quant_kwargs") or {}
    return {str(name): _block("quant_kwargs", {"quant_method": method, **loads, **kwargs}) for name in names}


def _block(key: str, found: Any) -> dict[str, Any]:
    """A component's dictionary, checked by making the native config of it."""
    block = found if isinstance(found, Mapping) else getattr(found, "to_dict", lambda: None)()
    if not isinstance(block, Mapping):
        raise ConfigError(f"{key}: a quantization_config is wanted, not {str(found)[:80]!r}")
    data: dict[str, Any] = to_json_data(dict(block))
    try:
        config_from_dict(data)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error
    return data


def from_pipeline_config(
    config: Mapping[str, Any] | PipelineQuantizationConfig,
) -> dict[str, QuantizationConfigMixin]:
    """Component -> native config, of Diffusers' object or its arguments; ConfigError as :func:`components_of`."""
    return {name: config_from_dict(block) for name, block in components_of(config).items()}


def to_pipeline_config(
    configs: Mapping[str, QuantizationConfigMixin], modules: Mapping[str, nn.Module] | None = None
) -> PipelineQuantizationConfig:
    """See :func:`quantlab.stages.own_pipeline.to_pipeline_config`, which tells of what a run leaves out beside it."""
    from diffusers.quantizers.pipe_quant_config import PipelineQuantizationConfig

    if not isinstance(configs, Mapping):
        raise ConfigError(
            f"configs={type(configs).__name__}: component -> config is wanted, such as {{'transformer': config}}"
        )
    if modules is not None and not isinstance(modules, Mapping):
        told = type(modules).__name__
        raise ConfigError(f"modules={told}: component -> module is wanted, such as {{'transformer': pipe.transformer}}")
    if not configs:
        raise ConfigError("components: no scheme is given; name a component, as in components.transformer")
    made: dict[str, Any] = {}
    for name, config in configs.items():
        module = _named(name, modules)
        if not isinstance(config, QuantizationConfigMixin):
            raise ConfigError(
                f"components.{name}={config!r}: one of quantlab's configs is wanted, e.g. QuantoConfig('int8')"
            )
        try:
            is_of_transformers = _is_of_transformers(module) if module is not None else name.startswith(_ENCODERS)
            made[name] = config.to_transformers(module) if is_of_transformers else config.to_diffusers(module)
        except ConfigError as error:
            raise ConfigError(f"components.{name}: {error}") from error
    return PipelineQuantizationConfig(quant_mapping=made)


def _named(name: object, modules: Mapping[str, nn.Module] | None) -> nn.Module | None:
    """The module of a component; None where no modules were given. ConfigError for a name of none."""
    from torch import nn

    if not isinstance(name, str) or not name.isidentifier():
        raise ConfigError(f"components: {name!r} is no name of a component, such as transformer")
    if not modules:
        return None
    known = {key: module for key, module in modules.items() if isinstance(module, nn.Module)}
    if name not in known:
        raise ConfigError(
            f"components.{name}: modules has no module of that name{nearest(name, known)}; it has "
            f"{', '.join(known) or 'none'}; give pipe.components"
        )
    return known[name]


def _is_of_transformers(module: nn.Module) -> bool:
    return any(kind.__module__.split(".")[0] == "transformers" for kind in type(module).__mro__)
