"""A measured candidate as a folder that others load: written, described and checked beside its place, then moved there.

A model of one component is a checkpoint; a pipeline has its components in folders, under its ``model_index.json``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantlab.backends.part import Part, Written
from quantlab.backends.scheme import Scheme
from quantlab.errors import ConfigError
from quantlab.exporting import check
from quantlab.exporting.card import Described, write_card
from quantlab.exporting.checkpoint import check_part, library_of, save, write_part
from quantlab.exporting.folder import (
    FORMAT,
    check_room,
    check_target,
    clean_json,
    file_bytes,
    written_beside,
)
from quantlab.exporting.verify import Verified, recorded, verify
from quantlab.models.exported import DIGESTS, MANIFEST, file_digests
from quantlab.models.loaded import LoadedModel
from quantlab.models.pipeline_call import pipeline_of
from quantlab.planning.job import Job
from quantlab.tracking.tags import EXPORT_LOADS_WITH, EXPORT_OUTPUTS, EXPORT_PATH
from quantlab.vocabulary.amounts import in_mib
from quantlab.vocabulary.native import QuantizationConfigMixin
from quantlab.vocabulary.reports import QuantizationReport


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was exported, as it is logged."""

    folder: Path
    verified: Verified
    num_bytes: int
    """Of all files."""

    @property
    def metrics(self) -> dict[str, float]:
        """What is logged as numbers."""
        error = self.verified.rel_error
        known = {} if error is None or not math.isfinite(error) else {"export/output_rel_error": error}
        return {
            EXPORT_OUTPUTS: float(self.verified.outputs_identical),
            "export/bytes": float(self.num_bytes),
            **known,
        }

    @property
    def tags(self) -> dict[str, str]:
        """What is logged as text."""
        found = self.verified
        return {
            EXPORT_PATH: str(self.folder),
            EXPORT_LOADS_WITH: found.loads_with,
            EXPORT_OUTPUTS: "yes" if found.outputs_identical else f"no: {found.said}",
        }

    def lines(self) -> list[str]:
        """What a user is told."""
        found = self.verified
        outputs = "outputs identical" if found.outputs_identical else f"outputs: {found.said}"
        return [
            f"exported: {self.folder} ({in_mib(self.num_bytes)})",
            f"loads with {found.loads_with}; bits identical ({found.num_tensors} tensors), {outputs}",
        ]


def check_exportable(
    target: str, job: Job, reference: LoadedModel, candidate: LoadedModel, layers: QuantizationReport | None
) -> None:
    """The refusals of :func:`export` that are known before anything is measured."""
    check_target("export.path", target)
    for part in parts_of(job, reference, candidate, layers).values():
        check_part(part)


def export(
    target: str | Path,
    job: Job,
    reference: LoadedModel,
    candidate: LoadedModel,
    layers: QuantizationReport | None,
    inputs: Any,
    described: Described,
    key: str = "export.path",
    is_last: bool = False,
) -> Exported:
    """Write ``candidate`` to the folder ``target``; the folder is there whole and checked, or as it was before.

    ``layers`` is what the quantize stage read back, ``inputs`` are the evaluation's, on a few of which the loaded model
    is run, ``described`` what the card says. ``is_last``: nobody uses the candidate afterwards, and it is emptied.

    Raises:
        ConfigError: a target that is no export, or a scheme that no loader of the ecosystem reads as it was measured.
        NotQuantized: a loader that gives back other bits.
        DiskFull: no room, before the first byte.
    """
    place = check_target(key, target)
    parts = parts_of(job, reference, candidate, layers)
    check_room(key, place, _needed(candidate, parts))
    calls = recorded(candidate, inputs, job.config.evaluation, list(parts))
    with written_beside(place, key) as folder:
        pipeline = _write(folder, candidate, parts) if (is_whole := "pipeline" in candidate.parts) else ""
        if is_whole:
            written = {name: write_part(part, _sub(folder, name)) for name, part in parts.items()}
        else:
            written = {name: write_part(part, folder) for name, part in parts.items()}
            _write_beside(folder, candidate)
        clean_json(folder, _forbidden(job))
        both = {name: (part, written[name]) for name, part in parts.items()}
        found = verify(folder, both, calls, candidate.device, pipeline, is_last)
        _write_manifest(folder, job, both, found, pipeline)
        write_card(folder, job, both, found, described, pipeline, file_bytes(folder))
        num_bytes = file_bytes(folder)
    return Exported(folder=place, verified=found, num_bytes=num_bytes)


def parts_of(
    job: Job, reference: LoadedModel, candidate: LoadedModel, layers: QuantizationReport | None
) -> dict[str, Part]:
    """The quantized components; ConfigError where there is nothing to export, or the model has no one checkpoint."""
    if not job.schemes or layers is None:
        raise ConfigError(f"export.path: {job.name} is not quantized; export a run that is")
    names = list(dict.fromkeys(row.component for row in layers.layers))
    if "pipeline" not in candidate.parts and len(names) != 1:
        raise ConfigError(f"export.path: {candidate.name} has no one checkpoint for {', '.join(names)}")
    cast = [n for n, part in candidate.components.items() if n not in names and part is not reference.components[n]]
    if cast:
        raise ConfigError(
            f"components.{cast[0]}: it is cast to another dtype than the rest, and loaders have one for all; leave "
            "it as it is, or give it a scheme"
        )
    schemes = {name: scheme for name in names if (scheme := job.scheme_of(name)) is not None}
    return {
        name: Part(
            name=name,
            module=candidate.components[name],
            original=reference.components[name],
            library=library_of(reference.components[name], name),
            config=_config(scheme, reference, name, layers),
            layers=[row for row in layers.layers if row.component == name],
            dtype=candidate.dtype,
            compute_dtype=candidate.dtype if scheme.axes.compute_dtype == "auto" else scheme.axes.compute_dtype,
            tokenizer=candidate.parts.get("tokenizer"),
        )
        for name, scheme in schemes.items()
    }


def _config(scheme: Scheme, model: LoadedModel, name: str, layers: QuantizationReport) -> QuantizationConfigMixin:
    """What the component was quantized by, as the select stage made it concrete."""
    shapes = {r.name: r.shape for r in layers.layers if r.component == name}
    native: QuantizationConfigMixin = scheme.backend.module.resolve(
        scheme.native.measured(shapes), model.device, model.dtype
    )
    return native


def _needed(candidate: LoadedModel, parts: Mapping[str, Part]) -> int:
    """Bytes of the tensors that will be written."""
    modules: list[Any] = [part.module for part in parts.values()]
    if "pipeline" in candidate.parts:
        modules += [m for n, m in _others(candidate, parts).items() if hasattr(m, "state_dict")]
    return sum(check.state_bytes(module) for module in modules)


def _others(candidate: LoadedModel, parts: Mapping[str, Part]) -> dict[str, Any]:
    """The components of a pipeline that are not quantized: modules, tokenizers, the scheduler."""
    pipe = candidate.parts["pipeline"]
    return {n: c for n, c in pipe.components.items() if c is not None and n not in parts}


def _write(folder: Path, candidate: LoadedModel, parts: Mapping[str, Part]) -> str:
    """All of a pipeline but its quantized components; the class that loads it."""
    pipe: Any = pipeline_of(candidate)
    kind = type(pipe)
    library = kind.__module__.partition(".")[0]
    if library != "diffusers":
        raise ConfigError(
            f"export.path: {kind.__name__} is of {library}, which Diffusers does not load; save it yourself"
        )
    pipe.save_config(folder)
    for name, part in _others(candidate, parts).items():
        target = _sub(folder, name)
        if hasattr(part, "state_dict"):
            with candidate.holding([name]):
                save(part, target, what=name)
        elif hasattr(part, "save_pretrained"):
            _save_as_loaded(part, target)
        elif hasattr(part, "save_config"):
            part.save_config(target)
        else:
            raise ConfigError(
                f"export.path: {name} ({type(part).__name__}) cannot be saved; save the pipeline yourself"
            )
    return f"diffusers:{kind.__name__}"


def _sub(folder: Path, name: str) -> Path:
    made = folder / name
    made.mkdir()
    return made


def _write_beside(folder: Path, candidate: LoadedModel) -> None:
    """What stands beside the weights of a model that is no pipeline: its tokenizer, its processor."""
    for name in ("tokenizer", "processor"):
        part: Any = candidate.parts.get(name)
        if part is not None:
            _save_as_loaded(part, folder)


def _save_as_loaded(part: Any, folder: Path) -> None:
    """Save a tokenizer or processor without what its last call left in it: to which length it cut and filled texts."""
    for tokenizer in (part, getattr(part, "tokenizer", None)):
        if (rules := getattr(tokenizer, "backend_tokenizer", None)) is not None:
            rules.no_truncation()
            rules.no_padding()
    part.save_pretrained(folder)


def _forbidden(job: Job) -> str:
    """The folder that the model was read from, where it is one of this machine."""
    path = job.config.model.path
    return str(Path(path).expanduser().absolute()) if path and Path(path).expanduser().is_dir() else ""


def _write_manifest(
    folder: Path, job: Job, parts: Mapping[str, tuple[Part, Written]], found: Verified, pipeline: str
) -> None:
    data = {
        "format": FORMAT,
        "name": job.name,
        "pipeline": pipeline,
        "verified": asdict(found),
        "parts": {
            name: {
                "subfolder": name if pipeline else "",
                **{k: v for k, v in asdict(written).items() if k != "state"},
                "quantization": part.config.to_dict(),
                "dtype": part.dtype,
            }
            for name, (part, written) in parts.items()
        },
        DIGESTS: file_digests(folder),
    }
    (folder / MANIFEST).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
