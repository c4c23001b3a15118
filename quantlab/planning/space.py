"""What a search may visit and what it looks for, checked before anything runs."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence

from quantlab.errors import ConfigError, nearest, require_package
from quantlab.metrics import METRICS
from quantlab.planning.job import Job, Merged
from quantlab.protocols.table import PROTOCOLS
from quantlab.vocabulary.native import canonical_json
from quantlab.vocabulary.schema import SearchConfig, SweepConfig

MINIMIZE, MAXIMIZE = "minimize", "maximize"
OTHERS = {
    "memory/weights_bytes": MINIMIZE,
    "memory/disk_bytes_model": MINIMIZE,
    "memory/bits_per_weight_quantized": MINIMIZE,
    "memory/bits_per_weight_model": MINIMIZE,
    "memory/compression": MAXIMIZE,
    "quantization/coverage": MAXIMIZE,
    "quantization/weight_rel_error_mean": MINIMIZE,
    "quantization/weight_rel_error_max": MINIMIZE,
    "quantization/product_rel_error_max": MINIMIZE,
    "quantization/worst_row_rel_error_max": MINIMIZE,
    "perf/evaluate_s": MINIMIZE,
    "perf/quantize_s": MINIMIZE,
}
"""Objectives that are no quality metric -> the direction that is better."""
OF_THE_SWEEP = (
    *("device", "num_threads", "output_dir", "tracking", "launcher", "sweep", "memory"),
    "evaluation.deterministic",
)
"""What the process that runs a sweep has, and not each job; and where parts lie, by which no job is known."""


def check_search(sweep: SweepConfig, is_sweep: bool) -> None:
    """ConfigError for a search that cannot be carried out, MissingPackage without Optuna (which is not imported)."""
    search = sweep.search
    key = f"sweep.search.num_trials={search.num_trials}"
    for name, direction in search.objectives.items():
        _check_objective(name, direction)
    if not search.num_trials:
        return
    if sweep.candidates:
        raise ConfigError(
            f"{key}: a search is over axes and not over a list; write sweep.grid in place of sweep.candidates"
        )
    if not is_sweep:
        raise ConfigError(
            f"{key}: a search needs a grid; give keys several values (quantlab -m dtype=int8,int4 ...), or a recipe "
            "with sweep.grid"
        )
    require_package("optuna", key, "quantlab-recipes[search]")


def check_shared(jobs: Sequence[Job]) -> None:
    """ConfigError where jobs differ in what a sweep has once: the first job's would count, whatever the others say."""
    for node in OF_THE_SWEEP:
        said = [functools.reduce(getattr, node.split("."), job.config) for job in jobs]
        if any(one != said[0] for one in said):
            keys = [k for k in jobs[0].point if k == node or k.startswith(f"{node}.")]
            typed = next((k for k in keys if any(j.point.get(k) != jobs[0].point[k] for j in jobs)), node)
            raise ConfigError(
                f"{typed}: all jobs of a sweep share it; give it one value, and each other value a command of its own, "
                "with sweep.force=true if what is there is to be measured again"
            )


def check_space(jobs: Sequence[Job]) -> None:
    """ConfigError where the points have unlike references, or an engine needs to know how many to run at once."""
    for name in ("model", "dataset", "evaluation"):
        nodes = [vars(getattr(job.config, name)) for job in jobs]
        for key, value in nodes[0].items():
            if key not in ("components", "default_exclusions") and any(n.get(key) != value for n in nodes):
                raise ConfigError(
                    f"{name}.{key}: is an axis of the search, and its values have unlike references, which cannot be "
                    f"ranked; give it one value and search over the scheme, or run the grid (sweep.search.num_trials=0)"
                )
    launcher = jobs[0].config.launcher
    if launcher.engine != "serial" and launcher.num_workers < 1:
        raise ConfigError(
            f"launcher.num_workers={launcher.num_workers}: a search on {launcher.engine} asks for so many jobs at "
            "once; set launcher.num_workers=4, or launcher=serial for one after the other"
        )


def distinct(jobs: Sequence[Job]) -> tuple[list[Job], list[Merged]]:
    """The jobs, each scheme once whatever words it was asked for by; and which words were one."""
    found: dict[str, list[Job]] = {}
    for job in jobs:
        found.setdefault(identity_of(job), []).append(job)
    kept, merged = [], []
    for same in found.values():
        best = max(same, key=lambda job: sum(scheme.num_forgiven for scheme in job.schemes.values()))
        kept.append(best)
        if spellings := _spellings(best, same):
            merged.append(Merged(name=best.name, spellings=spellings))
    return kept, merged


def identity_of(job: Job, widths: Mapping[str, Collection[int]] | None = None) -> str:
    """What a job measures, whatever its name, as text: its schemes in one spelling, and what of its config bears on it.

    ``widths``: of each scheme, the lengths of the rows that it may take, where the model is known.
    """
    config = job.config
    unread = {"quantization", "components", "name", *(() if job.needs_data else ("calibration",))}
    others = {k: v for k, v in job.resolved.items() if k not in unread}
    device = config.device if config.device == "cpu" else "auto"
    rows = widths or {}
    own = {
        name: scheme.spelled_out(device, config.model.dtype, rows.get(name, ())) for name, scheme in job.schemes.items()
    }
    return canonical_json([others, own, sorted(config.components), "" if own else config.quantization.dtype])


def _spellings(best: Job, same: Sequence[Job]) -> tuple[str, ...]:
    """The places in the grid of jobs that are one, as typed and without what they share; the one that is run first."""
    ordered = [best, *(job for job in same if job is not best)]
    keys = dict.fromkeys(key for job in ordered for key in job.point)
    varied = [key for key in keys if len({job.point.get(key) for job in ordered}) > 1]
    texts = (" ".join(f"{k.removeprefix('quantization.')}={job.point.get(k, '')}" for k in varied) for job in ordered)
    return tuple(dict.fromkeys(text for text in texts if text))


def _check_objective(name: str, direction: str) -> None:
    key = f"sweep.search.objectives: {name}"
    known = [*OTHERS, *(f"quality/{metric}" for metric in METRICS)]
    if name not in known:
        raise ConfigError(
            f"{key}: no such metric{nearest(name, known)}; quantlab list metrics shows those of quality, "
            f"and there are {', '.join(OTHERS)}"
        )
    if direction not in (MINIMIZE, MAXIMIZE):
        raise ConfigError(f"{key}: {direction}: there are {MINIMIZE}, {MAXIMIZE}")
    better = _better(name)
    if better not in (None, direction):
        raise ConfigError(f"{key}: {direction} looks for the worst; write {better}")


def _better(name: str) -> str | None:
    if name in OTHERS:
        return OTHERS[name]
    higher = METRICS[name.removeprefix("quality/")].higher_is_better
    return None if higher is None else MAXIMIZE if higher else MINIMIZE


def objectives_of(search: SearchConfig, protocol: str) -> dict[str, str]:
    """The objectives with their directions; ConfigError for a metric that the protocol does not measure."""
    if not search.objectives:
        headline = f"quality/{PROTOCOLS[protocol].HEADLINE[0]}"
        return {"memory/weights_bytes": MINIMIZE, headline: _better(headline) or MINIMIZE}
    for name in search.objectives:
        metric = METRICS.get(name.removeprefix("quality/"))
        if name.startswith("quality/") and metric is not None and protocol not in metric.protocols:
            have = ", ".join(f"quality/{m.name}" for m in METRICS.values() if protocol in m.protocols)
            raise ConfigError(
                f"sweep.search.objectives: {name}: is not measured on a {protocol} model; there are {have}"
            )
    return dict(search.objectives)
