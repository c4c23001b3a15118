"""Bytes: what a model's tensors occupy, each storage once, and the peak memory of a stage.

The libraries hide storage in three places: tensor subclasses (``__tensor_flatten__``), attributes of tensors
(``weight.quant_state``, ``weight.SCB``) and attributes of modules (``module.state.SCB``). The sum of
``numel * element_size`` over parameters sees none of them, so it is never used here.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from quantlab.modules.device import give_back, kind_of
from quantlab.vocabulary.reports import MemoryReport, StageReport

if TYPE_CHECKING:
    from torch import Tensor, UntypedStorage, nn

    Held = dict[tuple[str, int], UntypedStorage]

Storages = dict[tuple[str, int], int]
"""(device, address) of a storage -> its bytes."""

_PACKAGES = frozenset({"diffusers", "transformers", "quantlab"})
"""Plain objects of these are looked into, and of the packages that a caller names: those of the backends."""
_HELD = "_held_when_loaded"
"""Attribute of a part of a loaded module, see :func:`note_held`."""
_REGISTERED = ("_parameters", "_buffers")
_PLAIN = frozenset({bool, int, float, str, type(None)})
_MAX_DEPTH = 8
_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_SAMPLING_S = 0.01


# -- what a model occupies


def storages(obj: object, packages: Collection[str]) -> Storages:
    """Every tensor storage that ``obj`` holds, once: a module (with all below it), a tensor, or a container of them.

    ``packages`` are those whose plain objects hold tensors (:attr:`quantlab.backends.table.Backend.holds`), beside
    quantlab's, Diffusers' and transformers'. A view counts as the whole storage that it keeps alive. Tensors without
    an address (meta) count as they would be once they are real.
    """
    return {key: storage.nbytes() for key, storage in held_storages(obj, packages).items()}


def held_storages(obj: object, packages: Collection[str]) -> Held:
    """The storages of :func:`storages` themselves."""
    return {storage_of(tensor): tensor.untyped_storage() for tensor in _plain_tensors(obj, packages)}


def _plain_tensors(obj: object, packages: Collection[str]) -> list[Tensor]:
    """The tensors of :func:`storages`, each object once, and of subclasses those that they hold."""
    from torch import nn

    found: list[Tensor] = []
    seen: set[int] = set()
    for part in obj.modules() if isinstance(obj, nn.Module) else ():
        held = vars(part).get(_HELD)
        for name, value in vars(part).items():
            if held is not None and name not in held:  # of its calls
                continue
            if type(value) not in _PLAIN and (not isinstance(value, (dict, set)) or value):  # most are empty
                _walk(value, found, seen, packages)
    if not isinstance(obj, nn.Module):
        _walk(obj, found, seen, packages)
    return found


def _walk(value: object, found: list[Tensor], seen: set[int], packages: Collection[str], depth: int = 0) -> None:
    import torch

    if depth > _MAX_DEPTH or id(value) in seen or isinstance(value, (str, bytes, int, float, type, torch.nn.Module)):
        return
    seen.add(id(value))
    for inner in _inner(value, found, packages):
        _walk(inner, found, seen, packages, depth + 1)


def _inner(value: object, found: list[Tensor], packages: Collection[str]) -> Iterable[object]:
    """What ``value`` holds; a plain tensor is entered into ``found``."""
    import torch

    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):
            held = [getattr(value, name) for name in value.__tensor_flatten__()[0]]
        else:
            found.append(value)
            held = []
        return [*held, *getattr(value, "__dict__", {}).values()]
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    if (package := type(value).__module__.partition(".")[0]) in _PACKAGES or package in packages:
        return list(getattr(value, "__dict__", {}).values())
    return ()


def note_held(module: nn.Module) -> None:
    """Note which attributes of a module's parts hold tensors now, as it was loaded: what its calls leave in others
    (positions and masks that are kept for the next call) is no weight of it, nor of its copies."""
    for part in module.modules():
        if "weight" not in part._parameters:  # a layer, in whose place a library's own may come
            own = vars(part).items()
            vars(part)[_HELD] = frozenset(n for n, value in own if n in _REGISTERED or storages(value, ()))


def storage_of(tensor: Tensor) -> tuple[str, int]:
    """What the storage of a plain tensor is known by: its device and address (without one, by the object)."""
    storage = tensor.untyped_storage()
    address = 0 if tensor.is_meta else storage.data_ptr()
    return str(tensor.device), address or -storage._cdata


def logical_size(module: nn.Module) -> tuple[int, int, int]:
    """(parameters, all values, bytes of masks and positions) of an unquantized module; shared ones, and transposed
    views of them, count once.

    The first two are numbers of values; the second are those of parameters, of buffers, and of the tensors that a
    part keeps beside them (a weight that is computed of others). A complex number is two. Buffers of truth values and
    whole numbers are no values of a weight: no dtype makes them smaller, so they are in the third alone. Twice the
    second and the third are ``bytes_at_16_bit`` of a :class:`~quantlab.vocabulary.reports.MemoryReport`.
    """
    parameters, seen = 0, {}
    for tensors, is_parameter in ((module.parameters(), True), (module.buffers(), False)):
        for tensor in tensors:
            if (key := _key(tensor)) in seen:
                continue
            is_value = is_parameter or tensor.is_floating_point() or tensor.is_complex()
            seen[key] = _num_values(tensor) if is_value else 0
            parameters += tensor.numel() if is_parameter else 0
    counted = {storage for storage, _, _ in seen}
    beside = {storage_of(t): t for t in _plain_tensors(module, ()) if storage_of(t) not in counted}
    kept = {storage_of(b): b.untyped_storage().nbytes() for b in module.buffers() if not seen[_key(b)]}
    num_values = sum(seen.values())
    for storage, tensor in beside.items():
        num_bytes = tensor.untyped_storage().nbytes()
        if tensor.is_floating_point() or tensor.is_complex():
            num_values += num_bytes // tensor.element_size() * (2 if tensor.is_complex() else 1)
        else:
            kept[storage] = num_bytes
    return parameters, num_values, sum(kept.values())


def _num_values(tensor: Tensor) -> int:
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def _key(tensor: Tensor) -> tuple[tuple[str, int], int, int]:
    return storage_of(tensor), int(tensor.storage_offset()), tensor.numel()


def component_memory(
    module: nn.Module, quantized_layer_names: Iterable[str], original: nn.Module, packages: Collection[str]
) -> MemoryReport:
    """The ledger of one component.

    Args:
        module: the component as it is now.
        quantized_layer_names: paths of its quantized layers.
        original: the component before it was quantized (it may be on the meta device): what its logical parameters are
            counted from, :func:`logical_size`.
    """
    num_parameters, num_values, index_bytes = logical_size(original)
    total = storages(module, packages)
    codes: Storages = {}
    scales: Storages = {}
    for name in quantized_layer_names:
        layer_codes, layer_scales = _split(module.get_submodule(name), packages)
        codes.update(layer_codes)
        scales.update(layer_scales)
    num_codes = sum(codes.values())
    num_scales = sum(size for key, size in scales.items() if key not in codes)
    num_bytes = sum(total.values())
    return MemoryReport(
        weights_bytes=num_bytes,
        quantized_bytes=num_codes,
        scale_bytes=num_scales,
        other_bytes=num_bytes - num_codes - num_scales,
        bytes_at_16_bit=2 * num_values + index_bytes,
        num_parameters=num_parameters,
        index_bytes=index_bytes,
    )


def layer_memory(layer: nn.Module, packages: Collection[str]) -> tuple[int, int]:
    """(bytes of a layer's codes, bytes of its scales, zero points and code tables); its bias is in neither.

    For an unquantized layer the first is its dense weight and the second is 0.
    """
    codes, scales = _split(layer, packages)
    return sum(codes.values()), sum(scales.values())


def _split(layer: nn.Module, packages: Collection[str]) -> tuple[Storages, Storages]:
    """A layer's storages as codes and the rest, without its bias."""
    everything = storages(layer, packages)
    for key in storages(getattr(layer, "bias", None), packages):
        everything.pop(key, None)
    weight = layer._parameters.get("weight")  # not one that is made of the codes when it is asked for
    codes = _codes(weight, packages) if weight is not None else {}
    if not codes and everything:  # a layer that keeps its bytes under another name
        largest = max(everything, key=lambda key: everything[key])
        codes = {largest: everything[largest]}
    return codes, {key: size for key, size in everything.items() if key not in codes}


def _codes(weight: Tensor, packages: Collection[str]) -> Storages:
    """The storage of a weight's codes: its own, or of the inner tensor that is named as data, or the largest one."""
    if not hasattr(weight, "__tensor_flatten__"):
        return {storage_of(weight): weight.untyped_storage().nbytes()}
    names = weight.__tensor_flatten__()[0]
    data = [name for name in names if name.endswith("data") and "scale" not in name]
    if len(data) == 1:
        return _codes(getattr(weight, data[0]), packages)
    inner = storages([getattr(weight, name) for name in names], packages)
    largest = max(inner, key=lambda key: inner[key])
    return {largest: inner[largest]}


# -- what a stage needed


@dataclass
class StageMeasurement:
    """What :func:`measure_stage` gives: ``report`` is there once the block has ended, also by an error."""

    report: StageReport = field(init=False)


@contextlib.contextmanager
def measure_stage(name: str, device: str = "cpu", devices: Sequence[str] = ()) -> Iterator[StageMeasurement]:
    """Time and peak memory of the block: ``with measure_stage("quantize", device) as stage: ...; stage.report``.

    The resident set's peak is exact where Linux lets a process reset it; elsewhere it is sampled every 10 ms and
    may miss a short spike; where neither is possible it is None. CUDA peaks are None on other devices. Baselines are
    what was there when the block began. Blocks must not be nested: an inner one resets the peaks of the outer.
    ``devices`` are all on which the model lies, where these are several.

    An error of the GPU shows in a later call than the one that made it: the block ends when the GPU has done what it
    began. A block that fails raises its own error, whatever a GPU that answers no more says to being measured.
    """
    measurement = StageMeasurement()
    on_cuda = kind_of(str(device)) == "cuda"
    give_back(str(device))
    began = _begin_cuda(device) if on_cuda else {}
    baselines = [_begin_cuda(one)["baseline_alloc_bytes"] for one in devices] if on_cuda else []
    read_rss, read_anonymous, resident = _start_rss(), _sampled(_anonymous), _resident()
    start = time.perf_counter()
    peaks: dict[str, int] = {}
    by_device: tuple[tuple[int, int], ...] = ()

    def read() -> None:
        nonlocal peaks, by_device
        if on_cuda:
            peaks = _read_cuda(device)
            by_device = tuple((b, _read_cuda(d)["peak_alloc_bytes"]) for b, d in zip(baselines, devices, strict=True))

    try:
        yield measurement
        read()
    except BaseException:
        with contextlib.suppress(RuntimeError):
            read()
        raise
    finally:
        seconds = time.perf_counter() - start
        measurement.report = StageReport(
            name=name,
            seconds=seconds,
            baseline_rss_bytes=resident,
            peak_rss_bytes=read_rss(),
            peak_anon_bytes=read_anonymous(),
            by_device=by_device,
            **began,
            **peaks,
        )


def _begin_cuda(device: str) -> dict[str, int]:
    import torch

    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {"baseline_alloc_bytes": torch.cuda.memory_allocated(device)}


def _read_cuda(device: str) -> dict[str, int]:
    """The peaks; first it waits for what was begun, whose errors show here."""
    import torch

    torch.cuda.synchronize(device)
    return {
        "peak_alloc_bytes": torch.cuda.max_memory_allocated(device),
        "peak_requested_bytes": torch.cuda.memory_stats(device)["requested_bytes.all.peak"],
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
    }


def _resident() -> int | None:
    """Bytes of the process that are in memory; None where that is not known."""
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.Process().memory_info().rss)


def _start_rss() -> Callable[[], int | None]:
    """Begin watching the resident set; the function that is returned ends it and gives the peak in bytes."""
    try:
        _CLEAR_REFS.write_text("5", encoding="ascii")  # proc(5): resets the peak resident set size
    except OSError:
        return _sample_rss()
    return _read_high_water


def _read_high_water() -> int | None:
    return _status(b"VmHWM:")


def _anonymous() -> int | None:
    """Bytes in memory that no file holds; None where Linux does not say it."""
    return _status(b"RssAnon:")


def _status(field: bytes) -> int | None:
    try:
        with open(_STATUS, "rb", buffering=0) as status:  # asked a hundred times a second, beside the work
            _, found, rest = status.read().partition(field)
    except OSError:
        return None
    return int(rest.split(maxsplit=1)[0]) * 1024 if found else None


def _sample_rss() -> Callable[[], int | None]:
    return _sampled(_resident)


def _sampled(read: Callable[[], int | None]) -> Callable[[], int | None]:
    """Begin looking at a number every 10 ms; the function that is returned ends it and gives the largest."""
    if (first := read()) is None:
        return lambda: None
    peak, done = first, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(_SAMPLING_S):
            peak = max(peak, read() or 0)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()

    def stop() -> int:
        done.set()
        thread.join()
        return max(peak, read() or 0)

    return stop
