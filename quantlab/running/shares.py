"""What lies on which of several devices, and what each phase of a run needs there (``memory.placement=spread``).

Where each block lies follows from the unquantized model alone; a candidate's blocks go where the same blocks are. An
activation is counted on every device, as the one that computes is another at each moment; the decoder is on the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from quantlab.models.outline import Outline
from quantlab.modules.spread import Map, plan_map
from quantlab.running.phases import activations, looking
from quantlab.vocabulary.prices import ComponentPrice, Phase, Share
from quantlab.vocabulary.schema import EvaluationConfig


def spread_phases(
    outline: Outline,
    prices: Sequence[ComponentPrice],
    evaluation: EvaluationConfig,
    needs_data: bool,
    num: int,
    is_looked_at: bool = False,
) -> tuple[tuple[Phase, ...], tuple[Share, ...]]:
    """The phases of a run over ``num`` devices, and what lies on each; ConfigError for a model that cannot be cut.

    ``is_looked_at``: the errors of calibrated layers are measured, beside those of the plain algorithm.
    """
    found, needed = plan_map(outline.components, num, None), activations(outline, evaluation)
    schemed = [p for p in prices if p.scheme]
    before, made, copied = list(found.num_bytes), [0] * num, [0] * num
    for price in schemed:
        for path, num_bytes in price.by_path.items():
            made[found.number(price.name, path)] += num_bytes
    for block in found.blocks:
        if any(block.component == price.name for price in schemed):
            copied[found.number(block.component, block.path)] += sum(block.storages.values())
    layer = max((p.quantizing_bytes for p in schemed), default=0)
    called = max((p.unpacked_bytes for p in schemed), default=0) if outline.denoiser else 0
    after = [a + b for a, b in zip(before, made, strict=True)]
    whole = [a + b for a, b in zip(before, copied, strict=True)]
    filled = [(whole if needs_data else after)[i] + (layer if copied[i] else 0) for i in range(num)]
    looked, with_plain = looking(outline, needed.running), [a + b for a, b in zip(after, made, strict=True)]
    rows = [
        Phase(name="load", device_bytes=0, host_bytes=sum(before), on_each=(0,) * num),
        *([_phase("encode prompts", before, needed.reading)] if outline.denoiser else []),
        _phase("reference", before, needed.running),
        *([_phase("calibrate", whole, looked)] if needs_data and schemed else []),
        *([_phase("quantize", filled, 0)] if schemed else []),
        *([_phase("evidence", with_plain, looked)] if needs_data and is_looked_at and schemed else []),
        _phase("evaluate", after, needed.running + called),
        *([_phase("decode", after, needed.decoding, at_first=True)] if outline.denoiser else []),
    ]
    shares = tuple(
        Share(parts=tuple(_parts(found, i)), reference_bytes=before[i], candidate_bytes=made[i]) for i in range(num)
    )
    return tuple(rows), shares


def _phase(name: str, weights: Sequence[int], active: int, at_first: bool = False) -> Phase:
    each = tuple(num + (active if not at_first or i == 0 else 0) for i, num in enumerate(weights))
    fullest = each.index(max(each))
    return Phase(
        name=name,
        device_bytes=each[fullest],
        host_bytes=0,
        activation_bytes=each[fullest] - weights[fullest],
        on_each=each,
    )


def _parts(found: Map, device: int) -> Iterator[str]:
    """In words what lies on a device."""
    for name in found.where:
        paths = [block.path for block in found.blocks if block.component == name]
        here = [path for path in paths if found.number(name, path) == device]
        if here == paths:
            yield name
        elif here:
            yield f"{name}: {here[0]}" + (f" to {here[-1]}" if len(here) > 1 else "")
