"""What the jobs of a request share: the session with its store, and the loaded model with its reference."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from quantlab import tracking
from quantlab.backends.scheme import Scheme
from quantlab.backends.table import loggers
from quantlab.datasets.calibration import calibration_inputs
from quantlab.datasets.table import DATASETS
from quantlab.errors import ConfigError, nearest
from quantlab.models.loaded import LoadedModel, class_names
from quantlab.modules.device import collect_as_usual, give_back, kind_of
from quantlab.modules.emulated import emulated_products, lacking
from quantlab.modules.fingerprint import fingerprint_warning, grid_fingerprint, known_grid
from quantlab.modules.gpu_seen import NO_CUDA
from quantlab.modules.holders import holders
from quantlab.modules.layers import check_finite_weights, state_digest
from quantlab.modules.memory import StageMeasurement, measure_stage
from quantlab.planning.components import check_contradiction, named_by_users
from quantlab.planning.job import Job
from quantlab.planning.words import COMPONENTS
from quantlab.progress import Advance, file_name, say
from quantlab.protocols.table import PROTOCOLS
from quantlab.quiet import quiet_libraries
from quantlab.running.claims import Claims
from quantlab.running.known import Known, bench_key, remember, request_digest
from quantlab.running.placement import available, in_typed_words, load_placed, placed
from quantlab.running.room import floors_without_room, jobs_without_room, without_float32
from quantlab.running.rows import floors_of
from quantlab.stages.bundle import Bundle, check_bundle, differs, is_of_here, read_bundle
from quantlab.stages.observe import made_by, observe, reference_key
from quantlab.stages.reads import weights_read
from quantlab.tracking import Run, Store
from quantlab.tracking.tags import (
    INPUTS_SHA256,
    JUDGE_SHA256,
    MODEL_ARTIFACT,
    MODEL_PARTS,
    REFERENCE_KEY,
    WEIGHTS_SHA256,
)
from quantlab.vocabulary.native import canonical_json
from quantlab.vocabulary.numbers import FLOORS
from quantlab.vocabulary.reports import MetricValue, RunReport, StageReport
from quantlab.vocabulary.schema import ExperimentConfig

RUNNING = ("observe", "calibrate", "evidence", "warm_up", "compile", "evaluate", "attribute", "speed")
"""Stages in which a model runs."""


@dataclass
class Workbench:
    """What jobs share: the loaded model, its inputs, the reference's outputs, and the floors."""

    key: str
    model: LoadedModel
    inputs: Any
    reference: Mapping[str, Any]
    reference_key: str
    fingerprint: float | None
    reads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Component -> its layers whose weights it reads."""
    stages: tuple[StageReport, ...] = ()
    floors: dict[str, dict[str, MetricValue]] = field(default_factory=dict)
    """Name of a floor's row -> what it costs, for all rows that come after it."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Name of a floor for which there is no room -> why."""
    too_large: Mapping[str, str] = field(default_factory=dict)
    """Name of a job -> why the memory that a user gives does not hold it."""
    told: set[str] = field(default_factory=set)
    """What the user knows of what stays unquantized."""
    cache_dir: Path = Path()
    """Where digests of files are remembered."""
    calibrations: dict[str, Any] = field(default_factory=dict)
    """Calibration config -> its inputs."""
    brought: Bundle | None = None
    """The reference that was made elsewhere; None: it was observed here."""

    def not_told(self, sentences: Sequence[str]) -> list[str]:
        """Those that no job before has told the user."""
        found = [s for s in sentences if s not in self.told]
        self.told.update(found)
        return found

    def keep_floor(self, report: RunReport) -> None:
        """Keep the numbers of a finished row if it is a floor's."""
        self.floors |= floors_of([report], self.brought is not None)

    def with_floors(self, report: RunReport) -> RunReport:
        """The row with the floors that are known."""
        return replace(report, floors={name: self.floors[name] for name in FLOORS if name in self.floors})

    @functools.cached_property
    def known(self) -> Known:
        """By what its jobs and floors are known, also when it is gone."""
        return Known(
            protocol=self.model.protocol,
            dtype=self.model.dtype,
            reference_key=self.reference_key,
            judge_sha256=self.judge_sha256,
            default=default_of(self.model),
            classes=class_names(self.model.components),
            made=made_by(self.model),
            left_out=tuple(self.left_out),
            is_brought=self.brought is not None,
            tags=shared_tags(self),
            widths={name: _widths(module, self.reads.get(name, ())) for name, module in self.model.components.items()},
        )

    @functools.cached_property
    def judge_sha256(self) -> str:
        """Digest of the weights of the model's own classifier; an empty text where it has none."""
        judge = self.model.parts.get("judge")
        return state_digest(judge.state_dict()) if judge is not None else ""

    def calibration_inputs(self, config: ExperimentConfig) -> Any:
        """What calibration may look at; built and checked once. Raises ConfigError for data that cannot be used."""
        key = canonical_json(asdict(config.calibration))
        if key not in self.calibrations:
            self.calibrations[key] = calibration_inputs(config.calibration, config.evaluation, self.model, self.inputs)
        return self.calibrations[key]


@dataclass
class Session:
    """One request under way."""

    store: Store
    device: str
    output_dir: Path
    advance: Advance
    typed: Sequence[str] = ()
    """The words of the command, which its runs name."""
    parent_run_id: str | None = None
    parent_record: str | None = None
    """Id of the sweep's own record, by which it is found in any store."""
    bench: Workbench | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)
    claims: Claims = field(default_factory=lambda: Claims(Path("claims")))
    """Who runs which job."""
    parent_folder: Path | None = None
    """The sweep's own."""
    leaves: bool = False
    """Its jobs go on when it ends (``launcher.detach``)."""
    keeps_model: bool = True
    """Does it log the weights that quantlab trained, once a store? False in the process of a job: its sweep does."""
    known_before: dict[str, Known] | None = None
    """What is known of all references of a sweep; then no device is looked for before one of its jobs is to be run."""
    lost_device: str = ""
    """The job after whose error the GPU answers this process no more; empty as long as it does."""
    where: Mapping[str, object] | None = None
    """In the process of a job on a node: what its sweep asked the engine for (:func:`quantlab.running.known.where_of`).
    None: this machine."""
    compares_with: Known | None = None
    """In such a process, whose reference the sweep's rows are compared with."""
    expected: dict[str, list[ExperimentConfig]] = field(default_factory=dict)
    """Key of a workbench -> the configs of jobs on it that will want calibration data."""
    sharing: dict[str, list[Job]] = field(default_factory=dict)
    """Key of a workbench -> the jobs on it, all of which its placement is for."""

    def expect(self, jobs: Sequence[Job]) -> None:
        """Note what the jobs will want, so that bad calibration data are refused before the long work starts, and so
        that the model they share lies where each has room."""
        for job in jobs:
            self.sharing.setdefault(bench_key(job.config), []).append(job)
            if job.needs_data:
                self.expected.setdefault(bench_key(job.config), []).append(job.config)


def prepare_device(config: ExperimentConfig) -> str:
    """Resolve ``device``, set torch's threads; ConfigError where CUDA is asked for and there is none."""
    quiet_libraries(loggers())
    import torch

    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(NO_CUDA)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    torch.backends.mha.set_fastpath_enabled(False)  # it reads .weight directly and so bypasses quantized layers
    return "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"


def workbench(session: Session, job: Job, run: Run | None) -> Workbench:
    """The model, inputs and reference outputs for a job; the last one is kept for the jobs that share it."""
    if has_bench(session, job.config) and session.bench is not None:
        return session.bench
    let_go_of_bench(session)
    with in_typed_words(job.config.memory):
        return _made(session, job, run)


def _made(session: Session, job: Job, run: Run | None) -> Workbench:
    config, key = job.config, bench_key(job.config)
    brought = read_bundle(config)
    cache = session.output_dir / "cache"
    files = request_digest(config, cache, session.where)
    with in_stage(session, run, "load") as load:
        with named_by_users(config):
            sharing = session.sharing.get(key) or [job]
            model, where = load_placed(config, session.device, cache, session.advance, sharing)
        for name, module in model.components.items():
            path = config.model.path
            typed = f"model.path={path}" if path else f"model={config.model.family}"
            check_finite_weights(module, f"{typed}: {name}")
            del module
    _set_aside()
    inputs = DATASETS[config.dataset.name].load(config.dataset, config.evaluation, model)
    expected = {canonical_json(asdict(c.calibration)): c for c in session.expected.get(key, [])}
    calibrations = {
        said: calibration_inputs(c.calibration, c.evaluation, model, inputs) for said, c in expected.items()
    }
    components = list(model.components.values())
    fingerprint = grid_fingerprint(components)
    if warning := fingerprint_warning(fingerprint, known_grid(components)):
        say(warning, "warning")
    components.clear()
    on_device = replace(model, device=session.device)
    budget = available(on_device, config.memory)
    left_out = floors_without_room(on_device, config, sharing, budget, where)
    too_large = jobs_without_room(on_device, sharing, budget)
    del on_device
    model = placed(model, where, config, session.device, cache)
    if left_out is None:
        left_out = without_float32(model, config.memory)
    _set_aside()
    with in_stage(session, run, "observe", model) as seen:
        PROTOCOLS[model.protocol].check(model, inputs)
        reads = weights_read(model, inputs, config.evaluation, list(model.components))
        key_here = reference_key(model, inputs, config.evaluation)
        if brought is not None:
            key_here = brought.key(key_here)
        _check_same_reference(session.compares_with, key_here, model)
        if brought is None:
            reference: Mapping[str, Any] = observe(
                model, inputs, config.evaluation, cache, step_progress(session, "observe reference")
            )
        else:
            check_bundle(brought, model, inputs, config.evaluation)
            reference = brought.outputs
            if not is_of_here(brought, model):
                say(differs(brought, model), "warning")
    bench = Workbench(
        key=key,
        model=model,
        inputs=inputs,
        reference=reference,
        fingerprint=fingerprint,
        reads=reads,
        reference_key=key_here,
        left_out=left_out,
        too_large=too_large,
        brought=brought,
        stages=(load.report, seen.report),
        calibrations=calibrations,
        cache_dir=cache,
    )
    if run is not None:
        _log_shared(session, run, bench)
    session.bench = bench
    for told in bench.left_out.values() if config.sweep.floors else ():
        say(told, "warning")
    if files in (None, request_digest(config, cache, session.where)):  # None: the model was trained since
        remember(config, cache, bench.known, session.where)
    _set_aside()
    return bench


def _check_same_reference(wanted: Known | None, key: str, model: LoadedModel) -> None:
    """ConfigError where the sweep's reference is not what this process would observe: rows of both are not mixed."""
    if wanted is None or wanted.reference_key == key:
        return
    here, there = made_by(model), wanted.made
    if differing := [name for name in here if canonical_json(here[name]) != canonical_json(there.get(name))]:
        told = "; ".join(f"{name}: {there.get(name)} there and {here[name]} here" for name in differing)
        raise ConfigError(
            f"device={kind_of(model.device)}: the sweep's reference was observed on another kind of node ({told}), and "
            "numbers of two kinds are not compared; ask for nodes of one kind (launcher.settings, device), or observe "
            "it anew (sweep.force=true)"
        )
    raise ConfigError(
        "model.path: the model or the inputs are not those of the sweep's reference any more; their files have "
        "changed: give the same command again"
    )


def _widths(module: Any, read: Sequence[str]) -> dict[str, list[int]]:
    """Kind of the holders of weights that can be taken -> the lengths of their rows."""
    found: dict[str, set[int]] = {}
    for holder in holders(module, read).values():
        if holder.way:
            found.setdefault(holder.kind, set()).add(holder.view.matrix_shape[1])
    return {kind: sorted(widths) for kind, widths in found.items()}


def default_of(model: LoadedModel) -> tuple[str, ...]:
    """The components that the family quantizes where nobody names any."""
    return model.parts.get("denoisers") or tuple(model.components)


def chosen(model: LoadedModel, job: Job) -> dict[str, Scheme | None]:
    """Component -> its scheme, of all that the job is about; ConfigError for one that the model has not, or that has
    two schemes."""
    config, default = job.config, default_of(model)
    check_contradiction(config, config.model.components or default)
    for name in config.model_with().components:
        if name not in model.components:
            key = f"model.components={name}" if name in config.model.components else f"{COMPONENTS}.{name}"
            raise ConfigError(f"{key}: {model.name} has {', '.join(model.components)}{nearest(name, model.components)}")
    return job.components(default)


def has_bench(session: Session, config: ExperimentConfig) -> bool:
    """Is the workbench of ``config`` the one that is there?"""
    bench = session.bench
    return (
        bench is not None and bench.key == bench_key(config) and set(config.components) <= set(bench.model.components)
    )


def let_go_of_bench(session: Session) -> None:
    """Give back the memory of the loaded model, for another one or for other processes; callers hold no workbench."""
    if session.bench is None:
        return  # and nothing that was set aside is looked at again
    session.bench = None
    gc.unfreeze()
    give_back(session.device)


def _set_aside() -> None:
    """Each stage begins with a garbage collection, which need not look at a million objects of the libraries again."""
    collect_as_usual()
    gc.collect()
    gc.freeze()


def step_progress(session: Session, what: str) -> Callable[[int, int], None]:
    return lambda done, total: session.advance(what, done, total)


def _log_shared(session: Session, run: Run, bench: Workbench) -> None:
    """Tags of what the jobs share; and once a store, the weights that quantlab trained, to be found by hash."""
    shared = shared_tags(bench)
    run.set_tags(shared)
    digest = bench.model.weights_sha256
    held = {MODEL_ARTIFACT: digest, **{k: v for k, v in shared.items() if k == JUDGE_SHA256}}
    if session.keeps_model and "folder" in bench.model.parts and not tracking.has_run_with_tags(session.store, held):
        for path in sorted(Path(bench.model.parts["folder"]).glob("*.*")):
            run.log_artifact(path, f"model/{digest.removeprefix('sha256:')[:16]}")
        run.set_tags({MODEL_ARTIFACT: digest})


def shared_tags(bench: Workbench) -> dict[str, str]:
    return {
        REFERENCE_KEY: bench.reference_key,
        WEIGHTS_SHA256: bench.model.weights_sha256,
        MODEL_PARTS: json.dumps({k: v[:16] for k, v in bench.model.identity.items() if k != "weights"}),
        INPUTS_SHA256: bench.inputs.sha256,
        **({JUDGE_SHA256: bench.judge_sha256} if bench.judge_sha256 else {}),
    }


def run_folder(session: Session, name: str) -> Path:
    """A fresh folder for a run."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    base = session.output_dir / "runs"
    base.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f"{stamp}-{file_name(name).replace(' ', '-')}-", dir=base))


@contextlib.contextmanager
def in_stage(
    session: Session, run: Run | None, name: str, model: LoadedModel | None = None
) -> Iterator[StageMeasurement]:
    """Measure a stage; the run's tag says where it is, so that a failure and a kill name their stage.

    ``model`` is what runs in it, where the session has no workbench yet.
    """
    if run is not None:
        run.stage = name
    emulated = lacking(session.device) if name in RUNNING else ()
    runs = model or (session.bench.model if session.bench is not None else None)
    spread = None if runs is None else runs.parts.get("spread")
    devices = () if spread is None else spread.devices
    with measure_stage(name, session.device, devices) as measured, emulated_products(emulated):
        yield measured
