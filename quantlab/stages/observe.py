"""Observe: the reference's outputs on the evaluation inputs, computed once and stored by content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantlab.metrics import METRICS
from quantlab.models.loaded import LoadedModel
from quantlab.modules.device import kind_of
from quantlab.modules.kept import SUFFIX, Damaged, read_tree, set_aside, write_tree
from quantlab.protocols.table import PROTOCOLS
from quantlab.tracking.provenance import arithmetic, code_digest, versions
from quantlab.vocabulary.native import canonical_json
from quantlab.vocabulary.schema import EvaluationConfig

FORMAT = 6  # of the stored outputs; a change of what a protocol stores raises it
NOT_OBSERVED = ("num_bootstrap", "bootstrap_seed", "floor_batch_size", "attribute", "speed", "compile")
LIBRARIES = ("torch", "diffusers", "transformers", "numpy", "scikit-learn")


def reference_key(model: LoadedModel, inputs: Any, evaluation: EvaluationConfig) -> str:
    """Digest of all that determines the reference's outputs, bit for bit: model, inputs, settings, machine kind."""
    parts = {**asked_of(model, inputs, evaluation), **made_by(model)}
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:32]


def asked_of(model: LoadedModel, inputs: Any, evaluation: EvaluationConfig) -> dict[str, Any]:
    """What a reference is of, whoever computes it."""
    return {
        "format": FORMAT,
        "model": dict(model.identity),
        "inputs": inputs.sha256,
        "protocol": model.protocol,
        "dtype": model.dtype,
        "evaluation": observed_settings(evaluation),
        "metrics": {name: m.version for name, m in METRICS.items() if model.protocol in m.protocols},
    }


def observed_settings(evaluation: EvaluationConfig) -> dict[str, Any]:
    """The settings that a reference's outputs depend on."""
    return {k: v for k, v in asdict(evaluation).items() if k not in NOT_OBSERVED}


def made_by(model: LoadedModel) -> dict[str, Any]:
    """What computes a model's outputs here."""
    return made_on(model.device)


def made_on(device: str) -> dict[str, Any]:
    """What computes here on ``device``: its kind, libraries, torch's switches."""
    known = versions()
    return {
        "device": kind_of(device),
        "libraries": {name: known.get(name) for name in LIBRARIES},
        "arithmetic": arithmetic(device),
    }


def observe(
    model: LoadedModel,
    inputs: Any,
    evaluation: EvaluationConfig,
    cache_dir: Path,
    progress: Callable[[int, int], Any] | None = None,
) -> dict[str, Any]:
    """The reference's outputs, from the cache or computed now; safe when several processes ask at once.

    A cached file that is not what was written is set aside, and computed again. What other code observed is not read:
    after a repair of how a model is run, every row would be compared with what was wrong.
    """
    from filelock import FileLock

    folder = cache_dir / "reference"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{reference_key(model, inputs, evaluation)}.{code_digest()[:8]}{SUFFIX}"
    with FileLock(f"{file}.lock"):
        if file.exists():
            try:
                stored: dict[str, Any] = read_tree(file)
                return stored
            except Damaged as error:
                set_aside(file, error)
        outputs: dict[str, Any] = PROTOCOLS[model.protocol].observe(model, inputs, evaluation, progress)
        write_tree(outputs, file)
    return outputs
