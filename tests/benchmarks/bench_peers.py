"""quantlab beside what a user would take instead, on the same tokens and seeds: ``python tests/benchmarks/bench_peers.py``
``[--only language harness llama images] [--windows 8] [--images 100] [--place DIR]``.

* ``language``: a sweep of five schemes of SmolLM2, against one script that does all five with transformers, and against a
  script a scheme; and against one script that, as quantlab does, computes with the 4-bit codes that are stored
  (bitsandbytes repacks them lossily on CPUs with bfloat16 arithmetic, which is faster).
* ``harness``: the same sweep against lm-evaluation-harness, a process a scheme and one for the reference. It may live in an
  environment of its own: ``--harness-python``.
* ``llama``: a sweep of three GGUF schemes against llama.cpp (``xllamacpp``, which may be named in ``PYTHONPATH``) on the
  same blocks; llama.cpp's kernels round activations too, so that its divergence is larger. Whole against whole: its
  checkpoint is converted by the package ``gguf`` and quantized by its own function, all files in one process, then a
  process a file evaluates. Evaluation alone stands beside.
* ``images``: a sweep of five schemes of the digits model against a Diffusers loop, at once and a script a scheme.

Each side is timed from the start of its process to its end, imports included, on one thread; a model is prepared before,
and so is the store, once for all sweeps of a folder. Each sweep makes its reference anew.
The sweep measures what the script does: no noise floors, continuations or teacher-forced metrics (``--whole``: with them).
What it does beside is told apart as it is measured (``peers/sampled.py``), and a sweep without a store stands beside.
A peer that is not installed is left out with the reason. It wants a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PEERS = Path(__file__).parent / "peers"
sys.path.insert(0, str(PEERS))

from sampled import BESIDE, QUANTIZING  # noqa: E402
from schemes import WORDS  # noqa: E402

LENGTH, STEPS, TRAIN_STEPS = 256, 20, 40
GGUF = {f"gguf {dtype}": {"backend": "gguf", "dtype": dtype} for dtype in ("q8_0", "q5_0", "q4_0")}
EXTRAS = ["sweep.floors=false", "evaluation.num_continuations=0", "evaluation.num_teacher_forced=0"]
PARTS = ("language", "harness", "llama", "images")
TASK = """task: peers
dataset_path: json
dataset_kwargs: {data_files: {test: TEXTS}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""


@dataclass(frozen=True)
class Ran:
    """Processes that did one thing: their seconds, the largest peak, and what the last line of each said."""

    wall_s: float
    cpu_s: float
    peak_bytes: int
    said: list[dict[str, dict[str, float]]]
    parts: dict[str, float] = field(default_factory=dict)
    """Of a sweep: what its CPU seconds went to."""

    def and_then(self, other: Ran) -> Ran:
        """Both, one after the other; what the other one said."""
        peak = max(self.peak_bytes, other.peak_bytes)
        return Ran(self.wall_s + other.wall_s, self.cpu_s + other.cpu_s, peak, other.said)


def ran(folder: Path, *commands: Sequence[str]) -> Ran:
    """Run them one after the other; exits with the error of one that fails."""
    more = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    wall = cpu = 0.0
    peak, said = 0, []
    for command in commands:
        began = time.perf_counter()
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = subprocess.Popen(
                command, cwd=folder, env={**os.environ, "PYTHONPATH": path, **more}, stdout=out, stderr=err
            )
            _, status, used = os.wait4(process.pid, 0)
            wall += time.perf_counter() - began
            process.returncode = os.waitstatus_to_exitcode(status)
            out.seek(0)
            err.seek(0)
            if process.returncode:
                sys.exit(f"{' '.join(command)}\n{err.read()[-4000:]}")
            said.append(_said(out.read()))
        cpu += used.ru_utime + used.ru_stime
        peak = max(peak, used.ru_maxrss * 1024)
    return Ran(wall, cpu, peak, said)


def _said(text: str) -> Any:
    """A whole output of JSON, or its last line."""
    try:
        return json.loads(text)
    except ValueError:
        return json.loads(text.strip().splitlines()[-1])


def script(name: str, *words: str, python: str = sys.executable) -> list[str]:
    """A peer's process."""
    return [python, str(PEERS / f"{name}.py"), *words]


def sweep(folder: Path, schemes: dict[str, dict[str, Any]], words: Sequence[str]) -> Ran:
    """The schemes by quantlab, in one command; each row's quality as a script says it."""
    rows = "\n".join(f"    - {json.dumps(scheme)}" for scheme in schemes.values())
    (folder / "peers.yaml").write_text(f"# @package _global_\nsweep:\n  candidates:\n{rows}\n", encoding="utf-8")
    asked = ["recipe=peers.yaml", "device=cpu", "num_threads=1", "sweep.force=true", "-q", "--json", *words]
    for cached in ("reference", "known"):
        shutil.rmtree(folder / "outputs" / "cache" / cached, ignore_errors=True)
    done = ran(folder, script("sampled", "parts.json", *asked))
    parts = json.loads((folder / "parts.json").read_text(encoding="utf-8"))
    rows: list[Any] = [row for row in done.said[0] if "quantization/coverage" in row["metrics"]]  # type: ignore[attr-defined]
    prefix = "quality/"
    found = [{k.removeprefix(prefix): v for k, v in row["metrics"].items() if k.startswith(prefix)} for row in rows]
    return replace(done, said=[dict(zip(schemes, found, strict=True))], parts=parts)


def told(title: str, ours: dict[str, Ran], peers: dict[str, Ran], metrics: Sequence[str]) -> None:
    """The table of one comparison: seconds, memory, and the first sweep's over each; then what its seconds went to."""
    print(f"\n{title}")
    first, *others = ours.values()
    heads = f"  {'':<44} {'wall s':>8} {'CPU s':>8} {'peak MiB':>9}   quantlab over it: wall, CPU, peak"
    print(f"{heads}{'; without a store' if others else ''}")
    for name, one in {**ours, **peers}.items():
        ratios = [first.wall_s / one.wall_s, first.cpu_s / one.cpu_s, first.peak_bytes / one.peak_bytes]
        more = "   " + ", ".join(f"{ratio:.2f}" for ratio in ratios)
        more += "".join(f"; CPU {other.cpu_s / one.cpu_s:.2f}" for other in others)
        more = more if name in peers else ""
        print(f"  {name:<44} {one.wall_s:8.1f} {one.cpu_s:8.1f} {one.peak_bytes / 2**20:9.0f}{more}", flush=True)
    listed = sorted(first.parts.items(), key=lambda part: -part[1])
    print(f"  of quantlab's CPU seconds: {', '.join(f'{part} {seconds:.1f}' for part, seconds in listed)}")
    beside = sum(first.parts.get(part, 0.0) for part in BESIDE)
    print(
        f"  no script does {', '.join(BESIDE)}: {beside:.1f} s; without them over each: "
        + "; ".join(f"{name} {(first.cpu_s - beside) / one.cpu_s:.2f}" for name, one in peers.items())
    )
    for metric in metrics:
        for name, one in peers.items():
            theirs = {scheme: row[metric] for part in one.said for scheme, row in part.items() if metric in row}
            pairs = [f"{s} {first.said[0][s][metric]:.4g} / {value:.4g}" for s, value in theirs.items() if s != "none"]
            if pairs:
                print(f"  {metric}, quantlab / {name}: {'; '.join(pairs)}")


def sweeps(folder: Path, schemes: dict[str, dict[str, Any]], words: Sequence[str]) -> dict[str, Ran]:
    """The sweep as it is, and without a store."""
    return {
        "quantlab, one sweep": sweep(folder, schemes, words),
        "quantlab, one sweep, tracking=none": sweep(folder, schemes, [*words, "tracking=none"]),
    }


def language(folder: Path, asked: argparse.Namespace, made: dict[str, str]) -> None:
    """The five schemes of SmolLM2; against transformers and lm-evaluation-harness."""
    words = [
        "model=smollm2_135m",
        "dataset=text",
        f"dataset.path={made['text']}",
        f"evaluation.num_samples={asked.windows}",
        "evaluation.perplexity_protocol=ppl/v1",
        *([] if asked.whole else EXTRAS),
    ]
    ours = sweeps(folder, WORDS, words)
    what = f"SmolLM2-135M, {asked.windows} windows of {LENGTH} tokens, {len(WORDS)} schemes and the reference"
    place = (made["smollm2"], made["text"], str(LENGTH))
    if "language" in asked.only:
        peers = {
            "transformers, one script for all": ran(folder, script("language", *place, *WORDS)),
            "transformers, a script a scheme": ran(folder, *(script("language", *place, one) for one in WORDS)),
            "transformers, one script, weights as stored": ran(
                folder, script("language", *place, "--as-stored", *WORDS)
            ),
        }
        told(what, ours, peers, ("kld_mean", "ppl"))
    if "harness" in asked.only:
        python = asked.harness_python or sys.executable
        there = subprocess.run([python, "-c", "import lm_eval"], capture_output=True, check=False).returncode == 0
        if not there:
            print("\nharness: lm_eval is not there: pip install lm_eval, or name its interpreter by --harness-python")
            return
        (folder / "task.yaml").write_text(TASK.replace("TEXTS", made["texts"]), encoding="utf-8")
        each = (
            script("harness", made["smollm2"], str(folder), str(LENGTH), s, python=python) for s in ("none", *WORDS)
        )
        told(what, ours, {"lm-evaluation-harness, a process a scheme": ran(folder, *each)}, ())


def llama(folder: Path, asked: argparse.Namespace, made: dict[str, str]) -> None:
    """Three GGUF schemes of SmolLM2, against llama.cpp."""
    if importlib.util.find_spec("xllamacpp") is None:
        print("\nllama: llama.cpp is not there: pip install --no-deps xllamacpp, or name its folder in PYTHONPATH")
        return
    words = [
        "model=smollm2_135m",
        "dataset=text",
        f"dataset.path={made['text']}",
        f"evaluation.num_samples={asked.windows}",
        "evaluation.perplexity_protocol=ppl/v1",
        *([] if asked.whole else EXTRAS),
    ]
    ours = sweep(folder, GGUF, words)
    files = ran(folder, script("llama", "files", made["smollm2"], str(folder), *GGUF))
    place = (str(folder), made["ids"])
    base = ran(folder, script("llama", "base", *place))
    alone = base.and_then(ran(folder, *(script("llama", "compare", *place, one) for one in GGUF)))
    what = f"SmolLM2-135M as GGUF, {asked.windows} windows of {LENGTH} tokens, {len(GGUF)} schemes and the reference"
    peers = {"llama.cpp, its files and a process a file": files.and_then(alone)}
    told(what, {"quantlab, one sweep": ours}, peers, ("kld_mean", "ppl"))
    rest = ours.cpu_s - ours.parts[QUANTIZING]
    print(
        f"  evaluation alone, CPU s: quantlab without quantizing {rest:.1f}, llama.cpp without its files "
        f"({files.cpu_s:.1f}) {alone.cpu_s:.1f}: {rest / alone.cpu_s:.2f}"
    )


def images(folder: Path, asked: argparse.Namespace, made: dict[str, str]) -> None:
    """The five schemes of the digits model, against a Diffusers loop."""
    words = [
        "model=digits_dit",
        f"model.num_train_steps={TRAIN_STEPS}",
        f"evaluation.num_samples={asked.images}",
        *([] if asked.whole else EXTRAS),
    ]
    ours = sweeps(folder, WORDS, words)
    place = (made["digits"], made["seeds"], str(STEPS))
    peers = {
        "Diffusers, one script for all": ran(folder, script("images", *place, *WORDS)),
        "Diffusers, a script a scheme": ran(folder, *(script("images", *place, one) for one in WORDS)),
    }
    what = (
        f"A small diffusion transformer, {asked.images} images, {STEPS} steps, {len(WORDS)} schemes and the reference"
    )
    told(what, ours, peers, ("psnr_db",))


def main() -> None:
    """Print all that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--windows", type=int, default=8, help="of 256 tokens")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--whole", action="store_true", help="quantlab with floors, continuations, teacher forcing")
    parser.add_argument("--harness-python", help="an interpreter that has lm_eval, transformers and the backends")
    parser.add_argument("--place", type=Path, help="a folder that keeps the prepared models; else a temporary one")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.place.absolute() if asked.place else Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        kinds = {"images" if part == "images" else "language" for part in asked.only}
        words = (str(asked.windows), str(LENGTH), str(asked.images), str(TRAIN_STEPS), *sorted(kinds))
        (made,) = ran(folder, script("prepare", *words)).said
        if {"language", "harness"} & set(asked.only):
            language(folder, asked, made)
        if "llama" in asked.only:
            llama(folder, asked, made)
        if "images" in asked.only:
            images(folder, asked, made)
    print(f"\none thread of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
