"""Floors that memory would not hold: a run leaves them out, and its plan says so. Verdicts use the others.

They take more than the jobs that they are for: another batch size, attention with all of its scores, a wider copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from quantlab.planning.components import names_of
from quantlab.planning.job import Job, floor_jobs
from quantlab.planning.placing import is_possible
from quantlab.running.choice import ORDER, WHOLE, Phases, first_fitting, has_room, needs
from quantlab.vocabulary.numbers import REFERENCE
from quantlab.vocabulary.schema import ExperimentConfig


def floors_of(config: ExperimentConfig, dtype: str, default: Sequence[str]) -> list[Job]:
    """The floors of a request; ``default``: the components that are quantized where it names none."""
    return [job for job in floor_jobs(config, dtype, names_of(config, default)) if job.name != REFERENCE]


def left_out(
    floors: Mapping[str, Phases], jobs: Iterable[tuple[Job, Phases]], placement: str, device_bytes: int, said: str
) -> dict[str, str]:
    """Name of each floor that has no room on the device -> why it is left out.

    Args:
        floors: name -> its phases in each placement.
        jobs: each job on the model with its phases: another placement is advised where all have room, too.
        placement: that of the model. Beside one that is whole on the device a floor is a copy, never streamed.
        said: what there is, in words.
    """
    name, budget = WHOLE[0] if placement in WHOLE else placement, {"device_bytes": device_bytes}
    every, found = [*jobs], {}
    others = [n for n in ORDER if n not in WHOLE and all(_can_have(*job, n, budget) for job in every)]
    for floor, phases in floors.items():
        if name not in phases or has_room(phases[name], budget):
            continue
        other = first_fitting(phases, budget, others)
        way_out = f"; memory.placement={other} has room for it" if other else ""
        found[floor] = f"{floor}: left out, as {needs(phases, name)} and {said}{way_out}"
    rest = "verdicts use the other floors" if len(found) < len(floors) else "no floor is left to judge by"
    return {floor: f"{told}; {rest}" for floor, told in found.items()}


def _can_have(job: Job, phases: Phases, name: str, budget: Mapping[str, int]) -> bool:
    """Groups, which take least, are counted where nothing before them has room."""
    if name in phases:
        return has_room(phases[name], budget)
    return name == "group_offload" and not job.needs_data and is_possible(job.config, name)
