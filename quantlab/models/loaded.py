"""A model as the stages see it: named components, and what is needed to run them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, Self, TypedDict, cast

from quantlab.models.identity import identity_of
from quantlab.modules.ties import copied
from quantlab.vocabulary.schema import EvaluationConfig

if TYPE_CHECKING:
    import torch
    from diffusers.schedulers.scheduling_utils import SchedulerMixin
    from transformers import PreTrainedTokenizerBase

    from quantlab.modules.groups import Groups
    from quantlab.modules.residence import Prompts, Residence
    from quantlab.modules.spread import Spread

Progress = Callable[[str, int, int], object]
"""Told (what, done, total) while a model is made ready: trained, converted, hashed."""
OnStep = Callable[[int, "torch.Tensor"], None]
"""Told (step, latents after it) while a diffusion model samples."""
Conditioning = Mapping[str, Sequence[Any]]
"""Name -> one value a sample: ``{"class_label": [...]}``, ``{"prompt": [...]}``; ``image`` and ``mask`` are uint8
tensors (height, width, 3 or 1)."""


def class_names(components: Mapping[str, object]) -> dict[str, str]:
    """Component -> name of its class."""
    return {name: type(module).__name__ for name, module in components.items()}


class Pipeline(Protocol):
    """What is used of a pipeline of Diffusers, whatever it makes."""

    scheduler: SchedulerMixin

    @property
    def components(self) -> Mapping[str, object]: ...
    @property
    def config(self) -> Mapping[str, object]: ...
    def __call__(self, **arguments: object) -> Mapping[str, object]: ...
    def set_progress_bar_config(self, **settings: object) -> None: ...
    def to(self, device: str) -> Self: ...


class Parts(TypedDict, total=False):
    """What a family's functions need beside the components; each family fills in what it has."""

    processor: object
    """What makes a model's inputs of pictures or of sound."""
    tokenizer: PreTrainedTokenizerBase
    denoisers: tuple[str, ...]
    """Diffusion: the names of the components that are called at a step."""
    scheduler: SchedulerMixin
    pipeline: Pipeline
    draws: Sequence[Sequence[str]]
    """Of a candidate: in which dtypes the reference drew (``Sampled.draws``)."""
    call: Mapping[str, object]
    """Arguments of the pipeline's call that the user chose (``model.call``)."""
    residence: Residence
    """Which modules of a pipeline have their tensors, where they come and go (``memory.placement=alone``)."""
    groups: Groups
    """How its layers come and go (``memory.placement=group_offload``)."""
    spread: Spread
    """How it lies on several devices (``memory.placement=spread``)."""
    prompts: Prompts
    """Where its encoded prompts are kept."""
    origins: Mapping[str, object]
    """Name of its module -> the files it was read from, :class:`quantlab.models.sources.Origin`."""
    judge: torch.nn.Module
    """The classifier that reads generated images, see :mod:`quantlab.models.judge`."""
    folder: str
    """Where the files of weights are that quantlab trained; absent for weights of others."""
    trained_sha256: str
    """Digest of these weights as trained, whatever dtype they were loaded in."""


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What a diffusion model made of n samples."""

    latents: torch.Tensor | None
    """The final ones, float32 on the CPU, (n, ...); None where no scheduler was heard to step."""
    media: Mapping[str, torch.Tensor]
    """Float32 on the CPU, by kind: ``images`` (n, height, width, channels) and ``frames`` (n, frames, height, width,
    channels) in [0, 1], ``audio`` (n, channels, samples)."""
    draws: Sequence[Sequence[str]] = ()
    """Dtypes of what was drawn at random, see :func:`quantlab.modules.stepping.paired_draws`."""


class Sample(Protocol):
    """Runs a diffusion model. ``noise``: initial latents (n, ...), or int64 (n,), the seeds of a pipeline's draws."""

    def __call__(
        self,
        model: LoadedModel,
        noise: torch.Tensor,
        conditioning: Conditioning,
        evaluation: EvaluationConfig,
        on_step: OnStep | None = None,
    ) -> Sampled: ...


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A loaded model. The reference stays as loaded; a candidate is made by :meth:`with_components`.

    ``components`` are the modules that may be quantized, in eval mode, on the model's device. ``parts`` is what the
    family's functions need beside them (scheduler, tokenizer, pipeline, judge), shared by reference and candidates.
    """

    name: str
    protocol: str
    """Row of ``protocols.PROTOCOLS``: how it is run and compared."""
    components: Mapping[str, torch.nn.Module]
    parts: Parts = field(default_factory=Parts)
    dtype: str = "float32"
    """Compute dtype of the reference, and of every candidate."""
    device: str = "cpu"
    default_exclusions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """component -> entries of the family's own ``modules_to_not_convert``."""
    weights_sha256: str = ""
    sample: Sample | None = None
    """Diffusion families only."""

    @functools.cached_property
    def identity(self) -> Mapping[str, str]:
        """Part -> digest, of all that the model was built from: its weights, and what :func:`identity_of` says."""
        return {
            "weights": self.weights_sha256,
            **identity_of(self.components, cast("Mapping[str, object]", self.parts)),
        }

    def with_components(self, components: Mapping[str, torch.nn.Module]) -> LoadedModel:
        """The same model with some components replaced."""
        return replace(self, components={**self.components, **components})

    def copy_of(self, component: str) -> torch.nn.Module:
        """A deep copy of one component, to be quantized in place (some libraries cannot copy afterwards); on the host
        where the model runs group by group."""
        groups = self.parts.get("groups")
        if groups is not None:
            return groups.copy(component)
        with self.holding([component]):
            return copied(self.components[component])

    def placed(self, component: str, module: torch.nn.Module) -> torch.nn.Module:
        """A changed copy of a component, to be run as that is: group by group, where the model runs so."""
        groups = self.parts.get("groups")
        return module if groups is None else groups.place(component, module)

    def holding(self, components: Collection[str]) -> AbstractContextManager[None]:
        """While open, these have their tensors, wherever they come from."""
        residence = self.parts.get("residence")
        return nullcontext() if residence is None else residence.holding(components)
