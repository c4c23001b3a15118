"""Calibration: ModelOpt's algorithms on the named layers, fed by running the whole model."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from quantlab.backends.casting import by_place, wanted_dtype
from quantlab.backends.modelopt.config import NVIDIAModelOptConfig
from quantlab.backends.modelopt.library import insert, layers_at, settle, shape_of
from quantlab.backends.modelopt.quantize import begin
from quantlab.backends.modelopt.quantizers import activation_cfg, block_of
from quantlab.backends.modelopt.silent import shielded, unclip
from quantlab.backends.unseen import never_ran, only_zeros
from quantlab.errors import ConfigError
from quantlab.modules.feed import CalibrationFeed
from quantlab.progress import under_way

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from quantlab.backends.modelopt.library_types import QuantLinear

    Named = Mapping[str, QuantLinear]

_HESSIAN_BYTES = 4 << 30
"""How much of ``gptq``'s second moments is kept at once; more layers take more passes over the data."""


def calibrate(
    model: nn.Module,
    layers: Iterable[str],
    config: NVIDIAModelOptConfig,
    compute_dtype: str | torch.dtype | None,
    feed: CalibrationFeed,
) -> None:
    """Give the named ``nn.Linear`` quantizers, in place, and set their scales by ``config.algorithm``.

    Each pass runs ``feed`` on the whole ``model``. The layers hold all that :func:`quantize` needs to pack them; until
    then they round at every use. Inputs are not kept; what is, is in :mod:`quantlab.backends.modelopt.algorithms`.

    Raises:
        ConfigError: a layer that the scheme cannot take, that never ran, or whose input is not finite.
    """
    named = layers_at(model, layers)
    _check_shapes({name: shape_of(layer) for name, layer in named.items()}, config)
    begin(named, config, {name: wanted_dtype(layer, compute_dtype, "modelopt") for name, layer in named.items()})
    loudest: dict[str, Tensor] = {}
    run = _first_pass_checked(named, loudest, _on_the_terminal(model, feed))
    rounds = _rounds(named, config)
    before = {name: layer.weight.detach().clone() for name, layer in named.items()} if len(rounds) > 1 else {}
    done: dict[str, QuantLinear] = {}
    for part in rounds:
        with (
            _as_before(done, before),
            _given_by_place(part),
            shielded(part, loudest, config.algorithm),
            _told_by_layer(named, config.algorithm),
        ):
            insert(part, config, forward_loop=run)
        for name, layer in part.items():
            unclip(layer, loudest[name] == 0, config.algorithm)
            settle(layer, config, activation_cfg(config))
            layer.calibrated_by = config
        done |= part


def check_layers(
    config: NVIDIAModelOptConfig, shapes: Mapping[str, tuple[int, int]], compute_dtypes: Mapping[str, str], device: str
) -> None:
    """ConfigError as :func:`calibrate`, of layers that have no tensors yet."""
    _check_shapes(shapes, config)


def _check_shapes(shapes: Mapping[str, tuple[int, int]], config: NVIDIAModelOptConfig) -> None:
    settings = config.algorithm_settings or {}
    for name, (out_features, in_features) in shapes.items():
        rank = settings.get("lowrank", 32)
        if config.algorithm == "svdquant" and rank >= min(out_features, in_features):
            raise ConfigError(
                f"algorithm_settings.lowrank={rank}: {name} [{out_features}, {in_features}] has no "
                "higher rank, so nothing of it would be quantized; lower it, or exclude the layer"
            )
        block = settings.get("block_size", 1)
        if config.algorithm == "local_hessian" and in_features % block:
            raise ConfigError(
                f"algorithm_settings.block_size={block}: in_features {in_features} of {name} does not "
                "divide by it, and ModelOpt would do mse in silence; leave it out, or choose a divisor"
            )


def _rounds(named: Named, config: NVIDIAModelOptConfig) -> list[dict[str, QuantLinear]]:
    """The layers that the library calibrates together.

    ``local_hessian`` has one block size for all that it sees, and ``gptq`` is held to :data:`_HESSIAN_BYTES`. With more
    than one round a copy of the dense weights is kept until the end.
    """
    parts: dict[int, dict[str, QuantLinear]] = {}
    kept = turn = 0
    for name, layer in named.items():
        key = 0
        if config.algorithm == "local_hessian":
            key = block_of(config, name, shape_of(layer))
        elif config.algorithm == "gptq":
            size = 4 * shape_of(layer)[1] ** 2
            if kept and kept + size > _HESSIAN_BYTES:
                turn, kept = turn + 1, 0
            kept, key = kept + size, turn
        parts.setdefault(key, {})[name] = layer
    return list(parts.values())


@contextlib.contextmanager
def _as_before(done: Named, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """While open, layers that are done compute as they did, so that the rounds see what one round would."""
    quantizers = [q for layer in done.values() for q in (layer.weight_quantizer, layer.input_quantizer) if q.is_enabled]
    now = {name: layer.weight.data for name, layer in done.items()}
    for quantizer in quantizers:
        quantizer.disable()
    for name, layer in done.items():
        layer.weight.data = weights[name]
    try:
        yield
    finally:
        for name, layer in done.items():
            layer.weight.data = now[name]
        for quantizer in quantizers:
            quantizer.enable()


@contextlib.contextmanager
def _given_by_place(named: Named) -> Iterator[None]:
    """While open, layers get their inputs by place: others ``local_hessian`` does not see, and does mse in silence."""
    handles = [layer.register_forward_pre_hook(by_place, with_kwargs=True) for layer in named.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _told_by_layer(named: Named, algorithm: str) -> Iterator[None]:
    """While open, it is told which layer the library works on: after its passes it has each weight in hand in turn."""
    library: Any = importlib.import_module("modelopt.torch.quantization.model_calib")
    in_hand = library.enable_weight_access_and_writeback
    places = {id(layer): f"layer {i} of {len(named)} ({name})" for i, (name, layer) in enumerate(named.items(), 1)}

    def told(module: nn.Module, *more: Any, **settings: Any) -> Any:
        if place := places.get(id(module)):
            under_way(f"calibrate: {algorithm}, {place}")
        return in_hand(module, *more, **settings)

    library.enable_weight_access_and_writeback = told
    try:
        yield
    finally:
        library.enable_weight_access_and_writeback = in_hand


def _on_the_terminal(model: nn.Module, feed: CalibrationFeed) -> Callable[[], None]:
    """``feed(model)`` with the output streams of now: the library is made quiet, the progress bar is not."""
    out, err = sys.stdout, sys.stderr

    def run() -> None:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                feed(model)
            except Exception as error:
                error.is_from_model = True  # type: ignore[attr-defined]
                raise

    return run


def _first_pass_checked(
    named: Named, loudest: dict[str, Tensor], run: Callable[[], None]
) -> Callable[[nn.Module], None]:
    """A forward loop for the library; its first pass finds the layers that do not run, and broken inputs.

    ``loudest`` gets the largest magnitude in each input channel of each layer.
    """
    is_checked = False

    def forward_loop(_: nn.Module) -> None:
        nonlocal is_checked
        if is_checked:
            run()
            return
        handles = [
            layer.register_forward_pre_hook(_watch(name, loudest), with_kwargs=True) for name, layer in named.items()
        ]
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()
        is_checked = True
        if missing := [name for name in named if name not in loudest]:
            raise never_ran(missing)
        if silent := [name for name in named if not bool(loudest[name].any())]:
            raise only_zeros(silent)

    return forward_loop


def _watch(name: str, loudest: dict[str, Tensor]) -> Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], None]:
    def look(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        import torch

        inputs = (args[0] if args else kwargs["input"]).detach()
        if not inputs.numel():
            return
        largest = inputs.abs().reshape(-1, inputs.shape[-1]).amax(0)
        loudest[name] = torch.maximum(loudest[name], largest) if name in loudest else largest
        if not bool(largest.isfinite().all()):
            raise ConfigError(
                f"calibration: {name} got NaN or infinity on the calibration data; clean the data, or "
                "set compute_dtype=float32 where the model overflows"
            )

    return look
