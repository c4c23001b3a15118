"""One job: what it shares with others (model, inputs, reference), then quantize, evaluate, and track all of it."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from quantlab import tracking
from quantlab.backends.table import BACKENDS
from quantlab.datasets.calibration import calibration_inputs
from quantlab.datasets.table import DATASETS
from quantlab.errors import ConfigError
from quantlab.models.loaded import LoadedModel
from quantlab.models.table import FAMILIES
from quantlab.modules.fingerprint import fingerprint_warning, grid_fingerprint
from quantlab.modules.layers import check_finite_weights, state_digest
from quantlab.modules.memory import StageMeasurement, component_memory, measure_stage
from quantlab.planning.job import FLOOR_BATCH, FLOOR_BF16, Job
from quantlab.progress import Advance, say
from quantlab.quiet import quiet_libraries
from quantlab.stages.candidate import Making, make_candidate, write_calibration
from quantlab.stages.evaluate import evaluate, summarize
from quantlab.stages.observe import observe, reference_key
from quantlab.tracking.results import log_calibration, log_evaluation, log_quantization
from quantlab.tracking.tags import (
    DEVICE,
    GIT_COMMIT,
    GIT_DIRTY,
    INPUTS_SHA256,
    JOB_KEY,
    JUDGE_SHA256,
    KIND,
    MODEL_ARTIFACT,
    RECIPE,
    REFERENCE_KEY,
    VERSIONS,
    WEIGHTS_SHA256,
)
from quantlab.vocabulary.native import canonical_json
from quantlab.vocabulary.reports import MemoryReport, MetricValue, QuantizationReport, RunReport, StageReport
from quantlab.vocabulary.schema import CalibrationConfig, ExperimentConfig


@dataclass
class Workbench:
    """What jobs share: the loaded model, its inputs, the reference's outputs, and the floors."""

    key: str
    model: LoadedModel
    inputs: Any
    reference: Mapping[str, Any]
    reference_key: str
    fingerprint: float | None
    stages: tuple[StageReport, ...] = ()
    floors: dict[str, dict[str, MetricValue]] = field(default_factory=dict)


@dataclass
class Session:
    """One request under way."""

    store: Any
    device: str
    output_dir: Path
    advance: Advance
    parent_run_id: str | None = None
    parent_record: str | None = None
    """Id of the sweep's own record, by which it is found in any store."""
    bench: Workbench | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)
    calibrations: dict[str, list[CalibrationConfig]] = field(default_factory=dict)
    """Key of a workbench -> the calibration sets that jobs on it will want."""

    def expect(self, jobs: Sequence[Job]) -> None:
        """Note what the jobs will want, so that bad calibration data are refused before the long work starts."""
        for job in jobs:
            if job.native is not None and job.native.needs_data:
                wanted = self.calibrations.setdefault(_bench_key(job.config), [])
                wanted += [job.config.calibration] if job.config.calibration not in wanted else []


def prepare_device(config: ExperimentConfig) -> str:
    """Resolve ``device``, set torch's threads; ConfigError where CUDA is asked for and there is none."""
    quiet_libraries()
    import torch

    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device=cuda: this torch sees no CUDA device; pass device=cpu, or install a CUDA build of torch"
        )
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    torch.backends.mha.set_fastpath_enabled(False)  # it reads .weight directly and so bypasses quantized layers
    return "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"


def workbench(session: Session, config: ExperimentConfig, run: Any) -> Workbench:
    """The model, inputs and reference outputs for a config; the last one is kept for the jobs that share it."""
    key = _bench_key(config)
    if session.bench is not None and session.bench.key == key:
        return session.bench
    if session.bench is not None:
        session.bench = None  # frees the other model before this one is loaded
        gc.unfreeze()
    cache = session.output_dir / "cache"
    with _stage(session, run, "load") as load:
        model = FAMILIES[config.model.family](config.model, session.device, cache, session.advance)
        for name, module in model.components.items():
            path = config.model.path
            typed = f"model.path={path}" if path else f"model={config.model.family}"
            check_finite_weights(module, f"{typed}: {name}")
    _set_aside()
    inputs = DATASETS[config.dataset.name](config.dataset, config.evaluation, model)
    for wanted in session.calibrations.get(key, []):
        calibration_inputs(wanted, config.evaluation, model, inputs)
    fingerprint = grid_fingerprint(list(model.components.values()))
    if warning := fingerprint_warning(fingerprint):
        say(f"[yellow]warning[/yellow]: {warning}")
    with _stage(session, run, "observe") as seen:
        reference = observe(model, inputs, config.evaluation, cache, _step(session, "observe reference"))
    bench = Workbench(
        key=key,
        model=model,
        inputs=inputs,
        reference=reference,
        fingerprint=fingerprint,
        reference_key=reference_key(model, inputs, config.evaluation),
        stages=(load.report, seen.report),
    )
    _log_shared(session, run, bench)
    session.bench = bench
    _set_aside()
    return bench


def _bench_key(config: ExperimentConfig) -> str:
    return canonical_json([asdict(config.model), asdict(config.dataset), asdict(config.evaluation)])


def _set_aside() -> None:
    """Each stage begins with a garbage collection, which need not look at a million objects of the libraries again."""
    gc.collect()
    gc.freeze()


def _step(session: Session, what: str) -> Any:
    return lambda done, total: session.advance(what, done, total)


def _log_shared(session: Session, run: Any, bench: Workbench) -> None:
    """Tags of what the jobs share; and once a store, the weights that quantlab trained, to be found by hash."""
    shared = _shared_tags(bench)
    run.set_tags(shared)
    digest = bench.model.weights_sha256
    held = {MODEL_ARTIFACT: digest, **{k: v for k, v in shared.items() if k == JUDGE_SHA256}}
    if "folder" in bench.model.parts and not tracking.has_run_with_tags(session.store, held):
        for path in sorted(Path(bench.model.parts["folder"]).glob("*.*")):
            run.log_artifact(path, f"model/{digest.removeprefix('sha256:')[:16]}")
        run.set_tags({MODEL_ARTIFACT: digest})


def _shared_tags(bench: Workbench) -> dict[str, str]:
    return {
        REFERENCE_KEY: bench.reference_key,
        WEIGHTS_SHA256: bench.model.weights_sha256,
        INPUTS_SHA256: bench.inputs.sha256,
        **({JUDGE_SHA256: judge} if (judge := judge_digest(bench)) else {}),
    }


def judge_digest(bench: Workbench) -> str:
    """Digest of the weights of the model's own classifier; an empty text where it has none."""
    judge = bench.model.parts.get("judge")
    return state_digest(judge.state_dict()) if judge is not None else ""


def floor_row(session: Session, job: Job) -> RunReport:
    """A reference or floor row beside a single run: measured once, then found in the cache by content."""
    bench = session.bench
    assert bench is not None, "the workbench is made before the floors"
    settings = [_chosen(bench.model, job.config), job.batch_size, job.config.evaluation.num_bootstrap]
    digest = hashlib.sha256(canonical_json(settings).encode()).hexdigest()[:16]
    file = session.output_dir / "cache" / "reference" / f"{bench.reference_key}.{job.name}.{digest}.json"
    if file.exists():
        with contextlib.suppress(json.JSONDecodeError, KeyError, TypeError):
            stored = json.loads(file.read_text())
            quality = {k: MetricValue(**v) for k, v in stored["quality"].items()}
            bench.floors[job.name] = quality
            memory = {k: MemoryReport(**v) for k, v in stored["memory"].items()}
            return RunReport(
                name=job.name,
                status="FINISHED",
                protocol=bench.model.protocol,
                quality=quality,
                floor=bench.floors.get(FLOOR_BF16, {}),
                floor_batch=bench.floors.get(FLOOR_BATCH, {}),
                memory=memory,
                params=job.resolved,
            )
    report = run_job(session, bench, job, None)
    file.write_text(
        json.dumps(
            {
                "quality": {k: asdict(v) for k, v in report.quality.items()},
                "memory": {k: asdict(v) for k, v in report.memory.items()},
            }
        )
    )
    return report


# -- one job


def run_job(session: Session, bench: Workbench, job: Job, run: Any) -> RunReport:
    """Quantize, evaluate and record one job. ``run`` is its tracked run, or None for a row that is not tracked."""
    chosen = _chosen(bench.model, job.config)
    made = make_candidate(
        Making(
            model=bench.model,
            inputs=bench.inputs,
            job=job,
            names=chosen,
            cache_dir=session.output_dir / "cache",
            advance=session.advance,
            stage=lambda name: _stage(session, run, name),
        )
    )
    candidate, layers = made.model, made.quantization
    report = RunReport(
        name=job.name,
        status="FINISHED",
        protocol=bench.model.protocol,
        quantization=layers,
        calibration=made.calibration,
        memory={name: _memory(name, bench.model, candidate, layers) for name in chosen},
        disk_bytes=_disk_bytes(candidate, job, layers) if job.config.tracking.save_checkpoint else None,
        stages=(*bench.stages, *made.stages),
        params=job.resolved,
        run_id=run.run_id if run else None,
    )
    if run is not None:
        log_quantization(run, report, _shared_tags(bench))
        log_calibration(run, report)
        with tempfile.TemporaryDirectory(prefix="quantlab-calibration-") as folder:
            for file in write_calibration(made, job, Path(folder)):
                run.log_artifact(file, f"calibration/{file.parent.name}")
    with _stage(session, run, "evaluate") as evaluated:
        progress = _step(session, job.name)
        measured = evaluate(
            candidate, bench.model, bench.reference, bench.inputs, job.config.evaluation, progress, job.batch_size
        )
        quality = summarize(measured, job.config.evaluation)
    if job.name in (FLOOR_BF16, FLOOR_BATCH):
        bench.floors[job.name] = quality
    report = replace(
        report,
        quality=quality,
        floor=bench.floors.get(FLOOR_BF16, {}),
        floor_batch=bench.floors.get(FLOOR_BATCH, {}),
        measurements=measured,
        stages=(*report.stages, evaluated.report),
    )
    if run is not None:
        with _stage(session, run, "track"):
            log_evaluation(run, report, bench.fingerprint)
    return report


def _chosen(model: LoadedModel, config: ExperimentConfig) -> list[str]:
    unknown = [c for c in config.model.components if c not in model.components]
    if unknown:
        raise ConfigError(f"model.components={unknown[0]}: {model.name} has {', '.join(model.components)}")
    return list(config.model.components or model.components)


def _memory(
    name: str, reference: LoadedModel, candidate: LoadedModel, layers: QuantizationReport | None
) -> MemoryReport:
    rows = [r for r in layers.layers if r.component == name] if layers else []
    stored = [r.name for r in rows if r.status in ("quantized", "fallback")]
    return component_memory(candidate.components[name], stored, reference.components[name])


def _disk_bytes(candidate: LoadedModel, job: Job, layers: QuantizationReport | None) -> int | None:
    """Size of the saved quantized components; None for rows that no backend saves."""
    if job.native is None or layers is None:
        return None
    with tempfile.TemporaryDirectory(prefix="quantlab-save-") as folder:
        for name in _chosen(candidate, job.config):
            target = Path(folder) / name
            target.mkdir()
            BACKENDS[job.config.quantization.backend].save(candidate.components[name], target)
        return sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())


# -- tracking


def run_folder(session: Session, name: str) -> Path:
    """A fresh folder for a run."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    slug = "".join(c if c.isalnum() else "-" for c in name)[:60]
    base = session.output_dir / "runs"
    base.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f"{stamp}-{slug}-", dir=base))


@contextlib.contextmanager
def open_run(
    session: Session, name: str, job: Job, kind: str = "job", key: str = "", folder: Path | None = None
) -> Iterator[Any]:
    """The tracked run of a job or of a whole sweep; ``key`` is the job's content key, ``folder`` one made before."""
    folder = folder or run_folder(session, name)
    git = session.environment["git"]
    tags = {
        KIND: kind,
        DEVICE: session.device,
        RECIPE: job.config.recipe or "",
        **({JOB_KEY: key} if key else {}),
        VERSIONS: session.environment["versions"],
        **({GIT_COMMIT: git["sha"], GIT_DIRTY: git["dirty"]} if git else {}),
    }
    params = {} if kind == "sweep" else job.resolved
    run = session.store.start_run(name, folder, params, tags, session.parent_run_id)
    with run:
        if kind != "sweep":
            run.log_json(session.environment, "environment.json")
            (folder / "recipe.yaml").write_text(job.recipe_yaml, encoding="utf-8")
            run.log_artifact(folder / "recipe.yaml")
        yield run


@contextlib.contextmanager
def _stage(session: Session, run: Any, name: str) -> Iterator[StageMeasurement]:
    """Measure a stage; the run's tag says where it is, so that a failure and a kill name their stage."""
    if run is not None:
        run.stage = name
    with measure_stage(name, session.device) as measured:
        yield measured
