"""What a format's own program makes of a candidate's file, where it is installed: the figure beside the row's."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantlab.errors import QuantlabError
from quantlab.exporting.checkpoint import write_part
from quantlab.exporting.whole import parts_of
from quantlab.models.loaded import LoadedModel
from quantlab.planning.job import Job
from quantlab.progress import say
from quantlab.protocols.language import TextInputs, measure_logits
from quantlab.vocabulary.reports import Measurements, QuantizationReport

PREFIX = "llama_cpp_"


def program_of(job: Job, protocol: str) -> str:
    """The program that runs files of the job's format by kernels of its own, as it is installed; "" for none."""
    if protocol != "language" or len(job.schemes) != 1:
        return ""
    [scheme] = job.schemes.values()
    ask = getattr(scheme.backend.module, "own_kernels", None)
    return "" if ask is None else str(ask())


def beside(
    job: Job,
    models: tuple[LoadedModel, LoadedModel],
    layers: QuantizationReport | None,
    inputs: TextInputs,
    reference: Mapping[str, Any],
    measured: Measurements,
) -> Measurements:
    """``measured`` with the numbers of the format's own program on the same tokens, under names with :data:`PREFIX`.

    ``models``: the reference, and the candidate, whose file is written as an export writes it. What no such file can
    hold is told, and has no such numbers.
    """
    reference_model, candidate = models
    program, [scheme] = program_of(job, reference_model.protocol), job.schemes.values()
    ask: Any = scheme.backend.module
    try:
        [part] = parts_of(job, reference_model, candidate, layers).values()
        with tempfile.TemporaryDirectory(prefix="quantlab-own-kernels-") as folder:
            file = Path(folder, str(write_part(part, Path(folder)).arguments["gguf_file"]))
            logits = ask.logits_of(file, inputs.input_ids.tolist(), job.config.num_threads)
            found = measure_logits(logits, inputs, job.config.evaluation, reference, reference_model)
    except (QuantlabError, OSError) as error:  # its folder may have no room for the file
        say(f"{job.name}: no figure of {program}: {error}")
        return measured
    return replace(
        measured,
        samples={**measured.samples, **{f"{PREFIX}{name}": values for name, values in found.samples.items()}},
        estimates={**measured.estimates, **{f"{PREFIX}{name}": value for name, value in found.estimates.items()}},
        resolved={**measured.resolved, "own_kernels": program},
    )
