"""Engines: the jobs that a sweep hands over are run one by one, or by one of Hydra's launchers.

Every engine runs the same function on the same files, so a job does not depend on who runs it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf

from quantlab.errors import ConfigError, require_package
from quantlab.planning.job import Job
from quantlab.planning.places import conf_dir
from quantlab.planning.words import override_text
from quantlab.progress import say
from quantlab.running.apart import Handed, has_ended, has_lost_device, python_path, run_apart, work
from quantlab.vocabulary.launching import COMMANDS, LauncherConfig
from quantlab.vocabulary.schema import ExperimentConfig

ENGINES = {
    "serial": ("", "", ""),
    "joblib": ("hydra_plugins.hydra_joblib_launcher", "pool", "pool"),
    "submitit_local": ("hydra_plugins.hydra_submitit_launcher", "submitit_local", "slurm"),
    "submitit_slurm": ("hydra_plugins.hydra_submitit_launcher", "slurm", "slurm"),
    "ray": ("hydra_plugins.hydra_ray_launcher", "ray", "ray"),
}
"""engine -> import name of Hydra's launcher, option of the group ``launcher``, extra of this project."""
_NODE = "quantlab_handed_over"
_POLL_S = 1.0


def check_launcher(launcher: LauncherConfig) -> None:
    """ConfigError for an unknown engine, MissingPackage where its launcher is not installed. Torch-free."""
    if launcher.engine not in ENGINES:
        raise ConfigError(f"launcher.engine={launcher.engine}: there are {', '.join(ENGINES)}")
    module, option, extra = ENGINES[launcher.engine]
    if module:
        require_package(module, f"launcher={option}", f"quantlab-recipes[{extra}]")


def runs_apart(job: Job, device: str) -> bool:
    """Does a sweep hand the job over? Else it runs in the sweep's own process and shares the loaded model."""
    config = job.config
    if config.launcher.engine != "serial" or config.sweep.isolation == "process":
        return True
    may_crash = any(device in scheme.row.may_crash_on for scheme in job.schemes.values())
    return config.sweep.isolation == "auto" and (may_crash or config.sweep.timeout_s is not None)


def run_handed(
    handed: Sequence[Handed],
    config: ExperimentConfig,
    on_end: Callable[[int, int, int], None],
    *,
    always_apart: bool = False,
) -> None:
    """Run all jobs that were handed over; how each ended is in its folder. Never raises for a job's failure.

    ``on_end(ended, failed, running)`` is called now and then. ``always_apart``: whatever ``sweep.isolation`` says, as
    this process has lost its GPU.
    """
    isolated = always_apart or config.sweep.isolation != "none"
    if config.launcher.engine == "serial":
        for job in handed:
            _report_state(handed, on_end, running=1)
            run_task(job.folder, isolated, config.sweep.timeout_s)
        return
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_POLL_S):
            _report_state(handed, on_end)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        _launch(handed, config, isolated)
    except Exception as error:  # noqa: BLE001  an engine's failure; what its jobs did is in their folders
        say(f"{config.launcher.engine}: {type(error).__name__}: {str(error)[:500]}", "launcher")
    finally:
        over.set()
        watcher.join()


def _report_state(handed: Sequence[Handed], on_end: Callable[[int, int, int], None], running: int = -1) -> None:
    ended = [has_ended(job.folder) for job in handed]
    begun = sum((job.folder / "run.json").exists() and not end for job, end in zip(handed, ended, strict=True))
    on_end(sum(map(bool, ended)), ended.count("FAILED"), begun if running < 0 else running)


def run_task(folder: Path, isolated: bool, timeout_s: float | None, slots: Mapping[str, str] | None = None) -> None:
    """What every engine runs for one job; ``slots``: lock file -> the GPU that whoever holds it may use."""
    if not isolated and not has_lost_device():
        _keep_slot(slots or {})
        work(folder)
        return
    lock, cuda_device = take_slot(slots or {})
    try:
        run_apart(folder, timeout_s, cuda_device)
    finally:
        if lock is not None:
            lock.release()


def take_slot(slots: Mapping[str, str]) -> tuple[FileLock | None, str | None]:
    """A GPU that no other running job has been given; (None, None) where there is nothing to choose.

    There are as many slots as jobs at once, so one is always free. A lock that a killed process held is free too.
    """
    for file, cuda_device in slots.items():
        lock = FileLock(file)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            continue
        return lock, cuda_device
    return None, None


_KEPT: list[FileLock] = []  # of a worker that runs several jobs: CUDA sees the device of its first one until it ends


def _keep_slot(slots: Mapping[str, str]) -> None:
    if slots and not _KEPT:
        lock, cuda_device = take_slot(slots)
        if lock is not None and cuda_device is not None:
            _KEPT.append(lock)
            os.environ["CUDA_VISIBLE_DEVICES"] = cuda_device


def hydra_task(config: DictConfig) -> None:
    """:func:`run_task` as Hydra calls it."""
    run_task(Path(config.folder), config.isolated, config.timeout_s, {str(k): str(v) for k, v in config.slots.items()})


# -- Hydra's launchers, without a Hydra application


def _launch(handed: Sequence[Handed], config: ExperimentConfig, isolated: bool) -> None:
    gpus = [] if config.device == "cpu" else _visible_gpus()
    settings = launcher_settings(config.launcher, len(gpus))
    base = handed[0].folder.parent.parent / "launcher" / handed[0].folder.name
    slots: dict[str, str] = {}
    if gpus and config.launcher.engine in ("joblib", "submitit_local"):  # the others give each job its device
        base.mkdir(parents=True, exist_ok=True)
        num_at_once = int(settings.get("n_jobs", len(handed)))
        slots = {str(base / f"slot{i}.lock"): gpus[i % len(gpus)] for i in range(num_at_once)}
    node = {"folder": "", "slots": slots, "isolated": isolated, "timeout_s": config.sweep.timeout_s}
    ConfigStore.instance().store(name=_NODE, node=node)
    words = [
        f"hydra/launcher={config.launcher.engine}",
        override_text("hydra.sweep.dir", str(base)),
        "hydra.sweep.subdir=${hydra.job.num}",
        "hydra.output_subdir=null",
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
    ]
    jobs = [[override_text("folder", str(job.folder))] for job in handed]
    current = GlobalHydra.instance()
    outer, current.hydra = current.hydra, None
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = python_path()  # an engine's processes inherit it
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            hydra: Any = GlobalHydra.instance().hydra
            whole = hydra.compose_config(_NODE, words, RunMode.MULTIRUN, with_log_configuration=False)
            for key, value in settings.items():  # values, not words: nothing in them is read again
                OmegaConf.update(whole.hydra.launcher, key, value, force_add=True)
            context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks())
            launcher = Plugins.instance().instantiate_launcher(
                hydra_context=context, task_function=hydra_task, config=whole
            )
            launcher.launch(jobs, initial_job_idx=0)
    finally:
        GlobalHydra.instance().hydra = outer
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def launcher_settings(launcher: LauncherConfig, num_gpus: int) -> dict[str, Any]:
    """What the launcher is told, by dotted key of its own schema; a machine without GPUs asks for none."""
    settings = _flat(asdict(launcher.settings))
    if launcher.engine == "joblib":
        settings["n_jobs"] = launcher.num_workers or num_gpus or max(2, (os.cpu_count() or 1) // 4)
    if not num_gpus:
        settings = {k: 0 if k == "ray.remote.num_gpus" else v for k, v in settings.items()}
    return settings


def _flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted key, without those that are left to the launcher; ``additional_parameters`` is one leaf."""
    out: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping) and key not in COMMANDS:
            out |= _flat(value, f"{prefix}{key}.")
        elif value is not None and value not in ([], {}):
            out[f"{prefix}{key}"] = value
    return out


def _visible_gpus() -> list[str]:
    """The names by which CUDA_VISIBLE_DEVICES chooses each GPU that this process sees: numbers, UUIDs, MIG slices.

    As CUDA reads the list: what follows the first name that is no device (``-1``, an empty one) counts for nothing,
    and torch counts the devices that are left.
    """
    import torch

    num, chosen = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    named = [str(i) for i in range(num)] if chosen is None else [word.strip() for word in chosen.split(",")]
    return named[:num]
