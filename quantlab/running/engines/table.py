"""The engines by name: what each needs, and how it is opened."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

from quantlab.errors import ConfigError, require_package
from quantlab.running.engines.pool import Pool, SharingPool, visible_gpus
from quantlab.running.engines.protocol import Engine
from quantlab.running.engines.ray_cluster import Ray, check_address
from quantlab.running.engines.slurm import Slurm
from quantlab.running.engines.submitted import Submitted
from quantlab.vocabulary.launching import LauncherConfig, RaySettings, SlurmSettings, SubmititSettings
from quantlab.vocabulary.schema import ExperimentConfig

ENGINES = {
    "serial": ("", ""),
    "pool": ("", "pool"),
    "submitit_local": ("submitit", "slurm"),
    "slurm": ("submitit", "slurm"),
    "ray": ("ray", "ray"),
}
"""engine, which is also the option of the group ``launcher`` -> import name of its library, extra of this project."""
_T = TypeVar("_T")
_FAR = ("slurm", "ray", "submitit_local")


def check_launcher(launcher: LauncherConfig) -> None:
    """ConfigError for an engine that cannot do what is asked, MissingPackage where its library is not installed."""
    if launcher.engine not in ENGINES:
        raise ConfigError(f"launcher.engine={launcher.engine}: there are {', '.join(ENGINES)}")
    module, extra = ENGINES[launcher.engine]
    if module:
        require_package(module, f"launcher={launcher.engine}", f"quantlab-recipes[{extra}]")
    settings = launcher.settings
    own_ray = isinstance(settings, RaySettings) and settings.ray.init.address is None
    if launcher.detach and (launcher.engine not in _FAR or own_ray):
        what = "a Ray of the sweep's own ends" if own_ray else f"jobs of launcher={launcher.engine} end"
        raise ConfigError(
            f"launcher.detach=true: {what} with the sweep's process; choose launcher=slurm, or launcher=ray with "
            "launcher.settings.ray.init.address"
        )


def check_cluster(launcher: LauncherConfig) -> None:
    """EngineError where nothing listens at the address of the engine's cluster."""
    settings = launcher.settings
    if isinstance(settings, RaySettings) and settings.ray.init.address is not None:
        check_address(settings.ray.init.address)


def is_far(launcher: LauncherConfig) -> bool:
    """Do jobs run where this process need not: on nodes of a cluster, also when it has ended?"""
    return launcher.engine in _FAR


def open_engine(config: ExperimentConfig, folder: Path, always_apart: bool = False) -> Engine:
    """The engine of ``config``; its own files go to ``folder``. Raises ConfigError where it cannot be used.

    ``always_apart``: whatever ``sweep.isolation`` says, as this process has lost its GPU.
    """
    launcher, timeout_s = config.launcher, config.sweep.timeout_s
    settings = launcher.settings
    gpus = visible_gpus() if config.device != "cpu" and launcher.engine in ("pool", "submitit_local") else []
    if config.memory.placement == "spread" and gpus:  # a job sees as many as its model lies on
        size = config.memory.devices or len(gpus)
        gpus = [",".join(gpus[i : i + size]) for i in range(0, max(len(gpus) - size, 0) + 1, size)]
    num = launcher.num_workers or len(gpus) or max(2, (os.cpu_count() or 1) // 4)
    if launcher.engine == "slurm":
        return Slurm(_typed(settings, SlurmSettings), folder, timeout_s)
    if launcher.engine == "submitit_local":
        told = _typed(settings, SubmititSettings)
        return Submitted(told, folder, num, timeout_s, gpus, detached=launcher.detach)
    if launcher.engine == "ray":
        return Ray(_typed(settings, RaySettings), config.device, timeout_s)
    if launcher.engine == "pool" and config.sweep.isolation == "none" and not always_apart:
        return SharingPool(num, folder / "queue", gpus)
    return Pool(1 if launcher.engine == "serial" else num, timeout_s, gpus)


def _typed(settings: object, kind: type[_T]) -> _T:
    return settings if isinstance(settings, kind) else kind()
