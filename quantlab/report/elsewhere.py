"""What must be said beside rows whose numbers are other ones where other programs run their files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from quantlab.backends.table import said_of

_OWN_KERNELS = "quality/llama_cpp_kld_mean"


def said_elsewhere(rows: Iterable[tuple[str, Sequence[str], Mapping[str, float]]], protocol: str) -> list[str]:
    """Sentences for (name, backends, metrics) of quantized rows: what the programs do otherwise, and where one of them
    is installed, its figures."""
    known = list(rows)
    told = said_of((backend for _, backends, _ in known for backend in backends), protocol)
    found = [f"{metrics[_OWN_KERNELS]:.3g} ({name})" for name, _, metrics in known if _OWN_KERNELS in metrics]
    return [*told, *([f"kld_mean by llama.cpp's own kernels: {', '.join(found)}"] if found else [])]
