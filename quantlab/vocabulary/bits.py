"""What people mean who type a dtype as a number of bits: ``4``, ``8bit``, ``fp8``, ``w4a16``. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Mapping

from quantlab.vocabulary.capabilities import Offer
from quantlab.vocabulary.dtypes import DTYPES

_SAID = re.compile(r"(?:load[-_]?in[-_]?)?(w|u?int|[iu]|fp|float|bf|q|)[-_]?(\d{1,2})[-_ ]?(?:bits?|a(\d+))?")
_IS_FLOAT = ("fp", "float", "bf")
_KINDS = {"int": ("int",), "uint": ("int",), "i": ("int",), "u": ("int",), **dict.fromkeys(_IS_FLOAT, _IS_FLOAT)}
"""What was typed before the number -> what is in the names of such dtypes; of others all are meant."""
_WHOLE = 16
"""Activations of so many bits are not rounded."""


def of_bits(word: str, offers: Mapping[str, Offer]) -> str:
    """``; of 4 bits there are nf4, fp4 (backend=bitsandbytes)...`` for a word that says a number of bits; "" for
    another, and where nobody has so many."""
    said = _SAID.fullmatch(word.lower())
    if said is None:
        return ""
    kind, bits, of_activations = said.group(1), int(said.group(2)), said.group(3)
    wanted = _with_bits(bits, _KINDS.get(kind, ()), offers) or _with_bits(bits, (), offers)
    if not wanted:
        return ""
    told = "; ".join(f"{', '.join(names)} (backend={backend})" for backend, names in wanted.items())
    rounds = bool(of_activations) and int(of_activations) < _WHOLE
    more = f"; activations are rounded by activation_dtype=, as activation_dtype=int{of_activations}" if rounds else ""
    return f"; of {bits} bits there are {told}{more}"


def _with_bits(bits: int, parts: tuple[str, ...], offers: Mapping[str, Offer]) -> dict[str, list[str]]:
    """Backend -> its dtypes of so many bits, with one of ``parts`` in their names where there are any."""

    def fits(name: str) -> bool:
        known = DTYPES.get(name)
        return known is not None and known.bits == bits and (not parts or any(part in name for part in parts))

    found = {backend: [name for name in offer.rows if fits(name)] for backend, offer in offers.items()}
    return {backend: names for backend, names in found.items() if names}
