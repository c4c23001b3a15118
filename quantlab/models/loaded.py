"""A model as the stages see it: named components, and what is needed to run them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A loaded model. The reference stays as loaded; a candidate is made by :meth:`with_components`.

    ``components`` are the modules that may be quantized, in eval mode, on the model's device. ``parts`` is what the
    family's functions need beside them (scheduler, tokenizer, pipeline, judge), shared by reference and candidates.
    """

    name: str
    protocol: str
    """Row of ``protocols.PROTOCOLS``: how it is run and compared."""
    components: Mapping[str, Any]
    parts: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    """Compute dtype of the reference, and of every candidate."""
    device: str = "cpu"
    default_exclusions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """component -> entries of the family's own ``modules_to_not_convert``."""
    weights_sha256: str = ""
    sample: Any = None
    """Diffusion families: ``sample(model, noise, conditioning, evaluation, on_step) -> final latents``, fp32 on CPU."""
    decode: Any = None
    """Diffusion families: ``decode(model, latents) -> images`` in [0, 1], (n, height, width, channels)."""

    def with_components(self, components: Mapping[str, Any]) -> LoadedModel:
        """The same model with some components replaced."""
        return replace(self, components={**self.components, **components})

    def copy_of(self, component: str) -> Any:
        """A deep copy of one component, to be quantized in place (some libraries cannot copy afterwards)."""
        return copy.deepcopy(self.components[component])
