"""Peak memory and time of quantizing a model that lies on the disk: streamed layer by layer, and loaded whole as before.

    python tests/benchmarks/bench_memory.py [--parameters 1e9] [--only BACKEND] [--device cuda | --count allocated]
                                            [--streamed | --export]

A random transformer in bfloat16 is written in shards. Each way runs in a process of its own. The ratio is of the peak of
anonymous memory (``RssAnon``: without the pages of files) over (quantized bytes + the largest layer in float32 + 300 MiB
of libraries); 1.15 is to be kept. What the libraries and the model's code truly hold once they are imported stands
beside it, and ``above`` is the ratio of what came on top of that. ``cpu`` and ``wall`` are streaming's time over that of
loading whole and quantizing, of the processor and by the clock; 1.3 by the clock is to be kept, which wants a machine
that has nothing else to do. ``--streamed`` leaves the other way out.
With ``--device cuda`` it is the peak of bytes that torch has allocated there, where libraries hold nothing and are allowed
nothing. ``--count allocated`` is the nearest to it that a CPU can tell, and the same at every run: what torch's own
allocator gives out at most, over the same bytes. It sees tensors and what kernels allocate between them, not the pages of
the checkpoint, which are no memory of the process, nor what numpy and a library's own C++ allocate. And it counts the
CPU's code paths: bitsandbytes, torchao and GGUF quantize and
multiply with other kernels on CUDA, and the caching allocator rounds sizes up there. Its times are the profiler's.

``--export`` measures an export instead, from the model on the disk to the checked folder: the candidate made from the
files and emptied before the check, against the whole model with the candidate beside it. ``own`` is the exporting
process, ``all`` with the one that checks.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from quantlab.models.architectures import read_architecture
from quantlab.models.outline import empty
from quantlab.modules.source import Source, shards_of
from quantlab.stages.quantize import quantize_component
from quantlab.stages.select import QuantizationRequest, select_layers, select_streamed
from quantlab.vocabulary.axes import QuantizationAxes
from quantlab.vocabulary.schema import ModelConfig
from tests.support.allocated import Allocated
from tests.support.tables import storages, the_scheme
from tests.support.tiny_text_models import byte_tokenizer

MIB = 2**20
LIBRARIES = 300 * MIB
SCHEMES = {
    "bitsandbytes": "nf4",
    "torchao": "int8",
    "quanto": "int4",
    "gguf": "q8_0",
    "modelopt": "int4",
}
MAX_PEAK, MAX_SLOWER = 1.15, 1.3


def write_model(folder: Path, parameters: float) -> None:
    """A Llama without embeddings to speak of, about so many parameters, in shards of 500 MB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width = 2048
    layer = 4 * width * width + 3 * width * 4 * width
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=max(1, round(parameters / layer)),
        num_attention_heads=16,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="500MB")
    byte_tokenizer().save_pretrained(folder)


def request_of(backend: str, device: str) -> QuantizationRequest:
    axes = QuantizationAxes(backend=backend, dtype=SCHEMES[backend])
    return QuantizationRequest(
        component="model",
        scheme=the_scheme(axes),
        compute_dtype="bfloat16",
        device=device,
        default_exclusions=("lm_head",),
    )


def anonymous(process: str = "self") -> int:
    """Bytes of a process that no file holds."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("no RssAnon here")


def of_children() -> int:
    """The same of the processes that this one has started."""
    found = 0
    for children in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # one that has just ended
            found += sum(anonymous(child) for child in children.read_text().split())
    return found


class PeakOnDevice:
    """What torch has allocated on a CUDA device at most while open."""

    def __enter__(self) -> PeakOnDevice:
        torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *_: object) -> None:
        self.value = torch.cuda.max_memory_allocated()


class PeakAllocated(Allocated):
    """What torch's CPU allocator has given out at most while open."""

    @property
    def value(self) -> int:
        return self.peak_bytes


class Peak:
    """The largest RssAnon while open, looked at every 2 ms; ``together`` with the children's."""

    def __enter__(self) -> Peak:
        self.value, self.done = anonymous(), threading.Event()
        self.together = self.value
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.002):
            now = anonymous()
            self.value, self.together = max(self.value, now), max(self.together, now + of_children())

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        self.value = max(self.value, anonymous())


def streamed(folder: Path, backend: str, device: str) -> torch.nn.Module:
    part = read_architecture(ModelConfig(family="causal_lm", path=str(folder)), "model").parts["model"]
    source = Source(module=empty("model", part, "bfloat16"), shards=shards_of("model", folder), device=device)
    module, request = copy.deepcopy(source.module), request_of(backend, device)
    return quantize_component(request, module, source.module, select_streamed(request, module), source=source)[0]


def whole(folder: Path, backend: str, device: str) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    original = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval().requires_grad_(False).to(device)
    )
    module, request = copy.deepcopy(original), request_of(backend, device)
    return quantize_component(request, module, original, select_layers(request, module))[0]


WAYS = {"streamed": streamed, "whole": whole}


def warm_up(folder: Path, backend: str, device: str = "cpu") -> None:
    """Import the libraries, and the model's own code."""
    part = read_architecture(ModelConfig(family="causal_lm", path=str(folder)), "model").parts["model"]
    empty("model", part, "bfloat16")
    small = torch.nn.ModuleDict({"a": torch.nn.Linear(512, 512, dtype=torch.bfloat16)}).to(device)
    quantize_component(request_of(backend, device), copy.deepcopy(small), small)


def measure(folder: Path, backend: str, way: str, device: str = "cpu", count: str = "resident") -> dict[str, float]:
    """In this process: libraries are warm before the clock starts, and what they hold on a CPU counts."""
    warm_up(folder, backend, device)
    with_libraries = device == "cpu" and count == "resident"
    before = anonymous() if with_libraries else 0
    began, busy = time.perf_counter(), time.process_time()
    with Peak() if with_libraries else PeakAllocated() if device == "cpu" else PeakOnDevice() as peak:
        module = WAYS[way](folder, backend, device)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - busy
    held = sum(storages(module).values())
    layer = 2048 * 8192 * 4
    allowed = held + layer + (LIBRARIES if with_libraries else 0)
    return {
        "peak_mib": peak.value / MIB,
        "libraries_mib": before / MIB,
        "quantized_mib": held / MIB,
        "ratio": peak.value / allowed,
        "ratio_above_libraries": (peak.value - before) / (held + layer),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
    }


def exporting(folder: Path, backend: str, way: str) -> dict[str, float]:
    """Export the model at ``folder``; what it took beside the libraries, in MiB."""
    from quantlab.backends import torchao
    from quantlab.datasets.table import DATASETS
    from quantlab.exporting.whole import export
    from quantlab.models.table import family_of
    from quantlab.planning.plan import plan
    from quantlab.running.placement import hollow, source_for
    from quantlab.running.workbench import chosen
    from quantlab.stages.candidate import Making, make_candidate
    from tests.support.exports import Described, as_row, measure_stage
    from tests.support.shell import text_words
    from tests.support.tiny_text_models import TEXT

    told, cache = folder / "text.txt", folder / "cache"
    told.write_text(TEXT)
    words = [w for w in text_words("cpu") if not w.startswith("calibration")]
    model_words = ["model=causal_lm", f"model.path={folder}", "model.dtype=bfloat16"]
    data = ["dataset=text", f"dataset.path={told}"]
    (job,) = plan([*model_words, *data, *words, f"backend={backend}", f"dtype={SCHEMES[backend]}"]).jobs
    is_streamed = way == "streamed"
    if not is_streamed:
        del torchao.flattened
    warm_up(folder, backend)
    before = anonymous()
    with Peak() as peak, tempfile.TemporaryDirectory(dir=folder) as place:
        if is_streamed:
            model = hollow(job.config, "cpu", cache, lambda *_: None)
        else:
            model = family_of(job.config.model).load(job.config.model, "cpu", cache)
        inputs = DATASETS["text"].load(job.config.dataset, job.config.evaluation, model)
        schemes = chosen(model, job)
        made = make_candidate(
            Making(
                model=model,
                job=job,
                calibration_inputs=lambda: inputs,
                schemes=schemes,
                reads={},
                cache_dir=cache,
                advance=lambda *_: None,
                stage=lambda name: measure_stage(name, "cpu"),
                source=source_for(model, job, schemes) if is_streamed else None,
            )
        )
        described = Described(row=as_row({"protocol": model.protocol, "name": job.name}))
        done = export(
            Path(place) / "out", job, model, made.model, made.quantization, inputs, described, is_last=is_streamed
        )
    return {
        "files_mib": done.num_bytes / MIB,
        "libraries_mib": before / MIB,
        "own_mib": (peak.value - before) / MIB,
        "all_mib": (peak.together - before) / MIB,
    }


def print_exports(folder: Path, only: str | None) -> None:
    """A row a backend: both ways, and the ratio of their peaks."""
    print("backend       dtype    files  libraries       own (whole) ratio       all (whole) ratio   [MiB]")
    for backend in [only] if only else [b for b in SCHEMES if b != "quanto"]:  # transformers saves nothing of quanto
        new, old = (apart(folder, backend, f"export {way}") for way in WAYS)
        told = "".join(f"{new[k]:10.0f} {f'({old[k]:.0f})':>7} {new[k] / old[k]:5.2f}" for k in ("own_mib", "all_mib"))
        print(
            f"{backend:<13} {SCHEMES[backend]:<5} {new['files_mib']:8.0f} {new['libraries_mib']:10.0f}{told}",
            flush=True,
        )


def apart(folder: Path, backend: str, way: str, *options: str) -> dict[str, float]:
    command = [sys.executable, __file__, *options, "--measure", str(folder), backend, way]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parameters", type=float, default=1e9)
    parser.add_argument("--only", choices=SCHEMES)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--count", choices=["resident", "allocated"], default="resident")
    parser.add_argument("--streamed", action="store_true")
    parser.add_argument("--export", action="store_true")
    parser.add_argument("--measure", nargs=3)
    args = parser.parse_args()
    if args.measure:
        folder, backend, way = args.measure
        kind, _, rest = way.partition(" ")
        where = Path(folder)
        found = exporting(where, backend, rest) if rest else measure(where, backend, kind, args.device, args.count)
        print(json.dumps(found))
        return 0
    good, options = True, ("--device", args.device, "--count", args.count)
    with tempfile.TemporaryDirectory(prefix="quantlab-bench-") as name:
        write_model(Path(name), args.parameters)
        if args.export:
            print_exports(Path(name), args.only)
            return 0
        print(
            "backend       dtype  quantized  libraries   streamed  ratio  above   whole  ratio    cpu   wall   [MiB, s]"
        )
        for backend in [args.only] if args.only else SCHEMES:
            new = apart(Path(name), backend, "streamed", *options)
            good &= new["ratio"] <= MAX_PEAK
            beside = ""
            if not args.streamed:
                old = apart(Path(name), backend, "whole", *options)
                busy, slower = (new[name] / old[name] for name in ("cpu_seconds", "seconds"))
                good &= slower <= MAX_SLOWER or args.count == "allocated"
                took = f"{new['seconds']:.1f} over {old['seconds']:.1f}"
                beside = f"{old['peak_mib']:7.0f} {old['ratio']:6.2f} {busy:6.2f} {slower:6.2f}   {took}"
            print(
                f"{backend:<13} {SCHEMES[backend]:<5} {new['quantized_mib']:10.0f} {new['libraries_mib']:10.0f} "
                f"{new['peak_mib']:10.0f} {new['ratio']:6.2f} {new['ratio_above_libraries']:6.2f} {beside}",
                flush=True,
            )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
