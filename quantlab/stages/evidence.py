"""Evidence: which layer hurts, measured on calibration data.

Each layer of a candidate answers the inputs that the reference's layer gets, so that errors of earlier layers are not
counted against it; by denoising step, and summed. The reference and one candidate are in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from quantlab.errors import MetricUndefined, NotFinite
from quantlab.modules.feed import CalibrationFeed


@dataclass
class LayerEnergies:
    """Sums over all inputs of one layer."""

    signal: dict[int, float] = field(default_factory=dict)
    """Denoising step -> sum of squared outputs of the reference's layer."""
    noise: dict[int, float] = field(default_factory=dict)
    """Denoising step -> sum of squared differences of the candidate's layer."""
    channel_absmax: Any = None
    """fp32 tensor (in_features,): largest |input| of each channel."""

    def sqnr_db(self, step: int | None = None) -> float | None:
        """10 log10(signal / noise), of one step or of all; None where nothing was measured or nothing differs."""
        steps = self.signal if step is None else [step]
        signal, noise = (sum(of.get(k, 0.0) for k in steps) for of in (self.signal, self.noise))
        return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None

    @property
    def input_absmax(self) -> float:
        """Largest |input|."""
        return float(self.channel_absmax.max())

    @property
    def outlier_ratio(self) -> float:
        """Largest over median of the channels' absmax; 1 where all channels are zero."""
        median = float(self.channel_absmax.median())
        return self.input_absmax / median if median > 0 else 1.0


def layer_energies(
    reference: Any,
    candidate: Any,
    layers: Sequence[str],
    feed: CalibrationFeed,
    num_calls: int,
    progress: Callable[[int, int], Any] | None = None,
) -> dict[str, LayerEnergies]:
    """Energies of each layer over ``num_calls`` calls that are evenly spaced over the feed.

    Args:
        candidate: the component with quantized layers of the same names; None: inputs and signal only.

    Raises:
        MetricUndefined: naming a layer whose input on the reference is NaN or infinite.
    """
    found = {name: LayerEnergies() for name in layers}
    chosen = evenly_spaced(len(feed.calls), num_calls)
    step = 0

    def hooks_of(name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        """The candidate's layer has the hooks that users set on the reference's: it gets what those were given."""
        layer = None if candidate is None else candidate.get_submodule(name)

        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given[name] = args[0] if args else kwargs["input"]

        def after(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            inputs = args[0] if args else kwargs["input"]
            if inputs.numel():  # an expert that no token chose
                _add(found[name], name, step, inputs, output, layer, given.pop(name))

        return before, after

    given: dict[str, Any] = {}
    handles = []
    modules = dict(reference.named_modules())
    for name in layers:
        before, after = hooks_of(name)
        handles.append(modules[name].register_forward_pre_hook(before, with_kwargs=True, prepend=True))
        handles.append(modules[name].register_forward_hook(after, with_kwargs=True))
    try:
        for done, i in enumerate(chosen, 1):
            step = int(feed.calls[i].get("step", 0))
            feed.step(reference, i)
            if progress is not None:
                progress(done, len(chosen))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _add(row: LayerEnergies, name: str, step: int, inputs: Any, output: Any, layer: Any, given: Any) -> None:
    import torch

    absmax = inputs.detach().abs().float().reshape(-1, inputs.shape[-1]).amax(0)
    if not bool(torch.isfinite(absmax).all()):
        raise MetricUndefined(
            f"calibration: {name} gets NaN or infinity on the calibration data (step {step}); the reference overflows "
            "there: try model.dtype=bfloat16 or float32, or exclude the layer"
        )
    row.channel_absmax = absmax if row.channel_absmax is None else torch.maximum(row.channel_absmax, absmax)
    expected = output.detach().float()
    row.signal[step] = row.signal.get(step, 0.0) + _energy(expected)
    if layer is not None:
        with torch.no_grad():
            answered = layer(given.clone())
        noise = _energy(answered.detach().float() - expected)
        if not math.isfinite(noise):
            raise NotFinite(
                f"calibration: {name}, quantized, gives NaN or infinity on the calibration data (step {step}); "
                "set compute_dtype=float32 or bfloat16, choose another dtype, or exclude the layer",
                f"the output of {name}",
            )
        row.noise[step] = row.noise.get(step, 0.0) + noise


def _energy(tensor: Any) -> float:
    """Sum of squares, added up in fp64."""
    import torch

    return float(tensor.square().sum(dtype=torch.float64))


def evenly_spaced(num: int, num_wanted: int) -> list[int]:
    """Up to ``num_wanted`` of ``range(num)``, in order."""
    wanted = min(num, num_wanted)
    return [i * num // wanted for i in range(wanted)]


def weight_sqnr_db(weight_rel_error: float | None) -> float | None:
    """Relative Frobenius error of a weight as signal over error in dB; None for an exact one."""
    return -20 * math.log10(weight_rel_error) if weight_rel_error else None
