"""Does a reference look already quantized? A dequantized checkpoint makes every comparison against it an artefact.

Two looks at a sample of each layer's rows. The fingerprint is the relative weight error of plain round-to-nearest int4
with groups of 32 and a minimum of their own (the grid of ggml's Q4_1). Weights that were trained in floating point give
0.07 to 0.085 (measured on small language models, encoders and image transformers); weights that came from such a grid
give 0. The other formats are recognized by their codes: 16 neighbours in a row share a scale in all of them, so that
all of the 16 are multiples of one number by codes of the format, whatever that number is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantlab.modules.holders import View, holders

if TYPE_CHECKING:
    from torch import Tensor, nn

GROUP_SIZE = 32
NUM_LEVELS = 16
ALREADY_QUANTIZED_BELOW = 0.05
CHUNK = 16
_MAX_LAYERS = 32
_ROWS, _CHUNKS = 64, 12
"""How many rows of a layer are looked at, and of how many of them how many chunks."""
_EXPERTS = 8
"""Of packed experts so many are looked at."""
_FEW = 3
"""Different magnitudes that say nothing: constant, one-hot and ternary weights are on every grid."""
_ON_GRID = 0.9
"""Share of chunks that makes a layer one of a grid."""
_TOLD = 0.1
"""Share of the weights from which grids are told: the layers that are on one seem to lose less than they do."""
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""QLoRA's codes (arXiv 2305.14314, appendix E); libraries differ in the later digits."""
_FP4 = tuple(sign * code / 192 for sign in (-1, 1) for code in (0, 1, 32, 48, 64, 96, 128, 192))
"""The codes of bitsandbytes' fp4."""
_E2M1 = tuple(sign * code for sign in (-1, 1) for code in (0, 0.5, 1, 1.5, 2, 3, 4, 6))


@dataclass(frozen=True)
class _Grid:
    name: str
    fits: Callable[[Tensor, float], Tensor]
    """Chunks (n, 16), of which the largest magnitude is 1, and a relative tolerance -> bool (n,)."""
    num_different: int
    """Magnitudes that a chunk must have to tell this grid from finer ones and from chance."""


def grid_fingerprint(layers: nn.Module | Sequence[nn.Module | Tensor]) -> float | None:
    """Relative error ||W - Wq|| / ||W|| of int4 round-to-nearest, group 32, asymmetric; mean weighted by parameters.

    Args:
        layers: a module (its linear layers and experts are looked at, the output embedding of a language model is
            not: it is often stored in another format), or a sequence of modules and of weights (out_features,
            in_features).

    Returns:
        The fingerprint, or None where no layer's in_features divides by 32, or none has groups of more than three
        different weights.
    """
    sample = [(rows, num) for rows, num in _sampled(layers) if rows.shape[1] % GROUP_SIZE == 0]
    errors = [(error, num) for rows, num in sample if (error := _rel_error(rows)) is not None]
    total = sum(num for _, num in errors)
    return sum(error * num for error, num in errors) / total if total else None


def known_grid(layers: nn.Module | Sequence[nn.Module | Tensor]) -> str | None:
    """The formats whose codes the weights of the layers are, whatever their scales' granularity; None: no such.

    4-bit floats, nf4, fp4, float8 and integers of up to 8 bits are told, in float32 and after a cast to 16 bits.
    Where they are not all of one format, as in the mixes of GGUF files, each is told with its share of the weights;
    nothing is told where less than a tenth is of any. Arguments as for :func:`grid_fingerprint`.
    """
    votes: dict[str | None, int] = {}
    for rows, num in _sampled(layers):
        is_telling, name = _layer_grid(rows)
        if is_telling:
            votes[name] = votes.get(name, 0) + num
    total = sum(votes.values())
    found = sorted(((num / total, name) for name, num in votes.items() if name is not None), reverse=True)
    if sum(share for share, _ in found) < _TOLD:
        return None
    if found[0][0] == 1:
        return found[0][1]
    return " and ".join(f"{name} ({share:.0%} of them)" for share, name in found)


def fingerprint_warning(value: float | None, grid: str | None = None) -> str | None:
    """What to tell the user about a fingerprint and a known grid; None where nothing is suspicious."""
    if grid is not None:
        seen = f"its weights are {grid} times a scale"
    elif value is not None and value < ALREADY_QUANTIZED_BELOW:
        seen = (
            f"rounding it to 4 bits in groups of {GROUP_SIZE} changes its weights by {value:.4f} (0.07 to 0.085 is "
            "usual for weights trained in floating point)"
        )
    else:
        return None
    return (
        f"the reference looks already quantized: {seen}, so losses measured against it say little; use a checkpoint "
        "that was never quantized"
    )


# -- the sample


def _sampled(layers: nn.Module | Sequence[nn.Module | Tensor]) -> list[tuple[Tensor, int]]:
    """Evenly spaced rows (n, in_features) of evenly spaced layers, and how many weights each layer has."""
    given = layers if isinstance(layers, Sequence) else [layers]
    found = [one for item in given for one in _matrices(item)]
    found = [(w, view) for w, view in found if w.dim() == len(view.shape) and w.is_floating_point() and w.numel()]
    if len(found) > _MAX_LAYERS:
        found = [found[i * len(found) // _MAX_LAYERS] for i in range(_MAX_LAYERS)]
    return [(_rows(weight, view), weight.numel()) for weight, view in found]


def _matrices(item: nn.Module | Tensor) -> list[tuple[Tensor, View]]:
    import torch

    if isinstance(item, torch.Tensor):
        return [(item, View(shape=(0, 0)))]
    output_embeddings = getattr(item, "get_output_embeddings", None)
    head = output_embeddings() if output_embeddings is not None else None
    inside = holders(torch.nn.ModuleList([item]))  # an item may be a layer itself
    wanted = [h for h in inside.values() if h.kind in ("linear", "expert") and h.owner is not head]
    return [(h.weight.detach(), h.view) for h in wanted if h.has_weight]


def _rows(weight: Tensor, view: View) -> Tensor:
    """(n, in_features) float32, of a few experts where there are many; no more than these is copied."""
    some = weight[:: -(-len(weight) // _EXPERTS)] if weight.dim() == 3 else weight
    turned = some.transpose(-1, -2) if view.transposed else some
    num = -(-_ROWS // len(some)) if weight.dim() == 3 else _ROWS
    rows = turned[..., :: -(-turned.shape[-2] // num), :]
    return rows.detach().reshape(-1, turned.shape[-1]).float()


# -- int4 with a minimum


def _rel_error(weight: Tensor) -> float | None:
    """One layer's error, over its size about its mean; None where no group tells anything.

    The minimum is a float, not a rounded zero point: with that the Q4_1 grid is met exactly.
    """
    groups = weight.reshape(-1, GROUP_SIZE)
    groups = groups[_num_different(groups) > _FEW]
    if not len(groups):
        return None
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    step = ((high - low) / (NUM_LEVELS - 1)).clamp_min(1e-30)
    rounded = ((groups - low) / step).round() * step + low
    spread = float((groups - groups.mean()).norm())  # of weights far from zero the size says nothing
    return float((groups - rounded).norm()) / max(spread, 1e-30)


def _num_different(groups: Tensor) -> Tensor:
    """int (n,): how many different values each row holds."""
    ordered = groups.sort(dim=1).values
    return 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1)


# -- codes times a scale


def _layer_grid(weight: Tensor) -> tuple[bool, str | None]:
    """Whether the layer has chunks that tell, and the grid that nearly all of them are on."""
    width = weight.shape[1] // CHUNK
    if not width:
        return False, None
    chunks = weight[:, : width * CHUNK].reshape(len(weight), width, CHUNK)
    chunks = chunks[:: -(-len(weight) // _CHUNKS), :: -(-width // _CHUNKS)].reshape(-1, CHUNK)
    tolerance, smallest = _precision(weight)
    largest = chunks.abs().amax(1)
    chunks, largest = chunks[largest > smallest], largest[largest > smallest]
    num = _num_different(chunks.abs())
    is_telling = num > _FEW
    if int(is_telling.sum()) < 4:
        return False, None
    ratios, num = (chunks / largest[:, None])[is_telling], num[is_telling]
    for grid in _grids():
        enough = num >= grid.num_different
        if int(enough.sum()) >= 4 and float(grid.fits(ratios[enough], tolerance).float().mean()) >= _ON_GRID:
            return True, grid.name
    return True, None


def _precision(weight: Tensor) -> tuple[float, float]:
    """The relative rounding of the weights (float32's, or that of a narrower dtype that they went through), doubled as
    the scale is a weight too; and the magnitude below which the dtype's own grid is too coarse."""

    if bool((weight.bfloat16().float() == weight).all()):
        return 2.0**-7, 0.0
    if bool((weight.half().float() == weight).all()):
        return 2.0**-10, 2.0**-12
    return 2.0**-16, 0.0


def _grids() -> tuple[_Grid, ...]:
    """Coarse ones first, since finer ones hold their codes."""
    return (
        _Grid("integers of 3 bits", lambda r, t: _fits_integers(r, 1, 5, t), 4),
        _Grid("4-bit floats (e2m1, as in mxfp4 and nvfp4)", lambda r, t: _fits_codes(r, _E2M1, t), 4),
        _Grid("the codes of nf4", lambda r, t: _fits_codes(r, _NF4, t + 1e-3), 5),
        _Grid("the codes of fp4", lambda r, t: _fits_codes(r, _FP4, t), 4),
        _Grid("integers of 4 or 5 bits", lambda r, t: _fits_integers(r, 1, 17, t), 5),
        _Grid("8-bit floats (e5m2)", lambda r, t: _fits_floats(r, 4, t), 6),
        _Grid("8-bit floats (e4m3, as in mxfp8)", lambda r, t: _fits_floats(r, 8, t), 7),
        _Grid("integers of 6 to 8 bits (as in int8 and q8_0)", lambda r, t: _fits_integers(r, 17, 129, t), 8),
        _Grid("integers of 2 to 5 bits with a minimum of their own (as in q4_1 and q4_k)", _fits_above_minimum, 4),
    )


def _fits_codes(ratios: Tensor, codes: Sequence[float], tolerance: float) -> Tensor:
    """Whether all of a chunk are codes of a table, one of which the largest is."""
    import torch

    table = torch.tensor(codes, device=ratios.device)
    signed = ratios / ratios.gather(1, ratios.abs().argmax(1, keepdim=True))  # the largest is 1
    scaled = signed[:, None, :] * table[table != 0][:, None]
    apart = (scaled[..., None] - table).abs()
    return (apart <= tolerance * table.abs() + 1e-6).any(-1).all(-1).any(-1)


def _fits_integers(ratios: Tensor, low: int, high: int, tolerance: float) -> Tensor:
    """Whether all of a chunk are integers, of which the largest is at least ``low`` and below ``high``."""
    import torch

    scaled = ratios[:, None, :] * torch.arange(low, high, device=ratios.device)[:, None]
    return ((scaled - scaled.round()).abs() <= tolerance * scaled.abs() + 1e-4).all(-1).any(-1)


def _fits_above_minimum(ratios: Tensor, tolerance: float) -> Tensor:
    """Whether all of a chunk less its smallest are integers below 32."""
    import torch

    above = ratios - ratios.amin(1, keepdim=True)
    spread = above.amax(1, keepdim=True)
    scaled = (above / spread)[:, None, :] * torch.arange(3, 32, device=ratios.device)[:, None]
    allowed = tolerance / spread[..., None] * torch.arange(3, 32, device=ratios.device)[:, None]
    return (((scaled - scaled.round()).abs() <= allowed + 1e-4) & (allowed < 0.25)).all(-1).any(-1)


def _fits_floats(ratios: Tensor, num_significands: int, tolerance: float) -> Tensor:
    """Whether all of a chunk, but for those so small that they may be subnormal, have one of 4 or 8 significands."""
    import torch

    steps = 1 + torch.arange(num_significands, device=ratios.device) / num_significands
    significands = (ratios[:, None, :] * steps[:, None]).abs().frexp().mantissa * 2 * num_significands
    is_near = (significands - significands.round()).abs() <= tolerance * significands
    return (is_near | (ratios.abs() < 2.0**-6)[:, None, :]).all(-1).any(-1)
