"""What it costs to hand jobs over: ``python tests/benchmarks/bench_engines.py [--jobs 10000] [--seconds 3]``.

The scheduler alone, on the simulated engine (CPU seconds, peak memory, what it asks), and the engines of this machine
on jobs that sleep: seconds a job above those that it sleeps, the pool against one process, and what a SLURM of this machine takes.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import pytest  # noqa: E402

from quantlab.running import scheduler  # noqa: E402
from quantlab.running.attempts import has_ended  # noqa: E402
from quantlab.running.engines.pool import Pool  # noqa: E402
from quantlab.running.engines.protocol import EngineError  # noqa: E402
from quantlab.running.engines.slurm import Slurm  # noqa: E402
from quantlab.running.engines.submitted import Submitted  # noqa: E402
from quantlab.running.scheduler import Scheduler  # noqa: E402
from quantlab.vocabulary.launching import SlurmSettings, SubmititSettings  # noqa: E402
from tests.support.engines import Simulated, make_job, stand_in  # noqa: E402


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


def overhead(name: str, engine: object, folder: Path, num: int, seconds: float, at_once: int) -> float:
    """Wall seconds of ``num`` jobs that sleep."""
    folders = [make_job(folder, f"{name}{i}", seconds=seconds) for i in range(num)]
    began = time.perf_counter()
    one = Scheduler(engine, 3, lambda done: None)  # type: ignore[arg-type]
    one.add(folders)
    one.run()
    wall = time.perf_counter() - began
    engine.close()  # type: ignore[attr-defined]
    assert all(has_ended(done) == "FINISHED" for done in folders)
    print(
        f"{name}: {num} jobs of {seconds:g} s, {at_once} at once: {wall:.1f} s, {wall * at_once / num - seconds:.2f} s a job"
    )
    return wall


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
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--local", type=int, default=6, help="jobs for each engine of this machine")
    parser.add_argument("--slurm", type=int, default=500, help="jobs for a SLURM of this machine, if there is one")
    words = parser.parse_args()
    scheduler.say = lambda *_: None  # type: ignore[assignment]
    scheduler._PAUSE_S = scheduler._LONGEST_PAUSE_S = 0.0
    with tempfile.TemporaryDirectory() as place:
        simulated(Path(place), words.jobs)
    scheduler._PAUSE_S, scheduler._LONGEST_PAUSE_S = 0.05, 2.0
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        folder = Path(place)
        stand_in(folder / "site", patch)
        alone = overhead("one process a job", Pool(1), folder, words.local, words.seconds, 1)
        two = overhead("pool of two", Pool(2), folder, words.local, words.seconds, 2)
        print(f"a pool of two: {alone / two:.2f} times one")
        local = Submitted(SubmititSettings(), folder / "submitit", 2)
        overhead("submitit_local", local, folder, words.local, words.seconds, 2)
    with tempfile.TemporaryDirectory() as place:
        on_slurm(Path(place), words.slurm)
    print(f"on {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
