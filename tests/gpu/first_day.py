"""The first hour on a new machine with a CUDA device, in ten minutes: ``python tests/gpu/first_day.py``.

Everything that a GPU can do otherwise than the processor, run once and told in lines that can be read: which kernels
multiply wrongly, whether whole jobs give their numbers again, what memory is given back between jobs, what a
device-side assert leaves behind. Prints a line for each finding and writes all of it to ``--out`` as JSON.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
BACKENDS = ("bitsandbytes", "torchao", "quanto", "gguf", "modelopt")
PARTS = {"modelopt": 6, "torchao": 2}
"""Backends with so many schemes that they take several processes."""
QUICK = ("evaluation=quick", "num_threads=4")
TINY = (*QUICK, "model.num_train_steps=20", "model.train_batch_size=16", "model.num_layers=1")


def call(words, folder, env=None, timeout=420):
    """(exit code, stdout, stderr, seconds) of a Python process in ``folder``; 124 where it took too long."""
    started = time.monotonic()
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=folder, env={**os.environ, "PYTHONPATH": path, **(env or {})}, text=True, capture_output=True, timeout=timeout,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        return 124, str(error.stdout or ""), str(error.stderr or ""), time.monotonic() - started
    return done.returncode, done.stdout, done.stderr, time.monotonic() - started


def machine(device, folder):
    """What is here."""
    import torch

    found = {"torch": torch.__version__, "nvcc": bool(shutil.which("nvcc")), "ninja": bool(shutil.which("ninja"))}
    if device == "cuda":
        of = torch.cuda.get_device_properties(0)
        found |= {"device": of.name, "capability": f"{of.major}.{of.minor}", "num_devices": torch.cuda.device_count()}
    yield True, ", ".join(f"{k} {v}" for k, v in found.items()), found


def without_nvcc():
    """PATH and switches of a machine without a CUDA compiler."""
    kept = [p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "nvcc").exists()]
    return {"PATH": os.pathsep.join(kept), "CUDA_HOME": "/nonexistent"}


def kernels(device, folder):
    """Every scheme, dtype, shape and view against the decoded weight, in processes of their own."""

    def one(told):
        name, words, env = told
        words = [ROOT / "tests/gpu/kernels.py", *words, "--device", device]
        return name, call(words, folder, {"OMP_NUM_THREADS": "2", **env})

    asked = [(backend, [backend], {}) for backend in BACKENDS if backend not in PARTS]
    for backend, parts in PARTS.items():
        asked += [(f"{backend} {i + 1}/{parts}", [backend, "--part", i, parts], {}) for i in range(parts)]
    if device == "cuda" and shutil.which("nvcc"):
        asked.append(("modelopt without nvcc", ["modelopt", "--plain"], without_nvcc()))
    with ThreadPoolExecutor(len(asked)) as pool:
        for name, (code, out, err, seconds) in pool.map(one, asked):
            rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
            wrong = [r for r in rows if not r.get("ok") and "refused" not in r]
            refused = Counter(r["refused"] for r in rows if "refused" in r)
            told = f"{name}: {len(rows)} products, {len(wrong)} wrong, {sum(refused.values())} refused, {seconds:.0f} s"
            yield (
                not code and not wrong and bool(rows),
                told + (f"; exit code {code}: {err[-500:]}" if code else ""),
                rows,
            )
            for r in wrong[:12]:
                what = r.get("raised") or f"error {r['error']:.2g}, {r['tolerance']:.2g} is rounding"
                yield False, f"  {r['scheme']} {r['compute_dtype']} {r['shape']} {r['case']}: {what}", None
            for why, times in refused.most_common(8):
                yield True, f"  refused {times} times: {why}", None


def jobs(device, folder):
    """The main recipe in two dtypes, and a run of it again."""
    for dtype in ("float32", "bfloat16"):
        words = [
            "-m",
            "quantlab",
            "recipe=digits_backends",
            f"device={device}",
            f"model.dtype={dtype}",
            *QUICK,
            "--json",
        ]
        code, out, err, seconds = call(words, folder)
        rows = json.loads(out) if out.startswith("[") else []
        told = Counter(row["status"] for row in rows)
        yield not code, f"digits_backends in {dtype}: exit {code}, {dict(told)}, {seconds:.0f} s", rows
        for row in rows:
            if row["status"] == "FAILED":
                yield False, f"  {row['name']}: {str(row.get('error'))[:300]}", None
        ids = [
            row["run_id"] for row in rows if row["status"] == "FINISHED" and row.get("run_id") and "int8" in row["name"]
        ]
        for run_id in ids[-1:]:
            code, out, err, seconds = call(["-m", "quantlab", "reproduce", run_id], folder)
            yield not code, f"  reproduce: exit {code}, {seconds:.0f} s: {(out + err).strip()[-200:]}", {"out": out}


def handovers(device, folder):
    """What a sweep over two models and one job apart holds on the device before each job begins."""
    code, out, err, seconds = call([__file__, "--held", device], folder)
    held = [json.loads(line) for line in out.splitlines() if line.startswith('{"before"')]
    first = {row["model"]: row for row in reversed(held)}
    grown = [r for r in held if r["allocated_bytes"] > 1.05 * first[r["model"]]["allocated_bytes"] + 2**20]
    told = ", ".join(f"{row['before']} {row['allocated_bytes'] / 2**20:.1f}" for row in held)
    yield not code and not grown and len(held) > 3, f"MiB allocated before: {told}; exit {code}, {seconds:.0f} s", held
    if code:
        yield False, "  " + err[-1500:], None


def held(device):
    """In a process of its own: run the sweep, and print a line before each job."""
    import torch

    import quantlab
    from quantlab.running import job as jobs

    run_job = jobs.run_job

    def watched(session, bench, job, run):
        here = (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) if device == "cuda" else (0, 0)
        model = str(job.config.evaluation.guidance_scale)
        told = {"before": job.name, "model": model, "allocated_bytes": here[0], "reserved_bytes": here[1]}
        print(json.dumps(told), flush=True)
        return run_job(session, bench, job, run)

    jobs.run_job = watched
    rows = quantlab.run(
        overrides=[
            f"device={device}",
            # float8 of torchao runs apart on CUDA, and what the others hold must be gone by then
            "sweep.candidates=[{backend: quanto, dtype: int8}, {backend: torchao, dtype: float8_e4m3},"
            " {backend: gguf, dtype: q8_0}]",
            "evaluation.guidance_scale=1.5,2.5",
            *TINY,
        ],
        quiet=True,
    )
    sys.exit(any(row.status != "FINISHED" for row in rows))


def after_an_assert(device, folder):
    """A job that kills the context; the next one must finish, and the first must say what happened."""
    code, out, err, seconds = call([__file__, "--asserting", device], folder)
    rows = [json.loads(line) for line in out.splitlines() if line.startswith('{"name"')]
    told = {row["name"]: (row["status"], row["error"][:200]) for row in rows}
    failed = [name for name, (status, error) in told.items() if status == "FAILED" and "assert" in error]
    others = [name for name, (status, _) in told.items() if status == "FINISHED"]
    fine = len(failed) == 1 and any("gguf" in name for name in others)
    yield fine, f"{told}; exit {code}, {seconds:.0f} s" + ("" if fine else f": {err[-1500:]}"), rows


def asserting(device):
    """In a process of its own: two schemes, the first of which asserts on the device."""
    import torch

    import quantlab
    from quantlab.stages import quantize

    hand_over = quantize._hand_over

    def faulty(scheme, *rest):
        if scheme.backend.name == "quanto":
            torch.zeros(2, device=device)[torch.tensor([5], device=device)].sum().item()
        return hand_over(scheme, *rest)

    quantize._hand_over = faulty
    words = [
        f"device={device}",
        "sweep.candidates=[{backend: quanto, dtype: int8}, {backend: gguf, dtype: q8_0}]",
        *TINY,
    ]
    for row in quantlab.run(overrides=words, quiet=True):
        print(json.dumps({"name": row.name, "status": row.status, "error": row.error or ""}), flush=True)


def cards(device, folder):
    """With two devices: a pool of two, a device each, and what compare makes of it."""
    import torch

    if device != "cuda" or torch.cuda.device_count() < 2:
        yield True, "fewer than two devices: not run", None
        return
    words = [
        "-m",
        "quantlab",
        "-m",
        "backend=quanto,gguf,bitsandbytes",
        "launcher=pool",
        "launcher.num_workers=2",
        *TINY,
        "--json",
    ]
    code, out, err, seconds = call(words, folder)
    rows = json.loads(out) if out.startswith("[") else []
    fine = not code and all(row["status"] == "FINISHED" for row in rows)
    yield fine, f"pool: exit {code}, {dict(Counter(row['status'] for row in rows))}, {seconds:.0f} s", rows
    code, out, err, seconds = call(["-m", "quantlab", "compare", "sweep=latest", "--json"], folder)
    yield not code, f"compare: exit {code}: {err[-300:]}", {"out": out}


def marked(device, folder):
    """The tests that are marked ``gpu``: memory that does not suffice, pools, pipelines, language models and more."""
    if device != "cuda":
        return
    words = [
        "-m",
        "pytest",
        "-m",
        "gpu",
        f"-n{min(8, os.cpu_count() or 1)}",
        "--dist=worksteal",
        "-q",
        "--maxfail=40",
        "-p",
        "no:cacheprovider",
        ROOT / "tests",
    ]
    code, out, err, seconds = call(words, ROOT)
    yield not code, f"exit {code}, {seconds:.0f} s: {out.strip().splitlines()[-1:]}", {"out": out[-20000:]}
    for line in out.splitlines():
        if line.startswith(("FAILED", "ERROR")):
            yield False, f"  {line[:300]}", None


SECTIONS = {s.__name__: s for s in (machine, kernels, jobs, handovers, after_an_assert, cards, marked)}


def in_folder(name, device, folder):
    """The findings of a section; one that breaks off is a finding."""
    folder.mkdir()
    found = []
    try:
        found.extend(SECTIONS[name](device, folder))
    except Exception as error:  # noqa: BLE001 the other sections are to be told all the same
        found.append((False, f"{name} broke off: {type(error).__name__}: {error}", None))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sections", nargs="*", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument("--out", type=Path, help="the findings as JSON")
    parser.add_argument("--held", help=argparse.SUPPRESS)
    parser.add_argument("--asserting", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.held or given.asserting:
        return held(given.held) if given.held else asserting(given.asserting)
    findings, is_fine = [], True
    with tempfile.TemporaryDirectory() as folder:
        pool = ThreadPoolExecutor(len(given.sections))  # nothing here is timed, and most of it waits for a processor
        running = {name: pool.submit(in_folder, name, given.device, Path(folder) / name) for name in given.sections}
        for name, found in running.items():
            print(f"== {name}: {SECTIONS[name].__doc__}", flush=True)
            for fine, told, data in found.result():
                print(f"{'ok   ' if fine else 'FAULT'} {told}", flush=True)
                findings.append({"section": name, "ok": fine, "told": told, "data": data})
                is_fine &= fine
                if given.out:
                    given.out.write_text(json.dumps(findings, indent=1), encoding="utf-8")
    return sys.exit(not is_fine)


if __name__ == "__main__":
    main()
