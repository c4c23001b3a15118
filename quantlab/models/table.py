"""The model families: name -> how it is loaded. A family is one file with a ``load`` function.

``load(config, device, cache_dir, progress)`` returns a :class:`~quantlab.models.loaded.LoadedModel`; it raises
ModelError (key ``model.path``) for what cannot be read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from quantlab.models import causal_lm, diffusers_pipeline, digits_dit, encoder, smollm2
from quantlab.models.loaded import LoadedModel

FAMILIES: dict[str, Callable[..., LoadedModel]] = {
    "digits_dit": digits_dit.load,
    "diffusers": diffusers_pipeline.load,
    "smollm2": smollm2.load,
    "causal_lm": causal_lm.load,
    "encoder": encoder.load,
}
Progress = Callable[[str, int, int], Any]
