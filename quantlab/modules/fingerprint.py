"""Does a reference look already quantized? A dequantized checkpoint makes every comparison against it an artefact.

The fingerprint is the relative weight error of plain round-to-nearest int4 with groups of 32 and a minimum of their
own (the grid of ggml's Q4_1). Weights that were trained in floating point give 0.07 to 0.085 (measured on small
language models, encoders and image transformers); weights that came from such a grid give 0. Grids of other kinds
(codebooks, larger groups) are only seen where this grid happens to contain them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

GROUP_SIZE = 32
NUM_LEVELS = 16
ALREADY_QUANTIZED_BELOW = 0.05


def grid_fingerprint(layers: nn.Module | Sequence[nn.Module | Tensor], max_layers: int = 32) -> float | None:
    """Relative error ||W - Wq|| / ||W|| of int4 round-to-nearest, group 32, asymmetric; mean weighted by parameters.

    Args:
        layers: a module (its Linear layers are looked at, the output embedding of a language model is not: it is
            often stored in another format), or a sequence of modules and of weights (out_features, in_features).
        max_layers: how many layers, evenly spaced, are looked at.

    Returns:
        The fingerprint, or None where no layer's in_features divides by 32.
    """
    given = layers if isinstance(layers, Sequence) else [layers]
    weights = [w for item in given for w in _linear_weights(item)]
    weights = [w for w in weights if w.dim() == 2 and w.shape[1] % GROUP_SIZE == 0 and w.is_floating_point()]
    if not weights:
        return None
    num = min(max_layers, len(weights))
    sample = [weights[i * len(weights) // num] for i in range(num)]
    return sum(_rel_error(w) * w.numel() for w in sample) / sum(w.numel() for w in sample)


def fingerprint_warning(value: float | None) -> str | None:
    """What to tell the user about a fingerprint; None where nothing is suspicious."""
    if value is None or value >= ALREADY_QUANTIZED_BELOW:
        return None
    return (
        f"the reference looks already quantized: rounding it to 4 bits in groups of {GROUP_SIZE} changes its "
        f"weights by {value:.4f} (0.07 to 0.085 is usual for weights trained in floating point), so losses "
        "measured against it say little; use a checkpoint that was never quantized"
    )


def _linear_weights(item: nn.Module | Tensor) -> list[Tensor]:
    import torch

    if isinstance(item, torch.Tensor):
        return [item]
    output_embeddings = getattr(item, "get_output_embeddings", None)
    head = output_embeddings() if output_embeddings is not None else None
    return [m.weight for m in item.modules() if isinstance(m, torch.nn.Linear) and m is not head]


def _rel_error(weight: Tensor) -> float:
    """One layer's error. The minimum is a float, not a rounded zero point: with that the Q4_1 grid is met exactly."""
    groups = weight.detach().float().reshape(-1, GROUP_SIZE)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    step = ((high - low) / (NUM_LEVELS - 1)).clamp_min(1e-30)
    rounded = ((groups - low) / step).round() * step + low
    norm = float(groups.norm())
    return float((groups - rounded).norm()) / norm if norm else 0.0
