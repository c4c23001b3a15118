"""Weigh: what a candidate occupies in memory, component by component, and on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quantlab.backends.scheme import Scheme
from quantlab.backends.table import held_packages
from quantlab.models.loaded import LoadedModel
from quantlab.modules.memory import component_memory
from quantlab.modules.packed import stored_at
from quantlab.vocabulary.reports import LayerReport, MemoryReport, QuantizationReport

if TYPE_CHECKING:
    from torch import Tensor, nn


def weigh(
    reference: LoadedModel, candidate: LoadedModel, names: Sequence[str], layers: QuantizationReport | None
) -> dict[str, MemoryReport]:
    """The ledger of each named component; ``layers`` is what the quantize stage read back, None where nothing was."""
    rows = layers.layers if layers else ()
    stored = {name: _stored(candidate.components[name], name, rows) for name in names}
    packages = held_packages()
    return {
        name: component_memory(candidate.components[name], stored[name], reference.components[name], packages)
        for name in names
    }


def _stored(module: nn.Module, component: str, rows: Sequence[LayerReport]) -> list[str]:
    """Paths of the layers that hold codes; one that fell back to a float holds none."""
    done = [r.name for r in rows if r.component == component and r.is_stored_quantized]
    return [stored_at(module, name) for name in done]


def saved_bytes(candidate: LoadedModel, schemes: Mapping[str, Scheme | None], layers: QuantizationReport | None) -> int:
    """Bytes of the components on disk, whole: the files that the backend of each saves, and beside them, for one that
    saves its layers alone, all other tensors as safetensors; one without a scheme is such tensors. The files are
    removed afterwards."""
    rows = layers.layers if layers else ()
    with tempfile.TemporaryDirectory(prefix="quantlab-save-") as folder:
        for name, scheme in schemes.items():
            target = Path(folder) / name
            target.mkdir()
            if scheme is None:
                _save_others(candidate.components[name], (), target)
                continue
            scheme.backend.module.save(candidate.components[name], target)
            if scheme.backend.saves == "layers":
                _save_others(candidate.components[name], _stored(candidate.components[name], name, rows), target)
        return sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())


def _save_others(module: nn.Module, saved: Collection[str], folder: Path) -> None:
    """All tensors outside the ``saved`` layers, a tied one once, to ``others.safetensors``."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in module.state_dict().items():
        if any(name.startswith(f"{layer}.") for layer in saved):
            continue
        key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        if not tensor.numel() or key not in seen:
            seen.add(key)
            tensors[name] = tensor.detach().cpu().contiguous()
    save_file(tensors, folder / "others.safetensors")
