"""Price: what a scheme will occupy, from a module on the meta device, to the byte.

Which layers are taken is decided by the same function as in a run (:func:`quantlab.stages.select.choose_layers`), and
what each will occupy by its backend's ``layer_bytes``; there is no other arithmetic.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from quantlab.backends.scheme import Scheme
from quantlab.backends.table import held_packages
from quantlab.errors import ConfigError
from quantlab.modules.holders import PACK, Holder, holders
from quantlab.modules.layers import matches
from quantlab.modules.memory import Storages, logical_size, storage_of, storages
from quantlab.modules.remembered import remembered
from quantlab.stages.select import QuantizationRequest, Selection, check_device, check_layers, choose_layers
from quantlab.vocabulary.capabilities import CUSTOM_ROW
from quantlab.vocabulary.dtypes import COMPUTE_DTYPES, dtype_name
from quantlab.vocabulary.prices import ComponentPrice, Kept, Kind
from quantlab.vocabulary.reports import MemoryReport
from quantlab.vocabulary.sizes import DenseLayer, StoredBytes, item_bytes, plain_bytes

if TYPE_CHECKING:
    from torch import Tensor, nn

NO_BACKEND = "no backend replaces"
"""How the rule begins of weights that are in no Linear layer."""


def price_component(
    name: str, module: nn.Module, request: QuantizationRequest | None, scheme_name: str = ""
) -> ComponentPrice:
    """The price of a component that is on the meta device; it is not changed.

    ``request`` is what a run would be asked; None: it stays as it is. What a run would refuse is in ``refused``, and
    the rest is priced as if it were not asked for.
    """
    if request is None:
        return _priced(name, module, None, _Choice(), scheme_name)
    asked, unmatched = request, _unmatched(request, module)
    refused: tuple[str, ...] = ()
    try:  # as a run does, in whose words it is refused
        check_device(request.scheme.format, request.device, request.compute_dtype)
        chosen = choose_layers(request, module)
        check_layers(request, module, chosen)
    except ConfigError as error:
        asked, refused = _askable(request, unmatched), (str(error),)
        try:
            chosen = choose_layers(asked, module)
        except ConfigError:
            return replace(_priced(name, module, None, _Choice(), scheme_name), unmatched=unmatched, refused=refused)
    price = _priced(name, module, asked, _Choice.of(chosen), scheme_name)
    return replace(price, unmatched=unmatched, refused=refused, file_bytes=_file_bytes(request.scheme, module))


def _file_bytes(scheme: Scheme, module: nn.Module) -> int | None:
    """What the file of another program would hold, where the backend knows one."""
    count = getattr(scheme.backend.module, "file_bytes", None)
    if count is None:
        return None
    saved = module.state_dict(keep_vars=True)
    buffers = {n: b for n, b in module.named_buffers() if n in saved}
    found: int | None = count(
        scheme.native, {n: tuple(t.shape) for n, t in (*module.named_parameters(), *buffers.items())}
    )
    return found


def _unmatched(request: QuantizationRequest, module: nn.Module) -> tuple[str, ...]:
    """The entries of ``modules_to_not_convert`` that take no layer."""
    axes = request.scheme.axes
    layers = [n for n, h in holders(module).items() if h.way and h.kind in axes.layer_kinds]
    defaults = () if axes.replace_default_exclusions else request.default_exclusions
    entries = dict.fromkeys((*defaults, *request.scheme.exclusions))
    return tuple(e for e in entries if not any(matches(e, n) for n in layers))


def _askable(request: QuantizationRequest, unmatched: Collection[str]) -> QuantizationRequest:
    """The request without what makes a run refuse it whole, as far as it can do without."""
    scheme = request.scheme
    axes = scheme.axes if scheme.axes.on_mismatch != "error" else replace(scheme.axes, on_mismatch="skip")
    kept = tuple(e for e in scheme.exclusions if e not in unmatched)
    return replace(request, scheme=replace(scheme, axes=axes, exclusions=kept))


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """Layer -> what becomes of its weight."""

    selection: Selection | None = None
    taken: Collection[str] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Layer -> why it is kept."""

    @classmethod
    def of(cls, chosen: Selection) -> _Choice:
        reasons = {**chosen.left, **chosen.excluded, **{n: f"does not fit: {why}" for n, why in chosen.misfits.items()}}
        return cls(selection=chosen, taken=frozenset((*chosen.taken, *chosen.misfits)), reasons=reasons)


def _largest_bytes(request: QuantizationRequest | None, numels: Collection[int]) -> tuple[int, int]:
    """What is held for the largest layer, weights of ``numels`` each, while it is quantized, and while it is called."""
    if request is None or not numels:
        return 0, 0
    axes = request.scheme.axes
    row = request.scheme.backend.offer.rows.get(axes.dtype, CUSTOM_ROW)
    return int(4 * row.layers_at_once * max(numels)), item_bytes(request.compute_dtype) * max(numels)


def _priced(
    name: str, module: nn.Module, request: QuantizationRequest | None, choice: _Choice, scheme_name: str
) -> ComponentPrice:
    counted = _Count()
    found = holders(module, request.read if request is not None else ())
    stored = _stored(request, choice.selection, found)
    shared = {**choice.selection.same, **choice.selection.packed} if choice.selection else {}
    of_part: dict[int, list[Holder]] = defaultdict(list)
    for holder in found.values():
        of_part[id(holder.owner)].append(holder)
    for path, part in module.named_modules():
        if choice.selection and path in choice.selection.same:
            continue
        counted.path = path
        done, reasons = set[str](), dict[str, str]()
        for holder in of_part[id(part)]:
            if holder.name in stored:
                counted.add_stored(path, holder, *stored[holder.name], choice.reasons.get(holder.name, ""))
                done |= {holder.parameter} if holder.way == PACK else {holder.parameter, "bias"}
            elif shared.get(holder.name) in stored:
                done.add(holder.parameter)
            else:
                reasons[holder.parameter] = choice.reasons.get(holder.name) or holder.reason
        counted.add_part(path, part, reasons if request is not None else None, done)
    counted.path = ""
    facts = _facts(module)
    counted.add_others(facts.storages)
    parameters, values, index_bytes = facts.size
    memory = MemoryReport(
        weights_bytes=sum(counted.kinds[k][1] for k in counted.kinds),
        quantized_bytes=counted.of("codes"),
        scale_bytes=counted.of("scales"),
        other_bytes=sum(n for (what, _), (_, n) in counted.kinds.items() if what not in ("codes", "scales")),
        bytes_at_16_bit=2 * values + index_bytes,
        num_parameters=parameters,
        index_bytes=index_bytes,
    )
    quantizing, unpacked = _largest_bytes(request, [math.prod(found[n].view.matrix_shape) for n in stored])
    return ComponentPrice(
        name=name,
        memory=memory,
        quantized_parameters=sum(n for (what, _), (n, _) in counted.kinds.items() if what == "codes"),
        kinds=tuple(
            Kind(what=what, dtype=dtype, parameters=n, num_bytes=num_bytes)
            for (what, dtype), (n, num_bytes) in sorted(counted.kinds.items(), key=lambda item: -item[1][1])
        ),
        kept=tuple(
            Kept(rule=rule, modules=tuple(paths), num_bytes=sum(paths.values()))
            for rule, paths in sorted(counted.kept.items(), key=lambda item: -sum(item[1].values()))
        ),
        by_path=counted.by_path,
        original_bytes=sum(facts.storages.values()),
        quantizing_bytes=quantizing,
        unpacked_bytes=unpacked,
        scheme=scheme_name if request is not None else "",
        is_simulated=any(bytes_of.is_simulated for _, bytes_of in stored.values()),
    )


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """What is asked of a module each time that it is priced."""

    storages: Storages
    size: tuple[int, int, int]


@remembered
def _facts(module: nn.Module) -> _Facts:
    return _Facts(storages=storages(module, held_packages()), size=logical_size(module))


def _stored(
    request: QuantizationRequest | None, chosen: Selection | None, found: Mapping[str, Holder]
) -> dict[str, tuple[str, StoredBytes]]:
    """Holder -> dtype and bytes, of those that are stored otherwise: taken, or misfits with a dtype to fall back to."""
    if request is None or chosen is None:
        return {}
    known: dict[tuple[object, ...], StoredBytes] = {}
    stored = {}
    for name in (*chosen.taken, *chosen.misfits):
        dense = dense_layer(found[name])
        if name in chosen.misfits:
            told = _fallback_bytes(request.scheme, chosen, dense, chosen.compute_dtypes[name], request.device)
            if told is not None:
                stored[name] = told
            continue
        dtype, compute = chosen.asked[name].axes.dtype, chosen.compute_dtypes[name]
        key = (dense, dtype, compute)
        if key not in known:
            known[key] = request.scheme.backend.module.layer_bytes(chosen.native, dense, dtype, compute, request.device)
        stored[name] = (dtype, known[key])
    return stored


def dense_layer(holder: Holder) -> DenseLayer:
    """An unquantized weight as far as bytes are concerned; a packed one's bias stays where it is."""
    bias = None if holder.way == PACK else holder.owner._parameters.get("bias")
    return DenseLayer(
        shape=holder.view.matrix_shape,
        dtype=dtype_name(holder.weight.dtype),
        bias_dtype="" if bias is None else dtype_name(bias.dtype),
    )


def _fallback_bytes(
    scheme: Scheme, chosen: Selection, dense: DenseLayer, compute_dtype: str, device: str
) -> tuple[str, StoredBytes] | None:
    """What ``on_mismatch`` makes of a layer; None where it stays as it is."""
    dtype = scheme.axes.on_mismatch
    if dtype in COMPUTE_DTYPES:
        return dtype, StoredBytes(codes=plain_bytes(dense, dtype), scales=0, bias_dtype=dense.bias_dtype)
    if chosen.fallback is None or chosen.fallback.format.misfit(dense.shape):
        return None
    other = chosen.fallback
    native = other.backend.module.resolve(other.native, device, compute_dtype)
    return dtype, other.backend.module.layer_bytes(native, dense, dtype, compute_dtype, device)


class _Count:
    """Bytes by kind, each storage once."""

    def __init__(self) -> None:
        self.kinds: dict[tuple[str, str], tuple[int, int]] = defaultdict(lambda: (0, 0))
        self.kept: dict[str, dict[str, int]] = defaultdict(dict)
        self.seen: set[object] = set()
        self.replaced: set[object] = set()
        self.path = ""
        self.by_path: dict[str, int] = defaultdict(int)

    def of(self, kind: str) -> int:
        return sum(n for (what, _), (_, n) in self.kinds.items() if what == kind)

    def _add(self, what: str, dtype: str, parameters: int, num_bytes: int) -> None:
        known = self.kinds[what, dtype]
        self.kinds[what, dtype] = known[0] + parameters, known[1] + num_bytes
        self.by_path[self.path] += num_bytes

    def add_stored(self, path: str, holder: Holder, dtype: str, stored: StoredBytes, why: str) -> None:
        """A weight that is replaced, and the bias that moves with it; ``why`` it is not stored as asked. One that fell
        back to a float is kept: it has no codes."""
        self.replaced.add(storage_of(holder.weight))
        is_float = dtype in COMPUTE_DTYPES
        self._add(type(holder.owner).__name__ if is_float else "codes", dtype, holder.weight.numel(), stored.codes)
        if is_float:
            self.kept[f"{why}; kept in {dtype}"][path] = stored.codes
        self._add("scales", dtype, 0, stored.scales)
        bias = None if holder.way == PACK else holder.owner._parameters.get("bias")
        if bias is None:
            return
        if stored.bias_dtype == dtype_name(bias.dtype):
            self._tensor("biases", bias, is_parameter=True)
        else:
            self.replaced.add(storage_of(bias))
            num_bytes = bias.numel() * item_bytes(stored.bias_dtype)
            self._add("biases", stored.bias_dtype, bias.numel(), num_bytes)

    def _tensor(self, what: str, tensor: Tensor, is_parameter: bool) -> int:
        """Bytes of a tensor whose storage was not seen before; else 0."""
        key = storage_of(tensor)
        if key in self.seen:
            return 0
        self.seen.add(key)
        num_bytes = tensor.untyped_storage().nbytes()
        self._add(what, dtype_name(tensor.dtype), tensor.numel() if is_parameter else 0, num_bytes)
        return num_bytes

    def add_part(
        self, path: str, part: nn.Module, reasons: Mapping[str, str] | None, done: Collection[str] = ()
    ) -> None:
        """The parameters and buffers of one module itself that are not ``done``, as they are; ``reasons`` says of each
        parameter why, None: the component has no scheme."""
        for name, tensor in part._parameters.items():
            if tensor is None or name in done:
                continue
            is_weight = name != "bias"
            num_bytes = self._tensor(type(part).__name__ if is_weight else "biases", tensor, is_parameter=True)
            if is_weight and num_bytes:
                reason = "it has no scheme" if reasons is None else reasons.get(name, "")
                self.kept[reason or f"{NO_BACKEND} {type(part).__name__}"][path] = num_bytes
        for buffer in part._buffers.values():
            if buffer is not None:
                self._tensor("buffers", buffer, is_parameter=False)

    def add_others(self, every: Storages) -> None:
        """Tensors that are held otherwise."""
        for key, num_bytes in every.items():
            if key not in self.seen and key not in self.replaced:
                self._add("other", "", 0, num_bytes)
