"""Which weights a model reads instead of calling their layers: found by one run of the unquantized model."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from quantlab.errors import QuantlabError, first_line, is_of_the_machine
from quantlab.models.loaded import LoadedModel
from quantlab.modules.calls import NotKept, replay
from quantlab.modules.reached import recorded_reads
from quantlab.progress import say
from quantlab.protocols.table import PROTOCOLS
from quantlab.vocabulary.schema import EvaluationConfig

_NUM_STEPS = 2


def weights_read(
    model: LoadedModel, inputs: Any, evaluation: EvaluationConfig, components: Sequence[str]
) -> Mapping[str, tuple[str, ...]]:
    """Component -> the paths of its layers whose weights something reads beside them, on one sample.

    What was seen until then, and a word, where the sample cannot be run alone: what then reads a quantized weight fails
    by itself. Want of memory and a lost GPU are raised.
    """
    settings = replace(evaluation, batch_size=1, num_inference_steps=min(evaluation.num_inference_steps, _NUM_STEPS))
    with contextlib.ExitStack() as stack:
        found = {name: stack.enter_context(recorded_reads(model.components[name])) for name in components}
        try:
            _run_one(model, inputs.subset([0]), settings, components)
        except (QuantlabError, RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            if is_of_the_machine(error):
                raise
            reason = first_line(error)
            say(
                f"one sample alone cannot be run, so weights that {model.name} reads may be missed: {reason}", "warning"
            )
    return {name: tuple(paths) for name, paths in found.items()}


def _run_one(model: LoadedModel, one: Any, settings: EvaluationConfig, components: Sequence[str]) -> None:
    calls = PROTOCOLS[model.protocol].calls
    try:
        for name, call in calls(model, one, settings, components):
            replay(model.components[name], call, model.device, model.dtype)
    except NotKept:  # nobody replays them here: the sample is run without keeping its calls
        for _ in calls(model, one, settings, ()):
            pass
