"""What quantlab itself costs: commands without torch, a run beside the plain script of its row, a shared reference, the
README's main job beside its model's own arithmetic, and the memory of scoring a language model with a large vocabulary.

``python tests/benchmarks/bench_overhead.py [--seconds 60] [--row torchao_int8] [--only commands|run|sweep|main|score]``

Ratios of one session on one machine; each side of a ratio runs on one thread, and CPU seconds stand beside wall seconds
because other work on the machine disturbs only the latter. Needs the checkout and the libraries, no network.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import json
import os
import resource
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = ROOT / "tests" / "independent"
ROWS = {
    "bitsandbytes_nf4": (["backend=bitsandbytes", "dtype=nf4"], "bitsandbytes"),
    "torchao_int8": (["backend=torchao", "dtype=int8"], "torchao.quantization"),
    "torchao_int4_g64": (["backend=torchao", "dtype=int4", "group_size=64"], "torchao.quantization"),
    "quanto_int8": (["backend=quanto", "dtype=int8"], "optimum.quanto"),
    "gguf_q8_0": (["backend=gguf", "dtype=q8_0"], "gguf"),
    "modelopt_int8": (["backend=modelopt", "dtype=int8"], "modelopt.torch.quantization"),
}
"""Script -> words that ask quantlab for the same, and the module to import before the clock starts."""
COMMANDS = {
    "quantlab --help": ["--help"],
    "quantlab list backends": ["list", "backends"],
    "a refused combination": ["backend=quanto", "dtype=nf4"],
}
BATCH_SIZE, NUM_STEPS, TRAIN_STEPS, PILOT_SAMPLES = 100, 20, 40, 100
LIMIT = 0.05
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
"""What makes torch compute as on a processor that has neither AVX-512 nor 16-bit products."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the timed run, about")
    parser.add_argument("--row", choices=ROWS, default="torchao_int8")
    parser.add_argument("--repeats", type=int, default=1, help="of each side, alternating; the best counts")
    parser.add_argument("--only", choices=("commands", "run", "sweep", "main", "score"))
    parser.add_argument("--avx2", action="store_true", help="main: as on a processor without 16-bit arithmetic")
    parser.add_argument("--threads", type=int, default=2, help="main: of the job")
    parser.add_argument("--samples", type=int, default=200, help="main: of the evaluation")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        print(json.dumps(WORKERS[asked.worker](asked.row, asked.words)))
        return
    if asked.only in (None, "commands"):
        bench_commands()
    with tempfile.TemporaryDirectory() as folder:
        if asked.only in (None, "run"):
            bench_run(Path(folder), asked.row, asked.seconds, asked.repeats)
        if asked.only in (None, "sweep"):
            bench_sweep(Path(folder))
        if asked.only in (None, "main"):
            bench_main(Path(folder), asked.threads, asked.samples, AVX2 if asked.avx2 else {})
    if asked.only in (None, "score"):
        bench_score(asked.row, asked.repeats)


# -- commands that need no torch


def bench_commands() -> None:
    print("CPU seconds of commands, best of 3 (and of an interpreter that does nothing)")
    nothing = min(_cpu_seconds([sys.executable, "-c", "pass"]) for _ in range(3))
    print(f"  {'python -c pass':<28} {nothing:6.2f}")
    for name, words in COMMANDS.items():
        command = [sys.executable, "-m", "quantlab", *words]
        best = min(_cpu_seconds(command) for _ in range(3))
        print(f"  {name:<28} {best:6.2f}   imports torch: {'yes' if _imports_torch(words) else 'no'}")


def _cpu_seconds(command: Sequence[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True, check=False, env=_environment(), cwd=tempfile.gettempdir())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _imports_torch(words: Sequence[str]) -> bool:
    command = [sys.executable, "-X", "importtime", "-m", "quantlab", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=_environment(), cwd=tempfile.gettempdir()
    )
    return any(line.rpartition("|")[2].strip() == "torch" for line in done.stderr.splitlines())


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


# -- a run beside the script of its row


def bench_run(folder: Path, row: str, seconds: float, repeats: int) -> None:
    pilot = _work("quantlab", row, _request(folder, row, PILOT_SAMPLES))
    num = max(PILOT_SAMPLES, round(PILOT_SAMPLES * seconds / pilot["stages"]["evaluate"] / BATCH_SIZE) * BATCH_SIZE)
    asked = _request(folder, row, num)
    shared = _work("reference", row, asked)
    plain, ours = [], []
    for _ in range(repeats):
        ours.append(_work("quantlab", row, asked))
        plain.append(_work("script", row, [shared["weights"], shared["file"], str(BATCH_SIZE), str(NUM_STEPS)]))
    a, b = (min(runs, key=lambda r: r["cpu"]) for runs in (plain, ours))
    print(f"\nquantlab over the script of {row}: {num} samples, {NUM_STEPS} steps, batches of {BATCH_SIZE}, one thread")
    print(f"  {'':<44} {'wall s':>8} {'CPU s':>8}")
    for name, wall, cpu in [
        ("script, load to metrics", a["wall"], a["cpu"]),
        ("quantlab, run start to end", b["wall"], b["cpu"]),
        *((f"  of this, {name}", spent, "") for name, spent in b["stages"].items()),
        ("  of this, all else (record, track)", b["wall"] - sum(b["stages"].values()), ""),
        ("apart: composing the request", b["compose_wall"], b["compose_cpu"]),
        ("apart: imports of quantlab's run", b["import_wall"], b["import_cpu"]),
        ("apart: imports of the script", a["import_wall"], a["import_cpu"]),
        ("apart: opening the store, new", pilot["store_wall"], pilot["store_cpu"]),
        ("apart: reference outputs (once a setting)", shared["wall"], shared["cpu"]),
    ]:
        print(f"  {name:<44} {wall:8.2f} " + (f"{cpu:8.2f}" if cpu != "" else ""))
    for kind in ("wall", "cpu"):
        ratio = b[kind] / a[kind]
        print(f"  ratio {kind}: {ratio:.4f}; under {LIMIT:.0%}: {'yes' if ratio < 1 + LIMIT else 'no'}")
    fixed = b["cpu"] - a["cpu"]
    print(f"  difference {fixed:.2f} CPU s, which is {LIMIT:.0%} of a run of {fixed / LIMIT:.0f} s")
    agree = abs(b["latent_rel_mse"] - a["latent_rel_mse"]) <= 1e-6 * a["latent_rel_mse"]
    print(
        f"  same latent_rel_mse to 1e-6: {'yes' if agree else 'no'} ({b['latent_rel_mse']:.9g}, "
        f"{a['latent_rel_mse']:.9g})"
    )


def _request(folder: Path, row: str, num_samples: int) -> list[str]:
    """One candidate without noise floors, which the script does not measure either."""
    candidate = dict(word.split("=") for word in ROWS[row][0])
    recipe = folder / f"{row}.yaml"
    recipe.write_text("# @package _global_\n" + json.dumps({"sweep": {"floors": False, "candidates": [candidate]}}))
    return [f"recipe={recipe}", *_settings(folder), f"evaluation.num_samples={num_samples}"]


def _settings(folder: Path) -> list[str]:
    return [
        f"output_dir={folder}/outputs",
        f"tracking.uri=sqlite:///{folder}/mlflow.db",
        "num_threads=1",
        "device=cpu",
        f"model.num_train_steps={TRAIN_STEPS}",
        f"evaluation.batch_size={BATCH_SIZE}",
        f"evaluation.num_inference_steps={NUM_STEPS}",
        "evaluation.num_teacher_forced=0",
    ]


def _work(worker: str, row: str, words: Sequence[str], **more: str) -> dict[str, Any]:
    """Run one worker of this file in a process of its own; ``more`` goes into its environment."""
    command = [sys.executable, __file__, "--worker", worker, "--row", row, "--", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**_environment(), **more})
    if done.returncode:
        raise SystemExit(f"{worker} failed: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _timed(prefix: str, call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, {f"{prefix}wall": time.perf_counter() - wall, f"{prefix}cpu": time.process_time() - cpu}


def _import(names: Sequence[str]) -> None:
    for name in names:
        importlib.import_module(name)
    diffusers = importlib.import_module("diffusers")  # whose models are imported when they are first named
    _ = diffusers.DiTTransformer2DModel, diffusers.DDIMScheduler


def _script(row: str, words: Sequence[str]) -> dict[str, Any]:
    _, imports = _timed("import_", lambda: _import(["torch", ROWS[row][1]]))
    sys.argv = [str(SCRIPTS / f"{row}.py"), *words]
    sys.path.insert(0, str(SCRIPTS))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        _, spent = _timed("", lambda: runpy.run_path(sys.argv[0], run_name="__main__"))
    return {**json.loads(printed.getvalue().splitlines()[-1]), **spent, **imports}


def _quantlab(row: str, words: Sequence[str]) -> dict[str, Any]:
    modules = [
        "torch",
        ROWS[row][1],
        "mlflow",
        "quantlab.running.sweep",
        "scipy.linalg",
        "sklearn.datasets",
        "sklearn.model_selection",
        "PIL.Image",
    ]
    _, imports = _timed("import_", lambda: _import(modules))
    from quantlab import tracking
    from quantlab.planning.plan import plan
    from quantlab.running.sweep import run_plan

    request, composed = _timed("compose_", lambda: plan(words, multirun=True))
    store, opened = _timed("store_", lambda: tracking.open_store(request.jobs[0].config.tracking, Path.cwd()))
    reports, spent = _timed("", lambda: run_plan(request, quiet=True))
    report = reports[-1]
    tracked = tracking.get_run(store, report.run_id)
    return {
        **spent,
        **imports,
        **composed,
        **opened,
        "stages": {s.name: s.seconds for s in report.stages},
        "latent_rel_mse": tracked["metrics"]["quality/latent_rel_mse"],
    }


def _reference(row: str, words: Sequence[str]) -> dict[str, Any]:
    import torch

    from quantlab.datasets.table import DATASETS
    from quantlab.models.table import FAMILIES
    from quantlab.modules.kept import read_tree
    from quantlab.modules.trees import replaced
    from quantlab.planning.plan import plan
    from quantlab.stages.observe import observe, reference_key

    config = plan(words, multirun=True).jobs[0].config
    cache = Path(config.output_dir) / "cache"
    model = FAMILIES[config.model.family].load(config.model, config.device, cache, None)
    inputs = DATASETS[config.dataset.name].load(config.dataset, config.evaluation, model)
    _, spent = _timed("", lambda: observe(model, inputs, config.evaluation, cache))
    (kept,) = (cache / "reference").glob(f"{reference_key(model, inputs, config.evaluation)}.*.safetensors")
    file = cache / "reference.pt"
    own = replaced(read_tree(kept), lambda value: value.clone() if isinstance(value, torch.Tensor) else None)
    torch.save(own, file)  # which does not take tensors that are views of one storage
    return {**spent, "weights": model.parts["folder"], "file": str(file)}


# -- one reference for all jobs of a sweep


def bench_sweep(folder: Path) -> None:
    words = ["backend=quanto", "dtype=int8,int4,int2", "evaluation=quick", *_settings(folder)[:5]]
    print("\nthree jobs of one sweep")
    for when in ("first time", "again"):
        found = _work("sweep", "quanto_int8", words)
        print(f"  {when + ':':<12} {found['rows']} rows, the reference was computed {found['observed']} times")


def _sweep(row: str, words: Sequence[str]) -> dict[str, Any]:
    import quantlab
    from quantlab.protocols import diffusion

    calls = []
    observe = diffusion.observe

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return observe(*args, **kwargs)

    diffusion.observe = counted
    reports = quantlab.run(overrides=words, quiet=True)
    return {"rows": len(reports), "observed": len(calls)}


# -- the README's main job


def bench_main(folder: Path, threads: int, samples: int, simulated: dict[str, str]) -> None:
    """The share of ``quantlab recipe=digits_backends`` that is not what its model computes, in training and in use."""
    words = [f"output_dir={folder}/main", f"tracking.uri=sqlite:///{folder}/main.db", "sweep.isolation=none"]
    words.append(f"evaluation.num_samples={samples}")
    count = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    found = _work("main", "torchao_int8", [*words, f"num_threads={threads}", "device=cpu"], **count, **simulated)
    title = (
        f"quantlab recipe=digits_backends, {samples} samples, {threads} threads, torch uses {found['cpu_capability']}"
    )
    print(f"\n{title}: {found['rows']} rows, {found['num_emulated']} rows emulated")
    print(f"  {'':<44} {'wall s':>8} {'CPU s':>8}")
    parts = {"all of it": "", "training, once": "train_", "its model's forwards after that": "forward_"}
    for name, key in parts.items():
        print(f"  {name:<44} {found[f'{key}wall']:8.2f} {found[f'{key}cpu']:8.2f}")
    for kind in ("wall", "cpu"):
        rest = found[kind] - found[f"train_{kind}"] - found[f"forward_{kind}"]
        print(f"  share that is not the model's own arithmetic ({kind}): {rest / found[kind]:.3f}")
    for name, seconds in found["seconds"].items():
        print(f"    {name:<24} {seconds:6.1f} s")


def _main(row: str, words: Sequence[str]) -> dict[str, Any]:
    import diffusers
    import torch

    import quantlab
    from quantlab.models import digits_dit

    spent = {f"{part}_{kind}": 0.0 for part in ("train", "forward") for kind in ("wall", "cpu")}
    outermost: list[str] = []

    def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if outermost:
                return call(*args, **kwargs)
            outermost.append(part)
            try:
                result, took = _timed("", lambda: call(*args, **kwargs))
            finally:
                outermost.clear()
            for kind in ("wall", "cpu"):
                spent[f"{part}_{kind}"] += took[kind]
            return result

        return wrapped

    digits_dit.train_denoiser = timed("train", digits_dit.train_denoiser)
    network = diffusers.DiTTransformer2DModel
    network.forward = timed("forward", network.forward)
    reports, whole = _timed("", lambda: quantlab.run(recipe="digits_backends", overrides=list(words), quiet=True))
    return {
        **spent,
        **whole,
        "rows": len(reports),
        "num_emulated": sum(report.params.get("compute") == "emulated" for report in reports),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "seconds": {report.name: sum(stage.seconds for stage in report.stages) for report in reports},
    }


# -- scoring a large vocabulary


SCORED, VOCABULARY = 512, 152_064


def bench_score(row: str, repeats: int) -> None:
    one_set = SCORED * VOCABULARY * 4
    found = {worker: [_work(worker, row, []) for _ in range(repeats)] for worker in ("score_plainly", "score")}
    print(f"\nscoring {SCORED} positions x {VOCABULARY} logits (one set: {one_set / 2**20:.0f} MiB), one thread")
    for worker, title in (("score_plainly", "all positions at once"), ("score", "quantlab's language protocol")):
        peak = min(run["peak_bytes"] for run in found[worker])
        spent = min(run["wall"] for run in found[worker])
        print(f"  {title + ':':<32} peak {peak / one_set:5.2f} sets, {spent:6.2f} s")
    walls = [min(run["wall"] for run in found[worker]) for worker in ("score", "score_plainly")]
    same = found["score"][0]["kld"] == found["score_plainly"][0]["kld"]
    print(f"  ratio of times: {walls[0] / walls[1]:.3f}; same kld to the last bit: {'yes' if same else 'no'}")


def _score(row: str, words: Sequence[str]) -> dict[str, Any]:
    from quantlab.protocols import language
    from quantlab.protocols.output_head import HEAD, logits_by_parts

    model, candidate, inputs, hidden = _large_vocabulary()
    models = logits_by_parts(model, HEAD), logits_by_parts(candidate, HEAD)
    return _with_peak(lambda: language._token_table(*models, hidden, hidden, inputs)["kld"][0].tolist())


def _score_plainly(row: str, words: Sequence[str]) -> dict[str, Any]:
    import torch

    model, candidate, inputs, hidden = _large_vocabulary()

    def kld() -> list[float]:
        with torch.no_grad():
            log_p, log_q = (m.components["model"].lm_head(hidden[0, :-1]).log_softmax(-1) for m in (model, candidate))
            p = log_p.exp()
            mass, other = p.sum(-1, dtype=torch.float64), log_q.exp().sum(-1, dtype=torch.float64)
            terms = torch.where(p > 0, p * (log_p - log_q), 0.0)
            found = terms.sum(-1, dtype=torch.float64) / mass - (mass.log() - other.log())
            return found.tolist()

    return _with_peak(kld)


def _large_vocabulary() -> tuple[Any, Any, Any, Any]:
    """A model, another one, one window of tokens, and hidden states for it."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from quantlab.models.loaded import LoadedModel
    from quantlab.protocols.language import TextInputs

    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    models = []
    for _ in range(2):
        net = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.3, **sizes)).eval()
        models.append(LoadedModel(name="large", protocol="language", components={"model": net}))
    ids = torch.randint(0, VOCABULARY, (1, SCORED + 1))
    inputs = TextInputs(ids, ("window 0",), np.zeros(1, dtype=np.int64), "", {})
    return *models, inputs, torch.randn(1, SCORED + 1, 64)


def _with_peak(call: Callable[[], list[float]]) -> dict[str, Any]:
    """Wall seconds, and by how much the process grew at most meanwhile."""
    import psutil

    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    found, spent = _timed("", call)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    return {"kld": found, "peak_bytes": peak - before, **spent}


WORKERS = {
    "quantlab": _quantlab,
    "reference": _reference,
    "script": _script,
    "sweep": _sweep,
    "main": _main,
    "score": _score,
    "score_plainly": _score_plainly,
}

if __name__ == "__main__":
    main()
