"""How calibration's memory and time grow with the number of samples.

Run: python tests/benchmarks/bench_calibration.py [NUM_SAMPLES MORE_SAMPLES]

Each row is a process of its own: the digits model, one algorithm, few and many calibration samples. The peak is that of
the calibrate stage (recorded calls included, the interpreter and its libraries too); torchao's AWQ keeps inputs, with
and without ``calibration_layers_at_once``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = [
    "evaluation=quick",
    "model.num_train_steps=40",
    "sweep.floors=false",
    "calibration.num_evidence_calls=0",
    "num_threads=1",
    "--json",
    "-q",
]
ROWS = {
    "gguf q4_k imatrix": ["backend=gguf", "dtype=q4_k", "algorithm=imatrix"],
    "quanto int8 activations": ["backend=quanto", "dtype=int8", "activation_dtype=int8"],
    "modelopt int4 awq_lite": ["backend=modelopt", "dtype=int4", "algorithm=awq_lite"],
    "modelopt int4 gptq": ["backend=modelopt", "dtype=int4", "algorithm=gptq"],
    "torchao int8 smoothquant": ["backend=torchao", "dtype=int8", "activation_dtype=int8", "algorithm=smoothquant"],
    "torchao int8 awq": ["backend=torchao", "dtype=int8", "algorithm=awq", "group_size=none"],
    "torchao int8 awq, 4 layers at once": [
        "backend=torchao",
        "dtype=int8",
        "algorithm=awq",
        "group_size=none",
        "quantization.calibration_layers_at_once=4",
    ],
}
MIB = 1024**2


def calibrated(folder: Path, words: list[str], num_samples: int) -> tuple[float, float]:
    """Seconds and peak resident MiB of a run's calibrate stage."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "quantlab", *words, *SETTINGS, f"calibration.num_samples={num_samples}"]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    metrics = json.loads(done.stdout)[-1]["metrics"]
    return metrics["perf/calibrate_s"], metrics["memory/calibrate/peak_rss_bytes"] / MIB


def main() -> None:
    few, many = [int(w) for w in sys.argv[1:3]] or [40, 400]
    print(f"calibrate stage, {few} and {many} samples ({many / few:.0f}x) of 10 steps each, batches of 20")
    print(f"  {'':<36} {'MiB':>7} {'MiB':>7} {'ratio':>6} {'more':>7} {'s':>7} {'s':>7}")
    with tempfile.TemporaryDirectory(prefix="bench-calibration-") as name:
        for what, words in ROWS.items():
            (time_few, peak_few), (time_many, peak_many) = (calibrated(Path(name), words, n) for n in (few, many))
            print(
                f"  {what:<36} {peak_few:7.0f} {peak_many:7.0f} {peak_many / peak_few:6.2f} "
                f"{peak_many - peak_few:+7.0f} {time_few:7.1f} {time_many:7.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
