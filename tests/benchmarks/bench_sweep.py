"""How much a sweep saves against single runs that start with the same warm cache, and what a second process gains.

Run: python tests/benchmarks/bench_sweep.py [NUM_JOBS] [single] [pool]

Every run is a process of its own with one thread. What the imports alone take is measured apart. ``single`` (default):
a sweep against as many single runs of a second. ``pool``: a sweep of longer jobs (some 20 s each) by two worker
processes against one (``sweep.isolation=none``: a worker keeps its model), and whether their numbers are identical.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ["model.num_train_steps=40", "--json", "-q"]
SHORT, LONG = ["evaluation=quick"], ["evaluation.num_samples=400", "evaluation.num_teacher_forced=20"]
SCHEMES = [(dtype, size) for size in (16, 32, 64, 128, 256) for dtype in ("int8", "int4", "int3", "int2")]
IMPORTS = "import torch, torchao, mlflow, sklearn, quantlab.running.sweep, quantlab.cli"


def timed(folder: Path, *command: str) -> tuple[float, float, str]:
    """Wall seconds, CPU seconds and stdout of a process."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *command], env=env, cwd=folder, capture_output=True, text=True, check=False)
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(done.stderr)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def quantlab(folder: Path, *words: str) -> tuple[float, float, str]:
    """The same of the command line."""
    return timed(folder, "-m", "quantlab", *words, *SETTINGS)


def recipe(folder: Path, num_jobs: int) -> str:
    """A sweep of the first schemes."""
    rows = [f"    - {{backend: torchao, dtype: {d}, group_size: {g}}}" for d, g in SCHEMES[:num_jobs]]
    file = folder / "bench.yaml"
    file.write_text("\n".join(["# @package _global_", "sweep:", "  candidates:", *rows]) + "\n")
    return f"recipe={file}"


def against_single_runs(folder: Path, num_jobs: int) -> None:
    """Print the ratio of the sweep to as many single runs."""
    quantlab(folder, "backend=torchao", *SHORT)  # trains the model, observes the reference, measures the floors
    imports = min(timed(folder, "-c", IMPORTS)[:2] for _ in range(2))
    sweep = quantlab(folder, recipe(folder, num_jobs), *SHORT, "sweep.force=true")
    single = [
        quantlab(folder, "backend=torchao", f"dtype={d}", f"group_size={g}", *SHORT)[:2] for d, g in SCHEMES[:num_jobs]
    ]
    print(f"{num_jobs} jobs, one thread, warm cache; the sweep also measures its three floor rows")
    for i, unit in enumerate(("wall", "CPU")):
        alone, together, imported = sum(s[i] for s in single), float(sweep[i]), imports[i]
        ratio, bare = alone / together, (alone - num_jobs * imported) / (together - imported)
        print(f"  {unit:4} s: single runs {alone:.1f}, sweep {together:.1f}: {ratio:.2f}x")
        print(f"          imports alone {imported:.1f} a process; without them {bare:.2f}x")
    again = quantlab(folder, recipe(folder, num_jobs), *SHORT)
    print(f"  the same sweep again (all resumed): {again[0]:.1f} s wall, {again[1]:.1f} s CPU")


def two_against_one(folder: Path, num_jobs: int) -> None:
    """Print the ratio of one worker process to two, without their start."""
    quantlab(folder, "backend=torchao", *LONG)  # trains the model, observes the reference, measures the floors
    words = [
        recipe(folder, num_jobs),
        *LONG,
        "launcher=pool",
        "sweep.isolation=none",
        "sweep.force=true",
        "sweep.floors=false",
        "num_threads=1",
    ]
    found = {}
    print(f"{num_jobs} jobs by worker processes of one thread, warm cache, no floor rows")
    for num in (1, 2):
        wall, cpu, out = quantlab(folder, *words, f"launcher.num_workers={num}")
        numbers = {
            row["name"]: {k: v for k, v in row["metrics"].items() if k.startswith(("quality/", "memory/weights"))}
            for row in json.loads(out)
        }
        found[num] = wall, numbers
        seconds = [
            row["metrics"]["perf/evaluate_s"] for row in json.loads(out) if "quantization/coverage" in row["metrics"]
        ]
        print(
            f"  {num} worker(s): {wall:.1f} s wall, {cpu:.1f} s CPU; jobs of {min(seconds):.1f} to {max(seconds):.1f} s"
        )
    started = timed(folder, "-c", IMPORTS)[0]
    ratio = (found[1][0] - 2 * started) / (found[2][0] - 2 * started)  # the sweep's imports, then a worker's
    identical = "identical" if found[1][1] == found[2][1] else "NOT identical"
    print(f"  {found[1][0] / found[2][0]:.2f}x; without imports {ratio:.2f}x; numbers are {identical}")


if __name__ == "__main__":
    asked = [int(w) for w in sys.argv[1:] if w.isdigit()]
    with tempfile.TemporaryDirectory(prefix="bench-sweep-") as name:
        if "single" in sys.argv[1:] or "pool" not in sys.argv[1:]:
            against_single_runs(Path(name), asked[0] if asked else len(SCHEMES))
        if "pool" in sys.argv[1:]:
            two_against_one(Path(name), asked[0] if asked else len(SCHEMES))
