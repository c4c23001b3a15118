"""Any ``torch.nn.Module`` on batches of the user's own: output cosine and relative error, one value a row."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantlab.errors import ConfigError, NotFinite
from quantlab.metrics.output_error import output_cosine, output_rel_error
from quantlab.models.loaded import LoadedModel
from quantlab.modules.calls import Call, Progress
from quantlab.modules.compute_dtype import component_dtype
from quantlab.modules.trees import Batch, add_to_digest, arguments_of, replaced, tensors_in
from quantlab.protocols.defined import defined
from quantlab.vocabulary.dtypes import dtype_name
from quantlab.vocabulary.reports import Measurements
from quantlab.vocabulary.schema import EvaluationConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

HEADLINE = ("output_cosine", "output_rel_error")


@dataclass(frozen=True)
class ModuleInputs:
    """Batches as the module's forward takes them."""

    batches: tuple[Batch, ...]
    sha256: str


def inputs_of(batches: Sequence[Batch]) -> ModuleInputs:
    """The user's batches with their digest; ConfigError when there are none."""
    if not batches:
        raise ConfigError("inputs: at least one batch is wanted (a tensor, or a tuple or mapping of tensors)")
    digest = hashlib.sha256()
    for tensor in tensors_in(list(batches)):
        add_to_digest(digest, tensor)
    return ModuleInputs(batches=tuple(batches), sha256=digest.hexdigest())


def samples_of(batches: Sequence[Batch]) -> set[str]:
    """Digests of the samples in ``batches``: of each row of a batch's largest tensor (an image's pixels, and not its
    label), by content, whatever the batch, its order or its dtype. A row of one number throughout tells nothing."""
    found = set()
    for batch in batches:
        tensors = [t for t in tensors_in(batch) if t.dim() > 0 and t.numel()]
        largest = max(tensors, key=lambda t: t.numel(), default=None)
        for row in largest.reshape(len(largest), -1) if largest is not None else ():
            if bool((row != row[0]).any()):
                found.add(hashlib.sha256(row.detach().cpu().double().numpy().tobytes()).hexdigest())
    return found


def _cast(batch: Batch, device: str, dtype: torch.dtype) -> Batch:
    import torch

    def cast(value: object) -> Tensor | None:
        if not isinstance(value, torch.Tensor):
            return None
        return value.to(device=device, dtype=dtype if value.is_floating_point() else None)

    return replaced(batch, cast)


def check(model: LoadedModel, inputs: ModuleInputs) -> None:
    """Nothing is asked of these models before they run."""


def observe(
    model: LoadedModel,
    inputs: ModuleInputs,
    evaluation: EvaluationConfig,
    progress: Progress | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Outputs of the module, concatenated over batches: fp32 tensor of shape (rows, ...).

    ``batch_size`` cuts the user's batches smaller, where they are single tensors. NotFinite for NaN or infinity.
    """
    import torch

    module = model.components["model"]
    dtype = component_dtype(model.components["model"], model.dtype)
    batches = [
        part for b in inputs.batches for part in (b.split(batch_size) if batch_size and hasattr(b, "split") else [b])
    ]
    outputs = []
    with torch.no_grad():
        for i, batch in enumerate(batches):
            args, kwargs = arguments_of(_cast(batch, model.device, dtype))
            out = tensors_in(module(*args, **kwargs))[0]
            outputs.append((out.dequantize() if hasattr(out, "qtype") else out).detach().float().cpu())
            if not bool(torch.isfinite(outputs[-1]).all()):
                raise NotFinite(
                    f"inputs: the output of batch {i} holds NaN or infinity; check weights and inputs",
                    f"the output of batch {i}",
                )
            if progress:
                progress(i + 1, len(batches))
    return {"outputs": torch.cat(outputs)}


def calls(
    model: LoadedModel,
    inputs: ModuleInputs,
    evaluation: EvaluationConfig,
    components: Sequence[str],
    progress: Progress | None = None,
) -> Iterator[tuple[str, Call]]:
    """The module's calls on the batches, of the size that they have."""
    dtype = component_dtype(model.components["model"], model.dtype)
    for i, batch in enumerate(inputs.batches):
        args, kwargs = arguments_of(_cast(batch, "cpu", dtype))
        for name in components:
            yield name, {"args": args, "kwargs": kwargs, "dtype": dtype_name(dtype), "step": 0}
        if progress:
            progress(i + 1, len(inputs.batches))


def measure(
    model: LoadedModel,
    inputs: ModuleInputs,
    evaluation: EvaluationConfig,
    reference: Mapping[str, Any],
    reference_model: LoadedModel,
    progress: Progress | None = None,
    batch_size: int | None = None,
) -> Measurements:
    """``output_cosine`` and ``output_rel_error`` of each output row against the reference's."""
    out = observe(model, inputs, evaluation, progress, batch_size)["outputs"]
    ref = reference["outputs"]
    metrics = {
        "output_cosine": lambda: output_cosine(out, ref),
        "output_rel_error": lambda: output_rel_error(out, ref),
    }
    undefined: dict[str, str] = {}
    return Measurements(
        samples=defined(metrics, undefined),
        sample_ids=tuple(f"row {i}" for i in range(len(ref))),
        undefined=undefined,
    )
