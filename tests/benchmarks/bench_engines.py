"""What it costs to hand jobs over: ``python tests/benchmarks/bench_engines.py [--jobs 10000] [--samples 200]``.

The scheduler alone, on the simulated engine (CPU seconds, peak memory, what it asks); jobs of the digits model on each
engine of this machine against the serial one (Ray where it is installed); and what a SLURM of this machine takes. What a
job costs is a slope, from two numbers of jobs, so that what a sweep pays once stands apart.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from quantlab.running import scheduler  # noqa: E402
from quantlab.running.attempts import has_ended  # noqa: E402
from quantlab.running.engines.protocol import EngineError  # noqa: E402
from quantlab.running.engines.slurm import Slurm  # noqa: E402
from quantlab.running.scheduler import Scheduler  # noqa: E402
from quantlab.vocabulary.launching import SlurmSettings  # noqa: E402
from tests.support.engines import Simulated, make_job  # noqa: E402
from tests.support.shell import digits_words  # noqa: E402
from tests.support.stores import ROOT  # noqa: E402


def simulated(folder: Path, num: int) -> None:
    """``num`` jobs, 5 % of them lost at each try."""
    folders = [make_job(folder, f"job{i:05d}") for i in range(num)]
    engine, over = Simulated(1, num_at_once=500, lost=0.05), Counter()
    one = Scheduler(engine, 20, lambda done: over.update([done]))
    before, rss = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall = time.perf_counter()
    one.add(folders)
    submitted = time.perf_counter() - wall
    one.run()
    cpu = time.process_time() - before
    assert set(over) == set(folders)
    assert set(over.values()) == {1}
    assert all(has_ended(done) == "FINISHED" for done in folders)
    assert set(engine.computed.values()) == {1}
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - rss) / 1024
    print(
        f"simulated: {num} jobs, {engine.num_submitted - num} given again, none lost or twice: {cpu:.1f} CPU-s with the "
        f"simulation's own, {more:.1f} MiB more at the peak, submitted in {submitted:.2f} s, {engine.num_polls} polls"
    )


ENGINES = {
    "serial": ("sweep.isolation=none",),
    "serial, isolated": ("sweep.isolation=process",),
    "pool of two": ("launcher=pool", "launcher.num_workers=2", "sweep.isolation=process"),
    "pool of two, sharing": ("launcher=pool", "launcher.num_workers=2", "sweep.isolation=none"),
    "submitit_local": ("launcher=submitit_local", "launcher.num_workers=2"),
    "ray": ("launcher=ray",),
}
GROUP_SIZES = (32, 64, 128)
FEW, MANY = 2, 2 * len(GROUP_SIZES)


def sweep(folder: Path, num: int, samples: int, *words: str) -> tuple[float, float]:
    """Wall and CPU seconds of a sweep of ``num`` jobs of the digits model."""
    sizes = f"group_size={','.join(map(str, GROUP_SIZES[: num // 2]))}"
    asked = digits_words("backend=torchao", "dtype=int8,int4", sizes, f"evaluation.num_samples={samples}", *words)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "quantlab", "-m", *asked, "sweep.force=true", "sweep.floors=false", "-q", "--json"]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, cwd=folder, env=env, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def engines(folder: Path, samples: int, names: Sequence[str]) -> None:
    """What a job costs on each engine, and a sweep once; against the serial engine."""
    sweep(folder, FEW, samples, *ENGINES["serial"])  # trains the model
    walls: dict[str, float] = {}
    serial = first = 0.0
    for name in names:
        (wall1, cpu1), (wall2, cpu2) = (sweep(folder, num, samples, *ENGINES[name]) for num in (FEW, MANY))
        wall, cpu = (wall2 - wall1) / (MANY - FEW), (cpu2 - cpu1) / (MANY - FEW)
        serial, first, walls[name] = serial or cpu, first or wall, wall
        print(
            f"{name}: {wall:.2f} s a job, {cpu:.2f} CPU-s, {cpu - serial:+.2f} CPU-s against serial, "
            f"{_ratio(first, wall)} by the clock; "
            f"a sweep's start {wall1 - FEW * wall:.1f} s, {cpu1 - FEW * cpu:.1f} CPU-s",
            flush=True,
        )
    if {"serial, isolated", "pool of two"} <= set(walls):
        print(f"a pool of two: {walls['serial, isolated'] / walls['pool of two']:.2f} times one process a job")


def _ratio(first: float, wall: float) -> str:
    return f"{first / wall:.2f} times as fast" if min(first, wall) > 0 else "of a machine too busy to tell how fast"


def on_slurm(folder: Path, num: int) -> None:
    """``num`` jobs handed to a SLURM that runs here, asked about, and cancelled."""
    if shutil.which("sbatch") is None:
        print("slurm: there is no sbatch here")
        return
    folders = [make_job(folder, f"slurm{i:05d}", seconds=60) for i in range(num)]
    engine = Slurm(SlurmSettings(timeout_min=10), folder / "submitit")
    began = time.perf_counter()
    try:
        ids = engine.submit(folders)
    except EngineError as error:
        print(f"slurm: {error}")
        return
    submitted = time.perf_counter() - began
    engine.poll(ids)
    asked = time.perf_counter() - began - submitted
    engine.cancel(ids)
    arrays = len({job_id.split("_")[0] for job_id in ids})
    print(f"slurm: {num} jobs submitted in {submitted:.1f} s ({arrays} arrays), asked about in {asked:.2f} s")


def main() -> None:
    """Print all of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=200, help="of each job's evaluation, which is how long it takes")
    parser.add_argument("--only", nargs="*", choices=ENGINES, help="these engines beside the serial one")
    parser.add_argument("--slurm", type=int, default=500, help="jobs for a SLURM of this machine, if there is one")
    words = parser.parse_args()
    scheduler.say = lambda *_: None  # type: ignore[assignment]
    scheduler._PAUSE_S = scheduler._LONGEST_PAUSE_S = 0.0
    with tempfile.TemporaryDirectory() as place:
        simulated(Path(place), words.jobs)
    scheduler._PAUSE_S, scheduler._LONGEST_PAUSE_S = 0.05, 2.0
    here = [name for name in ENGINES if name != "ray" or importlib.util.find_spec("ray") is not None]
    with tempfile.TemporaryDirectory() as place:
        engines(Path(place), words.samples, [n for n in here if words.only is None or n in ("serial", *words.only)])
    with tempfile.TemporaryDirectory() as place:
        on_slurm(Path(place), words.slurm)
    print(f"on {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
