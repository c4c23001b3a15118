"""Calibrate: the reference's own activations, collected once, and a backend's algorithm run over them."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from quantlab.errors import ConfigError, is_out_of_memory
from quantlab.models.loaded import LoadedModel
from quantlab.modules.device import give_back, kind_of, let_go
from quantlab.modules.feed import CalibrationFeed, StoredCalls
from quantlab.modules.kept import Damaged, read_json, set_aside, write_json
from quantlab.progress import say
from quantlab.protocols.table import PROTOCOLS
from quantlab.protocols.unchanged import same_memory
from quantlab.stages.observe import LIBRARIES
from quantlab.stages.select import QuantizationRequest, Selection
from quantlab.tracking.provenance import arithmetic, code_digest, versions
from quantlab.vocabulary.native import canonical_json
from quantlab.vocabulary.schema import EvaluationConfig

FORMAT = 3  # of the stored calls; a change of what is stored raises it
Progress = Callable[[int, int], Any] | None
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class CalibrationSet:
    """The recorded calls of a model's components on the calibration data."""

    calls: Mapping[str, StoredCalls]
    sha256: str
    num_samples: int
    batch_size: int

    def feed(self, component: str, model: LoadedModel, on_call: Progress = None) -> CalibrationFeed:
        """The forward loop of one component."""
        return CalibrationFeed(
            calls=self.calls[component],
            num_samples=self.num_samples,
            batch_size=self.batch_size,
            device=model.device,
            dtype=model.dtype,
            sha256=self.sha256,
            on_call=on_call,
        )


def calibration_set(
    model: LoadedModel,
    components: Sequence[str],
    inputs: Any,
    settings: EvaluationConfig,
    cache_dir: Path,
    progress: Progress = None,
) -> CalibrationSet:
    """The calls of ``components`` while the reference runs on the calibration data: from the cache, or recorded now.

    Safe when several processes ask at once. ``inputs`` are what calibration may look at
    (:func:`quantlab.datasets.calibration.calibration_inputs`), ``settings`` how the model is run on them. Raises
    ConfigError for a component that never runs, and MetricUndefined for NaN on the way.
    """
    from filelock import FileLock

    folder = cache_dir / "calibration" / _key(model, components, inputs, settings)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if (folder / "set.json").exists():
            try:
                _check(folder, components)
            except Damaged as error:
                set_aside(folder, error)
        if not (folder / "set.json").exists():
            _record(model, components, inputs, settings, folder, progress)
    return _open(folder, components, settings.num_samples, settings.batch_size)


def in_smaller_batches(attempt: Callable[[int], T], batch_size: int, device: str) -> T:
    """``attempt(batch_size)``, and where memory runs out anew with half the batch, which is told; at least 1."""
    while True:
        try:
            return attempt(batch_size)
        except Exception as error:  # noqa: BLE001  whatever a model or backend raises: only lack of memory is handled
            if not is_out_of_memory(error) or batch_size == 1:
                raise
            let_go(error)
        give_back(device)  # half-made copies, some in cycles, which the next attempt needs the room of
        say(f"while calibrating, calibration.batch_size={batch_size // 2} instead of {batch_size}", "out of memory")
        batch_size //= 2


def _key(model: LoadedModel, components: Sequence[str], inputs: Any, settings: EvaluationConfig) -> str:
    used = ("batch_size", "num_inference_steps", "guidance_scale", "height", "width", "num_frames")
    known = versions()
    parts = {
        "format": FORMAT,
        "code": code_digest(),
        "model": dict(model.identity),
        "inputs": inputs.sha256,
        "protocol": model.protocol,
        "dtype": model.dtype,
        "device": kind_of(model.device),
        "components": list(components),
        "settings": {k: asdict(settings)[k] for k in used},
        "libraries": {name: known.get(name) for name in LIBRARIES},
        "arithmetic": arithmetic(model.device),
    }
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:32]


def _record(
    model: LoadedModel,
    components: Sequence[str],
    inputs: Any,
    settings: EvaluationConfig,
    folder: Path,
    progress: Progress,
) -> None:
    """Write the calls beside their final place and move them there when they are complete."""
    partial = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)  # without set.json: an older kill's
    stored = {name: StoredCalls(partial / name) for name in components}
    try:
        for name, call in PROTOCOLS[model.protocol].calls(model, inputs, settings, list(stored), progress):
            stored[name].write(call)
        if empty := [name for name, calls in stored.items() if not len(calls)]:
            raise ConfigError(
                f"model.components={empty[0]}: it never ran on the calibration data; leave it out of the components, "
                "or choose an algorithm that needs no data"
            )
        digests = {name: calls.sha256() for name, calls in stored.items()}
        write_json(digests, partial / "set.json")
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check(folder: Path, components: Sequence[str]) -> None:
    """:class:`~quantlab.modules.kept.Damaged` where a stored set is not what was recorded."""
    digests = read_json(folder / "set.json")
    for name in components:
        calls = StoredCalls(folder / name)
        calls.check()
        if calls.sha256() != digests.get(name):
            raise Damaged(f"{name}: its calls are not those that were recorded")


def _open(folder: Path, components: Sequence[str], num_samples: int, batch_size: int) -> CalibrationSet:
    digests = read_json(folder / "set.json")
    return CalibrationSet(
        calls={name: StoredCalls(folder / name) for name in components},
        sha256=hashlib.sha256(canonical_json(digests).encode()).hexdigest(),
        num_samples=num_samples,
        batch_size=batch_size,
    )


def calibrate_component(request: QuantizationRequest, module: Any, selection: Selection, feed: CalibrationFeed) -> Any:
    """Run the backend's algorithm over ``feed`` on the selected layers of ``module``, in place.

    Returns what the quantize stage hands to the backend. Raises ConfigError where the backend cannot use this data.
    """
    if not selection.calibrated:
        return None
    backend = request.scheme.backend.calibrated
    own = {selection.compute_dtypes[name] for name in selection.calibrated}
    dtype = own.pop() if len(own) == 1 else "auto"  # each layer's own
    with same_memory(module, selection.calibrated):  # weights that it makes of others are not yet a candidate's
        return backend.calibrate(module, selection.calibrated, selection.native, dtype, feed)
