"""Checkpoints of others: which package reads a ``quant_method``, and whose a layer is that some library loaded.

What a layer is, its classes and its tensor's classes say; a configuration only says which package must be there.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from quantlab.backends.table import Backend, backends
from quantlab.errors import ConfigError, require_package

if TYPE_CHECKING:
    from torch import nn

PACKAGES = {
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "bitsandbytes_4bit": ("bitsandbytes", "bitsandbytes"),
    "bitsandbytes_8bit": ("bitsandbytes", "bitsandbytes"),
    "torchao": ("torchao", "torchao"),
    "quanto": ("optimum.quanto", "optimum-quanto"),
    "gguf": ("gguf", "gguf"),
    "modelopt": ("modelopt", "nvidia-modelopt"),
    "gptq": ("gptqmodel", "gptqmodel optimum"),
    "awq": ("gptqmodel", "gptqmodel"),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"),
    "auto-round": ("auto_round", "auto-round"),
    "sdnq": ("sdnq", "sdnq"),
    "nunchaku": ("nunchaku", "nunchaku @ git+https://github.com/nunchaku-ai/nunchaku"),
    "nunchaku_lite": ("kernels", "kernels"),
    "hqq": ("hqq", "hqq"),
    "fp8": ("kernels", "kernels"),
    "mxfp4": ("kernels", "kernels"),
    "fbgemm_fp8": ("fbgemm_gpu", "fbgemm-gpu"),
    "eetq": ("kernels", "kernels"),
    "aqlm": ("aqlm", "aqlm"),
    "vptq": ("vptq", "vptq"),
    "higgs": ("flute", "flute-kernel"),
    "spqr": ("spqr_quant", "spqr_quant"),
    "quark": ("quark", "amd-quark"),
}
"""``quant_method`` of a configuration -> the package that its library needs, and what pip installs it by. A method that
is not here is left to the library, which knows it or says that it does not. (PyPI's nunchaku is another project.)"""
_JOINS_ON_IMPORT = frozenset({"sdnq"})
"""Packages that tell transformers of themselves when they are imported; it passes over their checkpoints else."""
_NEEDED_FOR_THE_KERNEL = frozenset({"fp8", "mxfp4", "eetq", "nunchaku_lite"})
"""On a CPU transformers dequantizes these, or refuses them in words of its own."""
FOLDED = frozenset({"awq"})
"""Methods that multiply channels of a layer and divide them in the norm before it: neither is the model's own."""


def loaders() -> tuple[str, ...]:
    """Every package that a checkpoint of others may be read by, as pip calls it."""
    return tuple(sorted({name for _, install in PACKAGES.values() for name in install.partition(" @ ")[0].split()}))


def require_method(method: str, key: str) -> None:
    """MissingPackage where the library of a ``quant_method`` is not installed; ``key`` is what the user typed."""
    if method in PACKAGES and method not in _NEEDED_FOR_THE_KERNEL:
        package, install = PACKAGES[method]
        require_package(package, f"{key}: quant_method={method}", install)
        if method in _JOINS_ON_IMPORT:
            importlib.import_module(package)


def method_of(config: Mapping[str, object], has_modelopt_state: bool, key: str) -> str:
    """The ``quant_method`` that a checkpoint's configuration says; "" for none. ConfigError for what is no word."""
    said = config.get("quantization_config", config.get("compression_config"))
    if said is None:
        return "modelopt" if has_modelopt_state else ""
    if not isinstance(said, Mapping):
        raise ConfigError(f"{key}: quantization_config: a mapping is wanted; copy or download its config.json again")
    method = said.get("quant_method") or ("bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & set(said) else "")
    if not isinstance(method, str) or not method:
        raise ConfigError(
            f"{key}: its quantization_config names no quant_method; copy or download its config.json again"
        )
    return method


def backend_of_layer(layer: nn.Module) -> Backend | None:
    """The backend whose library's layer (or tensor) this is; None for a plain one, and for a library without a row."""
    weight = layer._parameters.get("weight")
    classes = [*type(layer).__mro__, *(type(weight).__mro__ if weight is not None else ())]
    packages = {c.__module__.partition(".")[0] for c in classes}
    for row in backends().values():
        owns = getattr(row.module, "owns", None)
        if owns(layer) if owns is not None else packages & set(row.holds):
            return row
    return None
