"""What torchao chooses on data: the scales of AWQ, SmoothQuant and static activations, and the codes of GPTQ.

The library's observers keep every input of a layer and concatenate them, so that its memory grows with the data and its
batches must be equal. Here only the inputs of AWQ are kept, as rows of tokens (batches of any size), for as many layers
at a time as ``calibration_layers_at_once`` says. SmoothQuant (Xiao et al. 2022, arXiv:2211.10438) and static scales are
functions of the largest magnitude in each input channel, so one row a layer is enough; the library's own observer turns
it into scales, and they equal those of all inputs. AWQ is Lin et al. 2023, arXiv:2306.00978, searched by the library.
GPTQ (Frantar et al. 2022, arXiv:2210.17323) keeps a matrix (in_features, in_features) a layer; the library rounds by it
on CUDA.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantlab.backends.torchao.build import build_form, quiet_library
from quantlab.backends.torchao.config import TorchAoConfig
from quantlab.backends.torchao.forms import Form
from quantlab.backends.torchao.rules import FLOAT8_STATIC
from quantlab.backends.unseen import never_ran, only_zeros, with_silent_channels
from quantlab.errors import ConfigError
from quantlab.progress import under_way

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from quantlab.backends.torchao.library_types import TorchAOBaseTensor

    Linears = Mapping[str, nn.Linear]
    Dtypes = Mapping[str, torch.dtype]


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerScales:
    """What was measured for one layer."""

    pre_scale: Tensor | None = None
    """(in_features,): the weight's columns are multiplied by it before they are rounded, and the input divided by it.
    None: neither."""
    activation_scale: Tensor | None = None
    """One number, in as many dimensions as the layer's input has: the step of its static activations. None: dynamic."""
    hessian: Tensor | None = None
    """fp32 (in_features, in_features): second moments of the inputs, by which GPTQ rounds. None: each weight alone."""


def measure(
    layers: Linears,
    forms: Mapping[str, Form],
    dtypes: Dtypes,
    config: TorchAoConfig,
    run: Callable[[], None],
) -> dict[str, LayerScales]:
    """The scales of each layer of ``layers``, which stay as they are; ``run`` passes all calibration data once.

    ``dtypes`` are what the layers will compute in. Raises ConfigError naming a layer that never ran or got infinities.
    """
    with quiet_library():
        if config.algorithm == "awq":
            return _search_all(layers, forms, dtypes, config.calibration_layers_at_once, run)
        if config.algorithm == "gptq":
            return _hessians(layers, dtypes, run)
        rows = _largest_inputs(layers, dtypes, run)
        alpha = config.smoothquant_alpha if config.algorithm == "smoothquant" else None
        return {
            name: _from_row(layer.weight.detach().to(dtypes[name]), rows.pop(name), forms[name], alpha)
            for name, layer in layers.items()
        }


@contextlib.contextmanager
def _watched(layers: Linears, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While open, ``see(name, input)`` is called before each forward of a layer."""
    handles = [
        layer.register_forward_pre_hook(functools.partial(_pass_on, see, name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pass_on(
    see: Callable[[str, Tensor], None], name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    see(name, (args[0] if args else kwargs["input"]).detach())


def _not_finite(name: str, dtype: torch.dtype) -> ConfigError:
    return ConfigError(
        f"calibration: {name} got NaN or infinity in {dtype} on the calibration data; exclude it with "
        "modules_to_not_convert, or compute in float32 or bfloat16"
    )


# -- SmoothQuant and static activations


def _largest_inputs(layers: Linears, dtypes: Dtypes, run: Callable[[], None]) -> dict[str, Tensor]:
    """Layer -> the largest magnitude in each input channel, (1, ..., 1, in_features) as its input has dimensions."""
    import torch

    rows: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        if not x.numel():
            return
        x = x.to(dtypes[name])
        x = x[None] if x.ndim == 1 else x
        row = x.abs().amax(dim=tuple(range(x.ndim - 1)), keepdim=True)
        rows[name] = torch.maximum(rows[name], row) if name in rows else row

    with _watched(layers, see):
        run()
    for name in layers:
        if name not in rows:
            raise never_ran([name])
        if not bool(rows[name].isfinite().all()):
            raise _not_finite(name, rows[name].dtype)
        if not bool(rows[name].any()):
            raise only_zeros([name])
    return rows


def _from_row(weight: Tensor, row: Tensor, form: Form, alpha: float | None) -> LayerScales:
    """``alpha`` None: no smoothing."""
    import torch

    if form["_type"] == FLOAT8_STATIC:
        return LayerScales(activation_scale=_float8_scale(row, form))
    base, core = build_form(form), importlib.import_module("torchao.prototype.smoothquant.core")
    observer = core.SmoothQuantObserver(weight, alpha)
    observer(row)
    kwargs = base.get_act_quant_kwargs() if hasattr(base, "get_act_quant_kwargs") else None
    with torch.no_grad():
        factor, activation_scale, _ = observer.calculate_qparams(weight_quant_kwargs=kwargs)
    factor = with_silent_channels(factor, row.flatten() == 0)
    return LayerScales(pre_scale=None if alpha is None else factor, activation_scale=activation_scale)


def _float8_scale(row: Tensor, form: Form) -> Tensor:
    """By the observer that the library puts on a layer; the layer's own size does not matter to it."""
    import torch

    prepare = build_form(form)
    prepare.step = "prepare"
    stand_in = torch.nn.ModuleDict({"layer": torch.nn.Linear(1, 1)})
    importlib.import_module("torchao.quantization").quantize_(stand_in, prepare)
    observer: Any = stand_in["layer"].input_act_obs
    observer(row)
    return observer.calculate_qparams()[0]


# -- GPTQ


def _hessians(layers: Linears, dtypes: Dtypes, run: Callable[[], None]) -> dict[str, LayerScales]:
    """By the library's observer, fed from outside: its way puts the observer in the weight's place."""
    observer = importlib.import_module("torchao.prototype.gptq.observer").GPTQObserverTensor
    seen = {name: observer.from_hp(layer.weight.detach().contiguous()) for name, layer in layers.items()}
    with _watched(layers, lambda name, x: seen[name].update_2d(x.to(dtypes[name])) if x.numel() else None):
        run()
    for name, found in seen.items():
        if not int(found.total_batches):
            raise never_ran([name])
        if not bool(found.hessian.isfinite().all()):
            raise _not_finite(name, dtypes[name])
        if not bool(found.hessian.any()):
            raise only_zeros([name])
    return {name: LayerScales(hessian=found.hessian) for name, found in seen.items()}


def rounded_by_gptq(weight: Tensor, hessian: Tensor, form: Form) -> TorchAOBaseTensor:
    """The library's quantized tensor of ``weight``, which stays as it is; both must be on CUDA.

    All columns are one block: with the library's blocks of 256 the scale of a row would be that of its first 256
    weights, and larger ones after them would be cut.
    """
    api = importlib.import_module("torchao.prototype.gptq.api")
    settings = api.GPTQConfig(step="convert", base_config=build_form(form), gptq_quantize_block_size=weight.shape[1])
    with quiet_library():
        return api.gptq_quantize(hessian.clone(), weight.detach().clone(), settings)


# -- AWQ


def _search_all(
    layers: Linears,
    forms: Mapping[str, Form],
    dtypes: Dtypes,
    at_once: int,
    run: Callable[[], None],
) -> dict[str, LayerScales]:
    found: dict[str, LayerScales] = {}
    for names in _chunks(list(layers), at_once):
        inputs: dict[str, list[Tensor]] = {name: [] for name in names}
        with _watched({name: layers[name] for name in names}, functools.partial(_keep, inputs, dtypes)):
            run()
        for name in names:
            under_way(f"calibrate: awq, layer {len(found) + 1} of {len(layers)} ({name})")
            if not any(x.numel() for x in inputs[name]):
                raise never_ran([name])
            if not all(bool(x.isfinite().all()) for x in inputs[name]):
                raise _not_finite(name, dtypes[name])
            if not any(bool(x.any()) for x in inputs[name]):
                raise only_zeros([name])
            found[name] = LayerScales(pre_scale=_search(layers[name], inputs.pop(name), forms[name], dtypes[name]))
    return found


def _keep(inputs: Mapping[str, list[Tensor]], dtypes: Dtypes, name: str, x: Tensor) -> None:
    """A copy: what follows the layer may write into its input."""
    inputs[name].append(x.reshape(-1, x.shape[-1]).to("cpu", dtypes[name], copy=True))


def _search(layer: nn.Linear, inputs: list[Tensor], form: Form, dtype: torch.dtype) -> Tensor:
    is_silent = _wake_silent_channels(inputs).to(layer.weight.device)
    core = importlib.import_module("torchao.prototype.awq.core")
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)
    observer = core.AWQObserver(layer.weight.detach().to(dtype), bias, build_form(form))
    for x in inputs:
        observer(x, None)
    return with_silent_channels(observer.calculate_qparams(), is_silent)


def _wake_silent_channels(inputs: list[Tensor]) -> Tensor:
    """A channel that is 0 throughout counts as the quietest one that is not, in place; bool (in_features,): which.

    The library divides all factors by the root of the smallest, which would be that of a silent channel.
    """
    import torch

    loudness = torch.stack([x.float().abs().sum(dim=0) for x in inputs]).sum(dim=0)
    is_silent = loudness == 0
    if bool(is_silent.any()):
        quietest = loudness[~is_silent].min() / sum(len(x) for x in inputs)
        for x in inputs:
            x[:, is_silent] = quietest.to(x.dtype)
    return is_silent


def _chunks(names: list[str], at_once: int) -> list[list[str]]:
    size = at_once or len(names) or 1
    return [names[i : i + size] for i in range(0, len(names), size)]
