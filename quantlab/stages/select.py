"""Select: which layers of a component a scheme takes, which it leaves, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quantlab.backends.exclusions import expand, kept_in_float32
from quantlab.backends.scheme import Format, Scheme
from quantlab.backends.table import offers, warn_unprobed
from quantlab.errors import ConfigError, DoesNotFit
from quantlab.modules.compiler import missing_compiler
from quantlab.modules.device import kind_of
from quantlab.modules.holders import PACK, TURN, Holder, holders
from quantlab.modules.hooks import check_forwards, check_offloading
from quantlab.modules.layers import resolve_exclusions
from quantlab.modules.packed import pack, share, turn
from quantlab.modules.reached import check_weights_are_here
from quantlab.modules.ties import ties, unite
from quantlab.planning.placing import check_streamed
from quantlab.progress import counted
from quantlab.vocabulary.axes import QuantizationAxes
from quantlab.vocabulary.capabilities import LAYER_KINDS
from quantlab.vocabulary.dtypes import COMPUTE_DTYPES, dtype_name
from quantlab.vocabulary.native import QuantizationConfigMixin

if TYPE_CHECKING:
    import torch

_LISTS = "modules_to_not_convert"
_CHECK_LAYERS = "check_layers"
"""The function of a backend's module, where it has one."""


@dataclass(frozen=True, kw_only=True)
class QuantizationRequest:
    """What is asked of the stage for one component."""

    component: str
    scheme: Scheme
    compute_dtype: str
    """Of the component; or of the layers, where the scheme's axes say one."""
    device: str
    default_exclusions: tuple[str, ...] = ()
    """Entries of the model family, which may match nothing."""
    read: tuple[str, ...] = ()
    """Layers whose weights something in the component reads (:func:`quantlab.modules.reached.recorded_reads`)."""
    typed: str = ""
    """The key that the component's scheme was asked for by; "": the request's, as ``model.components`` says."""
    is_called: bool = False
    """From Python, with a module of the caller's: what decides beside the config are arguments."""

    @property
    def key(self) -> str:
        """How messages about the component begin."""
        return "module" if self.is_called else self.typed or f"model.components={self.component}"

    def key_of(self, name: str) -> str:
        """A key of the scheme as whoever asked types it."""
        return name if self.is_called else f"{self.typed or 'quantization'}.{name}"

    def list_of(self, entry: str) -> str:
        """The key of the list of exclusions that ``entry`` stands in, as whoever asked types it (of a component without
        the component: :func:`quantlab.planning.components.told_under`)."""
        if self.is_called:
            return self.scheme.native.exclusions_key
        lists = self.scheme.axes.modules_to_not_convert
        name = next((name for name, entries in lists.items() if entry in entries), None)
        if name is None:  # it came with a pasted dictionary
            return f"quantization.quantization_config: {self.scheme.native.exclusions_key}"
        return _LISTS if self.typed and name == "own" else f"{_LISTS}.{name}"  # a component's own may be one list

    @property
    def lists(self) -> str:
        """The key of what leaves layers out: that of the one list, where there is one."""
        if self.is_called:
            return self.scheme.native.exclusions_key
        entries = next(iter(self.scheme.axes.modules_to_not_convert.values()), [])
        return self.list_of(entries[0]) if entries and len(self.scheme.axes.modules_to_not_convert) == 1 else _LISTS

    def said(self, name: str, value: Sequence[str] | bool) -> str:
        """:meth:`key_of` with a value: a list, a word, or whether."""
        if self.is_called:
            return f"{name}={value!r}"
        text = str(value).lower() if isinstance(value, bool) else value
        return f"{self.key_of(name)}={text if isinstance(text, str) else '[' + ','.join(text) + ']'}"


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which layers of a component are quantized, and how."""

    native: QuantizationConfigMixin
    """The scheme's config with what depends on the device made concrete."""
    taken: tuple[str, ...]
    excluded: Mapping[str, str]
    """Layer -> the entry that leaves it out."""
    left: Mapping[str, str]
    """Holder of weights -> why it is none of those that the request is about: its kind, or that nobody can store it."""
    misfits: Mapping[str, str]
    """Layer -> why it cannot be stored as asked (``quantization.on_mismatch`` says what becomes of it)."""
    asked: Mapping[str, Format]
    compute_dtypes: Mapping[str, str]
    """Layer -> the dtype that it computes in: where the axes leave it open its own, if the format computes in it."""
    idle_exclusions: tuple[str, ...] = ()
    packed: Mapping[str, str] = field(default_factory=dict)
    """Holder -> the one of ``taken`` or ``misfits`` whose packed weight both read."""
    same: Mapping[str, str] = field(default_factory=dict)
    """Layer -> the one of ``taken`` or ``misfits`` that is stored for both, as they share weight and bias."""
    fallback: Scheme | None = None
    """How the misfits are stored, where there are any and ``quantization.on_mismatch`` is a dtype of the backend."""

    @property
    def calibrated(self) -> tuple[str, ...]:
        """The layers that calibration looks at: those taken, and the misfits whose config needs data too."""
        is_calibrated = self.fallback is not None and self.fallback.native.needs_data
        return (*self.taken, *(self.misfits if is_calibrated else ()))


def select_layers(request: QuantizationRequest, module: torch.nn.Module) -> Selection:
    """Which holders of weights in ``module`` the request takes.

    They are made ready, in place: layers that are one in several places, as they share weight and bias, become one;
    weights that are read rather than called are packed (:mod:`quantlab.modules.packed`).

    Raises:
        ConfigError: an exclusion that matches nothing, no layer left, or a device that the scheme does not run on.
        ModelError: a layer whose work a quantized one would not do (:func:`quantlab.modules.hooks.check_forwards`).
        DoesNotFit: layers that the scheme cannot take.
    """
    warn_unprobed(request.scheme.backend.name)
    check_device(request.scheme.format, request.device, request.compute_dtype)
    check_offloading(module, request.key)
    check_weights_are_here(module, request.key)
    chosen = choose_layers(request, module)
    _prepare(module, holders(module, request.read), chosen, axes=request.scheme.axes)
    return chosen


def select_streamed(request: QuantizationRequest, module: torch.nn.Module, is_grouped: bool = False) -> Selection:
    """As :func:`select_layers`, of a module whose tensors are still on the disk.

    ConfigError as :func:`quantlab.planning.placing.check_streamed`; ``is_grouped``: the unquantized model runs in
    groups.
    """
    check_device(request.scheme.format, request.device, request.compute_dtype)
    check_streamed(request.scheme, "group_offload" if is_grouped else "streamed")
    chosen = choose_layers(request, module)
    unite(module, chosen.same)
    return chosen


def choose_layers(request: QuantizationRequest, module: torch.nn.Module) -> Selection:
    """As :func:`select_layers`, of a module that may be on the meta device and stays as it is; whether the scheme runs
    on the device is not asked."""
    scheme = request.scheme
    axes = scheme.axes
    found = holders(module, request.read)
    offered, left = _offered(request, found)
    if not offered:
        raise ConfigError(f"{request.key}: {_nothing_of_the_kind(request, found, left)}")
    layers = {n: found[n] for n in offered}
    excluded, idle = _excluded(request, module, list(layers))
    same, packed, tied = ties(module, [h for n, h in layers.items() if n not in excluded], not scheme.why_not_packed)
    excluded |= {n: r for n, r in tied.items() if n not in excluded}
    wanted = [n for n in layers if n not in excluded and n not in same and n not in packed]
    if not wanted:
        told = f" ({next(iter(tied))}: {tied[next(iter(tied))]})" if tied else ""
        others = "" if tied else _others(request, found, layers)
        raise ConfigError(
            f"{request.lists}: all {len(layers)} {_words(axes.layer_kinds)} layers of "
            f"{request.component} are excluded{told}; nothing is left to quantize{others}"
        )
    check_forwards(module, [n for n in wanted if layers[n].way != PACK], request.key)
    shapes = {n: layers[n].view.matrix_shape for n in layers}
    native = scheme.native.measured(shapes)
    dtypes = native.layer_dtypes({n: shapes[n] for n in wanted})
    asked = {n: scheme.other_formats[dtypes[n]] if n in dtypes else scheme.format for n in wanted}
    misfits = {n: reason for n in wanted if (reason := asked[n].misfit(shapes[n]))}
    if misfits and axes.on_mismatch == "error":
        raise DoesNotFit(_misfit_message(request, misfits, shapes))
    if len(misfits) == len(wanted):
        raise DoesNotFit(_nothing_message(axes, request.component, misfits, shapes))
    kept = {n: dtype_name(layers[n].weight.dtype) for n in wanted} if axes.compute_dtype == "auto" else {}
    return Selection(
        compute_dtypes={
            n: kept[n] if kept.get(n) in asked[n].row.compute_dtypes else request.compute_dtype for n in wanted
        },
        native=scheme.backend.module.resolve(native, kind_of(request.device), request.compute_dtype),
        taken=tuple(n for n in wanted if n not in misfits),
        excluded=excluded,
        left=left,
        misfits=misfits,
        same=same,
        packed=packed,
        asked=asked,
        idle_exclusions=idle,
        fallback=_checked_fallback(request, {n: shapes[n] for n in misfits}),
    )


def check_layers(request: QuantizationRequest, module: torch.nn.Module, chosen: Selection) -> None:
    """ConfigError for what the backend asks of a layer beside what the table knows: by its shape, by the dtype that it
    computes in, and by the device. In a run the backend itself says so, when it is handed the layers."""
    check = getattr(request.scheme.backend.module, _CHECK_LAYERS, None)
    if check is not None:
        found = holders(module, request.read)
        shapes = {name: found[name].view.matrix_shape for name in chosen.taken}
        check(chosen.native, shapes, chosen.compute_dtypes, kind_of(request.device))


def _offered(request: QuantizationRequest, found: Mapping[str, Holder]) -> tuple[list[str], dict[str, str]]:
    """The holders that the scheme could store; and holder -> why not, for the others."""
    scheme, offered, left = request.scheme, list[str](), dict[str, str]()
    for name, holder in found.items():
        if not holder.way:
            left[name] = holder.reason
        elif holder.kind not in scheme.axes.layer_kinds:
            left[name] = f"{request.key_of('layer_kinds')}: {holder.kind} is not among them"
        elif holder.way == PACK and scheme.why_not_packed:
            left[name] = f"{holder.reason or f'its weight ({holder.kind}) is read'}, and {scheme.why_not_packed}"
        else:
            offered.append(name)
    return offered, left


def _words(kinds: Sequence[str]) -> str:
    return " and ".join("Linear" if kind == "linear" else kind for kind in kinds)


def _nothing_of_the_kind(request: QuantizationRequest, found: Mapping[str, Holder], left: Mapping[str, str]) -> str:
    """What is said of a component without a layer of the kinds that are asked for."""
    axes = request.scheme.axes
    others = _others(request, found, ())
    kinds = _words(axes.layer_kinds)
    if any(h.kind in axes.layer_kinds for h in found.values()):
        name = next(n for n, h in found.items() if h.kind in axes.layer_kinds)
        return (
            f"none of its {kinds} layers can be quantized by {axes.backend} {axes.dtype} ({name}: {left[name]}){others}"
        )
    return f"it has no {kinds} layer{others or '; nothing to quantize'}"


def _others(request: QuantizationRequest, found: Mapping[str, Holder], taken: Collection[str]) -> str:
    """Where the weights are that are not ``taken``, and which kinds would take them."""
    sizes: Counter[str] = Counter()
    for name, holder in found.items():
        if name not in taken and holder.has_weight:
            sizes[holder.kind if holder.way else f"{type(holder.owner).__name__}"] += holder.weight.numel()
    kinds = [kind for kind, _ in sizes.most_common() if kind in LAYER_KINDS]
    told = " and ".join(f"{kind} ({size:,})" for kind, size in sizes.most_common(4))
    way_out = f"{request.said('layer_kinds', kinds)} takes them" if kinds else "no backend stores them"
    return f"; its weights are in {told}: {way_out}" if told else ""


def _prepare(
    module: torch.nn.Module, found: Mapping[str, Holder], chosen: Selection, *, axes: QuantizationAxes
) -> None:
    """Let the backend find a plain ``nn.Linear`` for each layer that it is given."""
    unite(module, chosen.same)
    for name in (*chosen.taken, *(chosen.misfits if axes.on_mismatch != "skip" else ())):
        make_ready(module, found[name], chosen)
    share_packed(found, chosen)


def make_ready(module: torch.nn.Module, holder: Holder, chosen: Selection) -> None:
    """Put a plain ``nn.Linear`` where the backend is told to find the holder's weight; nothing where there is one."""
    if holder.way == PACK or holder.name in chosen.packed.values():
        pack(holder)
    elif holder.way == TURN:
        turn(module, holder)


def share_packed(found: Mapping[str, Holder], chosen: Selection) -> None:
    """Let holders of one weight read the layer that it was packed into."""
    for name, first in chosen.packed.items():
        if not found[first].has_weight:
            share(found[name], found[first])


def _excluded(
    request: QuantizationRequest, module: torch.nn.Module, layers: Sequence[str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Layer -> why it stays as it is; and the entries under a library's rule that take no layer of the module.

    By quantlab's matcher: the family's defaults, and the scheme's entries; beside them what the model's class keeps in
    float32, and where the config keeps a library's rule, that library's. An entry of quantlab's that matches nothing is
    a ConfigError.
    """
    scheme, native = request.scheme, request.scheme.native
    defaults = () if scheme.axes.replace_default_exclusions else request.default_exclusions
    keep = not scheme.axes.replace_default_exclusions
    theirs, idle = kept_in_float32(module) if keep else {}, tuple[str, ...]()
    if native.exclusion_rule != "quantlab":
        theirs, idle = expand(native, module, keep)
    names = [n for n, _ in module.named_modules()]
    optional = (*defaults, *(entry for entries in scheme.shipped_exclusions.values() for entry in entries))
    ours = resolve_exclusions(layers, [*defaults, *scheme.exclusions], names, optional, request.list_of)
    found = {name: f"modules_to_not_convert: {entry}" for name, entry in ours.items()}
    return {**native.disabled_layers(layers), **{n: r for n, r in theirs.items() if n in layers}, **found}, idle


def check_device(asked: Format, device: str, compute_dtype: str = "") -> None:
    """ConfigError naming the requirement where the scheme does not run on this device or in this compute dtype.

    Without a ``compute_dtype`` it is not known yet, and nothing is asked that only torch can tell.
    """
    axes, row = asked.axes, asked.row
    who = f"dtype={axes.dtype}: {axes.backend}"
    if kind_of(device) not in row.devices:
        raise ConfigError(
            f"{who} runs it on {' and '.join(row.devices)} only, and this run is on {device}"
            f"{'; ' + row.note if row.note else ''}"
        )
    if axes.algorithm in row.cuda_algorithms and kind_of(device) != "cuda":
        others = [
            b
            for b, offer in offers().items()
            if b != axes.backend and axes.dtype in offer.rows and axes.algorithm in offer.rows[axes.dtype].algorithms
        ]
        other = f", or backend={others[0]}" if others else ""
        raise ConfigError(
            f"algorithm={axes.algorithm}: {axes.backend} runs it on CUDA only, and this run is on "
            f"{device}; pass device=cuda{other}"
        )
    if not compute_dtype:
        return
    if compute_dtype not in row.compute_dtypes:
        raise ConfigError(
            f"{who} computes it in {', '.join(row.compute_dtypes)} only; this run computes in {compute_dtype}: "
            f"pass compute_dtype={row.compute_dtypes[0]}"
        )
    if kind_of(device) == "cuda" and (row.min_compute_capability is not None or row.needs_nvcc):
        import torch

        if not torch.cuda.is_available():  # planned for a device that is elsewhere
            return
        if row.needs_nvcc and (missing := missing_compiler()):
            raise ConfigError(
                f"{who} compiles CUDA code for it, and {missing} is not on this machine; install the CUDA toolkit and "
                "ninja, or choose another dtype (quantlab list combinations device=cuda)"
            )
        have = torch.cuda.get_device_capability(device)
        if row.min_compute_capability is not None and have < row.min_compute_capability:
            need = ".".join(map(str, row.min_compute_capability))
            raise ConfigError(f"{who} needs CUDA compute capability {need}; this device has {have[0]}.{have[1]}")


def _misfit_message(
    request: QuantizationRequest, misfits: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> str:
    axes, component = request.scheme.axes, request.component
    key = f"group_size={axes.group_size}" if any("group_size" in r for r in misfits.values()) else f"dtype={axes.dtype}"
    return (
        f"{key}: {counted(len(misfits), 'layer')} of {component} cannot be stored as {axes.backend} {axes.dtype}: "
        f"{_listed(misfits, shapes)}. "
        "Choose another group size or dtype, exclude them with modules_to_not_convert, or pass "
        f"{request.said('on_mismatch', 'skip')} (or a dtype to fall back to)"
    )


def _listed(misfits: Mapping[str, str], shapes: Mapping[str, Sequence[int]]) -> str:
    """Each reason once, behind the layers of which it is true."""
    shown = list(misfits)[:8]
    left = f"; and {len(misfits) - 8} more" if len(misfits) > 8 else ""
    alike = {r: [n for n in shown if misfits[n] == r] for r in (misfits[n] for n in shown)}
    told = (f"{', '.join(f'{n} {list(shapes[n])}' for n in names)}: {r}" for r, names in alike.items())
    return "; ".join(told) + left


def _nothing_message(
    axes: QuantizationAxes, component: str, misfits: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> str:
    """A scheme that fits nowhere is none, whatever becomes of the layers."""
    name, why = next(iter(misfits.items()))
    instead = "" if axes.on_mismatch in ("skip", *COMPUTE_DTYPES) else f" (dtype={axes.on_mismatch} fits them)"
    return (
        f"dtype={axes.dtype}: fits none of the {len(misfits)} layers of {component} that it should quantize, such as "
        f"{name} {list(shapes[name])}: {why}; choose another dtype or group size{instead}, or leave the component out "
        "of model.components"
    )


def _checked_fallback(request: QuantizationRequest, shapes: Mapping[str, Sequence[int]]) -> Scheme | None:
    """The scheme of layers of these shapes; None where there are none. DoesNotFit where they do not fit it either."""
    fallback = request.scheme.fallback
    if not shapes or fallback is None:
        return None
    bad = {n: r for n, shape in shapes.items() if (r := fallback.format.misfit(shape))}
    if bad:
        raise DoesNotFit(
            f"{request.said('on_mismatch', fallback.axes.dtype)}: does not fit either: {_listed(bad, shapes)}; choose "
            "a dtype without blocks, or skip"
        )
    return fallback
