"""What a scheme leaves of a component, in a sentence, wherever that is much: it is said before any number."""

from __future__ import annotations

from collections.abc import Sequence

from quantlab.backends.scheme import Scheme
from quantlab.modules.layers import matches
from quantlab.stages.select import QuantizationRequest
from quantlab.vocabulary.capabilities import LAYER_KINDS
from quantlab.vocabulary.reports import LayerReport, QuantizationReport

MUCH = 0.1
"""A share of a component's weights above which what stays unquantized is said first."""
_NUM_NAMED = 3


def unquantized(component: str, report: QuantizationReport, request: QuantizationRequest | None) -> str:
    """Share, largest holders by name and kind, and what would take them; "" where little stays unquantized.

    Nothing would take what a checkpoint of others keeps (``request`` is None)."""
    share = 1 - report.coverage
    if share <= MUCH:
        return ""
    stay = sorted((r for r in report.layers if not r.is_stored_quantized), key=lambda r: -r.num_weights)
    also = {r.shares: f", which is also {r.name}" for r in stay if r.shares}
    own = [r for r in stay if not r.shares]
    total = report.num_parameters
    named = ", ".join(
        f"{r.name}{also.get(r.name, '')} ({r.kind}, {_percent(r.num_weights / total)})" for r in own[:_NUM_NAMED]
    )
    more = f" and {len(own) - _NUM_NAMED} more" if len(own) > _NUM_NAMED else ""
    largest = f"; the largest are {named}{more}" if named else "; they are in vectors, which no backend stores"
    much = [r for r in stay if r.num_weights > MUCH * share * total]
    ways = "; ".join(_ways_out(request, much)) if request is not None else ""
    return f"{component}: {_percent(share)} of its weights stay unquantized{largest}{f'; {ways}' if ways else ''}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else "under 1 %"


def _ways_out(request: QuantizationRequest, stay: Sequence[LayerReport]) -> list[str]:
    scheme, replaced = request.scheme, request.said("replace_default_exclusions", True)
    asked = scheme.axes.layer_kinds
    of_a_kind = [r for r in stay if r.status == "left" and r.kind in LAYER_KINDS]
    left = [r for r in of_a_kind if _is_left_by(scheme, r)]
    kinds = list(dict.fromkeys(r.kind for r in left))
    held = {  # a weight is taken where all its places are: an embedding is not without the head that is tied to it
        r.name: f"{first.name} is tied to {r.name}"
        for r in stay
        for first in left
        if r.status == "excluded" and _place(r) == _place(first) and _kept_by(request, r.name)
    }
    found = []
    if kinds:
        key = request.said("layer_kinds", [*asked, *kinds])
        more = "".join(dict.fromkeys(f" {way}" for name in held for way in _kept_by(request, name)))
        other = "" if not scheme.why_not_packed else f" with {_other(scheme)} ({scheme.why_not_packed})"
        why = f", as {' and '.join(held.values())}" if held else ""
        found.append(f"{key}{more} takes {' and '.join(kinds)}{other}{why}")
    if names := [r.name for r in stay if r.status == "left" and r.kind not in LAYER_KINDS]:
        found.append(f"no backend stores {names[0]}")
    if skipped := [r for r in stay if r.status == "skipped"]:
        found.append(f"{skipped[0].name} does not fit ({skipped[0].reason}): choose another dtype or group_size")
    excluded = [r for r in stay if r.status == "excluded" and r.name not in held]
    excluded += [r for r in of_a_kind if r not in left]
    if excluded:
        one = next((r for r in excluded if _kept_by(request, r.name)), excluded[0])
        way = " ".join(_kept_by(request, one.name))
        takes = f": {way} takes it" if way.startswith(replaced) else ""  # what someone asked for needs no way out
        found.append(f"{one.name} is left out ({one.reason}){takes}")
    return found


def _is_left_by(scheme: Scheme, row: LayerReport) -> bool:
    """Whether the scheme leaves it, and another takes it; no backend takes others, as a weight that is computed."""
    return "layer_kinds: " in row.reason or bool(scheme.why_not_packed and scheme.why_not_packed in row.reason)


def _place(row: LayerReport) -> str:
    """What rows of one weight have in common."""
    return row.shares or row.name


def _kept_by(request: QuantizationRequest, name: str) -> list[str]:
    """What must be said, or no longer be said, for an excluded layer to be taken; [] for other reasons."""
    scheme = request.scheme
    is_default = not scheme.axes.replace_default_exclusions and any(
        matches(entry, name) for entry in request.default_exclusions
    )
    own = [entry for entry in scheme.exclusions if matches(entry, name)]
    said = [request.said("replace_default_exclusions", True)] if is_default else []
    return [*said, *([f"without modules_to_not_convert={','.join(own)}"] if own else [])]


def _other(scheme: Scheme) -> str:
    """A dtype of the same backend that leaves inputs alone."""
    if scheme.native.needs_data:
        return "an algorithm that needs no data"
    rows = scheme.backend.offer.rows
    found = [d for d, row in rows.items() if "none" in row.activation_dtypes]
    same = scheme.axes.dtype in found
    return "activation_dtype=none" if same else f"dtype={found[0]}" if found else "another backend"
