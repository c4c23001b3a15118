"""What a scheme will occupy, computed without weights. Plain values, torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from quantlab.vocabulary.reports import MemoryReport


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Bytes of one kind in a component; all kinds together are the component."""

    what: str
    """``codes``, ``scales``, the class of a layer whose weight is kept, ``biases``, ``buffers``, ``other``."""
    dtype: str
    parameters: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Weights that stay as they are, and why."""

    rule: str
    modules: tuple[str, ...]
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class ComponentPrice:
    """One component under its scheme."""

    name: str
    memory: MemoryReport
    """As the ledger of a run will show it."""
    quantized_parameters: int
    kinds: tuple[Kind, ...]
    kept: tuple[Kept, ...]
    original_bytes: int
    """Unquantized."""
    quantizing_bytes: int
    """An estimate: what is there beside the weights while the largest layer is quantized and read back."""
    unpacked_bytes: int = 0
    """The largest quantized layer's weight as it is multiplied, as kernels make it of the codes."""
    by_path: Mapping[str, int] = field(default_factory=dict)
    """Path of a part -> the bytes that are its own."""
    unmatched: tuple[str, ...] = ()
    """Entries of ``modules_to_not_convert`` that take no layer; those of a family's defaults may."""
    refused: tuple[str, ...] = ()
    """Why a run would refuse it."""
    file_bytes: int | None = None
    """Tensors of the file of another program under this scheme (llama.cpp's), where it names one."""
    scheme: str = ""
    """Name of the scheme; "": it stays as it is."""
    backend: str = ""
    dtype: str = ""
    group_size: int | str = ""
    is_simulated: bool = False
    """Stored wider than the dtype says."""

    @property
    def bits_per_quantized_weight(self) -> float | None:
        """Codes and scales, over the weights that they stand for."""
        if not self.quantized_parameters:
            return None
        return 8 * (self.memory.quantized_bytes + self.memory.scale_bytes) / self.quantized_parameters

    def data(self) -> dict[str, Any]:
        """Plain data, as ``quantlab plan --json`` prints it."""
        return {
            "name": self.name,
            "scheme": self.scheme,
            "backend": self.backend,
            "dtype": self.dtype,
            "group_size": self.group_size,
            "parameters": self.memory.num_parameters,
            "bytes": self.memory.weights_bytes,
            "original_bytes": self.original_bytes,
            "quantized_parameters": self.quantized_parameters,
            "bits_per_weight": self.memory.bits_per_weight,
            "bits_per_quantized_weight": self.bits_per_quantized_weight,
            "is_simulated": self.is_simulated,
            "file_bytes": self.file_bytes,
            "kinds": [
                {"kind": k.what, "dtype": k.dtype, "parameters": k.parameters, "bytes": k.num_bytes} for k in self.kinds
            ],
            "kept": [{"rule": k.rule, "modules": list(k.modules), "bytes": k.num_bytes} for k in self.kept],
        }


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What one phase of a run needs."""

    name: str
    device_bytes: int
    """Weights, exactly, and activations, estimated."""
    host_bytes: int
    """Weights that wait in the host's memory."""
    activation_bytes: int = 0
    """Of ``device_bytes``, what is an estimate."""
    on_each: tuple[int, ...] = ()
    """Where a model lies on several devices: the bytes on each, of which ``device_bytes`` are the most."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """What lies on one of several devices (``memory.placement=spread``)."""

    parts: tuple[str, ...]
    """Components, or ``from to until`` of one that is cut."""
    reference_bytes: int
    candidate_bytes: int


@dataclass(frozen=True, kw_only=True)
class Price:
    """One combination."""

    name: str
    backend: str
    dtype: str
    group_size: int | str
    device: str
    compute_dtype: str
    components: tuple[ComponentPrice, ...] = ()
    phases: Mapping[str, tuple[Phase, ...]] = field(default_factory=dict)
    """Placement -> the phases of a run with it."""
    shares: tuple[Share, ...] = ()
    """One for each device, where several were asked for."""
    placement: str = ""
    """The placement that fits the budget; "": none does, or there is no budget."""
    budget: Mapping[str, int] = field(default_factory=dict)
    """``device_bytes`` and ``host_bytes`` that there are, as far as they are known."""
    advice: str = ""
    """Where nothing fits, the nearest change that would; where jobs that share a model lie otherwise than each would by
    itself, that."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Name of a floor that a run leaves out, as it has no room -> why."""
    refused: tuple[str, ...] = ()
    """Why this combination cannot run."""

    @property
    def total_bytes(self) -> int:
        """Weights of the whole model, the components without a scheme too."""
        return sum(c.memory.weights_bytes for c in self.components)

    @property
    def is_simulated(self) -> bool:
        """Whether a component is stored wider than its dtype says, as a row of a run says it."""
        return any(c.is_simulated for c in self.components)

    @property
    def why_refused(self) -> tuple[str, ...]:
        """Why a run of it would be refused, component by component."""
        return (*self.refused, *(reason for part in self.components for reason in part.refused))

    @property
    def fits(self) -> bool | None:
        """Whether some placement fits the budget; None where there is no budget."""
        return bool(self.placement) if self.budget else None

    def data(self) -> dict[str, Any]:
        """Plain data, as ``quantlab plan --json`` prints it."""
        chosen = self.placement or next(iter(self.phases), "")
        return {
            "name": self.name,
            "backend": self.backend,
            "dtype": self.dtype,
            "group_size": self.group_size,
            "device": self.device,
            "compute_dtype": self.compute_dtype,
            "total_bytes": self.total_bytes,
            "is_simulated": self.is_simulated,
            "components": [c.data() for c in self.components],
            "unmatched": sorted({entry for c in self.components for entry in c.unmatched}),
            "refused": list(self.why_refused),
            "placement": chosen,
            "phases": [_phase(p) for p in self.phases.get(chosen, ())],
            "placements": {name: [_phase(p) for p in phases] for name, phases in self.phases.items()},
            "devices": [asdict(share) for share in self.shares],
            "budget": dict(self.budget),
            "fits": self.fits,
            "advice": self.advice,
            "floors_left_out": dict(self.left_out),
        }


def _phase(phase: Phase) -> dict[str, Any]:
    return {
        "name": phase.name,
        "device_bytes": phase.device_bytes,
        "host_bytes": phase.host_bytes,
        "estimated_activation_bytes": phase.activation_bytes,
        **({"on_each_device_bytes": list(phase.on_each)} if phase.on_each else {}),
    }
