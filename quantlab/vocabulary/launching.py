"""The ``launcher`` node: who runs the jobs of a sweep, and what each engine may be told. Torch-free, mutable, plain.

The settings are a closed set of typed keys for each engine, in the engine's own words. Null leaves a setting as the
engine has it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from quantlab.vocabulary.fields import choice, number

_MANY = 10**6


@dataclass
class LauncherSettings:
    """What is told to ``serial`` and ``pool``: nothing."""


@dataclass
class SubmititSettings(LauncherSettings):
    """``launcher=submitit_local``, and what SLURM takes as well: submitit's own names."""

    timeout_min: int | None = number(None, 1, _MANY)
    cpus_per_task: int | None = number(None, 1, 4096)
    gpus_per_node: int | None = number(None, 0, 64)
    mem_gb: int | None = number(None, 1, _MANY)
    name: str | None = None
    stderr_to_stdout: bool | None = None


@dataclass
class SlurmSettings(SubmititSettings):
    """``launcher=slurm``."""

    partition: str | None = None
    qos: str | None = None
    comment: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    gres: str | None = None
    account: str | None = None
    cpus_per_gpu: int | None = number(None, 1, 4096)
    gpus_per_task: int | None = number(None, 0, 64)
    mem_per_gpu: str | None = None
    mem_per_cpu: str | None = None
    signal_delay_s: int | None = number(None, 1, _MANY)
    """Seconds of grace before SLURM ends a job."""
    array_parallelism: int | None = number(None, 1, _MANY)
    additional_parameters: dict[str, str] = field(default_factory=dict)
    """Options of sbatch that have no key here; never taken from a recipe."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell before the job begins; never taken from a recipe."""


@dataclass
class RayInit:
    """``ray.init``."""

    address: str | None = None
    """Of a cluster; null: a Ray of this sweep's own on this machine, which the other two keys are for."""
    num_cpus: int | None = number(None, 1, 4096)
    num_gpus: int | None = number(None, 0, 64)


@dataclass
class RayRemote:
    """``ray.remote``: what each job asks for."""

    num_cpus: float | None = number(None, 0, 4096)
    num_gpus: float | None = number(None, 0, 64)
    """Null: one, and none on a cluster without any."""
    memory: int | None = number(None, 1, 2**50)
    """Bytes."""
    resources: dict[str, float] = field(default_factory=dict)
    """Resources of the cluster's own."""


@dataclass
class RayParts:
    """Ray's two parts."""

    init: RayInit = field(default_factory=RayInit)
    remote: RayRemote = field(default_factory=RayRemote)


@dataclass
class RaySettings(LauncherSettings):
    """``launcher=ray``."""

    ray: RayParts = field(default_factory=RayParts)


LAUNCHER_SETTINGS: dict[str, type[LauncherSettings]] = {
    "serial": LauncherSettings,
    "pool": LauncherSettings,
    "submitit_local": SubmititSettings,
    "slurm": SlurmSettings,
    "ray": RaySettings,
}
"""engine -> what it may be told."""
COMMANDS = ("setup", "additional_parameters")
"""Settings by which commands are run: the user types them, a recipe never says them."""


@dataclass
class LauncherConfig:
    """The ``launcher`` node."""

    engine: str = choice("serial", *(name for name in LAUNCHER_SETTINGS if name != "serial"))
    num_workers: int = number(0, 0, 1024)
    """Processes at once (pool, submitit_local); 0: one a GPU, or one for every 4 CPUs."""
    max_attempts: int = number(3, 1, 100)
    """How often a job is begun, where its node or its process is lost; being preempted does not count."""
    detach: bool = False
    """Submit and leave; the same command again takes the jobs over (engines whose jobs outlive their sweep)."""
    settings: LauncherSettings = field(default_factory=LauncherSettings)
    """Settings of the engine, in its own words."""
