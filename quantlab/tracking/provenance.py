"""What a run was made with: package versions, the state of the checkout, the hardware."""

from __future__ import annotations

import contextlib
import functools
import getpass
import hashlib
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import NotRequired, TypedDict

from quantlab.backends.checkpoints import loaders
from quantlab.backends.table import distributions
from quantlab.errors import ConfigError
from quantlab.modules.precision import precision
from quantlab.progress import printable
from quantlab.tracking.tags import SOURCE_NAME, SOURCE_TYPE, USER
from quantlab.tracking.values import shortened

_PACKAGES = (
    "quantlab-recipes",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "numpy",
    "scipy",
    "scikit-learn",
    "hydra-core",
    "omegaconf",
    "mlflow",
)
"""Beside these, what the backends name, and what loads checkpoints of others."""
_OF_ONEDNN = tuple(f"{lib}_{what}" for lib in ("ONEDNN", "DNNL") for what in ("MAX_CPU_ISA", "DEFAULT_FPMATH_MODE"))
"""Variables by which users choose its kernels, and so the last digits of convolutions and of products in bfloat16."""
_TF32_OVERRIDE = "NVIDIA_TF32_OVERRIDE"
"""It outweighs torch's switches of TF32."""


PACKAGE = Path(__file__).resolve().parents[1]
WINGS = ("vocabulary", "modules", "backends", "models", "datasets", "protocols", "metrics", "stages")
"""What makes a job's numbers: a change of the page, the command line or the tracking runs nothing again."""


class GitState(TypedDict):
    """A checkout; ``diff_sha256`` is None for a clean one."""

    sha: str
    dirty: bool
    diff_sha256: str | None


class Gpu(TypedDict):
    """One device that torch sees."""

    name: str
    compute_capability: str
    memory_bytes: int


class Hardware(TypedDict):
    """What float sums, speed and peak memory depend on; ``cuda`` and ``hip`` are torch's, None where it has none."""

    machine: str
    num_cpus: int | None
    cpu_capability: str
    processor: str
    variables: dict[str, str]
    """Of the environment, those that choose kernels."""
    torch_threads: int
    memory_bytes: int
    cuda: str | None
    hip: str | None
    gpus: list[Gpu]


class Environment(TypedDict):
    """What a run was made with (``environment.json``)."""

    versions: dict[str, str]
    git: GitState | None
    hardware: NotRequired[Hardware]
    """Absent of a process that computes nothing itself."""


_READ: dict[tuple[tuple[str, int], ...], dict[str, str]] = {}
"""The versions as they were read last, by the state of the folders of packages; at most one entry."""


def versions() -> dict[str, str]:
    """Python's version and those of the installed packages that a number can depend on.

    They are read again when something was installed: reading them all takes a tenth of a short job. Raises ConfigError
    where that replaced what this process has loaded: its numbers would be known by code that did not make them.
    """
    places = tuple(_last_change(place) for place in sys.path)
    if places not in _READ:
        found, before = _installed(), next(iter(_READ.values()), {})
        for name, version in before.items():
            if found.get(name, version) != version and _is_loaded(name):
                raise ConfigError(
                    f"{name}: {version} is loaded, and {found[name]} is installed since; restart "
                    "Python, in a notebook its kernel"
                )
        _READ.clear()
        _READ[places] = found
    return {"python": platform.python_version(), **_READ[places]}


def _installed() -> dict[str, str]:
    found = {}
    for package in (*_PACKAGES, *distributions(), *loaders()):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _is_loaded(package: str) -> bool:
    """Has this process imported a module of it?"""
    files = metadata.distribution(package).files or []
    return any(".".join(file.parts[:-1]) in sys.modules for file in files if file.name == "__init__.py")


def _last_change(place: str) -> tuple[str, int]:
    """A folder of packages and when one came or went, in nanoseconds."""
    try:
        return place, os.stat(place or ".").st_mtime_ns
    except OSError:
        return place, 0


@functools.cache
def code_digest(package: Path = PACKAGE) -> str:
    """Digest of quantlab's Python files in the :data:`WINGS` that make numbers."""
    return digest_of_code(package, (file for wing in WINGS for file in (package / wing).rglob("*.py")))


def digest_of_code(root: Path, files: Iterable[Path]) -> str:
    """Digest of files and their places below ``root``."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.relative_to(root).as_posix()}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()


def git_state(root: Path) -> GitState | None:
    """``sha``, ``dirty`` and ``diff_sha256`` of the checkout that holds ``root``; None outside one.

    A folder of which the checkout holds no file (an installed package in somebody's project) counts as outside.
    ``diff_sha256`` is of the text of ``git diff HEAD`` and of the names of untracked files, None in a clean checkout:
    two dirty runs with the same digest were made with the same changes to tracked files.
    """
    sha = _git(root, "rev-parse", "--verify", "HEAD")
    if sha is None or not _git(root, "ls-files", "--", "."):
        return None
    diff = _git(root, "diff", "--no-ext-diff", "--no-textconv", "HEAD")
    untracked = _git(root, "ls-files", "--others", "--exclude-standard")
    dirty = bool(diff or untracked)
    changes = f"{diff}\0{untracked}"
    return {
        "sha": sha,
        "dirty": dirty,
        "diff_sha256": hashlib.sha256(changes.encode(errors="surrogateescape")).hexdigest() if dirty else None,
    }


_RUNS_NOTHING = ("-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}")
"""An environment may lie in a project that was downloaded, whose own settings tell git what to run."""


def _git(root: Path, *words: str) -> str | None:
    """What git prints, or None where there is no git, no checkout, or no answer within 10 s."""
    try:
        done = subprocess.run(
            ["git", *_RUNS_NOTHING, "-C", str(root), *words],
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def hardware() -> Hardware:
    """What float sums, speed and peak memory depend on. No host or user name."""
    import psutil
    import torch

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "machine": platform.machine(),
        "num_cpus": cpus,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "processor": _processor(),
        "variables": {k: os.environ[k] for k in ("MKL_CBWR", *_OF_ONEDNN, _TF32_OVERRIDE) if k in os.environ},
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "gpus": [
            {"name": gpu.name, "compute_capability": f"{gpu.major}.{gpu.minor}", "memory_bytes": gpu.total_memory}
            for gpu in gpus
        ],
    }


def arithmetic(device: str) -> dict[str, object]:
    """What the numbers of a model on ``device`` depend on beside the model: the device in use and torch's switches.

    Not what else is visible: a process that sees four cards and one that sees the first of them compute the same.
    """
    import torch

    if not device.startswith("cuda"):
        return {
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "processor": _processor(),
            "mkl_cbwr": os.environ.get("MKL_CBWR"),
            **{name.lower(): os.environ[name] for name in _OF_ONEDNN if name in os.environ},
        }
    gpu = torch.cuda.get_device_properties(torch.device(device))
    return {
        "name": gpu.name,
        "compute_capability": f"{gpu.major}.{gpu.minor}",
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "attention": [
            torch.backends.cuda.flash_sdp_enabled(),  # type: ignore[no-untyped-call]
            torch.backends.cuda.mem_efficient_sdp_enabled(),  # type: ignore[no-untyped-call]
            torch.backends.cuda.math_sdp_enabled(),  # type: ignore[no-untyped-call]
            torch.backends.cuda.cudnn_sdp_enabled(),  # type: ignore[no-untyped-call]
        ],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "tf32_override": os.environ.get(_TF32_OVERRIDE),
        **precision(),
    }


def _processor() -> str:
    """Name and a digest of the instructions and caches by which libraries choose their kernels; cores do not count."""
    import torch

    found = {k: v for k, v in torch.cpu.get_capabilities().items() if not k.startswith("num_")}
    return f"{found.get('cpu_name', '')} {hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()[:8]}".strip()


def environment(root: Path | None = None, has_hardware: bool = True) -> Environment:
    """:func:`versions`, :func:`git_state` and :func:`hardware`; ``root`` is by default the folder of this code.

    Without ``has_hardware`` torch is not asked.
    """
    found: Environment = {"versions": versions(), "git": git_state(root or Path(__file__).parents[1])}
    return {**found, "hardware": hardware()} if has_hardware else found


MAX_COMMAND_CHARS = 500
"""MLflow shows a command in one line."""
_LOGIN = re.compile(r"(\w://)[^/\s'\"]*@")
_NAMES = r"(?:token|password|passwd|secret|api_?key|access_?key)"
_SECRET = re.compile(rf"({_NAMES}['\"]?\s*[=:]\s*)(?:\"[^\"]*\"|'[^']*'|[^\s'\",\]}}]+)", re.IGNORECASE)
_BEARER = re.compile(
    r"\b((?:bearer|authorization:\s*basic)\s+)[\w.~+/=-]{8,}|\b(hf_|ghp_|github_pat_|glpat-|sk-|dapi)[\w-]{16,}",
    re.IGNORECASE,
)
"""Behind ``Authorization:``, and tokens that tell by how they begin whose they are."""
_IS_SECRET = re.compile(rf"\A([^\s=]*{_NAMES}=).+", re.IGNORECASE | re.DOTALL)


def who_and_what(words: Sequence[str]) -> dict[str, str]:
    """MLflow's own tags of a run: its user, where the system knows one, and the command, of ``words`` as typed."""
    named = {}
    with contextlib.suppress(OSError, KeyError, ImportError):  # a container's user may have no name
        named[USER] = getpass.getuser()
    command = printable(" ".join(["quantlab", *map(_as_typed, words)]), sys.maxsize)
    return {**named, SOURCE_NAME: shortened(command, MAX_COMMAND_CHARS, "recipe.yaml has all"), SOURCE_TYPE: "LOCAL"}


def _as_typed(word: str) -> str:
    """A word as a shell takes it, without what stands before the @ of an address and the values of tokens and
    passwords."""
    told = _BEARER.sub(lambda found: f"{found[1] or found[2]}***", word)
    hidden = _SECRET.sub(r"\1***", _LOGIN.sub(r"\1***@", _IS_SECRET.sub(r"\1***", told)))
    quoted = shlex.quote(hidden)
    if quoted == hidden or hidden.replace("***", "") == shlex.quote(hidden.replace("***", "")):
        return hidden
    return f'"{hidden}"' if "'" in hidden and not set(hidden) & set('"$`\\!') else quoted
