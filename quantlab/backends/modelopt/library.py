"""ModelOpt itself: imported quietly, and made to change exactly the layers that it is given."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from quantlab.backends.modelopt.config import NVIDIAModelOptConfig
from quantlab.backends.modelopt.extensions import build_mx, leave_out
from quantlab.backends.modelopt.quantizers import build_quant_cfg
from quantlab.errors import ConfigError, is_of_the_machine
from quantlab.vocabulary.amounts import some_of

if TYPE_CHECKING:
    from torch import nn

    from quantlab.backends.modelopt.library_types import QuantLinear, TensorQuantizer

_NOISY_LOGGERS = ("torchao", "torch.utils._pytree", "diffusers", "bitsandbytes", "transformers")
BRANCH = ("svdquant_lora_a", "svdquant_lora_b")
"""Attributes of a weight's quantizer with a low-rank branch: (rank, in_features), then (out_features, rank)."""
_MX = ("MXFP8", "MXFP4")


@contextlib.contextmanager
def quiet_library() -> Iterator[ModuleType]:
    """``modelopt.torch.quantization`` without what it and the libraries that it imports print."""
    levels = {name: logging.getLogger(name).level for name in _NOISY_LOGGERS}
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield importlib.import_module("modelopt.torch.quantization")
    finally:
        for name, level in levels.items():
            if logging.getLogger(name).level == logging.ERROR:  # else the library chose one while it was imported
                logging.getLogger(name).setLevel(level)


def prepare(config: NVIDIAModelOptConfig, device: str) -> None:
    """Have the CUDA code that the scheme's kernels need, which is compiled at the first use on a machine.

    Raises ConfigError where it cannot be compiled.
    """
    used = [kind for kind in (config.weight_type, config.activation_type) if kind in _MX]
    if used and device.startswith("cuda"):
        build_mx(used[0])


def layers_at(model: nn.Module, names: Iterable[str]) -> dict[str, QuantLinear]:
    """Path -> layer, for paths of ``nn.Linear``, which the library turns into its own class in place."""
    return {name: cast("QuantLinear", model.get_submodule(name)) for name in names}


def insert(
    named: Mapping[str, QuantLinear],
    config: NVIDIAModelOptConfig,
    algorithm: str | None = None,
    forward_loop: Callable[[nn.Module], None] | None = None,
) -> None:
    """Give the layers their quantizers and run the algorithm (``config``'s own, or another).

    The library sees the layers in a holder of their own, so that no other module of the model gets quantizers; it
    changes them in place, and the model keeps them. ``forward_loop`` gets that holder, and runs the whole model.
    """
    import torch

    prepare(config, named[next(iter(named))].weight.device.type)
    layers = list(named.values())
    holder = torch.nn.ModuleList(layers)
    shapes = {str(i): shape_of(layer) for i, layer in enumerate(layers)}
    cfg = build_quant_cfg(config, shapes)
    cfg["quant_cfg"] = _of_most_at_once(cfg["quant_cfg"])
    cfg["algorithm"] = cfg["algorithm"] if algorithm is None else algorithm
    with quiet_library() as library, torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):  # progress bars
        leave_out()
        with named_failure(config, list(named)):
            library.quantize(holder, cfg, forward_loop)


def _of_most_at_once(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same for a holder of these layers alone: what most are told is told to all, and then what others are.

    The library looks through all quantizers for each entry.
    """
    first, *each = entries
    kinds: dict[str, list[dict[str, Any]]] = {}
    for entry in each:
        kinds.setdefault(entry["quantizer_name"].rpartition(".")[2], []).append(entry)
    found = [first]
    for kind, rows in kinds.items():
        [(usual, _)] = Counter(repr(row["cfg"]) for row in rows).most_common(1)
        [same, *_] = [row for row in rows if repr(row["cfg"]) == usual]
        found.append({**same, "quantizer_name": f"*.{kind}"})
        found += [row for row in rows if repr(row["cfg"]) != usual]
    return found


@contextlib.contextmanager
def named_failure(config: NVIDIAModelOptConfig, names: list[str]) -> Iterator[None]:
    """What the library throws, as a ConfigError with the names of the layers; what is the machine's stays as it is."""
    try:
        yield
    except ConfigError:
        raise
    except (AssertionError, RuntimeError, ValueError, TypeError) as error:
        if getattr(error, "is_from_model", False) or is_of_the_machine(error):
            raise
        raise ConfigError(
            f"quant_type={config.quant_type}: ModelOpt cannot quantize {some_of(names)}: "
            f"{error}; choose another dtype, group_size or algorithm, or exclude these layers"
        ) from error


def shape_of(layer: nn.Linear) -> tuple[int, int]:
    """(out_features, in_features)."""
    return int(layer.weight.shape[0]), int(layer.weight.shape[1])


def settle(layer: QuantLinear, config: NVIDIAModelOptConfig, activation: Mapping[str, Any] | None) -> None:
    """Leave in a calibrated layer what its forward needs, where a state dict finds it, and nothing else.

    ``activation`` is what the config tells the activations' quantizer; None: there is none. The library's searches
    leave dynamic activations with one scale a channel, and smoothing needs static ones: both are put back here.
    """
    calib = importlib.import_module("modelopt.torch.quantization.calib")
    weights, inputs = layer.weight_quantizer, layer.input_quantizer
    inputs.__dict__.pop("_amax_for_smoothing", None)
    if getattr(layer.__dict__.get("forward"), "__func__", None) is type(layer).forward:
        del layer.forward  # the searches put their own forward there, and then the class's own, bound for good
    _register_branch(weights)
    if weights.block_sizes and isinstance(weights.num_bits, int):  # as all but one of the algorithms keep it
        weights._buffers["_amax"] = weights._amax.float()
    if activation is not None:
        if not activation.get("block_sizes"):
            inputs._axis = activation.get("axis")
        if config.activation_scales == "dynamic":
            inputs._dynamic = activation.get("type") == "dynamic"
            inputs._buffers.pop("_amax", None)
    for quantizer in (weights, inputs):
        if getattr(quantizer, "_calibrator", None) is not None:
            quantizer._calibrator = calib.MaxCalibrator(quantizer._num_bits, quantizer._axis, quantizer._unsigned)


def _register_branch(quantizer: TensorQuantizer) -> None:
    """Make the low-rank branch of ``svdquant`` buffers.

    For weights in blocks the library changes the quantizer's class after it has made it one with a branch, so that the
    branch ends as plain attributes: in effect, but in no state dict.
    """
    found = {key: quantizer.__dict__.pop(key) for key in BRANCH if key in quantizer.__dict__}
    if found:
        nn = importlib.import_module("modelopt.torch.quantization.nn.modules.quant_linear")
        quantizer.__class__ = nn.SVDQuantTensorQuantizer
        for key, value in found.items():
            setattr(quantizer, key, value)
