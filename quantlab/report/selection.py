"""Which tracked runs are compared: what was typed, the runs it names, and which of them may stand in one column.

Runs are comparable if they carry the same ``quantlab.reference_key``: the digest of the reference's weights, the
evaluation's inputs and settings, the metrics' versions, the libraries and the kind of machine; and the same
``quantlab.judge_sha256``, where a classifier judged the outputs.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from quantlab.errors import ConfigError, TrackingError, nearest
from quantlab.metrics import METRICS, metric_called
from quantlab.progress import say
from quantlab.report.reading import Reader, StoredRun, experiment_id, json_object, read_json, tell_of_newer
from quantlab.tracking.results import Skipped
from quantlab.tracking.tags import (
    DEVICE,
    FORMER_PARENTS,
    INPUTS_SHA256,
    JUDGE_SHA256,
    KIND,
    MODEL_PARTS,
    PARENT_RUN_ID,
    REFERENCE_KEY,
    REPRODUCES,
    VERSIONS,
    WEIGHTS_SHA256,
)
from quantlab.tracking.used import used_params
from quantlab.vocabulary.numbers import CHECKPOINT_METHOD, FLOORS, is_scheme
from quantlab.vocabulary.schema import TrackingConfig

KEYS = ("sweep", "experiment", "metric", "margin", "tracking.uri", "tracking.experiment", "output_dir")
FLAGS = ("--json", "--markdown", "--plain", "--wide", "--quiet", "-q")
_COLUMNS = "perf/evaluate_s,quality/kld_p99"
USAGE = "quantlab compare sweep=latest, sweep=RUN_ID, experiment=NAME, or RUN_ID RUN_ID ..."
_IRRELEVANT = (
    "evaluation.num_bootstrap",
    "evaluation.bootstrap_seed",
    "evaluation.floor_batch_size",
    "evaluation.attribute",
)
_FLOORS = tuple(f"quality/{name}/" for name in FLOORS)
_NAMES = tuple(f"{name}/" for name in FLOORS)
_IS_BACKEND = re.compile(r"components\.\w+\.backend")
_SHARED = ("model.", "dataset.", "evaluation.", "device", "num_threads")


@dataclass(frozen=True, kw_only=True)
class ComparisonRequest:
    """What was typed behind ``quantlab compare``."""

    sweep: str = ""
    experiment: str = ""
    run_ids: tuple[str, ...] = ()
    metric: str = ""
    """Metric of the verdicts and the front; empty: the protocol's first headline metric."""
    margin: float = 0.0
    """The smallest difference that matters, in the metric's unit."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    output_dir: str = "outputs"
    """Where runs without a store left their folders."""
    as_json: bool = False
    as_markdown: bool = False
    is_plain: bool = False
    is_wide: bool = False
    columns: tuple[str, ...] = ()
    """Metrics that have columns of their own in the tables."""
    is_quiet: bool = False
    """Nothing is said of the page."""
    csv: Path | None = None
    html: Path | None = None

    @property
    def typed(self) -> str:
        """The words that choose the runs; every message about them begins so."""
        if self.sweep:
            return f"sweep={self.sweep}"
        return f"experiment={self.experiment}" if self.experiment else " ".join(self.run_ids)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The runs of one request, sorted."""

    title: str
    groups: tuple[tuple[StoredRun, ...], ...]
    """Runs that may stand in one column; the group with the most runs first."""
    failed: tuple[StoredRun, ...] = ()
    """Jobs without a result: failed, killed, or not ended."""
    parents: tuple[StoredRun, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    """What the sweeps did not run."""


def parse_request(words: Sequence[str]) -> ComparisonRequest:
    """The words behind ``quantlab compare`` as a request; ConfigError for what is none."""
    values: dict[str, str] = {}
    run_ids: list[str] = []
    files: dict[str, Path] = {}
    flags: set[str] = set()
    columns: list[str] = []
    rest = iter(words)
    for word in rest:
        key, has_value, value = word.partition("=")
        if word in FLAGS:
            flags.add(word)
        elif key == "--columns":
            names = value if has_value else next(rest, "")
            columns += [name.strip() for name in names.split(",") if name.strip()]
            if not columns or names.startswith("-") or "=" in names:
                raise ConfigError(f"--columns: it needs a value, such as --columns {_COLUMNS}")
        elif key in ("--csv", "--html"):
            files[key] = _file(key, value if has_value else next(rest, ""))
        elif word.startswith("-"):
            options = (*FLAGS, "--columns", "--csv", "--html")
            listed = ", ".join(options)
            raise ConfigError(f"{word}: no such option of compare{nearest(word, options)}; there are {listed}")
        elif not has_value:
            run_ids.append(word)
        elif key in KEYS and value:
            values[key] = value
        else:
            raise ConfigError(f"{word}: not a key of compare{nearest(key, KEYS)}; write {', '.join(KEYS)} with a value")
    if run_ids == ["latest"] and "sweep" not in values:  # as export and load take it
        run_ids, values["sweep"] = [], "latest"
    chosen = [k for k in ("sweep", "experiment") if k in values] + (["run ids"] if run_ids else [])
    if len(chosen) != 1:
        raise ConfigError(f"compare: {' and '.join(chosen) or 'nothing'} given; write {USAGE}")
    tracking = TrackingConfig()
    return ComparisonRequest(
        sweep=values.get("sweep", ""),
        experiment=values.get("experiment", ""),
        run_ids=tuple(dict.fromkeys(run_ids)),
        metric=metric_called(values.get("metric", "")),
        margin=checked_margin(values.get("margin", "0")),
        as_json="--json" in flags,
        as_markdown="--markdown" in flags,
        is_plain="--plain" in flags,
        is_wide="--wide" in flags,
        columns=tuple(columns),
        is_quiet=bool(flags & {"-q", "--quiet"}),
        csv=files.get("--csv"),
        html=files.get("--html"),
        output_dir=values.get("output_dir", "outputs"),
        tracking=replace(
            tracking,
            uri=values.get("tracking.uri", tracking.uri),
            required=True,
            experiment=values.get("tracking.experiment", values.get("experiment", tracking.experiment)),
        ),
    )


def _file(option: str, value: str) -> Path:
    if not value or value.startswith("-"):
        raise ConfigError(f"{option}: a file is missing; write {option} FILE")
    return Path(value).expanduser()


def checked_margin(text: str | float) -> float:
    """A margin as it is typed; ConfigError for what is none."""
    try:
        margin = float(text)
    except (TypeError, ValueError):
        margin = -1.0
    if not 0 <= margin < float("inf"):
        raise ConfigError(f"margin={text}: give a number that is 0 or more, in the metric's unit")
    return margin


def select(request: ComparisonRequest, reader: Reader) -> Selection:
    """The runs that a request names.

    Raises TrackingError for a run, sweep or experiment that does not exist, for none that could be compared, and, for
    run ids, where they are not comparable, with what differs.
    """
    if request.sweep:
        parents = [_sweep(request, reader)]
        runs = children(reader, parents[0])
    elif request.experiment:
        found = reader.of_experiment(experiment_id(reader, request.experiment, request.typed), {})
        parents = [r for r in found if r.tags.get(KIND) == "sweep"]
        runs = [r for r in found if r.tags.get(KIND) != "sweep" and REPRODUCES not in r.tags]
    else:
        parents, runs = _named(request, reader)
    jobs = [r for r in runs if r.tags.get(KIND) == "job" or REFERENCE_KEY in r.tags]
    if not jobs:
        raise TrackingError(f"{request.typed}: holds no job of quantlab's to compare; {_sweeps(request, reader)}")
    finished = [r for r in jobs if r.status == "FINISHED" and REFERENCE_KEY in r.tags]
    done = {_asked(r) for r in finished}
    failed = tuple(_newest_each([r for r in jobs if r.status != "FINISHED" and _asked(r) not in done]))
    each = list if request.run_ids else _newest_each  # whoever names runs wants those
    groups = tuple(with_floors(group, reader) for group in _groups(finished, each))
    if request.run_ids and len(groups) > 1:
        raise TrackingError(_not_comparable(request, groups))
    return Selection(
        title=_title(request, parents),
        groups=groups,
        failed=failed,
        parents=tuple(parents),
        skipped=tuple(s for p in parents for s in read_json(reader, p, "rows.json").get("skipped", [])),
    )


def is_candidate(run: StoredRun) -> bool:
    """Was it asked for: a scheme, or a cast (``backend=none dtype=float16``)? The reference and the floors are not."""
    return is_scheme(run.name, run.metrics)


def is_quantized(run: StoredRun) -> bool:
    """Was a quantized model measured?"""
    return "quantization/coverage" in run.metrics


def scheme_nodes(params: Mapping[str, str]) -> dict[str, str]:
    """Node of a scheme among a run's parameters (``quantization``, ``components.NAME``) -> its backend; without any
    scheme ``quantization`` alone."""
    whole = params.get("quantization.backend", "")
    own = {key.removesuffix(".backend"): v for key, v in sorted(params.items()) if _IS_BACKEND.fullmatch(key)}
    found = {node: backend for node, backend in {"quantization": whole, **own}.items() if backend != "none"}
    return found or {"quantization": whole}


def backends_of(params: Mapping[str, str]) -> list[str]:
    """The backends of a run by its parameters: those of its schemes, or that of a checkpoint that others quantized."""
    methods = params.get(f"resolved.{CHECKPOINT_METHOD}", "").split(", ")
    return [*scheme_nodes(params).values(), *filter(None, methods)]


def differences(a: StoredRun, b: StoredRun) -> list[str]:
    """What makes two runs incomparable, as ``key: value / value``; by the digests where no setting differs."""
    was, now = used_params(a.params), used_params(b.params)
    keys = sorted(k for k in {**was, **now} if k.startswith(_SHARED) and k not in _IRRELEVANT)
    found = [f"{k}: {was.get(k)} / {now.get(k)}" for k in keys if was.get(k) != now.get(k)]
    if found:
        return found
    found = [
        f"{k}: {a.tags.get(k, '-')[:16]} / {b.tags.get(k, '-')[:16]}"
        for k in (DEVICE, WEIGHTS_SHA256, INPUTS_SHA256, JUDGE_SHA256)
        if a.tags.get(k) != b.tags.get(k)
    ]
    for tag, what in ((MODEL_PARTS, "the model's "), (VERSIONS, "")):
        ours, theirs = (json_object(r.tags.get(tag, "")) for r in (a, b))
        keys = [k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k)]
        found += [f"{what}{k}: {ours.get(k)} / {theirs.get(k)}" for k in keys]
    both = " / ".join(r.tags[REFERENCE_KEY][:8] for r in (a, b))
    return found or [f"{REFERENCE_KEY}: {both} (metric versions, or kind of machine)"]


def shared_settings(params: Mapping[str, str]) -> dict[str, str]:
    """Of flat parameters, those that all runs on one reference have in common: model, data and evaluation."""
    return {k: v for k, v in used_params(params).items() if k.startswith(_SHARED) and k not in _IRRELEVANT}


def group_labels(groups: Sequence[Sequence[StoredRun]]) -> list[str]:
    """What sets each group apart from the others, as ``key=value``; nothing for a single group."""
    first = [g[0] for g in groups]
    used = [shared_settings(run.params) for run in first]
    keys = sorted({k for params in used for k in params})
    varied = [k for k in keys if len({params.get(k) for params in used}) > 1]
    labels = [", ".join(f"{k}={params.get(k, 'null')}" for k in varied) for params in used]
    if len(groups) > 1 and len(set(labels)) < len(groups):  # the settings are the same: versions or machines are not
        own = [first[0] if i else first[1] for i in range(len(first))]
        labels = ["; ".join(differences(run, other)[:3]) for run, other in zip(first, own, strict=True)]
    return labels


# -- the three ways to choose


def _sweep(request: ComparisonRequest, reader: Reader) -> StoredRun:
    if request.sweep == "latest":
        name = request.tracking.experiment
        number = experiment_id(reader, name, f"tracking.experiment={name}")
        found = reader.of_experiment(number, {KIND: "sweep"})
        if not found:
            single = next(
                (r for r in reader.of_experiment(number, {}) if r.status == "FINISHED" and is_candidate(r)), None
            )
            alone = f" (a single run is compared by its id: quantlab compare {single.run_id})" if single else ""
            raise TrackingError(
                f"sweep=latest: no sweep in experiment {request.tracking.experiment} of {reader.uri}{alone}; run one "
                "with quantlab recipe=NAME, or name another tracking.experiment or tracking.uri"
            )
        for sweep in found:
            if any(r.status == "FINISHED" and r.tags.get(KIND) == "job" for r in children(reader, sweep)):
                if sweep is not found[0]:
                    newest = f"{found[0].name} ({_short(found[0].run_id)})"
                    say(f"sweep=latest: {newest} is newer, and none of its jobs has finished", "warning")
                tell_of_newer(reader, name, sweep, "sweep=latest")
                return sweep
        raise TrackingError(
            f"sweep=latest: none of the {len(found)} sweeps in experiment {name} of {reader.uri} has a finished job; "
            "wait for one, or run one with quantlab recipe=NAME"
        )
    found = reader.by_id([request.sweep])
    if not found:
        raise TrackingError(f"{request.typed}: no such run in {reader.uri}; {_sweeps(request, reader)}")
    if found[0].tags.get(KIND) != "sweep":
        raise TrackingError(
            f"{request.typed}: is the job {found[0].name!r} and not a sweep; give its id without sweep=, or "
            f"sweep={found[0].tags.get(PARENT_RUN_ID, 'latest')}"
        )
    return found[0]


def children(reader: Reader, parent: StoredRun) -> list[StoredRun]:
    """The sweep's own runs, those of earlier sweeps that it took over, and those that a later sweep took over; by the
    names of its own table."""
    tags = ({PARENT_RUN_ID: parent.run_id}, {FORMER_PARENTS: f"%{parent.run_id}%"})
    found = {r.run_id: r for some in tags for r in reader.of_experiment(parent.experiment_id, some)}
    rows = [row for row in read_json(reader, parent, "rows.json").get("rows", []) if row.get("run_id")]
    listed = {row["run_id"]: row.get("name") for row in reversed(rows)}
    runs = [*found.values(), *reader.by_id([i for i in reversed(listed) if i not in found])]
    return [replace(run, name=listed.get(run.run_id) or run.name) for run in runs]


def _named(request: ComparisonRequest, reader: Reader) -> tuple[list[StoredRun], list[StoredRun]]:
    found = reader.by_id(request.run_ids)
    missing = [i for i in request.run_ids if i not in {r.run_id for r in found}]
    if missing:
        raise TrackingError(f"{missing[0]}: no such run in {reader.uri}; {_sweeps(request, reader)}")
    sweeps = [r for r in found if r.tags.get(KIND) == "sweep"]
    if sweeps:
        raise TrackingError(f"{sweeps[0].run_id}: is a whole sweep; write quantlab compare sweep={sweeps[0].run_id}")
    return [], found


def _sweeps(request: ComparisonRequest, reader: Reader) -> str:
    """The way out of a wrong id: the newest sweeps."""
    number = reader.experiments().get(request.tracking.experiment)
    found = reader.of_experiment(number, {KIND: "sweep"})[:3] if number else []
    listed = ", ".join(f"sweep={r.run_id} ({r.name})" for r in found)
    return f"try {listed}" if listed else "there is no sweep yet: run one with quantlab recipe=NAME"


# -- what belongs together


def _groups(
    runs: Sequence[StoredRun], each: Callable[[Sequence[StoredRun]], list[StoredRun]]
) -> tuple[tuple[StoredRun, ...], ...]:
    """Comparable runs; ``each`` says which of them stay."""
    groups: dict[tuple[str, str], list[StoredRun]] = {}
    judges = {r.tags[REFERENCE_KEY]: r.tags[JUDGE_SHA256] for r in runs if JUDGE_SHA256 in r.tags}
    for run in runs:
        key = run.tags[REFERENCE_KEY]
        groups.setdefault((key, run.tags.get(JUDGE_SHA256, judges.get(key, ""))), []).append(run)
    return tuple(tuple(_own_names(each(g))) for g in sorted(groups.values(), key=len, reverse=True))


def with_floors(group: Sequence[StoredRun], reader: Reader) -> tuple[StoredRun, ...]:
    """The runs with the floors' numbers among their own, where a sweep keeps them in runs of their own.

    Where those are not among the runs, a report has them: all of a group have the same reference, and so its floors.
    """
    if all(any(k.startswith(_FLOORS) for k in run.metrics) for run in group):
        return tuple(group)
    found: dict[str, float] = {}
    for run in group:
        if (name := run.name.split(" #")[0]) in FLOORS:
            own = {k.removeprefix("quality/"): v for k, v in run.metrics.items() if k.startswith("quality/")}
            found |= {
                f"quality/{name}/{k}": v
                for k, v in own.items()
                if f"{k.partition('/')[0]}/" not in _NAMES and _costs_more(own, found, name, k.partition("/")[0])
            }
    if not found:
        reports = (read_json(reader, run, "report.json") for run in group if is_candidate(run))
        floors = ({k: v for k, v in r.get("metrics", {}).items() if k.startswith(_FLOORS)} for r in reports)
        found = next((f for f in floors if f), {})
    return tuple(replace(run, metrics={**found, **run.metrics}) for run in group)


def _costs_more(own: Mapping[str, float], found: Mapping[str, float], floor: str, metric: str) -> bool:
    """Is a run of a floor under a metric the first, or further from the reference than the one that was ``found``?"""
    known, here = found.get(f"quality/{floor}/{metric}"), own.get(metric)
    if known is None or here is None or metric not in METRICS:
        return known is None
    return here < known if METRICS[metric].higher_is_better else here > known


def _asked(run: StoredRun) -> tuple[str, str]:
    """What a run was asked for: another run of the same is a repetition of it."""
    nodes = ("quantization.", "components.", "calibration.", "checkpoint", *_SHARED)
    asked = {k: v for k, v in used_params(run.params).items() if k.startswith(nodes)}
    return run.name, json.dumps(asked, sort_keys=True)


def _newest_each(runs: Sequence[StoredRun]) -> list[StoredRun]:
    """The newest run of each request, in the order in which they were started."""
    newest = {_asked(run): run for run in sorted(runs, key=lambda r: r.start_ms)}
    return sorted(newest.values(), key=lambda r: r.start_ms)


def _own_names(runs: Sequence[StoredRun]) -> list[StoredRun]:
    """The runs, with a piece of the id on names that occur more than once."""
    times = Counter(r.name for r in runs)
    return [replace(r, name=f"{r.name} #{r.run_id[:6]}") if times[r.name] > 1 else r for r in runs]


def _not_comparable(request: ComparisonRequest, groups: Sequence[Sequence[StoredRun]]) -> str:
    a, b = groups[0][0], groups[1][0]
    what = "; ".join(differences(a, b)[:5])
    return (
        f"{request.typed}: not comparable: {a.name!r} and {b.name!r} differ in {what}; choose runs of one sweep, or "
        "run them again with the same model, evaluation and versions"
    )


def _title(request: ComparisonRequest, parents: Sequence[StoredRun]) -> str:
    if request.sweep:
        return f"{parents[0].name}-{_short(parents[0].run_id)}"
    return request.experiment or f"runs-{_short(request.run_ids[0])}"


def _short(run_id: str) -> str:
    """Enough of an id to tell runs apart; one of a folder begins with a word that all of them have."""
    return run_id.removeprefix("local-")[:8]
