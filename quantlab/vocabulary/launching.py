"""The ``launcher`` node: who runs the jobs of a sweep, and what each engine may be told. Torch-free, mutable, plain.

The settings are a closed set of typed keys for each engine: those of Hydra's launcher that mean something for a job
that is one process, under their own names. Null leaves a setting as that launcher has it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from quantlab.vocabulary.fields import choice, number

_MANY = 10**6


@dataclass
class LauncherSettings:
    """What is told to the engine ``serial``: nothing."""


@dataclass
class JoblibSettings(LauncherSettings):
    """``launcher=pool``."""

    verbose: int = number(0, 0, 100)
    timeout: float | None = number(None, 0, _MANY, above=True)
    """Seconds for a job; ``sweep.timeout_s`` ends the job itself."""
    pre_dispatch: int | None = number(None, 1, _MANY)
    batch_size: int | None = number(None, 1, _MANY)


@dataclass
class SubmititSettings(LauncherSettings):
    """``launcher=submitit_local``, and what SLURM takes as well."""

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
    array_parallelism: int | None = number(None, 1, _MANY)
    additional_parameters: dict[str, str] = field(default_factory=dict)
    """Options of sbatch that have no key here; never taken from a recipe."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell before the job begins; never taken from a recipe."""


@dataclass
class RayInit:
    """``ray.init``."""

    address: str | None = None
    """Of a cluster; null: this machine."""
    num_cpus: int | None = number(None, 1, 4096)
    num_gpus: int | None = number(None, 0, 64)
    include_dashboard: bool = False


@dataclass
class RayRemote:
    """``ray.remote``: what each job asks for."""

    num_cpus: float | None = number(None, 0, 4096)
    num_gpus: float = number(1, 0, 64)
    memory: int | None = number(None, 1, 2**50)
    max_calls: int = number(1, 0, _MANY)
    max_retries: int = number(1, 0, 100)


@dataclass
class RayParts:
    """The launcher's own two parts."""

    init: RayInit = field(default_factory=RayInit)
    remote: RayRemote = field(default_factory=RayRemote)


@dataclass
class RaySettings(LauncherSettings):
    """``launcher=ray``."""

    ray: RayParts = field(default_factory=RayParts)


LAUNCHER_SETTINGS: dict[str, type[LauncherSettings]] = {
    "serial": LauncherSettings,
    "joblib": JoblibSettings,
    "submitit_local": SubmititSettings,
    "submitit_slurm": SlurmSettings,
    "ray": RaySettings,
}
"""engine -> what it may be told."""
COMMANDS = ("setup", "additional_parameters")
"""Settings by which commands are run: the user types them, a recipe never says them."""


@dataclass
class LauncherConfig:
    """The ``launcher`` node."""

    engine: str = choice("serial", *(name for name in LAUNCHER_SETTINGS if name != "serial"))
    """``serial``, or the name of a launcher of Hydra's."""
    num_workers: int = number(0, 0, 1024)
    """Processes at once (joblib); 0: one a GPU, or one for every 4 CPUs."""
    settings: LauncherSettings = field(default_factory=LauncherSettings)
    """Settings of Hydra's launcher under their own names."""
