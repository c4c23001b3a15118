"""How long ``quantlab compare`` takes over 1,000 tracked runs, and how long MLflow's own reader takes for them.

Run: python tests/benchmarks/bench_compare.py [NUM_RUNS]
"""

from __future__ import annotations

import contextlib
import io
import json
import sqlite3
import sys
import tempfile
import time
import uuid
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from quantlab.cli import dispatch
from quantlab.report.compare import compare
from quantlab.report.reading import open_reader
from quantlab.report.selection import parse_request, select
from quantlab.tracking import find_runs, open_store
from quantlab.vocabulary.schema import TrackingConfig
from tests.support.comparison_store import EFFECT, N, Sweep, add_run

NUM_FRONT = 20
TABLES = ("runs", "latest_metrics", "params", "tags")


def make_store(folder: Path, num_runs: int) -> None:
    """One real run, and copies of its rows with other bytes and errors; 20 of them are the front."""
    (folder / "outputs" / "runs").mkdir(parents=True)
    sweep = Sweep(folder, open_store(TrackingConfig(), folder))
    made = add_run(sweep, "int8", 1e-5 * EFFECT, size=4_000_000, backend="quanto")
    artifacts = folder / "outputs" / "mlartifacts"
    files = {f.relative_to(artifacts / made): f.read_bytes() for f in (artifacts / made).rglob("*") if f.is_file()}
    samples = json.loads(files[Path("artifacts/samples.json")])
    random = np.random.default_rng(0)
    with sqlite3.connect(folder / "outputs" / "mlflow.db") as database:
        for i in range(1, num_runs):
            front = i <= NUM_FRONT
            level = 1e-3 / 1.4**i if front else 2e-3 * (1 + random.random())
            size = 2_000_000 + 50_000 * i
            values = level * EFFECT * random.lognormal(0, 0.05, N)
            new = uuid.uuid4().hex
            copy_rows(database, made, new)
            mean, half = values.mean(), 2 * values.std() / N**0.5
            numbers = {
                "quality/latent_rel_mse": mean,
                "quality/latent_rel_mse/ci_lo": mean - half,
                "quality/latent_rel_mse/ci_hi": mean + half,
                "quality/latent_rel_mse/se": half / 2,
                "memory/weights_bytes": size,
            }
            for key, value in numbers.items():
                where = "WHERE run_uuid = ? AND key = ?"
                database.execute(f"UPDATE latest_metrics SET value = ? {where}", (value, new, key))
            database.execute("UPDATE runs SET name = ? WHERE run_uuid = ?", (f"scheme {i}", new))
            files[Path("artifacts/samples.json")] = json.dumps({**samples, "latent_rel_mse": list(values)}).encode()
            for name, content in files.items():
                (artifacts / new / name).parent.mkdir(parents=True, exist_ok=True)
                (artifacts / new / name).write_bytes(content)


def copy_rows(database: sqlite3.Connection, old: str, new: str) -> None:
    """The rows of a run under another id."""
    for table in TABLES:
        names = [row[1] for row in database.execute(f"PRAGMA table_info({table})")]
        chosen = ", ".join("?" if n == "run_uuid" else f'"{n}"' for n in names)
        database.execute(f"INSERT INTO {table} SELECT {chosen} FROM {table} WHERE run_uuid = ?", (new, old))


def main(num_runs: int = 1000) -> dict[str, float]:
    """Seconds of reading and comparing, of the whole command with its page, and of MLflow's reader alone."""
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        make_store(Path(name), num_runs)
        seconds = {}
        start = time.perf_counter()
        request = parse_request(["experiment=quantlab"])
        reader = open_reader(request.tracking, Path(name))
        selection = select(request, reader)
        groups = compare(request, selection, reader)
        seconds["select and compare"] = time.perf_counter() - start
        assert len(groups[0].runs) == num_runs
        assert len(groups[0].front) == NUM_FRONT
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            dispatch(["compare", "experiment=quantlab"])
        seconds["the whole command"] = time.perf_counter() - start
        page = next(Path("outputs", "reports").glob("*.html"))
        start = time.perf_counter()
        assert len(find_runs(open_store(TrackingConfig(), Path(name)), status=None)) == num_runs
        seconds["MLflow's reader alone"] = time.perf_counter() - start
        print(
            f"{num_runs} runs, a front of {len(groups[0].front)}, {len(groups[0].pairs)} pairs, "
            f"page {page.stat().st_size / 1e6:.1f} MB"
        )
    for what, value in seconds.items():
        print(f"{what:<24} {value:6.2f} s   {value / seconds['the whole command']:.2f} of the command")
    return seconds


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:2]))
