"""What of a workbench its jobs are known by, and how that is known again from files, with no weights in memory.

The reference's key follows from the request, the files that are read, this code, the libraries, and what computes: a
request that meets the same of each as an earlier one would load and digest its way to the same key. It is noted under
a digest of these when a workbench was made, and found again by whoever asks next, without torch.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quantlab.datasets.table import DATASETS, files_read
from quantlab.errors import QuantlabError
from quantlab.models.checkpoint import file_stamp
from quantlab.models.table import family_of
from quantlab.modules.kept import Damaged, read_json, write_json
from quantlab.planning.components import DEFAULT, names_of
from quantlab.planning.job import Job, floor_jobs
from quantlab.running.engines.table import is_far
from quantlab.tracking.provenance import code_digest, versions
from quantlab.vocabulary.files import files_below
from quantlab.vocabulary.native import canonical_json
from quantlab.vocabulary.schema import APART, ExperimentConfig

_OF_ARITHMETIC = (
    *("OMP_", "MKL_", "OPENBLAS_", "ATEN_", "ONEDNN_", "DNNL_", "TORCH_", "PYTORCH_"),
    *("CUDA_", "CUBLAS_", "NVIDIA_TF32_"),
)
"""How the variables begin that choose kernels, threads and devices."""
_SET_BY_IMPORTS = ("TORCHINDUCTOR_CACHE_DIR", "TORCHAO_FORCE_SKIP_LOADING_SO_FILES")
"""Those of them that are set when libraries are imported; no number depends on them."""
_OF_A_PROCESSOR = ("model name", "flags", "Features", "CPU part")
_COMMIT = 40
"""Letters of a revision that can only be one state of a repository."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """Of a workbench, all that says by which keys its jobs and its floors are known."""

    protocol: str
    dtype: str
    reference_key: str
    judge_sha256: str
    default: tuple[str, ...]
    """Components that are quantized where nobody names any."""
    classes: Mapping[str, str]
    """Component -> name of its class."""
    made: Mapping[str, Any]
    """What computed it (:func:`quantlab.stages.observe.made_on`)."""
    left_out: tuple[str, ...]
    """Floors for which there was no room."""
    is_brought: bool
    """Was the reference made elsewhere?"""
    tags: Mapping[str, str]
    """Of a run whose jobs share it."""
    widths: Mapping[str, Mapping[str, Sequence[int]]] = field(default_factory=dict)
    """Component -> kind of its holders of weights -> the lengths of their rows, each once."""

    def floor_jobs(self, config: ExperimentConfig) -> list[Job]:
        """The reference's row and its floors, if they are wanted, without those that memory would not hold."""
        if not config.sweep.floors:
            return []
        jobs = floor_jobs(config, self.dtype, names_of(config, self.default))
        return [job for job in jobs if job.name not in self.left_out]

    def widths_of(self, job: Job) -> dict[str, set[int]]:
        """Of each scheme of a job, the lengths of the rows that it may take."""
        found: dict[str, set[int]] = {name: set() for name in job.schemes}
        for component in names_of(job.config, self.default):
            name = component if component in job.config.components else DEFAULT
            if name in found:
                kinds = self.widths.get(component, {})
                found[name].update(*(kinds.get(kind, ()) for kind in job.schemes[name].axes.layer_kinds))
        return found


def bench_key(config: ExperimentConfig) -> str:
    """The words of a request that its workbench depends on."""
    said = (config.model, config.dataset, config.evaluation, config.reference)
    memory = config.memory
    place = [memory.placement if memory.placement in APART else "", memory.device_gib, memory.devices]
    return canonical_json([*(asdict(node) for node in said), place])


def known_of(data: Mapping[str, Any]) -> Known:
    """What was written as plain data; TypeError or KeyError for data that are none."""
    return Known(**{**data, "default": tuple(data["default"]), "left_out": tuple(data["left_out"])})


def recall(config: ExperimentConfig, cache_dir: Path) -> Known | None:
    """What an earlier process found of this request's workbench; None where its files, this code, the libraries or
    what computes are not known to be the same. No weights are read.

    In a process that has imported torch, and computes itself, a number of threads that was set by hand is seen too.
    """
    digest = request_digest(config, cache_dir)
    file = _file(cache_dir, digest or "")
    if digest is None or not file.is_file():
        return None
    try:
        found = known_of(read_json(file))
    except (Damaged, TypeError, KeyError):
        return None
    return None if _has_other_threads(config, found) else found


def reference_of(job: Job) -> str:
    """What a job's reference is known by within a request: jobs that say the same are compared with one reference."""
    return canonical_json([bench_key(job.config), sorted(job.config.components)])


def recall_each(jobs: Iterable[Job], cache_dir: Path) -> dict[str, Known | None]:
    """:func:`reference_of` each job -> what is known of it, each looked for once."""
    found: dict[str, Known | None] = {}
    for job in jobs:
        key = reference_of(job)
        if key not in found:
            found[key] = recall(job.config, cache_dir)
    return found


def remember(
    config: ExperimentConfig, cache_dir: Path, known: Known, where: Mapping[str, object] | None = None
) -> None:
    """Note what a workbench of this request turned out to be; ``where`` is :func:`where_of` as its sweep asked for it.

    Not where torch's threads are a number that somebody set by hand: another process would not see that it differs.
    """
    digest = request_digest(config, cache_dir, where)
    if digest is not None and (where or is_far(config.launcher) or _has_usual_threads(config, known)):
        file = _file(cache_dir, digest)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(asdict(known), file)


def request_digest(config: ExperimentConfig, cache_dir: Path, where: Mapping[str, object] | None = None) -> str | None:
    """Digest of all that decides what a request's workbench is; None where that is not on this disk, or not yet."""
    files = _files(config, cache_dir)
    if files is None:
        return None
    parts = {
        "bench": bench_key(config),
        "own": sorted(config.components),
        "files": [file_stamp(file) for file in sorted(set(files))],
        "code": code_digest(),
        "libraries": versions(),
        "where": dict(where or where_of(config)),
    }
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:32]


def _has_other_threads(config: ExperimentConfig, known: Known) -> bool:
    torch, threads = sys.modules.get("torch"), known.made["arithmetic"].get("threads")
    if torch is None or threads is None or config.num_threads or is_far(config.launcher):
        return False
    return bool(torch.get_num_threads() != threads)


def _has_usual_threads(config: ExperimentConfig, known: Known) -> bool:
    threads = known.made["arithmetic"].get("threads")
    if threads is None:  # a GPU's numbers do not depend on them
        return True
    said = str(config.num_threads or os.environ.get("OMP_NUM_THREADS", ""))
    if said.isdigit():
        return int(said) == int(threads)
    import psutil

    return threads in (len(_cpus()), psutil.cpu_count(logical=False))


def _cpus() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [*range(os.cpu_count() or 1)]


def _file(cache_dir: Path, digest: str) -> Path:
    return cache_dir / "known" / f"{digest}.json"


def _files(config: ExperimentConfig, cache_dir: Path) -> list[Path] | None:
    """The files that model, data set and reference are read from; None where they cannot be told from here."""
    try:
        model, reference = _model_files(config, cache_dir), config.reference.path
        brought = [] if reference is None else files_below(reference)
        return None if model is None else [*model, *_data_files(config), *brought]
    except (OSError, QuantlabError):  # whoever loads it says what is wrong
        return None


def _model_files(config: ExperimentConfig, cache_dir: Path) -> list[Path] | None:
    path, own = config.model.path, family_of(config.model).own_files
    if path is None:
        return (own(config.model, cache_dir) or None) if own else None
    folder = Path(path).expanduser()
    if not folder.exists():
        from huggingface_hub import constants, snapshot_download

        revision = config.model.revision or ""
        if not constants.HF_HUB_OFFLINE and len(revision) != _COMMIT:
            return None  # the repository may have moved on
        try:
            folder = Path(snapshot_download(path, revision=config.model.revision, local_files_only=True))
        except Exception:  # noqa: BLE001  it is not here, in the library's many ways of saying so
            return None
    return files_below(folder)


def _data_files(config: ExperimentConfig) -> Iterator[Path]:
    row, path = DATASETS[config.dataset.name], config.dataset.path
    if path is None:
        yield from row.own_files() if row.own_files else ()
        return
    yield from files_read(config.dataset.name, path)


def where_of(config: ExperimentConfig) -> dict[str, object]:
    """What computes, as plain data: this machine, or whatever node an engine gives for these settings."""
    asked: dict[str, object] = {"device": config.device, "num_threads": config.num_threads}
    if is_far(config.launcher):
        settings = config.launcher.settings
        return {**asked, "engine": config.launcher.engine, "settings": asdict(settings) if settings else None}
    set_by_user = {k: v for k, v in os.environ.items() if k not in _SET_BY_IMPORTS}
    chosen = {k: v for k, v in set_by_user.items() if k.startswith(_OF_ARITHMETIC)}
    return {
        **asked,
        "processor": _processor(),
        "cpus": len(_cpus()),
        "environment": chosen,
        "gpus": _gpus(config.device),
    }


@functools.cache
def _processor() -> list[str]:
    import platform

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    except OSError:
        lines = []
    said = [line for line in lines if line.startswith(_OF_A_PROCESSOR)]
    return [platform.machine(), platform.processor(), *said]


@functools.cache
def _gpus(device: str) -> list[str]:
    """Those of this machine with their driver; NVML is asked, not torch, which would be a long import."""
    import pynvml

    if device == "cpu":
        return []
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return [str(pynvml.nvmlSystemGetDriverVersion()), *(str(pynvml.nvmlDeviceGetUUID(h)) for h in handles)]
    except pynvml.NVMLError:
        return []
