"""``quantlab reproduce RUN_ID``: a run is rebuilt from the tracking store alone, run again, and compared.

The store has the resolved recipe, the environment, the digests, and the weights of what quantlab trained. Nothing is
taken from the cache of outputs: the reference and the floors are computed again.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantlab import tracking
from quantlab.errors import ConfigError, ModelError, TrackingError, nearest
from quantlab.metrics import METRICS
from quantlab.models.table import Trained, family_of
from quantlab.modules.layers import state_digest
from quantlab.planning.job import Job
from quantlab.planning.plan import plan
from quantlab.planning.recipe import own_paths
from quantlab.planning.words import override_text
from quantlab.report.reading import (
    FolderReader,
    Reader,
    StoredRun,
    experiment_id,
    json_object,
    open_reader,
    read_json,
    tell_of_newer,
)
from quantlab.report.reproduction import Reproduction, RunNumbers, compare_runs
from quantlab.report.selection import children, is_quantized
from quantlab.running.job import floor_row, open_run, run_job
from quantlab.running.resume import content_key
from quantlab.running.sweep import open_session, told_apart
from quantlab.running.workbench import Session, run_folder, workbench
from quantlab.tracking.connect import NO_STORE
from quantlab.tracking.tags import (
    DEVICE,
    FAILURE,
    JOB_KEY,
    JUDGE_SHA256,
    KIND,
    MODEL_ARTIFACT,
    RECIPE,
    REPRODUCES,
    REPRODUCTION,
    STAGE,
    WEIGHTS_SHA256,
)
from quantlab.vocabulary.numbers import CHECKPOINT_SHA256, FLOOR_ATTENTION, FLOOR_BATCH
from quantlab.vocabulary.schema import ExperimentConfig, ExportConfig, TrackingConfig

KEYS = ("tracking.uri", "device", "num_threads", "output_dir", *own_paths(["NAME"]))
"""What may be said anew: where things are, and on what it runs. All else is the run's own."""
USAGE = "quantlab reproduce RUN_ID [--json] (or latest instead of the id)"
LATEST = "latest"
Json = dict[str, Any]
Digests = tuple[str, str]
"""Of a model's weights and of its judge; the second is empty where it is not known."""


@dataclass(frozen=True, kw_only=True)
class ReproductionRequest:
    """What was typed behind ``quantlab reproduce``."""

    run_id: str
    words: dict[str, str] = field(default_factory=dict)
    as_json: bool = False
    quiet: bool = False


def may_be_set(key: str) -> bool:
    """Whether ``key`` is one of :data:`KEYS`, of which those with NAME are of any component."""
    parts = key.split(".")
    return key in KEYS or ".".join([parts[0], "NAME", *parts[2:]]) in KEYS


def parse_request(words: Sequence[str]) -> ReproductionRequest:
    """The words behind ``quantlab reproduce`` as a request; ConfigError for what is none."""
    run_ids: list[str] = []
    values: dict[str, str] = {}
    flags: set[str] = set()
    for word in words:
        key, has_value, value = word.partition("=")
        if word in ("--json", "-q", "--quiet"):
            flags.add(word)
        elif word.startswith("-"):
            raise ConfigError(
                f"{word}: no such option of reproduce{nearest(word, ['--json', '--quiet'])}; there are --json, -q"
            )
        elif not has_value:
            run_ids.append(word)
        elif may_be_set(key) and value:
            values[key] = value
        else:
            raise ConfigError(
                f"{word}: a run is reproduced as it was{nearest(key, KEYS)}; only {', '.join(KEYS)} can be set; "
                "to change more, take its recipe.yaml: quantlab recipe=FILE key=value"
            )
    if len(run_ids) != 1:
        raise ConfigError(f"reproduce: {len(run_ids) or 'no'} run ids given; write {USAGE}")
    return ReproductionRequest(
        run_id=run_ids[0], words=values, as_json="--json" in flags, quiet=bool(flags & {"-q", "--quiet"})
    )


def reproduce(request: ReproductionRequest) -> Reproduction:
    """Run a tracked job again and compare; the repetition is itself tracked, with the tag ``quantlab.reproduces``.

    Raises:
        TrackingError: no such run, or one without numbers: a sweep, a job that failed or has not ended.
        ModelError: the weights that quantlab trained are neither in the cache nor in the store.
    """
    uri = request.words.get("tracking.uri", TrackingConfig().uri)
    reader = open_reader(TrackingConfig(uri=uri), Path.cwd(), request.words.get("output_dir", "outputs"))
    run = finished_job(reader, request.run_id, "reproduce", TrackingConfig().experiment)
    with tempfile.TemporaryDirectory(prefix="quantlab-reproduce-") as folder:
        scratch = Path(folder)
        environment = read_json(reader, run, "environment.json")
        job = rebuilt(request.words, reader, run, environment, scratch)
        with open_session(job.config, request.quiet) as session:
            job = replace(job, config=with_weights(job.config, session, run, scratch))
            models = session.output_dir / "cache" / "models"
            models.mkdir(parents=True, exist_ok=True)
            (scratch / "cache").mkdir()
            (scratch / "cache" / "models").symlink_to(models, target_is_directory=True)
            typed = ["reproduce", request.run_id, *(f"{key}={value}" for key, value in request.words.items())]
            fresh = replace(session, output_dir=scratch, typed=typed)
            run = replace(run, metrics=all_numbers(run.metrics, read_json(reader, run, "report.json")))
            return _run_again(
                fresh, job, run, (read_json(reader, run, "samples.json"), environment), run_folder(session, job.name)
            )


def _run_again(session: Session, job: Job, run: StoredRun, known: tuple[Json, Json], folder: Path) -> Reproduction:
    samples, environment = known
    with told_apart(job.name), open_run(session, job.name, job, folder=folder) as again:
        again.set_tags({REPRODUCES: run.run_id})
        bench = workbench(session, job, again)
        again.stage = "floors"
        for floor in bench.known.floor_jobs(job.config):
            if floor.name != job.name and any(m.startswith(f"quality/{floor.name}/") for m in run.metrics):
                floor_row(session, floor)
        again.set_tags({JOB_KEY: content_key(bench.known, job, bench.cache_dir)})
        run_job(session, bench, job, again)
        summary = again.record.summary
        report = json_object((folder / "report.json").read_bytes())
        now: RunNumbers = {
            "run_id": again.run_id,
            "name": job.name,
            "metrics": all_numbers(summary["metrics"], report),
            "tags": _with_checkpoint(summary["tags"], summary["params"]),
        }
        ours = json_object((folder / "samples.json").read_bytes()) if (folder / "samples.json").is_file() else {}
        was: RunNumbers = {
            "run_id": run.run_id,
            "name": job.name,
            "metrics": run.metrics,
            "tags": _with_checkpoint(run.tags, run.params),
        }
        found = compare_runs(was, now, (samples, ours), (environment, session.environment))
        again.log_json(found.data(), "reproduction.json")
        again.set_tags({REPRODUCTION: found.verdict})
    return found


def _with_checkpoint(tags: Mapping[str, str], params: Mapping[str, Any]) -> dict[str, str]:
    """A run's tags, and of one on a checkpoint of others the digest of its files, which is told as they are."""
    digest = params.get(f"resolved.{CHECKPOINT_SHA256}")
    return {**tags, **({CHECKPOINT_SHA256: str(digest)} if digest else {})}


def all_numbers(tracked: Mapping[str, float], report: Json) -> dict[str, float]:
    """A run's tracked numbers, and those that its report alone has: the points of curves, in a sweep the floors'."""
    curves = {f"quality/{m.name}" for m in METRICS.values() if m.is_curve}
    return {**report.get("metrics", {}), **{k: v for k, v in tracked.items() if k not in curves}}


# -- what the store has


def finished_job(reader: Reader, run_id: str, verb: str, experiment: str) -> StoredRun:
    """The run, if it can be rebuilt for ``verb`` (reproduce, export); of ``latest`` the newest job of the experiment
    that finished and quantized. TrackingError with the way out otherwise."""
    if run_id == LATEST:
        return _latest(reader, verb, experiment)
    found = reader.by_id([run_id])
    if not found:
        raise TrackingError(
            f"{verb} {run_id}: no such run in {reader.uri}; quantlab compare sweep=latest --json lists runs with "
            "their ids, and tracking.uri=... names another store"
        )
    run = found[0]
    if run.tags.get(KIND) == "sweep":
        raise TrackingError(f"{verb} {run_id}: is the whole sweep {run.name!r}; {_children(reader, run)}")
    if run.tags.get(KIND) != "job":
        raise TrackingError(f"{verb} {run_id}: was not made by quantlab; give the id of one of quantlab's jobs")
    if run.status == "RUNNING":
        raise TrackingError(f"{verb} {run_id}: {run.name!r} has not ended; try again when it has")
    if run.status != "FINISHED":
        error = run.tags.get(FAILURE, "").splitlines()
        raise TrackingError(
            f"{verb} {run_id}: {run.name!r} is {run.status} at {run.tags.get(STAGE) or 'the start'} "
            f"({error[0][:200] if error else 'no reason was noted'}), so it has no numbers; run it "
            "again with the recipe.yaml among its artifacts: quantlab recipe=FILE"
        )
    return run


def _latest(reader: Reader, verb: str, experiment: str) -> StoredRun:
    found = reader.of_experiment(experiment_id(reader, experiment, f"tracking.experiment={experiment}"), {KIND: "job"})
    for run in found:
        if run.status == "FINISHED" and is_quantized(run) and REPRODUCES not in run.tags:
            tell_of_newer(reader, experiment, run, f"{verb} {LATEST}")
            return run
    raise TrackingError(
        f"{verb} {LATEST}: no finished job of experiment {experiment} in {reader.uri} is quantized; run one, or give "
        "the id of a run"
    )


def _children(reader: Reader, parent: StoredRun) -> str:
    """The jobs of a sweep, one a line, those of an earlier sweep that it took over included."""
    jobs = [r for r in sorted(children(reader, parent), key=lambda r: r.start_ms) if r.status == "FINISHED"]
    if not jobs:
        return "none of its jobs has finished; run it again"
    return "\n".join(["give one of its jobs:", *(f"  {r.run_id}  {r.name}" for r in jobs)])


def rebuilt(
    typed: Mapping[str, str], reader: Reader, run: StoredRun, environment: Json, scratch: Path, verb: str = "reproduce"
) -> Job:
    """The job as it was: its recipe with the same device and as many threads, and what was ``typed`` anew."""
    recipe = reader.read_artifact(run, "recipe.yaml")
    if recipe is None:
        raise TrackingError(
            f"{verb} {run.run_id}: its recipe.yaml is not among the store's artifacts any more, and without it the "
            "run cannot be rebuilt; bring the artifacts back, or choose another run"
        )
    file = scratch / "recipe.yaml"
    file.write_bytes(recipe)
    threads = (environment.get("hardware") or {}).get("torch_threads")
    experiments = {number: name for name, number in reader.experiments().items()}
    names = {key.split(".")[1] for key in run.params if key.startswith("components.")}
    own = {
        key: run.params.get(key, "null") for key in own_paths(sorted(names))
    }  # what a recipe leaves open; read, never written to
    words: dict[str, Any] = {
        **{key: value for key, value in own.items() if value != "null"},
        "device": run.tags.get(DEVICE, "auto"),
        "output_dir": ExperimentConfig().output_dir,  # where this goes is for whoever reproduces it to say
        "tracking.uri": NO_STORE if isinstance(reader, FolderReader) else TrackingConfig().uri,
        "tracking.experiment": experiments[run.experiment_id],
        **({"num_threads": threads} if threads else {}),
        **{k: int(v) if v.isdigit() else v for k, v in typed.items()},
    }
    (job,) = plan([f"recipe={file}", *(override_text(k, v) for k, v in words.items())]).jobs
    name = read_json(reader, run, "report.json").get("name") or run.name
    floors = run.params.get("sweep.floors", "true") == "true"
    config = replace(
        job.config,
        recipe=run.tags.get(RECIPE) or None,
        sweep=replace(job.config.sweep, floors=floors),
        export=ExportConfig(),  # no run says that; who made the store would write wherever it says
    )
    batch_size = config.evaluation.floor_batch_size if name == FLOOR_BATCH else job.batch_size
    return replace(job, name=name, config=config, batch_size=batch_size, plain_attention=name == FLOOR_ATTENTION)


# -- weights that quantlab trained


def with_weights(
    config: ExperimentConfig, session: Session, run: StoredRun, scratch: Path, verb: str = "reproduce"
) -> ExperimentConfig:
    """The config, with ``model.path`` where the run's weights had to be fetched from the store.

    The weights in the cache count if they, and the judge beside them, have the digests of the run's (of the store's,
    where the run does not name its judge).
    """
    wanted = (run.tags.get(WEIGHTS_SHA256, ""), run.tags.get(JUDGE_SHA256, ""))
    trained = family_of(config.model).trained
    if trained is None or not wanted[0]:
        return config
    models = Path(config.output_dir) / "cache" / "models"
    path: Any = config.model.path
    here = Path(path).expanduser() if path else models / trained.cache_key(config.model)
    stored = _fetched(config, trained, session, wanted, scratch / "weights")
    digests = _digests(config, trained, here)
    if _are(digests, wanted) and stored in (None, digests):
        return config
    if stored is None:
        judge = f" (judge {wanted[1]})" if wanted[1] else ""
        raise ModelError(
            f"{verb} {run.run_id}: the weights {wanted[0]}{judge} that it was made with are neither in {here} nor "
            f"in the store; pass model.path=FOLDER with their {' and '.join(trained.files)}"
        )
    target = models / f"{wanted[0].removeprefix('sha256:')[:16]}-{stored[1].removeprefix('sha256:')[:8]}"
    if _digests(config, trained, target) != stored:
        models.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(scratch / "weights", target)
    return replace(config, model=replace(config.model, path=str(target)))


def _are(digests: Digests | None, wanted: Digests) -> bool:
    """Are these the weights and the judge that are wanted? An empty digest of the judge wants any."""
    return digests is not None and digests[0] == wanted[0] and wanted[1] in ("", digests[1])


def _fetched(
    config: ExperimentConfig, trained: Trained, session: Session, wanted: Digests, folder: Path
) -> Digests | None:
    """Fetch the wanted weights into ``folder``; their digests, or None where the store has them not intact."""
    name = f"model/{wanted[0].removeprefix('sha256:')[:16]}"
    for holder in tracking.find_runs(session.store, status=None, tags={MODEL_ARTIFACT: wanted[0]}):
        shutil.rmtree(folder, ignore_errors=True)
        try:
            got = tracking.get_artifact(session.store, holder["run_id"], name, folder.with_name("download"))
        except TrackingError:
            continue
        shutil.copytree(got, folder)
        digests = _digests(config, trained, folder)
        if _are(digests, wanted):
            return digests
    return None


def _digests(config: ExperimentConfig, trained: Trained, folder: Path) -> Digests | None:
    """Digests of a folder's weights (in the model's dtype) and judge, computed from the tensors; None: unusable."""
    dtype = "float32" if config.model.dtype == "auto" else config.model.dtype
    try:
        model = trained.load(folder, dtype=dtype)
    except ModelError:
        return None
    return model.weights_sha256, state_digest(model.parts["judge"].state_dict())
