"""A checkpoint that others made, in the place of a quantized copy: loaded, compared with the reference, read back.

What a layer is, its tensors say: bits, group size and error are those of the loaded layers, whatever the checkpoint's
configuration claims. What is not quantized must be the reference's; else the checkpoint was made from another model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.backends.checkpoints import FOLDED, backend_of_layer
from quantlab.backends.others import WHOLE_MODEL, packed_integers, read_by_its_library
from quantlab.backends.table import Backend, held_packages
from quantlab.errors import ModelError, NotQuantized, QuantlabError, first_line, is_of_the_machine
from quantlab.models.foreign import (
    also_quantized,
    checkpoint_bytes,
    checkpoint_sha256,
    differing_keys_of,
    differing_settings_of,
    load_part,
    sources_of,
)
from quantlab.models.identity import settings_of
from quantlab.models.loaded import LoadedModel, class_names
from quantlab.models.reading import unreadable
from quantlab.models.settings import differing_settings
from quantlab.modules.compute_dtype import stand_for
from quantlab.modules.holders import Holder, holders
from quantlab.modules.layers import replace_layer
from quantlab.modules.memory import layer_memory, logical_size, storage_of
from quantlab.modules.packed import stored_at
from quantlab.modules.read_in_source import changes_in_source
from quantlab.progress import say
from quantlab.stages.layer_row import layer_row
from quantlab.stages.products import product, question
from quantlab.stages.unquantized import unquantized
from quantlab.stages.weight_errors import weight_errors
from quantlab.vocabulary.amounts import some_of
from quantlab.vocabulary.dtypes import COMPUTE_DTYPES, UNREAD, dtype_name
from quantlab.vocabulary.numbers import CHECKPOINT_METHOD, CHECKPOINT_SHA256
from quantlab.vocabulary.reports import LayerReport, QuantizationReport, StoredWeight

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_UNRELATED = 0.9
"""||W - Wq|| / ||W|| above which a layer is no rounding of the model's: 1-bit codes with a scale a row leave 0.6."""
_ROWS_AT_ONCE = 256
_NOT_ITS = "name the model that it was made from (model.path=...), or another checkpoint"


@dataclass(frozen=True, kw_only=True)
class ForeignCandidate:
    """A checkpoint as a candidate."""

    model: LoadedModel
    quantization: QuantizationReport
    disk_bytes: int
    """Of its files of weights."""
    batch_size: int | None
    """1 where rows of a batch share the scale of their inputs; None: the evaluation's."""
    depends_on_neighbours: bool
    """Whether a rule that looks at all of a call makes samples depend on their batch."""


def load_candidate(
    checkpoint: str, model: LoadedModel, names: Sequence[str], reads: Mapping[str, Sequence[str]], cache_dir: Path
) -> ForeignCandidate:
    """Load the components ``names`` of a checkpoint, and read them back beside those of ``model``, the reference.

    Raises ModelError, beginning with ``checkpoint=...``, for what cannot be read and for a checkpoint of another model,
    whose first mismatch it names; NotQuantized for a layer that multiplies by something else than it holds.
    """
    key = f"checkpoint={checkpoint}"
    sources = sources_of(checkpoint, names, class_names(model.components))
    if left := also_quantized(key, sources):
        say(
            f"{key}: its {', '.join(left)} {'is' if len(left) == 1 else 'are'} quantized too, and the reference's "
            f"measured instead; take all with model.components=[{','.join([*sources, *left])}]",
            "warning",
        )
    made, reports, methods, notes = {}, [], [], []
    for name, source in sources.items():
        module, method = load_part(key, source, name, model)
        made[name], report, more = _read(key, name, module, model, reads.get(name, ()), method in FOLDED)
        if method in FOLDED:
            told = f"{name}: {method} moves scales into the norms, so that it cannot be told whether it is this model's"
            report = replace(report, unquantized=(*report.unquantized, told))
        if told := _other_keys(name, differing_keys_of(key, source, model.components[name])):
            report = replace(report, unquantized=(*report.unquantized, told))
        reports.append(report)
        methods.append(method)
        notes += more
    layers = tuple(row for report in reports for row in report.layers)
    granularities = sorted({r.activation_granularity for r in layers if r.activation_granularity})
    resolved: dict[str, Any] = {
        CHECKPOINT_SHA256: checkpoint_sha256(sources, cache_dir),
        CHECKPOINT_METHOD: ", ".join(dict.fromkeys(m or "none" for m in methods)),
        "checkpoint_components": ", ".join(sources),
        **({"activation_granularity": ", ".join(granularities)} if granularities else {}),
    }
    return ForeignCandidate(
        model=model.with_components(made),
        quantization=QuantizationReport(
            layers=layers,
            num_parameters=sum(r.num_parameters for r in reports),
            resolved=resolved,
            unquantized=tuple(told for r in reports for told in r.unquantized),
        ),
        disk_bytes=checkpoint_bytes(sources),
        batch_size=1 if "per-tensor" in granularities else None,
        depends_on_neighbours=bool(notes),
    )


def _read(
    key: str, component: str, module: nn.Module, model: LoadedModel, read: Sequence[str], is_folded: bool
) -> tuple[nn.Module, QuantizationReport, list[str]]:
    """The module, its layers adopted by their backends; its report; and what layers decide at each call."""
    original = model.components[component]
    module = _adopted(key, module, model.dtype)
    _check_blocks(key, component, module, original)
    found = holders(original, read)
    rows: list[LayerReport] = []
    notes: list[str] = []
    seen: dict[tuple[str, int], str] = {}
    for name, holder in found.items():
        layer, weight = _stored(key, component, module, holder)
        shared = seen.setdefault(_identity(layer, weight), name)
        if shared != name:
            first = next(row for row in rows if row.name == shared)
            rows.append(replace(first, name=name, kind=holder.kind, shares=shared, weight_bytes=0, scale_bytes=0))
            continue
        backend = backend_of_layer(layer)
        stored = _read_back(key, name, backend, layer, model.dtype)
        if stored is not None:
            notes += [stored.note] if stored.note not in ("", WHOLE_MODEL) else []
            rows.append(_row(key, component, holder, layer, stored, is_folded))
        elif weight is not None and dtype_name(weight.dtype) in COMPUTE_DTYPES and not _rounds_itself(layer):
            _check_same(key, component, holder.path, weight, holder.weight, is_folded)
            rows.append(_kept_row(component, holder, weight))
        else:
            rows.append(_unread_row(key, component, holder, layer, is_folded))
    held = {holder.path for holder in found.values()}
    for path, tensor in original.state_dict().items():
        if path not in held and tensor.is_floating_point():
            other = _tensor_at(module, path)
            if other is None:
                raise _mismatch(key, component, path, "the checkpoint has none")
            _check_same(key, component, path, other, tensor, is_folded)
    report = QuantizationReport(layers=tuple(rows), num_parameters=logical_size(original)[0])
    told = (
        unquantized(component, report, None),
        _other_dtype(component, rows, model.dtype),
        _other_settings(component, differing_settings(settings_of(module), original)),
        _other_weights(component, module),
    )
    return module, replace(report, unquantized=tuple(filter(None, told))), notes


def _other_dtype(component: str, rows: Sequence[LayerReport], dtype: str) -> str:
    """A sentence where nothing that a checkpoint keeps is in the dtype that was asked for: its library has one."""
    kept = sorted({row.dtype for row in rows if row.status in ("excluded", "left")})
    if not kept or dtype in kept:
        return ""
    return (
        f"{component}: its library loads it in {', '.join(kept)}, and the reference computes in {dtype}: what that "
        "costs is part of its numbers"
    )


def told_by_files(checkpoint: str, components: Mapping[str, nn.Module], names: Sequence[str]) -> list[str]:
    """What will be told of the settings in the files of a checkpoint on this disk; ``components`` need no values."""
    if not Path(checkpoint).expanduser().exists():
        return []
    key, found = f"checkpoint={checkpoint}", list[str]()
    for name, source in sources_of(checkpoint, names, class_names(components)).items():
        found.append(_other_keys(name, differing_keys_of(key, source, components[name])))
        found.append(_other_settings(name, differing_settings_of(key, source, components[name])))
    return [f"{key}: {told}" for told in found if told]


def _other_keys(component: str, found: Sequence[str]) -> str:
    """A sentence where the keys of a file, which the model's settings stand for, compute otherwise."""
    if not found:
        return ""
    return (
        f"{component}: its file says {some_of(found, 4)}: it is measured by the model's settings, and whoever runs the "
        "file by its own; name the model that it was made from (model.path=...)"
    )


def _other_settings(component: str, found: Sequence[str]) -> str:
    """A sentence where a checkpoint's configuration makes it compute otherwise than the model."""
    if not found:
        return ""
    return (
        f"{component}: its config.json says {some_of(found, 4)}: what that changes is part of its numbers; name the "
        "model that it was made from (model.path=...)"
    )


def _other_weights(component: str, module: nn.Module) -> str:
    """A sentence where a model's code changes weights as it first runs: transformers' RWKV rounds 4-bit ones of
    bitsandbytes anew, to fp4 whatever they were."""
    changing = changes_in_source(module)
    return changing and (
        f"{component}: {changing} changes weights as it first runs, quantized ones too (RWKV's rounds some 4-bit ones "
        "anew, to fp4): numbers are of what it makes of them, as its library runs it, and layers are told as the file "
        "has them"
    )


def _adopted(key: str, module: nn.Module, dtype: str) -> nn.Module:
    """The module with each layer of a backend's library made ready as that backend runs it."""
    for name, layer in list(module.named_modules()):
        backend = backend_of_layer(layer) if name and next(layer.children(), None) is None else None
        adopt = getattr(backend.module, "adopt", None) if backend is not None else None
        if adopt is None:
            continue
        try:
            made = adopt(layer, dtype)
        except NotQuantized as error:
            raise ModelError(f"{key}: {name}: {error}; name another checkpoint") from error
        except unreadable() as error:
            raise _misstored(key, name, layer, error) from error
        if made is not layer:
            replace_layer(module, name, made)
    return module


def _stored(key: str, component: str, module: nn.Module, holder: Holder) -> tuple[nn.Module, Tensor | None]:
    """The layer in which the weight of ``holder`` is stored, and its tensor where it has one under that name."""
    path = stored_at(module, holder.name)
    if path != holder.name:
        layer = module.get_submodule(path)
        return layer, layer._parameters.get("weight")
    try:
        layer = module.get_submodule(holder.owner_path)
    except AttributeError as error:
        raise _mismatch(key, component, holder.path, "the checkpoint has no such layer") from error
    return layer, layer._parameters.get(holder.parameter)


def _identity(layer: nn.Module, weight: Tensor | None) -> tuple[str, int]:
    """What a stored weight is known by: tied ones are one."""
    if weight is None or hasattr(weight, "__tensor_flatten__"):
        return "layer", id(layer)
    return storage_of(weight)


def _rounds_itself(layer: nn.Module) -> bool:
    """A layer of a library without a row that rounds a dense weight whenever it runs (compressed-tensors)."""
    return hasattr(layer, "quantization_scheme")


def _read_back(key: str, name: str, backend: Backend | None, layer: nn.Module, dtype: str) -> StoredWeight | None:
    """None for a layer that its library left unquantized, or in a format that is not known here."""
    try:
        stored = read_by_its_library(layer, key, dtype) if backend is None else backend.module.read_back(layer)
    except (NotQuantized, KeyError):
        return None
    except unreadable() as error:
        raise _misstored(key, name, layer, error) from error
    if stored is None:
        return None
    if not bool(stored.dense.isfinite().all()):
        raise ModelError(f"{key}: {name} reads back with NaN or infinities; copy or download it again")
    return stored


def _misstored(key: str, name: str, layer: nn.Module, error: Exception) -> Exception:
    """What is raised of a layer of a library that lacks what the library puts into it."""
    if isinstance(error, QuantlabError) or is_of_the_machine(error):
        return error
    return ModelError(
        f"{key}: {name} is not stored as a {type(layer).__name__} is, which its configuration makes of it "
        f"({first_line(error)}); copy or download it again, or name another checkpoint"
    )


# -- rows


def _row(
    key: str, component: str, holder: Holder, layer: nn.Module, stored: StoredWeight, is_folded: bool
) -> LayerReport:
    reference = holder.view.matrix(holder.weight.detach())
    dense = _of_shape(key, component, holder, stored.dense.detach().to(reference.device), reference)
    found = weight_errors(replace(stored, dense=dense), reference, True)
    _check_related(key, component, holder, found.layer, is_folded)
    stand_for(layer, holder.weight)
    is_called = holder.kind == "linear" and not holder.reason and stored.note != WHOLE_MODEL
    asked = question(stored, holder.weight.dtype) if is_called else None
    answered = None if asked is None else product(layer, asked)
    if answered is not None and not answered.is_explained:
        how = answered.raised or f"its outputs for random inputs are {answered.rel_error:.2g} of their size off"
        raise NotQuantized(
            f"{key}: {holder.name} {list(reference.shape)} multiplies by something else than the weight that it holds: "
            f"{how}; run it on another device, or name another checkpoint"
        )
    lost = f"{len(found.lost_rows)} of {len(reference)} rows are lost" if found.lost_rows and not is_folded else ""
    reasons = "; ".join(filter(None, (stored.note, lost)))
    rows, columns = reference.shape
    return layer_row(component, holder, layer, (rows, columns), stored, found, answered, "quantized", reasons)


def _unread_row(key: str, component: str, holder: Holder, layer: nn.Module, is_folded: bool) -> LayerReport:
    """Of a format that is not decoded here: its bytes, and the weight as its answers to unit vectors tell it."""
    reference = holder.view.matrix(holder.weight.detach())
    weight_bytes, scale_bytes = layer_memory(layer, held_packages())
    packed = packed_integers(layer, len(reference), reference.numel())  # before it runs: some repack then
    error: float | None = None
    dense = _answered(layer, reference, holder.weight.dtype) if holder.kind == "linear" else None
    if dense is not None:
        found = _of_shape(key, component, holder, dense, reference)
        error = float((found - reference.float()).norm() / (reference.float().norm() or 1.0))
        _check_related(key, component, holder, error, is_folded)
    dtype, group_size = packed or (UNREAD, None)
    known = "" if packed else ", so that its format and group size are not known"
    how = "its error is of its answers to unit vectors" if error is not None else "its error is not known"
    return LayerReport(
        component=component,
        name=holder.name,
        kind=holder.kind,
        shape=tuple(reference.shape),
        status="quantized",
        dtype=dtype,
        group_size=group_size,
        bits_per_weight=8 * (weight_bytes + scale_bytes) / reference.numel(),
        weight_bytes=weight_bytes,
        scale_bytes=scale_bytes,
        weight_rel_error=error,
        reason=f"{type(layer).__name__}: not decoded here{known}; {how}",
    )


def _answered(layer: nn.Module, reference: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The matrix by which a layer multiplies, fp32 like ``reference``; None where it does not answer."""
    import torch

    bias = getattr(layer, "bias", None)
    bias = bias.detach().float() if isinstance(bias, torch.Tensor) else 0.0
    columns = []
    try:
        with torch.no_grad():
            for start in range(0, reference.shape[1], _ROWS_AT_ONCE):
                num = min(_ROWS_AT_ONCE, reference.shape[1] - start)
                x = torch.zeros(num, reference.shape[1], dtype=dtype, device=reference.device)
                x[torch.arange(num), start + torch.arange(num)] = 1
                columns.append(layer(x).float() - bias)
    except Exception as error:  # noqa: BLE001  whatever a stranger's layer raises: it is not known then
        if is_of_the_machine(error):
            raise
        return None
    return torch.cat(columns).T


def _kept_row(component: str, holder: Holder, weight: Tensor) -> LayerReport:
    return LayerReport(
        component=component,
        name=holder.name,
        kind=holder.kind,
        shape=holder.view.matrix_shape,
        status="excluded" if holder.kind == "linear" else "left",
        dtype=dtype_name(weight.dtype),
        reason="the checkpoint keeps it unquantized",
    )


# -- whether it is of this model


def _mismatch(key: str, component: str, path: str, how: str) -> ModelError:
    return ModelError(f"{key}: it was not made from this model: {component}.{path}: {how}; {_NOT_ITS}")


def _check_blocks(key: str, component: str, module: nn.Module, original: nn.Module) -> None:
    """ModelError for a list of blocks that has more or fewer than the model's."""
    import torch

    for name, part in original.named_modules():
        if not isinstance(part, torch.nn.ModuleList):
            continue
        other = _part_at(module, name)
        num = len(other) if isinstance(other, torch.nn.ModuleList) else 0
        if num != len(part):
            raise _mismatch(key, component, name, f"{num} blocks, the model has {len(part)}")


def _part_at(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _of_shape(key: str, component: str, holder: Holder, dense: Tensor, reference: Tensor) -> Tensor:
    if dense.shape != reference.shape:
        raise _mismatch(
            key, component, holder.path, f"it reads back as {list(dense.shape)}, the model has {list(reference.shape)}"
        )
    return dense


def _check_related(key: str, component: str, holder: Holder, error: float, is_folded: bool) -> None:
    if not error < _UNRELATED and not is_folded:
        raise _mismatch(key, component, holder.path, f"its quantized weight is {error:.2g} of its size off the model's")


def _check_same(key: str, component: str, path: str, found: Tensor, own: Tensor, is_folded: bool) -> None:
    """ModelError where an unquantized tensor is not the model's, in the dtype of either."""
    if tuple(found.shape) != tuple(own.shape):
        raise _mismatch(key, component, path, f"shape {list(found.shape)}, the model has {list(own.shape)}")
    theirs, ours = found.detach().float(), own.detach().to(found.device).float()
    if not bool(theirs.isfinite().all()):
        raise ModelError(f"{key}: {component}.{path} holds NaN or infinities; copy or download it again")
    if is_folded or _is_same(theirs, ours):
        return
    num = int((theirs != ours).sum())
    raise _mismatch(key, component, path, f"{num} of {ours.numel()} unquantized values differ from the model's")


def _is_same(theirs: Tensor, ours: Tensor) -> bool:
    """Equal, once either has been rounded as a checkpoint in 16 bits rounds it, in one step or two."""
    import torch

    half, brain = torch.float16, torch.bfloat16
    for steps in ((), (brain,), (half,), (half, brain), (brain, half)):
        for one, other in ((theirs, ours), (ours, theirs)):
            rounded = one
            for step in steps:
                rounded = rounded.to(step).float()
            room = 2.0**-23 * other.abs().clamp_min(1.0)  # a norm that is kept with 1 added
            if bool(((rounded - other).abs() <= room).all()):
                return True
    return False


def _tensor_at(module: nn.Module, path: str) -> Tensor | None:
    import torch

    part: Any = module
    for name in path.split("."):
        part = getattr(part, name, None)
    return part if isinstance(part, torch.Tensor) else None
