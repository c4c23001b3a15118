"""Which placement is taken where nobody names one, by what its phases need: the same for a plan and for a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quantlab.vocabulary.amounts import GIB, MIB
from quantlab.vocabulary.prices import Phase
from quantlab.vocabulary.schema import PLACEMENTS, MemoryConfig

Phases = Mapping[str, Sequence[Phase]]
"""Placement -> its phases, of one job."""
ORDER = tuple(name for name in PLACEMENTS if name != "spread")
"""Those that are chosen from, the first that fits before the others."""
WHOLE = ("resident", "streamed")
"""Those of a model that lies on the device, of which each of its jobs may have another."""
_COMPUTING = ("reference", "evaluate")
"""Phases without which there is no row, and whose weights are those of the model and of its candidate, nothing else."""
_TOGETHER = (WHOLE, *((name,) for name in ORDER if name not in WHOLE))
"""What jobs that share a model can have."""


def has_room(rows: Sequence[Phase], budget: Mapping[str, int]) -> bool:
    """Whether all phases keep to ``device_bytes`` and ``host_bytes``, as far as these are given."""
    return all(getattr(row, key) <= num_bytes for row in rows for key, num_bytes in budget.items())


def first_fitting(phases: Phases, budget: Mapping[str, int], names: Sequence[str] = ORDER) -> str:
    """The first placement whose phases all fit; "" where none does."""
    return next((name for name in names if name in phases and has_room(phases[name], budget)), "")


def least(phases: Phases, names: Sequence[str] = ORDER) -> str:
    """The placement that takes least of the device; of those whose estimates are one, of its weights."""
    return min((name for name in names if name in phases), key=lambda name: _most(phases[name]))


def chosen(phases: Phases, budget: Mapping[str, int], names: Sequence[str] = ORDER) -> str:
    """The placement of a job: the first that fits, or else what takes least of the device."""
    return first_fitting(phases, budget, names) or least(phases, names)


def together(every: Sequence[Phases], budget: Mapping[str, int]) -> tuple[str, ...]:
    """Which placements there are for jobs that share a model: one apart for all of them, or :data:`WHOLE`.

    The first with which each job fits that fits at all; else that in which the largest takes least of the device.
    """
    counted = [phases for phases in every if first_fitting(phases, budget)] or every
    for names in _TOGETHER:
        if all(first_fitting(phases, budget, names) for phases in counted):
            return names
    possible = [names for names in _TOGETHER if all(set(names) & set(phases) for phases in counted)] or [WHOLE]
    return min(possible, key=lambda names: max(_most(p[least(p, names)]) for p in counted))


def most_on_device(rows: Sequence[Phase]) -> int:
    """Bytes of the largest phase."""
    return max(row.device_bytes for row in rows)


def _most(rows: Sequence[Phase]) -> tuple[int, int]:
    return most_on_device(rows), max(row.device_bytes - row.activation_bytes for row in rows)


def refusal(phases: Phases, memory: MemoryConfig) -> str:
    """Why the memory that a user gives cannot hold what a job computes with, of weights alone, which are exact.

    "" where it can, and for a placement that is typed, which is tried.
    """
    if memory.device_gib is None or memory.placement != "auto":
        return ""
    heaviest = {
        name: max((row.device_bytes - row.activation_bytes, row.name) for row in rows if row.name in _COMPUTING)
        for name, rows in phases.items()
        if name in ORDER
    }
    name, (num_bytes, phase) = min(heaviest.items(), key=lambda item: item[1][0])
    if num_bytes <= int(memory.device_gib * GIB):
        return ""
    only = ", the only one that it can have," if len(heaviest) == 1 else ""
    told = f"no placement has room: {name}{only} needs {gib(num_bytes)} on the device for weights alone ({phase})"
    way_out = f"give it more, ask quantlab plan what would fit, or pass memory.placement={name}, which is tried"
    return f"memory.device_gib={memory.device_gib:g}: {told}; {way_out}"


def needs(phases: Phases, name: str) -> str:
    """In words what a placement takes of the device, and in which phase."""
    row = max(phases[name], key=lambda row: row.device_bytes)
    return f"{name} needs {gib(row.device_bytes)} on the device ({row.name})"


def gib(num_bytes: int) -> str:
    """Bytes as they are told."""
    return f"{num_bytes / GIB:.3f} GiB" if num_bytes >= GIB / 100 else f"{num_bytes / MIB:.3f} MiB"
