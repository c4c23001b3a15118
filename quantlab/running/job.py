"""One job: what it shares with others (model, inputs, reference), then quantize, evaluate, and track all of it."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from quantlab.backends.scheme import Scheme
from quantlab.backends.table import held_packages, unprobed
from quantlab.datasets.overlap import overlap
from quantlab.errors import ConfigError, in_words, is_device_lost, is_disk_full
from quantlab.exporting.card import Described
from quantlab.exporting.whole import check_exportable, export
from quantlab.models.loaded import LoadedModel
from quantlab.modules import emulated
from quantlab.modules.device import answers, kind_of
from quantlab.modules.kept import Damaged, read_json, set_aside, write_json
from quantlab.modules.memory import storages
from quantlab.planning.job import Job
from quantlab.progress import headline_of, in_markdown, say
from quantlab.running.forecast import bytes_to_run
from quantlab.running.own_kernels import beside, program_of
from quantlab.running.placement import in_typed_words, planned, source_for
from quantlab.running.rows import failed_row
from quantlab.running.workbench import Session, Workbench, chosen, in_stage, run_folder, shared_tags, step_progress
from quantlab.stages.attribute import attribute
from quantlab.stages.candidate import Candidate, Making, make_candidate, write_calibration
from quantlab.stages.compiled import compiled, first_run
from quantlab.stages.evaluate import evaluate, plain_attention, summarize, warm_up
from quantlab.stages.speed import speed
from quantlab.stages.weigh import saved_bytes, weigh
from quantlab.tracking import Run
from quantlab.tracking.pictures import SAMPLE_GRID
from quantlab.tracking.provenance import code_digest, who_and_what
from quantlab.tracking.results import log_calibration, log_evaluation, log_quantization, report_data, step_columns
from quantlab.tracking.tags import (
    DEVICE,
    GIT_COMMIT,
    GIT_DIRTY,
    JOB_KEY,
    KIND,
    NOTE,
    RECIPE,
    UNPROBED,
    VERSIONS,
)
from quantlab.tracking.used import used_params
from quantlab.tracking.values import flatten
from quantlab.vocabulary.ledger import warning as ledger_warning
from quantlab.vocabulary.native import canonical_json
from quantlab.vocabulary.numbers import CHECKPOINT_METHOD, FLOORS, NEEDED_BYTES, flat_metrics
from quantlab.vocabulary.reports import (
    Attribution,
    CalibrationReport,
    Measurements,
    MemoryReport,
    MetricValue,
    QuantizationReport,
    RunReport,
    StageReport,
)

_ARRAYS = ("clusters", "strata", "seeds")
REFERENCE_MADE_ON = "reference_made_on"
"""Parameter of a row whose reference was made elsewhere: device, dtype, library."""


def floor_row(session: Session, job: Job) -> RunReport:
    """A reference or floor row beside a single run: measured once, then found in the cache by content."""
    bench = session.bench
    assert bench is not None, "the workbench is made before the floors"
    drawn = job.config.evaluation
    settings = [
        code_digest(),
        list(chosen(bench.model, job)),
        job.batch_size,
        job.plain_attention,
        drawn.num_bootstrap,
        drawn.bootstrap_seed,
        drawn.compile,
        drawn.speed,
    ]
    digest = hashlib.sha256(canonical_json(settings).encode()).hexdigest()[:16]
    file = session.output_dir / "cache" / "reference" / f"{bench.reference_key}.{job.name}.{digest}.json"
    if file.exists():
        try:
            report = _cached_row(job, bench.model.protocol, read_json(file))
            bench.keep_floor(report)
            return bench.with_floors(report)
        except Damaged as error:
            set_aside(file, error)
    report = run_job(session, bench, job, None)
    file.parent.mkdir(parents=True, exist_ok=True)  # a reference from elsewhere was not kept there
    write_json(_to_cache(report), file)
    return report


def floor_rows(session: Session, bench: Workbench, job: Job) -> list[RunReport]:
    """The rows of the reference and the floors beside ``job``; one that fails costs its numbers and not the run:
    a module may know one dtype only."""
    rows = []
    for floor in bench.known.floor_jobs(job.config):
        if floor.name == job.name:
            continue
        try:
            rows.append(floor_row(session, floor))
        except Exception as error:  # noqa: BLE001  whatever a library raises: the run itself may do well
            if is_disk_full(error):
                raise
            told = in_words(error)
            say(f"{floor.name}: {told[:500]}; verdicts use the other floors", "failed")
            rows.append(failed_row(floor, bench.model.protocol, told, "floors"))
    return rows


def _to_cache(report: RunReport) -> dict[str, Any]:
    """What is kept of a row: its numbers, times too, and those of each sample and step; no images."""
    metrics, measured = flat_metrics(report), report.measurements
    assert measured is not None, "it was evaluated"
    arrays = {name: getattr(measured, name) for name in _ARRAYS}
    return {
        "measured": {
            "samples": {name: list(map(float, values)) for name, values in measured.samples.items()},
            "steps": step_columns(measured),
            "sample_ids": list(measured.sample_ids),
            "undefined": dict(measured.undefined),
            **{name: list(map(int, values)) for name, values in arrays.items() if values is not None},
        },
        "quality": {k: asdict(v) for k, v in report.quality.items()},
        "memory": {k: asdict(v) for k, v in report.memory.items()},
        "disk_bytes": report.disk_bytes,
        "stages": [asdict(stage) for stage in report.stages],
        "perf": {k.removeprefix("perf/"): v for k, v in metrics.items() if k.startswith("perf/")},
    }


def _cached_row(job: Job, protocol: str, stored: Mapping[str, Any]) -> RunReport:
    import numpy as np

    found = stored["measured"]
    return RunReport(
        name=job.name,
        status="FINISHED",
        protocol=protocol,
        quality={k: MetricValue(**v) for k, v in stored["quality"].items()},
        memory={k: MemoryReport(**v) for k, v in stored["memory"].items()},
        disk_bytes=stored["disk_bytes"],
        stages=tuple(StageReport(**{**v, "by_device": tuple(map(tuple, v["by_device"]))}) for v in stored["stages"]),
        speed=stored["perf"],
        params=job.resolved,
        measurements=Measurements(
            samples={name: np.asarray(values) for name, values in found["samples"].items()},
            steps={name: np.asarray(values) for name, values in found["steps"].items()},
            sample_ids=tuple(found["sample_ids"]),
            undefined=found["undefined"],
            **cast("dict[str, Any]", {name: np.asarray(found[name]) for name in _ARRAYS if name in found}),
        ),
    )


# -- one job


def run_job(session: Session, bench: Workbench, job: Job, run: Run | None) -> RunReport:
    """Quantize, evaluate and record one job. ``run`` is its tracked run, or None for a row that is not tracked."""
    schemes = chosen(bench.model, job)
    made = make(session, bench, job, run)
    candidate, layers = made.model, made.quantization
    target = job.config.export.path if run is not None else None  # a floor beside it is no model to export
    if target is not None:
        check_exportable(target, job, bench.model, candidate, layers)
    if made.batch_size is not None:
        job = replace(job, batch_size=made.batch_size)
    is_saved = job.config.tracking.save_checkpoint and layers is not None
    if layers is not None and job.batch_size is not None:
        layers = replace(layers, resolved={**layers.resolved, "evaluation.batch_size": job.batch_size})
    disk_bytes = made.disk_bytes
    if is_saved and job.schemes:
        with bench.model.holding([name for name, scheme in schemes.items() if scheme is None]):  # saved as they are
            disk_bytes = saved_bytes(candidate, schemes, layers)
    report = RunReport(
        name=job.name,
        status="FINISHED",
        protocol=bench.model.protocol,
        quantization=layers,
        calibration=_with_overlap(made.calibration, bench, job),
        memory=weigh(bench.model, candidate, list(schemes), layers),
        planned=planned(bench.model, job, schemes, bench.reads),
        device_bytes=_device_bytes(candidate, list(schemes)),
        disk_bytes=disk_bytes,
        stages=(*bench.stages, *made.stages),
        params={**job.resolved, **_found_out(bench, job, layers)},
        run_id=run.run_id if run else None,
        unquantized=layers.unquantized if layers else (),
    )
    for told in bench.not_told(report.unquantized):
        say(f"{job.name}: {told}", "warning")
    if told := ledger_warning(report):
        say(told, "warning")
    if run is not None:
        with run.together(), tempfile.TemporaryDirectory(prefix="quantlab-calibration-") as folder:
            if bench.brought is not None:
                run.log_params({REFERENCE_MADE_ON: bench.brought.made_on})
            log_quantization(run, report, shared_tags(bench))
            log_inputs(run, bench, job, report.calibration)
            log_calibration(run, report)
            for file in write_calibration(made, schemes, Path(folder)):
                run.log_artifact(file, f"calibration/{file.parent.name}")
    report = _measured(session, bench, job, run, made, report)
    bench.keep_floor(report)
    report = bench.with_floors(report)
    if run is not None:
        with in_stage(session, run, "track"), run.together():
            log_evaluation(run, report, bench.fingerprint)
    if target is not None and run is not None:
        with in_stage(session, run, "export"), bench.model.holding(bench.model.parts.get("origins", ())):
            picture = run.record.folder / SAMPLE_GRID
            memory_bytes = {**planned_bytes(report), **bytes_to_run(job)}
            described = Described(row=report_data(report), memory_bytes=memory_bytes, picture=picture)
            exported = export(target, job, bench.model, candidate, layers, bench.inputs, described)
        run.log_metrics(exported.metrics)
        run.set_tags(exported.tags)
        say("; ".join(exported.lines()))
    return report


def run_row(session: Session, bench: Workbench, job: Job, key: str, folder: Path | None = None) -> RunReport:
    """The row of a sweep's job that is run here and now; its failure is a row."""
    run = None
    try:
        with open_run(session, job.name, job, key=key, folder=folder) as run:
            return run_job(session, bench, job, run)
    except Exception as error:  # noqa: BLE001  whatever a library raises: a failing job is a row
        if is_disk_full(error):  # no other job would fare better
            raise
        text = in_words(error)
        say(f"{job.name}{f' at {run.stage}' if run else ''}: {headline_of(text)}", "failed")
        if is_device_lost(error) or not answers(session.device):
            session.lost_device = job.name
            text += "; the GPU answered this process no more, so the jobs after it ran in processes of their own"
        if run is None:  # it did not even begin
            return failed_row(job, bench.model.protocol, text)
        return failed_row(job, bench.model.protocol, text, run.stage, run.run_id, run.record.summary["metrics"])


def _measured(
    session: Session, bench: Workbench, job: Job, run: Run | None, made: Candidate, report: RunReport
) -> RunReport:
    """The report with what the candidate does: its quality, its speed, what each component costs."""
    candidate, settings, num_native = made.model, job.config.evaluation, emulated.num_emulated
    is_compiled = settings.compile and job.name not in FLOORS
    speeds: dict[str, float] = {}
    with contextlib.ExitStack() as measuring:
        measuring.enter_context(_attention(job))
        if is_compiled:
            measuring.enter_context(compiled(candidate))
            with in_stage(session, run, "compile") as compiling, first_run() as speeds:
                warm_up(candidate, bench.inputs, settings, job.batch_size)
            report = replace(report, stages=(*report.stages, compiling.report))
        elif kind_of(session.device) == "cuda":
            with in_stage(session, run, "warm_up") as warmed:
                warm_up(candidate, bench.inputs, settings, job.batch_size)
            report = replace(report, stages=(*report.stages, warmed.report))
        with in_stage(session, run, "evaluate") as evaluated:
            progress, schemes = step_progress(session, job.name), by_key(job)
            measured = evaluate(
                candidate, bench.model, bench.reference, bench.inputs, settings, progress, job.batch_size, schemes
            )
            quality = summarize(measured, settings)
            for why in dict.fromkeys(measured.undefined.values()):  # several metrics may lack the same
                say(f"{job.name}: {why}", "undefined")
            depends = made.depends_on_neighbours or any(s.native.depends_on_neighbours for s in job.schemes.values())
            other = _at_other_batch(session, bench, job, candidate) if depends and job.batch_size is None else {}
        stages = (*report.stages, evaluated.report)
        if job.name not in FLOORS and program_of(job, candidate.protocol):
            whole = bench.model.holding(bench.model.parts.get("origins", ()))
            with in_stage(session, run, "own_kernels") as told, whole:
                measured = beside(
                    job, (bench.model, candidate), made.quantization, bench.inputs, bench.reference, measured
                )
            quality, stages = summarize(measured, settings), (*stages, told.report)
        if settings.attribute and made.quantization is not None:
            with in_stage(session, run, "attribute") as attributed:
                report = replace(report, attribution=_attribution(session, bench, job, candidate, report, measured))
            stages = (*stages, attributed.report)
        if settings.speed and job.name not in FLOORS:
            with in_stage(session, run, "speed") as timed:
                speeds |= speed(candidate, bench.inputs, settings, step_progress(session, f"{job.name}, speed"))
            stages = (*stages, timed.report)
    report = replace(report, quality=quality, measurements=measured, stages=stages, other_batch=other, speed=speeds)
    if emulated.num_emulated > num_native:
        report = replace(report, params={**report.params, "compute": "emulated"})
        if run is not None:
            run.log_params({"compute": "emulated"})
    return report


def make(session: Session, bench: Workbench, job: Job, run: Run | None) -> Candidate:
    """The job's candidate. ConfigError for one that ``memory.device_gib`` does not hold."""
    schemes = chosen(bench.model, job)
    whole = schemes if job.needs_data else ()  # it is calibrated and compared with, whole
    with in_typed_words(job.config.memory):
        source = source_for(bench.model, job, schemes)
        if told := bench.too_large.get(job.name):
            raise ConfigError(told)
    with in_typed_words(job.config.memory), bench.model.holding(whole):
        return make_candidate(
            Making(
                model=bench.model,
                calibration_inputs=lambda: bench.calibration_inputs(job.config),
                job=job,
                schemes=schemes,
                reads=bench.reads,
                cache_dir=session.output_dir / "cache",
                advance=session.advance,
                stage=lambda name: in_stage(session, run, name),
                source=source,
            )
        )


def planned_bytes(report: RunReport) -> dict[str, int]:
    """What a card says of the memory that a candidate needs."""
    weights = sum(part.weights_bytes for part in report.planned.values())
    needed = flat_metrics(report).get(NEEDED_BYTES)
    return {
        **({"weights, as planned": weights} if weights else {}),
        **({"to run the quantized components on a GPU": int(needed)} if needed else {}),
    }


def _found_out(bench: Workbench, job: Job, layers: QuantizationReport | None) -> dict[str, Any]:
    """What a row must say beyond its request: where its reference was made, and what a checkpoint of others is."""
    made_on = {} if bench.brought is None else {REFERENCE_MADE_ON: bench.brought.made_on}
    if job.config.checkpoint is None or layers is None:
        return made_on
    return {**made_on, "resolved": {CHECKPOINT_METHOD: layers.resolved[CHECKPOINT_METHOD]}}


def _device_bytes(candidate: LoadedModel, names: Sequence[str]) -> tuple[int, ...]:
    """Bytes of a candidate's components on each device, where they lie on several."""
    spread = candidate.parts.get("spread")
    modules = {name: candidate.components[name] for name in names}
    return () if spread is None else tuple(spread.weights_bytes(modules, held_packages()))


def _attention(job: Job) -> contextlib.AbstractContextManager[None]:
    return plain_attention() if job.plain_attention else contextlib.nullcontext()


def _with_overlap(made: CalibrationReport | None, bench: Workbench, job: Job) -> CalibrationReport | None:
    """The report with how much text calibration and evaluation share."""
    if made is None:
        return None
    found = overlap(bench.calibration_inputs(job.config), bench.inputs)
    return replace(
        made,
        shared_tokens_of_calibration=found.of_calibration,
        shared_tokens_of_evaluation=found.of_evaluation,
    )


def _at_other_batch(session: Session, bench: Workbench, job: Job, candidate: LoadedModel) -> dict[str, MetricValue]:
    """The metrics at another batch size, where a rule that looks at all of a call makes samples depend on it."""
    settings = job.config.evaluation
    progress = step_progress(session, f"{job.name}, other batches")
    measured = evaluate(
        candidate,
        bench.model,
        bench.reference,
        bench.inputs,
        settings,
        progress,
        settings.floor_batch_size,
        by_key(job),
    )
    return summarize(measured, settings)


def _attribution(
    session: Session, bench: Workbench, job: Job, candidate: LoadedModel, report: RunReport, together: Measurements
) -> dict[str, Attribution]:
    """Which of the quantized components costs what; nothing where there is one."""
    names = [name for name, scheme in chosen(bench.model, job).items() if scheme is not None]
    if len(names) < 2:
        told = f"evaluation.attribute=true: {job.name} has one quantized component, whose cost is the row's"
        say(told, "warning")
        return {}

    def measure(name: str, model: LoadedModel) -> Measurements:
        progress = step_progress(session, f"{job.name}, {name} alone")
        settings, reference = job.config.evaluation, bench.reference
        return evaluate(model, bench.model, reference, bench.inputs, settings, progress, job.batch_size, by_key(job))

    before = {name: sum(storages(bench.model.components[name], held_packages()).values()) for name in names}
    saved = {name: before[name] - report.memory[name].weights_bytes for name in names}
    return attribute(bench.model, candidate, names, together, measure, job.config.evaluation, saved)


def by_key(job: Job) -> dict[str, Scheme]:
    """How messages about a scheme begin -> the scheme."""
    return {job.key_of(name) if name else "": scheme for name, scheme in job.schemes.items()}


# -- tracking


def described(job: Job, name: str) -> str:
    """The first line of a run's description: which scheme of what, on which data."""
    config = job.config
    recipe = f", from the recipe {config.recipe}" if config.recipe else ""
    model = config.model.path or config.model.family
    return in_markdown(f"{name} of {model} on {config.dataset.path or config.dataset.name}{recipe}.", 1000)


def log_inputs(run: Run, bench: Workbench, job: Job, calibration: CalibrationReport | None) -> None:
    """The data that a job looked at, as MLflow lists it."""
    inputs, config = bench.inputs, job.config
    looked_at = [("evaluation", config.dataset.name, config.dataset.path, inputs.sha256, inputs.num_samples)]
    if calibration is not None:
        given = config.calibration
        looked_at.append(("calibration", given.source, given.path, calibration.sha256, calibration.num_samples))
    for context, name, path, digest, num in looked_at:
        source = {"uri": str(Path(path).expanduser().absolute())} if path else {"dataset": name}
        run.log_input(Path(path).name if path else name, digest, context, source, {"num_samples": num})


@contextlib.contextmanager
def open_run(
    session: Session, name: str, job: Job, kind: str = "job", key: str = "", folder: Path | None = None
) -> Iterator[Run]:
    """The tracked run of a job or of a whole sweep; ``key`` is the job's content key, ``folder`` one made before."""
    folder = folder or run_folder(session, name)
    git = session.environment["git"]
    other = ", ".join(filter(None, (unprobed(b.name) for b in job.backends))) if kind != "sweep" else ""
    tags = {
        KIND: kind,
        DEVICE: session.device or job.config.device,
        RECIPE: job.config.recipe or "",
        **({JOB_KEY: key} if key else {}),
        VERSIONS: session.environment["versions"],
        **({UNPROBED: other} if other else {}),
        **({GIT_COMMIT: git["sha"], GIT_DIRTY: git["dirty"]} if git else {}),
        **who_and_what(session.typed),
        NOTE: f"A sweep of {name}." if kind == "sweep" else described(job, name),
    }
    params = {} if kind == "sweep" else used_params(flatten(job.resolved), job.needs_data)
    run = session.store.start_run(name, folder, params, tags, session.parent_run_id)
    with run:
        if kind != "sweep":
            with run.together():
                run.log_json(session.environment, "environment.json")
                (folder / "recipe.yaml").write_text(job.recipe_yaml, encoding="utf-8")
                run.log_artifact(folder / "recipe.yaml")
        yield run
