"""Peaks of a whole run at a budget beside what was planned, of a model at its true size with random weights.

    python tests/benchmarks/bench_full_size.py flux_dev --device-gib 24 [--place DIR] [WORD ...]

The architecture (one of ``conf/architectures``, see :data:`TINY`) is written once into ``--place`` in bfloat16, with the
tokenizers of tests and random values that keep activations near 1; then a job is planned and run there, nf4 unless a
``WORD`` says otherwise. Numbers of quality mean nothing; bytes, seconds and "does it fit" do. ``--layers N`` makes a
smaller one for a first try.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from quantlab.models.architectures import Part
from quantlab.models.outline import empty
from quantlab.planning.architectures import shipped_architectures
from tests.support.tiny_pipelines import BUILDERS
from tests.support.tiny_text_models import TEXT, byte_tokenizer

GIB = 2**30
TINY = {"flux_dev": "flux", "sd35_medium": "sd3", "sdxl": "sdxl", "llama_3_1_8b": "", "qwen3_8b": ""}
"""Model -> the tiny pipeline whose tokenizers and scheduler serve it; "" for a language model."""
PIPELINE = (
    "evaluation.num_samples=2", "evaluation.num_inference_steps=2", "evaluation.num_teacher_forced=1",
    "evaluation.batch_size=1", "evaluation.height=1024", "evaluation.width=1024", "calibration.num_samples=2",
)  # fmt: skip
LANGUAGE = ("dataset=text", "evaluation.num_samples=4", "evaluation.context_length=512", "evaluation.batch_size=1")
SCHEME = ("backend=bitsandbytes", "dtype=nf4")
LAYERS = ("num_layers", "num_single_layers", "num_hidden_layers", "num_decoder_layers")


def values(shape: torch.Size, device: str) -> torch.Tensor:
    """Matrices and kernels that keep the size of what they multiply; ones for a vector."""
    if len(shape) < 2:
        return torch.ones(shape, dtype=torch.bfloat16)
    made = torch.randn(shape, device=device, dtype=torch.bfloat16)
    return (made * (shape[0] / made.numel()) ** 0.5).cpu()


def shards(module: torch.nn.Module, device: str, most_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    """The values, tied ones once, in parts of about so many bytes."""
    part: dict[str, torch.Tensor] = {}
    known = {name for name, _ in module.named_parameters()}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name not in known and name not in module.state_dict():
            continue
        part[name] = values(tensor.shape, device) if name in known else tensor
        if name.endswith("bias"):
            part[name] = torch.zeros_like(part[name])
        if sum(t.nbytes for t in part.values()) > most_bytes:
            yield part
            part = {}
    yield part


def write_part(part: Part, folder: Path, device: str, layers: int | None) -> None:
    """A component as its library saves it."""
    from safetensors.torch import save_file

    config = dict(part.config)
    if layers:
        config |= {k: layers for k in LAYERS if k in config or "Transformer2D" in part.class_name and k in LAYERS[:2]}
    if part.class_name == "AutoencoderKL":
        config |= {"shift_factor": 0.0}
    module = empty(folder.name, Part(class_name=part.class_name, config=config), "bfloat16")
    if hasattr(module, "save_config"):
        module.save_config(folder)
    else:
        module.config.update({"architectures": [part.class_name], "dtype": torch.bfloat16})
        module.config.save_pretrained(folder)
    stem = "diffusion_pytorch_model" if hasattr(module, "save_config") else "model"
    index: dict[str, str] = {}
    for number, tensors in enumerate(shards(module, device, 4 * GIB)):
        name = f"{stem}-{number:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def write_model(name: str, folder: Path, device: str, layers: int | None) -> None:
    """The whole model, or nothing where it lies there already."""
    if (folder / "done").exists():
        return
    architecture = shipped_architectures()[name]
    tiny = TINY[name]
    if tiny:
        BUILDERS[tiny](folder)
        for file in (f for part in architecture.parts for f in (folder / part).glob("*model*")):
            file.unlink()
    else:
        byte_tokenizer().save_pretrained(folder)
    for part_name, part in architecture.parts.items():
        write_part(part, folder / part_name if tiny else folder, device, layers)
    (folder / "done").touch()


def quantlab(words: list[str]) -> Any:
    """What a command prints as JSON."""
    done = subprocess.run([sys.executable, "-m", "quantlab", *words, "--json"], stdout=subprocess.PIPE, text=True)
    if not done.stdout.strip():
        raise SystemExit(f"exit code {done.returncode}: {' '.join(words)}")
    return json.loads(done.stdout)


def show(planned: dict[str, Any], rows: list[dict[str, Any]], device_gib: float) -> None:
    """The plan of the first job, then each row's stages, and what took the most."""
    print(f"planned: {planned['placement']}, fits {planned['fits']}")
    for phase in planned["phases"]:
        print(f"  {phase['name']:<24} {phase['device_bytes'] / GIB:8.3f} GiB")
    largest = 0.0
    for row in rows:
        print(f"{row['name']}: {row['status']} {row.get('error') or ''}")
        metrics = row["metrics"]
        for key in [k for k in metrics if k.startswith("memory/") and k.endswith("/peak_alloc_bytes")]:
            stage = key.split("/", 1)[1].rsplit("/", 1)[0]
            reserved = metrics[key.replace("alloc", "reserved")]
            largest = max(largest, reserved / GIB)
            seconds = metrics.get(f"perf/{stage}_s", float("nan"))
            print(
                f"  {stage:<24} {metrics[key] / GIB:8.3f} GiB allocated {reserved / GIB:8.3f} reserved {seconds:6.1f} s"
            )
    kept = "kept" if largest <= device_gib else "NOT KEPT"
    print(f"largest {largest:.3f} GiB of {device_gib:g}: {kept}" if largest else "no peaks: they are a CUDA device's")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=TINY)
    parser.add_argument("--device-gib", type=float, default=24)
    parser.add_argument("--place", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int)
    parser.add_argument("words", nargs="*")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = args.place or Path(temporary) / args.model
        began = time.perf_counter()
        write_model(args.model, place, args.device, args.layers)
        print(f"{args.model}: written in {time.perf_counter() - began:.0f} s", flush=True)
        words = [f"model={args.model}", f"model.path={place}", f"device={args.device}", "sweep.floors=false"]
        if not any(word.startswith("sweep.candidates=") for word in args.words):
            words += SCHEME
        if TINY[args.model]:
            words += PIPELINE
        else:
            (place / "text.txt").write_text(TEXT * 4)
            words += [*LANGUAGE, f"dataset.path={place / 'text.txt'}"]
        words += [f"memory.device_gib={args.device_gib:g}", f"output_dir={place / 'outputs'}", *args.words]
        show(quantlab(["plan", *words])[0], quantlab(words), args.device_gib)


if __name__ == "__main__":
    main()
