"""A small tracked sweep with known numbers, made without a model: what the tests of comparison and page read."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from quantlab.metrics.statistics import mean_interval
from quantlab.tracking import Store, open_store
from quantlab.tracking.results import log_evaluation, log_quantization
from quantlab.vocabulary.reports import (
    LayerReport,
    Measurements,
    MemoryReport,
    MetricValue,
    QuantizationReport,
    RunReport,
)
from quantlab.vocabulary.schema import TrackingConfig

N = 40
EFFECT = np.random.default_rng(1).lognormal(0, 0.3, N)
"""What a sample is like under every scheme: pairing takes it out."""
LAYERS = ("blocks.0.to_q", "blocks.0.to_k", "blocks.1.to_q")
RECIPE = "# @package _global_\ndefaults:\n- override /backend: {backend}\n"


@dataclass
class Sweep:
    """The store and the ids of its runs."""

    folder: Path
    store: Store
    parent: str = ""
    runs: dict[str, str] = field(default_factory=dict)


def errors(level: float, seed: int) -> Any:
    """Errors (N,) around ``level``: the sample's own factor and a little noise of the scheme."""
    return level * EFFECT * np.random.default_rng(seed).lognormal(0, 0.05, N)


SCHEMES: dict[str, tuple[str, int, Any]] = {
    "int8 a": ("quanto", 4_000_000, errors(1e-6, 2)),
    "int8 b": ("gguf", 4_200_000, errors(5e-7, 3)),
    "int4 a": ("quanto", 2_000_000, errors(4e-4, 4)),
    "int4 b": ("gguf", 2_100_000, errors(4e-4, 5) * 0.998),
    "int4 c": ("torchao", 4_300_000, errors(8e-4, 6)),
}
FLOOR = errors(1e-5, 7)


def add_run(
    sweep: Sweep,
    name: str,
    values: Any,
    *,
    size: int = 16_000_000,
    backend: str = "none",
    parent: str | None = None,
    key: str = "k1",
    params: Mapping[str, Any] | None = None,
    ids: Sequence[str] | None = None,
    agree: Any = None,
) -> str:
    """One finished run of a candidate (or of the reference or a floor, without a backend)."""
    n = len(values)
    folder = sweep.folder / "outputs" / "runs" / f"{len(list((sweep.folder / 'outputs' / 'runs').iterdir())):03d}"
    samples = {
        "latent_rel_mse": values,
        "judge_agreement": np.ones(n) if agree is None else agree,
        "class_accuracy": np.arange(n) % 2 if agree is None else (np.arange(n) % 2) * agree,
    }
    quality = {k: mean_interval(v, None, np.arange(n) % 4) for k, v in samples.items()}
    images = np.full((2, 3, 8, 6, 1), 90, np.uint8)
    images[:, 1:] = size // 100_000
    measured = Measurements(
        samples=samples,
        strata=np.arange(n) % 4,
        sample_ids=tuple(ids or (f"s{i}" for i in range(n))),
        images=images,
        image_ids=("s0", "s1"),
        steps={"step_sqnr_db": np.array([40.0, 30.0]), "step_divergence": np.array([1e-3, 2e-2]) * values.mean()},
    )
    floor = {
        "latent_rel_mse": mean_interval(FLOOR, None, np.arange(len(FLOOR)) % 4),
        "judge_agreement": MetricValue(value=1, n=n),
    }
    memory = MemoryReport(
        weights_bytes=size,
        quantized_bytes=size - 100,
        scale_bytes=50,
        other_bytes=50,
        bytes_at_16_bit=8_000_000,
        num_parameters=4_000_000,
    )
    report = RunReport(
        name=name,
        status="FINISHED",
        protocol="diffusion",
        quality=quality,
        measurements=measured,
        floors={} if backend == "none" else {"floor_bf16": floor},
        quantization=None if backend == "none" else quantization(values),
        memory={"transformer": memory},
    )
    asked = {
        "model": {"family": "digits_dit", "path": None},
        "dataset": {"name": "digits_classes"},
        "evaluation": {"num_samples": n},
        "quantization": {"backend": backend, "dtype": name},
        **(params or {}),
    }
    tags = {"quantlab.kind": "job", "quantlab.device": "cpu", "quantlab.versions": {"torch": "2.13"}}
    with sweep.store.start_run(name, folder, asked, tags, parent) as run:
        (folder / "recipe.yaml").write_text(RECIPE.format(backend=backend))
        run.log_artifact(folder / "recipe.yaml")
        shared = {"quantlab.reference_key": key, "quantlab.inputs_sha256": "i1", "quantlab.weights_sha256": "w1"}
        log_quantization(run, report, shared)
        log_evaluation(run, report, None)
    sweep.runs[name] = run.run_id
    return run.run_id


def quantization(values: Any) -> QuantizationReport:
    error = float(values.mean()) ** 0.5
    return QuantizationReport(
        num_parameters=4_000_000,
        layers=tuple(
            LayerReport(
                component="transformer",
                name=name,
                kind="Linear",
                shape=(1000, 1000),
                status="quantized",
                dtype="int8",
                bits_per_weight=8.0,
                weight_bytes=1_000_000,
                weight_rel_error=error * (1 + i),
            )
            for i, name in enumerate(LAYERS)
        ),
    )


@functools.cache
def shared_sweep(template: Path) -> Sweep:
    """The sweep that all tests of a worker read and none changes (the template is shared by the workers)."""
    return make_sweep(template.parent / f"compared {os.getpid()}" / "my work", template)


def make_sweep(folder: Path, template: Path, store: Store | None = None) -> Sweep:
    """The sweep: reference, bf16 floor, five candidates, one failed job and one skipped combination."""
    (folder / "outputs" / "runs").mkdir(parents=True)
    shutil.copyfile(template, folder / "outputs" / "mlflow.db")
    sweep = Sweep(folder, store or open_store(TrackingConfig(), folder))
    own = folder / "outputs" / "runs" / "parent"
    with sweep.store.start_run("small grid", own, {}, {"quantlab.kind": "sweep"}) as parent:
        sweep.parent = parent.run_id
        add_run(sweep, "reference", np.zeros(N), size=16_000_000, parent=parent.run_id)
        add_run(sweep, "floor_bf16", FLOOR, size=8_000_000, parent=parent.run_id)
        for name, (backend, size, values) in SCHEMES.items():
            agree = np.ones(N)
            agree[:8] = 0 if name == "int4 c" else 1
            add_run(sweep, name, values, size=size, backend=backend, parent=parent.run_id, agree=agree)
        fail(sweep, "nf4", parent.run_id)
        skipped = [{"combination": "backend=gguf dtype=nf4", "reason": "gguf has no nf4"}]
        parent.log_json({"rows": [{"run_id": i} for i in sweep.runs.values()], "skipped": skipped}, "rows.json")
    return sweep


def fail(sweep: Sweep, name: str, parent: str) -> None:
    tags = {"quantlab.kind": "job"}
    asked = {"quantization": {"backend": "bitsandbytes", "dtype": name}}
    run = sweep.store.start_run(name, sweep.folder / "outputs" / "runs" / f"failed {name}", asked, tags, parent)
    run.stage = "quantize"
    run.finish("FAILED", "MemoryError: 12 GiB wanted")
