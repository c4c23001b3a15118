"""Jobs that are one scheme on the model at hand are measured once: planning, which knows no layers, may see two.

A library's own group size, lowered for the layers that it does not divide, is that number on a model where it divides
all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from quantlab.planning.job import Job
from quantlab.planning.space import identity_of
from quantlab.progress import say
from quantlab.running.known import Known


@dataclass
class Once:
    """The jobs of a sweep that were asked for so far."""

    names: dict[tuple[str, str], str] = field(default_factory=dict)
    """What a job measures, and against which reference -> the name of the first of them."""
    merged: list[str] = field(default_factory=list)
    """What the user is told: names of one scheme, a text each."""

    def is_again(self, known: Known, job: Job) -> bool:
        """Has a job, compared with the reference that ``known`` is of, a row already: one of another name, the
        reference's or a floor's?"""
        if job.comes_along:
            return True
        for floor in known.floor_jobs(job.config):
            if floor.batch_size is None and not floor.plain_attention:  # a cast, which somebody may ask for as a job
                self.names.setdefault((known.reference_key, identity_of(floor)), floor.name)
        identity = known.reference_key, identity_of(job, known.widths_of(job))
        first = self.names.setdefault(identity, job.name)
        if first != job.name:
            self.merged.append(f"{first} = {job.name}")
        return first != job.name

    @property
    def said(self) -> str:
        """Which jobs are not run by themselves; "" for none."""
        return f"run once, as these are one scheme on this model: {'; '.join(self.merged)}" if self.merged else ""

    def tell(self) -> None:
        """Say it, each once."""
        if self.said:
            say(self.said)
            self.merged.clear()
