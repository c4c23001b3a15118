"""SLURM by submitit: job arrays; states by one ``squeue`` for all jobs, which needs no accounting."""

from __future__ import annotations

import getpass
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from quantlab.errors import ConfigError
from quantlab.running.attempts import ATTEMPT, ended_since_given
from quantlab.running.engines.forking import python_environment
from quantlab.running.engines.protocol import EngineError, State
from quantlab.running.node import run
from quantlab.vocabulary.launching import SlurmSettings, SubmititSettings

_T = TypeVar("_T")
_ANSWER_S = 60.0
_QUEUED = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "SUSPENDED", "RESV_DEL_HOLD"}
_RUNNING = {"RUNNING", "COMPLETING", "CONFIGURING", "STAGE_OUT", "STOPPED", "SIGNALING", "RESIZING"}
_LIMITS = {
    "TIMEOUT": "timeout: longer than launcher.settings.timeout_min",
    "DEADLINE": "timeout: SLURM's deadline",
    "OUT_OF_MEMORY": "out of memory: SLURM ended the job; ask for more by launcher.settings.mem_gb",
    "CANCELLED": "cancelled in SLURM",
}
_MAX_IN_A_COMMAND = 500


class Slurm:
    """A cluster's queue. Logs of submitit lie in ``folder``, which like the jobs' must be seen by every node."""

    outlives = True
    settle_s = 30.0

    def __init__(self, settings: SlurmSettings, folder: Path, timeout_s: float | None = None) -> None:
        if shutil.which("sbatch") is None:
            raise ConfigError(
                "launcher=slurm: there is no sbatch on the path; give the command on a node that submits, or choose "
                "launcher=pool"
            )
        self._settings = settings
        self._folder = folder
        self._timeout_s = timeout_s
        self._folders: dict[str, Path] = {}
        self._array_size = 0
        self._last: dict[str, State] = {}
        self._is_seen = False
        self._awaited: dict[str, float] = {}

    def submit(self, folders: Sequence[Path], after: Sequence[str] = ()) -> list[str]:
        """Ids of the jobs, in arrays as large as the cluster takes."""
        ids: list[str] = []
        for some in _parts(folders, self._most()):
            ids += self._submit(some, after)
        self._folders |= dict(zip(ids, folders, strict=True))
        return ids

    def poll(self, ids: Sequence[str]) -> Mapping[str, State]:
        """What ``squeue`` says; of those that have left it and say nothing themselves, ``scontrol``.

        Raises :class:`EngineError` where the first job ends and nothing of it is seen here.
        """
        queue = self._queue(ids)
        if queue is None:  # the controller does not answer: nothing is known to have changed
            return {i: self._last.get(i, State("queued", reason="slurmctld does not answer")) for i in ids}
        self._last = {i: queue.get(i) or self._left(i) for i in ids}
        self._is_seen = self._is_seen or any(s.what == "running" and self._wrote(i) for i, s in self._last.items())
        return self._last

    def wait(self, seconds: float) -> None:
        """That long."""
        time.sleep(seconds)

    def cancel(self, ids: Sequence[str]) -> None:
        """``scancel``."""
        for some in _parts(ids, _MAX_IN_A_COMMAND):
            _call("scancel", "--quiet", *some)

    def adopt(self, jobs: Mapping[str, Path]) -> set[str]:
        """Those that are in the queue."""
        queue = self._queue(list(jobs)) or {}
        known = {i for i in jobs if i in queue and queue[i].is_open}
        self._folders |= {i: jobs[i] for i in known}
        return known

    def close(self) -> None:
        """Nothing is held."""

    def _submit(self, folders: Sequence[Path], after: Sequence[str]) -> list[str]:
        import submitit

        executor = submitit.AutoExecutor(self._folder, cluster="slurm")
        told = {**parameters(self._settings), **({"slurm_dependency": f"afterany:{':'.join(after)}"} if after else {})}
        limit_s = 60.0 * (self._settings.timeout_min or 0) or None
        num = len(folders)
        try:
            executor.update_parameters(**told)
            jobs = executor.map_array(run, [str(f) for f in folders], [self._timeout_s] * num, [limit_s] * num)
        except Exception as error:  # submitit has no one class for what sbatch says
            said = " ".join((str(error) or type(error).__name__).split())
            raise EngineError(
                f"launcher=slurm: sbatch refuses the jobs ({said[-500:]}); look at launcher.settings "
                "(partition, account, qos, gpus_per_node, ...; gpus_per_node=0 where there are no GPUs) and at what "
                "sinfo and sacctmgr show"
            ) from error
        return [str(job.job_id) for job in jobs]

    def _most(self) -> int:
        if not self._array_size:
            told = _call("scontrol", "show", "config") or ""
            sizes = [line.partition("=")[2].strip() for line in told.splitlines() if line.startswith("MaxArraySize")]
            self._array_size = max(1, min(1000, int(sizes[0]))) if sizes and sizes[0].isdigit() else 1000
        return self._array_size

    def _queue(self, ids: Sequence[str]) -> dict[str, State] | None:
        wanted = set(ids)
        told = _call("squeue", "--noheader", "--array", f"--user={getpass.getuser()}", "--format=%i|%T|%N|%r")
        if told is None:
            return None
        found: dict[str, State] = {}
        for line in told.splitlines():
            job_id, _, rest = line.strip().partition("|")
            if job_id in wanted:
                state, node, reason = (rest.split("|", 2) + ["", ""])[:3]
                found[job_id] = _state(state, node, reason)
        return found

    def _left(self, job_id: str) -> State:
        folder = self._folders.get(job_id)
        if folder is not None and ended_since_given(folder):
            self._is_seen = True
            return State("ended")
        told = _call("scontrol", "show", "job", "--oneliner", job_id) or ""
        known = dict(word.partition("=")[::2] for word in shlex.split(told.replace("'", "")))
        node = known.get("NodeList") or (self._last[job_id].node if job_id in self._last else "")
        state = _state(known.get("JobState") or "UNKNOWN", node, known.get("Reason", ""))
        if state.what != "ended" or folder is None or self._wrote(job_id):
            return state
        if said := self._last_word(job_id):
            return State("ended", state.node, f"it began nothing: {said}")
        return self._unseen(job_id, folder, state.node, known.get("JobState", ""))

    def _unseen(self, job_id: str, folder: Path, node: str, said: str) -> State:
        """Of a job of which nothing is here: a shared folder may take a while, and another is no shared folder."""
        since = self._awaited.setdefault(job_id, time.monotonic())
        if time.monotonic() - since < self.settle_s:
            return State("running", node, "its files are awaited")
        del self._awaited[job_id]
        if not node and not said:  # a task of an array that is cancelled before it begins is forgotten at once
            return State("stopped", "", "cancelled in SLURM while it was queued")
        told = f"node {node or 'of the first job'} wrote nothing there (SLURM says {said or 'nothing of the job'})"
        if self._is_seen:
            return State("lost", node, told)
        raise EngineError(
            f"output_dir={folder.parents[1]}: {told}; with launcher=slurm it must be a folder that every node sees, as "
            "output_dir=/shared/outputs"
        )

    def _wrote(self, job_id: str) -> bool:
        return job_id in self._folders and (self._folders[job_id] / ATTEMPT).exists()

    def _last_word(self, job_id: str) -> str:
        """The end of what the job's process said before it came to its folder; submitit keeps it beside the script."""
        for file in sorted(self._folder.glob(f"{job_id}_*_log.err")):
            lines = [line.strip() for line in file.read_text(errors="replace").splitlines() if line.strip()]
            return lines[-1][:300] if lines else "its process said nothing"
        return ""


def parameters(settings: SubmititSettings) -> dict[str, Any]:
    """What submitit is told: its own names, those of SLURM alone with the prefix that it wants."""
    shared = {f.name for f in fields(SubmititSettings)}
    said = {k: v for k, v in asdict(settings).items() if v is not None and v not in ([], {}) and k != "setup"}
    told = {k if k in shared else f"slurm_{k}": v for k, v in said.items()}
    if isinstance(settings, SlurmSettings):
        told["slurm_setup"] = [
            *(f"export {name}={shlex.quote(value)}" for name, value in python_environment().items()),
            *settings.setup,
        ]
    return told


def _state(word: str, node: str, reason: str) -> State:
    name = word.split()[0].rstrip("+")
    if name in _QUEUED:
        return State("queued", node, reason)
    if name in _RUNNING:
        return State("running", node, reason)
    if name in _LIMITS:
        return State("stopped", node, _LIMITS[name])
    if name == "PREEMPTED":
        return State("preempted", node, "preempted by SLURM")
    if name in ("NODE_FAIL", "BOOT_FAIL", "REVOKED"):
        return State("lost", node, f"{name} of {node or 'its node'}")
    return State("ended", node, reason if reason != "None" else "")


def _call(*words: str) -> str | None:
    """What a command of SLURM's prints; None where it fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_ANSWER_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _parts(items: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]
