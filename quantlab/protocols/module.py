"""Any ``torch.nn.Module`` on batches of the user's own: output cosine and relative error, one value a row."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from quantlab.errors import ConfigError, NotFinite
from quantlab.metrics.output_error import (
    output_cosine,
    output_rel_error,
    whole_cosine_shares,
    whole_intervals,
    whole_rel_error_shares,
)
from quantlab.metrics.statistics import same_labels
from quantlab.models.loaded import LoadedModel
from quantlab.modules.calls import Call, Progress
from quantlab.modules.compute_dtype import component_dtype, torch_dtype
from quantlab.modules.trees import (
    Batch,
    add_to_digest,
    arguments_of,
    digest_of,
    leaves_in,
    named_tensors,
    replaced,
    tensors_in,
)
from quantlab.protocols.defined import defined
from quantlab.protocols.tried import check_repeats
from quantlab.protocols.unchanged import same_state
from quantlab.vocabulary.dtypes import dtype_name
from quantlab.vocabulary.reports import Measurements
from quantlab.vocabulary.schema import EvaluationConfig

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

HEADLINE = ("output_cosine", "output_rel_error")


@dataclass(frozen=True)
class ModuleInputs:
    """Batches as the module's forward takes them."""

    batches: tuple[Batch, ...]
    sha256: str


def inputs_of(batches: Sequence[Batch], dtype: str | None = None) -> ModuleInputs:
    """The user's batches, their floating tensors in ``dtype`` (None: as given), with their digest; ConfigError when
    there are none."""
    if not batches:
        raise ConfigError("inputs: at least one batch is wanted (a tensor, or a tuple or mapping of tensors)")
    digest = hashlib.sha256()
    for tensor in tensors_in(list(batches)):
        add_to_digest(digest, tensor)
    cast = tuple(_cast(b, None, torch_dtype(dtype)) if dtype else b for b in batches)
    return ModuleInputs(batches=cast, sha256=digest.hexdigest())


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


def _cast(batch: Batch, device: str | None, dtype: torch.dtype, only: torch.dtype | None = None) -> Batch:
    """A copy of the batch on ``device`` (None: where it is; then what has the dtype already is no copy), its floating
    tensors (those of dtype ``only``) in ``dtype``: some modules change what they are given."""
    import torch

    def cast(value: object) -> Tensor | None:
        if not isinstance(value, torch.Tensor):
            return None
        is_cast = value.is_floating_point() and only in (None, value.dtype)
        return value.to(device=device, dtype=dtype if is_cast else None, copy=device is not None)

    return replaced(batch, cast)


def check(model: LoadedModel, inputs: ModuleInputs) -> None:
    """ModelError ``module: ...`` for one that answers its first batch in two ways, as what draws at random does."""
    first = replace(inputs, batches=inputs.batches[:1])
    runs = []
    for _ in range(2):
        with same_state(model.components["model"]):
            runs.append(observe(model, first, EvaluationConfig())["outputs"])
    check_repeats("module:", *runs)


def observe(
    model: LoadedModel,
    inputs: ModuleInputs,
    evaluation: EvaluationConfig,
    progress: Progress | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Each floating tensor that the module returns, by its place in what it returns ("" for one alone), as a list
    with one fp32 tensor a batch; and ``rows``, the number of rows of each batch: of the first tensor's.

    ``batch_size`` cuts the user's batches smaller, where they are single tensors. NotFinite for NaN or infinity.
    """
    import torch

    module = model.components["model"]
    dtype, usual = component_dtype(model.components["model"], model.dtype), torch_dtype(model.dtype)
    batches = _cut(inputs, batch_size)
    outputs: dict[str, list[Tensor]] = {}
    rows: list[int] = []
    with torch.no_grad():
        for i, batch in enumerate(batches):
            args, kwargs = arguments_of(_cast(batch, model.device, dtype, only=usual))
            found = _floating(module(*args, **kwargs))
            if not found or (outputs and set(found) != set(outputs)):
                raise ConfigError(
                    f"module: on batch {i} of inputs it returns {', '.join(found) or 'no floating tensor'}"
                    f"{f', and {chr(44).join(outputs)} before' if outputs else ''}; give batches that are answered "
                    "alike, with tensors to compare"
                )
            for name, out in found.items():
                outputs.setdefault(name, []).append(out)
                if not bool(torch.isfinite(out).all()):
                    which = f"the output {name} of batch {i}" if name else f"the output of batch {i}"
                    raise NotFinite(f"inputs: {which} holds NaN or infinity; check weights and inputs", which)
            first = next(iter(found.values()))
            rows.append(len(first) if first.dim() else 1)
            if progress:
                progress(i + 1, len(batches))
    return {"outputs": outputs, "rows": rows}


def _cut(inputs: ModuleInputs, batch_size: int | None) -> list[Batch]:
    cut = (b.split(batch_size) if batch_size and hasattr(b, "split") else [b] for b in inputs.batches)
    return [part for parts in cut for part in parts]


def _floating(returned: object) -> dict[str, Tensor]:
    """The floating tensors of what a module returns, as fp32 copies on the CPU (a module may write its next answer into
    the same memory); a complex number is two, and what is left out of sparse and nested ones is 0."""
    import torch

    found = {}
    for name, tensor in named_tensors(returned).items():
        dense = tensor.dequantize() if hasattr(tensor, "qtype") else tensor
        if dense.is_nested:
            dense = torch.nested.to_padded_tensor(dense, 0.0)
        elif dense.layout != torch.strided:
            dense = dense.to_dense()
        dense = torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense
        if dense.is_floating_point():
            found[name] = dense.detach().to("cpu", torch.float32, copy=True)
    return found


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
        args, kwargs = arguments_of(_cast(batch, "cpu", dtype, only=torch_dtype(model.dtype)))
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
    """``output_cosine`` and ``output_rel_error`` of each output row against the reference's, of the tensor that moves
    most (by its mean relative error); what the others do is in ``resolved``.

    A tensor without a row for each row of the first is compared as a whole, batch by batch. One with a single number a
    row, or a batch, is compared in all its numbers together, whatever the batches are: of one number the cosine says
    nothing, and the relative error is a quotient by what may be near 0. Rows that are the same by their inputs, and
    those of what is compared batch by batch, are one cluster.
    """
    found = observe(model, inputs, evaluation, progress, batch_size)
    undefined: dict[str, str] = {}
    batches = _cut(inputs, batch_size)
    clusters_if = functools.cache(lambda is_whole: _clusters(batches, found["rows"], is_whole))
    measured = {
        name: _compared(name, outputs, reference["outputs"][name], found["rows"], clusters_if, undefined)
        for name, outputs in found["outputs"].items()
    }
    errors = {name: float(m["output_rel_error"].mean()) for name, m in measured.items() if "output_rel_error" in m}
    worst = max(errors, key=lambda name: errors[name], default=next(iter(measured)))
    told = {"compared_output": worst, "output_rel_errors": ", ".join(f"{n}: {e:.3g}" for n, e in errors.items())}
    is_whole = not _has_rows(found["outputs"][worst], found["rows"])
    clusters = clusters_if(is_whole)
    numbers = _single_numbers(found["outputs"][worst], reference["outputs"][worst], found["rows"])
    return Measurements(
        samples=measured[worst],
        estimates={
            name: value
            for name, value in (whole_intervals(*numbers, clusters) if numbers else {}).items()
            if name in measured[worst]
        },
        clusters=clusters,
        sample_ids=tuple(f"row {i}" for i in range(sum(found["rows"]))),
        undefined={} if len(measured[worst]) == len(HEADLINE) else undefined,
        resolved=told if len(measured) > 1 else {},
    )


def _has_rows(tensors: Sequence[Tensor], rows: Sequence[int]) -> bool:
    """Whether there is a row for each row of the batches."""
    return all(t.dim() > 0 and len(t) == num for t, num in zip(tensors, rows, strict=True))


def _compared(
    name: str,
    outputs: Sequence[Tensor],
    reference: Sequence[Tensor],
    rows: Sequence[int],
    clusters_if: Callable[[bool], NDArray[np.int64] | None],
    undefined: dict[str, str],
) -> dict[str, NDArray[np.float64]]:
    """The metrics of one of the returned tensors, a value a row; ``clusters_if`` it is compared as a whole."""
    import numpy as np

    reference = _cut_alike(outputs, reference)
    for i, (found, expected) in enumerate(zip(outputs, reference, strict=True)):
        if found.shape != expected.shape:  # all batches together may have one number of rows
            reason = (
                f"the output{f' {name}' if name else ''} of batch {i} has shape {tuple(found.shape)}, the reference's "
                f"{tuple(expected.shape)}; give back what has one shape whatever the values are"
            )
            undefined |= {metric: f"{metric}: {reason}" for metric in HEADLINE}
            return {}
    numbers = _single_numbers(outputs, reference, rows)
    if numbers:
        out, ref = numbers
        clusters = clusters_if(not _has_rows(outputs, rows))
        shares = {
            "output_cosine": lambda: whole_cosine_shares(out, ref, clusters),
            "output_rel_error": lambda: whole_rel_error_shares(out, ref, clusters),
        }
        return defined(shares, undefined)
    by_rows = _has_rows(outputs, rows)
    out, ref = _flat(outputs, by_rows), _flat(reference, by_rows)
    metrics = {
        "output_cosine": lambda: output_cosine(out, ref),
        "output_rel_error": lambda: output_rel_error(out, ref),
    }
    return {n: v if by_rows else np.repeat(v, rows) for n, v in defined(metrics, undefined).items()}


def _cut_alike(outputs: Sequence[Tensor], reference: Sequence[Tensor]) -> Sequence[Tensor]:
    """The reference's, which may have been observed at another batch size, in as many parts as ``outputs``."""
    import torch

    if len(outputs) == len(reference):
        return reference
    whole, num = torch.cat(list(reference)), [len(t) for t in outputs]
    return torch.split(whole, num) if sum(num) == len(whole) else [whole] * len(outputs)


def _single_numbers(
    outputs: Sequence[Tensor], reference: Sequence[Tensor], rows: Sequence[int]
) -> tuple[Tensor, Tensor] | None:
    """Both as one number a row (a batch's one for each of its rows); None of outputs with more."""
    import torch

    by_rows = _has_rows(outputs, rows)
    if {t[:1].numel() if by_rows else t.numel() for t in outputs} != {1}:
        return None
    times = torch.ones(sum(rows), dtype=torch.int64) if by_rows else torch.tensor(rows)
    parts = outputs, _cut_alike(outputs, reference)
    out, ref = (torch.cat([t.reshape(-1) for t in part]).repeat_interleave(times) for part in parts)
    return out, ref


def _flat(tensors: Sequence[Tensor], by_rows: bool) -> Tensor:
    """Their rows, or one row a tensor; shorter ones are filled with zeros, which add nothing to a norm."""
    import torch

    rows = [t.flatten(1) if by_rows else t.reshape(1, -1) for t in tensors]
    width = max(row.shape[1] for row in rows)
    return torch.cat([torch.nn.functional.pad(row, (0, width - row.shape[1])) for row in rows])


def _clusters(batches: Sequence[Batch], rows: Sequence[int], is_whole: bool) -> NDArray[np.int64] | None:
    """The cluster of each row: what has the same inputs has the same error; None where all are different.

    Where inputs have several rows each (two conditions of a sample, the boxes of a picture) a batch is one cluster:
    which rows are of which input is not known.
    """
    labels: list[object] = []
    for batch, num in zip(batches, rows, strict=True):
        leaves = leaves_in(batch)
        is_cut = [not is_whole and hasattr(t, "dim") and t.dim() > 0 and len(t) == num for t in leaves]
        own = digest_of(t for t, cut in zip(leaves, is_cut, strict=True) if not cut)
        if any(is_cut):
            labels += [(own, digest_of(t[i] for t in itertools.compress(leaves, is_cut))) for i in range(num)]
        else:
            labels += [(own, 0 if is_whole or _outnumber(num, leaves) else i) for i in range(num)]
    return same_labels(labels)


def _outnumber(num: int, leaves: Sequence[Any]) -> bool:
    """Whether ``num`` rows are several of each row of a batch's largest tensor, and none of its other dimensions."""
    largest = max((t for t in leaves if hasattr(t, "dim") and t.numel()), key=lambda t: t.numel(), default=None)
    return largest is not None and largest.dim() > 0 and num not in largest.shape and num % len(largest) == 0
