"""Weigh: what a candidate occupies in memory, component by component, and on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from quantlab.backends.scheme import Scheme
from quantlab.backends.table import held_packages
from quantlab.models.loaded import LoadedModel
from quantlab.modules.memory import component_memory
from quantlab.vocabulary.reports import MemoryReport, QuantizationReport


def weigh(
    reference: LoadedModel, candidate: LoadedModel, names: Sequence[str], layers: QuantizationReport | None
) -> dict[str, MemoryReport]:
    """The ledger of each named component; ``layers`` is what the quantize stage read back, None where nothing was."""
    rows = layers.layers if layers else ()
    stored = {
        name: [r.name for r in rows if r.component == name and r.status in ("quantized", "fallback")] for name in names
    }
    packages = held_packages()
    return {
        name: component_memory(candidate.components[name], stored[name], reference.components[name], packages)
        for name in names
    }


def saved_bytes(candidate: LoadedModel, names: Sequence[str], scheme: Scheme) -> int:
    """Bytes of the files that the backend saves of the named components (they are removed afterwards)."""
    with tempfile.TemporaryDirectory(prefix="quantlab-save-") as folder:
        for name in names:
            target = Path(folder) / name
            target.mkdir()
            scheme.backend.module.save(candidate.components[name], target)
        return sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())
