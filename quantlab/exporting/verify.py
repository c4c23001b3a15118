"""An export, loaded in a fresh process that cannot import quantlab, against what was measured, bit for bit."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.backends.part import Part, Written
from quantlab.errors import NotQuantized
from quantlab.exporting import check
from quantlab.models.loaded import LoadedModel
from quantlab.models.settings import computing_settings
from quantlab.modules.calls import Call
from quantlab.modules.source import trim
from quantlab.protocols.table import PROTOCOLS
from quantlab.vocabulary.amounts import some_of
from quantlab.vocabulary.schema import EvaluationConfig

if TYPE_CHECKING:
    from torch import nn

_NUM_SAMPLES, _NUM_STEPS, _MAX_CALLS = 2, 2, 4
_MAX_SECONDS = 3600
_OF_A_READER = ("max_position_embeddings", "model_type")
"""A reader may call a model by the class that it makes of it, and reads no further than a text that both take."""


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What the fresh process found."""

    loads_with: str
    """Which loaders, one a component, and what had to be set aside."""
    outputs_identical: bool
    rel_error: float | None
    """The largest ||found - wanted|| / ||wanted|| of the calls; None: the loaded model could not be run."""
    reason: str
    """Why outputs differ; "" where they do not."""
    num_calls: int
    num_tensors: int

    @property
    def said(self) -> str:
        """How far outputs are off, and why; "" where they are identical."""
        if self.outputs_identical:
            return ""
        return self.reason if not self.rel_error else f"{self.rel_error:.2g} of their norm off, {self.reason}"


def recorded(
    candidate: LoadedModel, inputs: Any, evaluation: EvaluationConfig, names: Sequence[str]
) -> dict[str, list[Call]]:
    """A few calls of each component while the candidate runs on the evaluation's inputs."""
    size = min(_NUM_SAMPLES, inputs.num_samples)
    brief = replace(
        evaluation,
        batch_size=size,
        num_inference_steps=min(_NUM_STEPS, evaluation.num_inference_steps),
        num_teacher_forced=0,
    )
    found: dict[str, list[Call]] = {name: [] for name in names}
    protocol = PROTOCOLS[candidate.protocol]
    for name, call in protocol.calls(candidate, inputs.subset(range(size)), brief, list(names)):
        if len(found[name]) < _MAX_CALLS:
            found[name].append(call)
    return found


def verify(
    folder: Path,
    parts: Mapping[str, tuple[Part, Written]],
    calls: Mapping[str, Sequence[Call]],
    device: str,
    pipeline: str = "",
    lets_go: bool = False,
) -> Verified:
    """Load ``folder`` by the ecosystem's loaders and compare.

    ``pipeline`` is the class of the whole, of which the parts are then taken. ``lets_go``: nobody uses the parts'
    modules afterwards, so that they are emptied before another process loads the same. Raises NotQuantized where a
    loader fails or gives back other bits, naming the tensors.
    """
    import torch

    with tempfile.TemporaryDirectory(prefix="quantlab-check-") as scratch:
        request: dict[str, Any] = {
            "folder": str(folder),
            "device": device,
            "num_threads": torch.get_num_threads(),
            "path": [p for p in sys.path if p and not (Path(p) / "quantlab").is_dir()],
            "pipeline": pipeline_request(pipeline, parts) if pipeline else None,
            "parts": {},
        }
        for name, (part, written) in parts.items():
            file = Path(scratch) / f"{name}.pt"
            torch.save([_asked(part.module, call, device) for call in calls.get(name, ())], file)
            request["parts"][name] = {
                **asdict(written),
                "subfolder": name if pipeline else "",
                "in_pipeline": bool(pipeline) and written.method == "from_pretrained",
                "state": dict(written.state) if written.state is not None else check.digests(part.module),
                "calls": str(file),
                "settings": _settings(part, written),
            }
        if lets_go:
            for part, _ in parts.values():
                _let_go(part.module)
        answer, told = _fresh_process(request, Path(scratch))
        return _verdict(request, answer, told, parts)


def _settings(part: Part, written: Written) -> dict[str, Any]:
    """Those of a language model in a single file, which has no configuration beside it: its reader makes one."""
    is_single = "gguf_file" in written.arguments and part.library == "transformers"
    said = computing_settings(part.original) if is_single else {}
    return {k: v for k, v in said.items() if k not in _OF_A_READER}


def _let_go(module: nn.Module) -> None:
    """Take a module's parts and tensors away, whoever still holds the module."""
    for held in (module._modules, module._parameters, module._buffers):
        held.clear()
    gc.collect()
    trim()


def pipeline_request(target: str, parts: Mapping[str, tuple[Part, Written]]) -> dict[str, Any]:
    """How the whole pipeline is loaded: components that are single files are handed to it."""
    return {
        "target": target,
        "method": "from_pretrained",
        "arguments": pipeline_arguments(parts),
        "needs_gpu": any(written.needs_gpu for _, written in parts.values()),
        "before": next((written.before for _, written in parts.values() if written.before), ""),
        "without": [name for name, (_, written) in parts.items() if written.method != "from_pretrained"],
    }


def pipeline_arguments(parts: Mapping[str, tuple[Part, Written]]) -> dict[str, Any]:
    """What the pipeline's ``from_pretrained`` is told: the dtype, and what its components' own are told."""
    whole = [(part, written) for part, written in parts.values() if written.method == "from_pretrained"]
    told = {name: value for _, written in whole for name, value in written.arguments.items()}
    return {**told, "dtype": next(part.dtype for part, _ in parts.values())}


def _asked(module: nn.Module, call: Call, device: str) -> dict[str, Any]:
    return {"args": call["args"], "kwargs": dict(call["kwargs"]), "output": check.answer(module, call, device)}


def _fresh_process(request: Mapping[str, Any], scratch: Path) -> tuple[dict[str, Any], str]:
    """What the script answered, and how its process ended where it did not end well."""
    asked, answered = scratch / "request.json", scratch / "answer.json"
    asked.write_text(json.dumps(request), encoding="utf-8")
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-I", str(check.__file__), str(asked), str(answered)],
        env={**kept, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
        cwd=scratch,
        capture_output=True,
        text=True,
        timeout=_MAX_SECONDS,
        check=False,
    )
    found: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8")) if answered.is_file() else {}
    if done.returncode == 0:
        return found, ""
    if done.returncode < 0:
        return found, f"the process was ended by {signal.Signals(-done.returncode).name}"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return found, lines[-1][:500] if lines else f"exit code {done.returncode}"


def _verdict(
    request: Mapping[str, Any], answer: Mapping[str, Any], told: str, parts: Mapping[str, tuple[Part, Written]]
) -> Verified:
    found = answer.get("parts", {})
    for name, (_, written) in parts.items():
        if "other" not in found.get(name, {}):
            raise NotQuantized(
                f"export.path: {written.loader} does not load what was written of {name} ({told}); export another "
                "scheme, or keep to quantlab"
            )
        if other := found[name]["other"]:
            raise NotQuantized(
                f"export.path: {written.loader} gives back other bits than were measured in {some_of(other, 4)} "
                f"of {name}; nothing is written: export another scheme, or exclude these layers"
            )
    errors = [error for part in found.values() for error in part.get("errors", [])]
    is_whole = not told and all("errors" in part for part in found.values())
    largest = max(errors, default=0.0) if is_whole else None
    notes = sorted({part["told"] for part in found.values() if part.get("told")})
    loaders = ", ".join(written.loader for _, written in parts.values())
    return Verified(
        loads_with=f"{loaders}{f' ({notes[0]})' if notes else ''}",
        outputs_identical=largest == 0.0 and bool(errors),
        rel_error=largest,
        reason=_reason(largest, told, found, parts),
        num_calls=len(errors),
        num_tensors=sum(len(part["state"]) for part in request["parts"].values()),
    )


def _reason(
    largest: float | None, told: str, found: Mapping[str, Any], parts: Mapping[str, tuple[Part, Written]]
) -> str:
    """Why outputs of the same bits differ."""
    if largest == 0.0:
        return "" if any(part.get("errors") for part in found.values()) else "no call was recorded"
    if largest is None:
        return f"the loaded model cannot be run here: {told}"
    name = max(found, key=lambda n: max(found[n]["errors"], default=0.0))
    ours = sorted({row.kernel for row in parts[name][0].quantized.values() if row.kernel})
    theirs = ", ".join(found[name]["kernels"]) or "no known kernel"
    if settings := found[name].get("settings"):
        return (
            f"the same bits in {name}, but the reader of the file gives the model other settings than it was measured "
            f"with: {', '.join(settings)}"
        )
    changed = "; its forward changes its own tensors" if found[name].get("changed") else ""
    return (
        f"the same bits, multiplied by another kernel in {name}: {theirs} in the loader's layers, {', '.join(ours)} in "
        f"those that were measured{changed}"
    )
