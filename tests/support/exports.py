"""Tiny models in every scheme that is exported, and one process without quantlab that checks all of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from quantlab.datasets.table import DATASETS
from quantlab.exporting import check, verify
from quantlab.exporting.card import Described, as_row
from quantlab.exporting.whole import Exported, export
from quantlab.models.loaded import LoadedModel
from quantlab.models.table import family_of
from quantlab.modules.memory import measure_stage
from quantlab.planning.job import Job
from quantlab.planning.plan import plan
from quantlab.running.placement import planned
from quantlab.running.workbench import chosen
from quantlab.stages.candidate import Candidate, Making, make_candidate
from tests.support.shell import TINY, text_words
from tests.support.tiny_families import FAMILIES
from tests.support.tiny_text_models import OTHER, TEXT, save_bert, save_llama

MODELS = {
    "digits DiT": "digits",
    "tiny Flux": "flux",
    "tiny SD3": "sd3",
    "SDXL UNet": "sdxl",
    "tiny Wan": "wan_2_1",
    "tiny Llama": "llama",
    "SmolLM2": "smollm2",
}
"""Column of the table -> what is built."""
SCHEMES = (
    ("bitsandbytes", "nf4"),
    ("bitsandbytes", "int8"),
    ("torchao", "int8"),
    ("torchao", "int4"),
    ("torchao", "float8_e4m3"),
    ("quanto", "int8"),
    ("quanto", "int4"),
    ("quanto", "float8_e4m3"),
    ("modelopt", "int8"),
    ("modelopt", "float8_e4m3"),
)
_DRIVER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("check", sys.argv[1])
check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check)
for line in sys.stdin:
    try:
        check.main(line.rstrip("\\n").split("\\t"))
        print("ok", flush=True)
    except Exception as error:
        print(f"{type(error).__name__}: {error}".splitlines()[0], flush=True)
"""


class Checker:
    """The check's script in one process that lives on: what a process costs are its imports."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, request: Mapping[str, Any], scratch: Path) -> tuple[dict[str, Any], str]:
        """In the place of ``verify._fresh_process``."""
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, "-I", "-c", _DRIVER, str(check.__file__)]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        asked, answered = scratch / "request.json", scratch / "answer.json"
        asked.write_text(json.dumps(request))
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{asked}\t{answered}\n")
        self._process.stdin.flush()
        said = ""
        while said != "ok":
            line = self._process.stdout.readline()
            if not line or line.rstrip() == "ok" or ": " in line:
                said = line.strip() or f"the process ended with {self._process.wait()}"
                break
        found = json.loads(answered.read_text()) if answered.is_file() else {}
        return found, "" if said == "ok" else said

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    stream.close()


@contextmanager
def checker() -> Iterator[Checker]:
    made = Checker()
    try:
        yield made
    finally:
        made.close()


# -- models


@dataclass(frozen=True)
class Loaded:
    """A model with its inputs, and the words of a request on it."""

    words: tuple[str, ...]
    model: LoadedModel
    inputs: Any


def words_of(name: str, folder: Path) -> list[str]:
    """The request's words for the model ``name``; what it needs is written to ``folder`` once."""
    short = ["evaluation.num_bootstrap=50", "device=cpu", "sweep.floors=false"]
    if name == "digits":
        return [
            *(f"model.{k}={v}" for k, v in TINY.items()),
            "evaluation.num_samples=10",
            "evaluation.num_inference_steps=2",
            *short,
        ]
    if name in ("llama", "smollm2", "bert"):
        if not (folder / "text.txt").exists():
            (folder / "text.txt").write_text(TEXT)
            (folder / "other.txt").write_text(OTHER)
        if name == "llama" and not (folder / "llama").exists():
            save_llama(folder / "llama", hidden_size=64, intermediate_size=128)
        if name == "bert" and not (folder / "bert").exists():
            save_bert(folder / "bert", hidden_size=64, intermediate_size=128)
        family = "encoder" if name == "bert" else "causal_lm"
        chosen = ["model=smollm2_135m"] if name == "smollm2" else [f"model={family}", f"model.path={folder / name}"]
        texts = ["dataset=text", f"dataset.path={folder / 'text.txt'}", f"calibration.path={folder / 'other.txt'}"]
        return [*chosen, *texts, *text_words("cpu")]
    row = FAMILIES[name]
    if not (folder / name).exists():
        row.build().save_pretrained(folder / name)
    sizes = [f"evaluation.{k}={v}" for k, v in row.evaluation.items()]
    return [
        "model=diffusers",
        f"model.path={folder / name}",
        "dataset=prompts",
        "evaluation.num_samples=2",
        "evaluation.batch_size=2",
        "evaluation.num_inference_steps=2",
        "evaluation.height=32",
        "evaluation.width=32",
        "evaluation.num_teacher_forced=0",
        *sizes,
        *short,
    ]


@cache
def loaded(name: str, folder: Path, cache_dir: Path) -> Loaded:
    """The model, once in a process."""
    words = words_of(name, folder)
    (job,) = plan([*words, "backend=quanto", "dtype=int8"]).jobs
    model = family_of(job.config.model).load(job.config.model, "cpu", cache_dir)
    inputs = DATASETS[job.config.dataset.name].load(job.config.dataset, job.config.evaluation, model)
    return Loaded(tuple(words), model, inputs)


def job_on(found: Loaded, *words: str) -> Job:
    (job,) = plan([*found.words, *words]).jobs
    return job


def candidate_of(found: Loaded, job: Job, cache_dir: Path, reads: tuple[str, ...] = ()) -> Candidate:
    return make_candidate(
        Making(
            model=found.model,
            job=job,
            calibration_inputs=lambda: found.inputs,
            schemes=chosen(found.model, job),
            reads=dict.fromkeys(found.model.components, reads) if reads else {},
            cache_dir=cache_dir,
            advance=lambda *_: None,
            stage=lambda name: measure_stage(name, "cpu"),
        )
    )


def exported(found: Loaded, target: Path, cache_dir: Path, *words: str) -> tuple[Exported, Job, Candidate]:
    """The model quantized as ``words`` say, exported to ``target``."""
    job = job_on(found, *words)
    made = candidate_of(found, job, cache_dir)
    described = Described(row=as_row({"protocol": found.model.protocol, "name": job.name}))
    return export(target, job, found.model, made.model, made.quantization, found.inputs, described), job, made


# -- a cell of the table


def cell(found: Loaded, folder: Path, cache_dir: Path, backend: str, dtype: str) -> dict[str, Any]:
    """What the table says of one scheme on one model; a refusal is a cell too."""
    from quantlab.errors import ConfigError

    target, words = folder / f"{backend}-{dtype}", [f"backend={backend}", f"dtype={dtype}"]
    refused = ""
    try:
        done, job, made = exported(found, target, cache_dir, *words)
    except ConfigError as error:
        refused = str(error)
        if not refused.startswith("modules_to_not_convert"):
            return {"refused": refused}
        words.append("quantization.replace_default_exclusions=true")
        try:
            done, job, made = exported(found, target, cache_dir, *words)
        except ConfigError as second:
            return {"refused": str(second)}
    names = list(dict.fromkeys(row.component for row in made.quantization.layers))
    wanted = -sum(unsaved_bytes(found.model.components[name]) for name in names)
    wanted += sum(part.weights_bytes for part in planned(found.model, job, chosen(found.model, job), {}).values())
    places = [target / name if (target / name).is_dir() else target for name in names]
    return {
        "loader": done.verified.loads_with,
        "bits": True,
        "words": words,
        "refused_first": refused,
        "outputs": done.verified.outputs_identical,
        "rel_error": done.verified.rel_error,
        "reason": done.verified.reason,
        "planned_bytes": wanted,
        "file_bytes": sum(tensor_bytes(place) for place in places),
    }


def unsaved_bytes(module: Any) -> int:
    """Bytes of the buffers that stand in no state dict, as they are computed anew: positions, frequencies."""
    saved = module.state_dict()
    return sum(b.nbytes for name, b in module.named_buffers() if name not in saved)


def tensor_bytes(folder: Path) -> int:
    """Bytes of the tensors in a folder's safetensors files, without their headers."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with open(file, "rb") as opened:
            total += file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")
    return total


def patched(monkeypatch: Any, one: Checker) -> None:
    """Let every check go to the process that lives on."""
    monkeypatch.setattr(verify, "_fresh_process", one)
