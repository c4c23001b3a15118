"""Observe: the reference's outputs on the evaluation inputs, computed once and stored by content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantlab.metrics import METRICS
from quantlab.models.loaded import LoadedModel
from quantlab.protocols.table import PROTOCOLS
from quantlab.tracking.provenance import hardware, versions
from quantlab.vocabulary.native import canonical_json
from quantlab.vocabulary.schema import EvaluationConfig

FORMAT = 2  # of the stored outputs; a change of what a protocol stores raises it
NOT_OBSERVED = ("num_bootstrap", "bootstrap_seed", "floor_batch_size")
LIBRARIES = ("torch", "diffusers", "transformers", "numpy", "scikit-learn")


def reference_key(model: LoadedModel, inputs: Any, evaluation: EvaluationConfig) -> str:
    """Digest of all that determines the reference's outputs, bit for bit: model, inputs, settings, machine kind."""
    machine = hardware()
    known = versions()
    parts = {
        "format": FORMAT,
        "model": dict(model.identity),
        "inputs": inputs.sha256,
        "protocol": model.protocol,
        "dtype": model.dtype,
        "device": model.device,
        "evaluation": {k: v for k, v in asdict(evaluation).items() if k not in NOT_OBSERVED},
        "libraries": {name: known.get(name) for name in LIBRARIES},
        "metrics": {name: m.version for name, m in METRICS.items() if model.protocol in m.protocols},
        "machine": {k: machine.get(k) for k in ("torch_threads", "cpu_capability", "gpus")},
    }
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:32]


def observe(
    model: LoadedModel,
    inputs: Any,
    evaluation: EvaluationConfig,
    cache_dir: Path,
    progress: Callable[[int, int], Any] | None = None,
) -> dict[str, Any]:
    """The reference's outputs, from the cache or computed now; safe when several processes ask at once.

    A cached file that cannot be read is computed again.
    """
    import pickle

    import torch
    from filelock import FileLock

    folder = cache_dir / "reference"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{reference_key(model, inputs, evaluation)}.pt"
    with FileLock(f"{file}.lock"):
        if file.exists():
            try:
                stored: dict[str, Any] = torch.load(file, weights_only=True, map_location="cpu")
                return stored
            except (RuntimeError, EOFError, OSError, pickle.UnpicklingError):
                file.unlink()  # truncated by a full disk or a kill: the outputs are computed again
        outputs: dict[str, Any] = PROTOCOLS[model.protocol].observe(model, inputs, evaluation, progress)
        partial = file.with_suffix(f".{os.getpid()}.part")
        try:
            torch.save(outputs, partial)
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)  # of a disk that is full
    return outputs
