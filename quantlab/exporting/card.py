"""The model card of an export: ``README.md`` with its metadata, by the classes of ``huggingface_hub``.

Text that comes from outside (names, paths, error messages) is written as text: it is no markup of the page.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.backends.part import Part, Written
from quantlab.exporting.verify import Verified, pipeline_arguments
from quantlab.metrics import METRICS
from quantlab.planning.job import Job
from quantlab.progress import printable
from quantlab.report.table import headline
from quantlab.report.verdicts import error_metric, is_inside, largest_floor, less, with_other_batch
from quantlab.tracking.results import Row
from quantlab.vocabulary.amounts import in_mib
from quantlab.vocabulary.numbers import metric_value
from quantlab.vocabulary.reports import LayerReport

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

CARD = "README.md"
PICTURES = "images"
_TASKS = {
    "diffusion": "text-to-image",
    "language": "text-generation",
    "encoder": "feature-extraction",
    "seq2seq": "translation",
    "vision": "image-classification",
}
_MAX_KEPT = 12


@dataclass(frozen=True, kw_only=True)
class Described:
    """What the card says beside what the folder itself shows."""

    row: Row
    """The run's numbers, as its report has them."""
    memory_bytes: Mapping[str, int] = field(default_factory=dict)
    """What it needs to run, in words -> bytes, as planned."""
    picture: Path | None = None
    """Images of the reference, of the candidate and their difference."""


def write_card(
    folder: Path,
    job: Job,
    parts: Mapping[str, tuple[Part, Written]],
    found: Verified,
    described: Described,
    pipeline: str,
    num_bytes: int,
) -> None:
    """Write ``README.md``, and the picture that it shows; ``num_bytes`` are those of the folder's other files."""
    from huggingface_hub import ModelCard, ModelCardData

    shown = ""
    if described.picture is not None and described.picture.is_file():
        (folder / PICTURES).mkdir(exist_ok=True)
        shown = f"{PICTURES}/{described.picture.name}"
        shutil.copyfile(described.picture, folder / shown)
    protocol, config = described.row["protocol"], job.config
    model = _model_name(job)
    axes = job.axes
    data = ModelCardData(
        model_name=f"{model} {job.name}",
        base_model=config.model.path if _is_hub_id(config.model.path) else None,
        library_name="diffusers" if pipeline else next(part.library for part, _ in parts.values()),
        pipeline_tag=_TASKS.get(protocol),
        tags=["quantized", axes.backend, axes.dtype],
        eval_results=_eval_results(described.row, protocol, config.dataset.name) or None,
    )
    sections = [
        f"# {text(model)}, quantized: {text(job.name)}",
        _scheme(job, parts),
        _bytes(described, num_bytes),
        _quality(described.row, config.dataset.name),
        f"## Images\n\nReference, quantized, and their difference.\n\n![reference, quantized, difference]({shown})"
        if shown
        else "",
        f"## How to load it\n\nIn this folder (elsewhere: its path, or the id of its repository instead of `.`):\n\n"
        f"```python\n{three_lines(parts, pipeline)}\n```",
        _checked(found),
        _recipe(job),
    ]
    content = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(s for s in sections if s) + "\n"
    ModelCard(content, ignore_metadata_errors=False).save(folder / CARD)


def text(value: object) -> str:
    """Text from outside, on one line and without Markdown's or HTML's marks."""
    plain = " ".join(printable(str(value)).split())
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#!~" else c for c in plain)


def three_lines(parts: Mapping[str, tuple[Part, Written]], pipeline: str) -> str:
    """The Python that loads what lies in the working folder."""
    classes = {written.target for _, written in parts.values() if written.method != "from_pretrained" or not pipeline}
    classes |= {pipeline} if pipeline else set()
    classes |= {"diffusers:GGUFQuantizationConfig" for _, w in parts.values() if "compute_dtype" in w.arguments}
    by_library: dict[str, list[str]] = {}
    for target in sorted(classes):
        library, _, name = target.partition(":")
        by_library.setdefault(library, []).append(name)
    lines = ["import torch", *(f"from {lib} import {', '.join(names)}" for lib, names in by_library.items())]
    for before in sorted({written.before for _, written in parts.values() if written.before}):
        module, _, call = before.partition(":")
        lines += [f"from {module} import {call}", f"{call}()"]
    given: list[str] = []
    for name, (_, written) in parts.items():
        if pipeline and written.method == "from_pretrained":
            continue
        kind = written.target.partition(":")[2]
        place = f"{name}/{written.file}" if pipeline else written.file or "."
        variable = name if pipeline else "model"
        lines.append(f"{variable} = {kind}.{written.method}({place!r}{_arguments(written.arguments)})")
        given += [f"{name}={name}"] if pipeline else []
    if pipeline:
        more = "".join(f", {g}" for g in given)
        told = _arguments(pipeline_arguments(parts))
        lines.append(f"pipe = {pipeline.partition(':')[2]}.from_pretrained('.'{told}{more})")
    return "\n".join(lines).replace("'", '"')


def _arguments(arguments: Mapping[str, object]) -> str:
    said = []
    for name, value in arguments.items():
        if name == "compute_dtype":
            said.append(f"quantization_config=GGUFQuantizationConfig(compute_dtype=torch.{value})")
        else:
            said.append(f"{name}=torch.{value}" if name == "dtype" else f"{name}={value!r}")
    return "".join(f", {one}" for one in said)


# -- its parts


def _model_name(job: Job) -> str:
    path = job.config.model.path
    return path if path and _is_hub_id(path) else Path(path).name if path else job.config.model.family


def _is_hub_id(path: str | None) -> bool:
    return bool(path) and not Path(str(path)).expanduser().exists() and str(path).count("/") == 1


def _scheme(job: Job, parts: Mapping[str, tuple[Part, Written]]) -> str:
    schemes = {name: scheme for name in parts if (scheme := job.scheme_of(name)) is not None}
    said = {
        name: {
            "backend": scheme.axes.backend,
            "dtype": scheme.axes.dtype,
            "group size": scheme.axes.group_size,
            "activations": scheme.axes.activation_dtype,
            "algorithm": scheme.axes.algorithm,
            "computes in": parts[name][0].dtype,
        }
        for name, scheme in schemes.items()
    }
    same = len({str(words) for words in said.values()}) == 1
    titles = [""] if same else [f"`{name}`" for name in said]
    shown = list(said.values())[: len(titles)]
    lines = ["## Scheme", "", f"| | {' | '.join(titles)} |", "|---|" + "---|" * len(titles)]
    lines += [f"| {k} | {' | '.join(text(words[k]) for words in shown)} |" for k in shown[0]]
    for name, (part, _) in parts.items():
        kept = [r for r in part.layers if r.status != "quantized" and not r.shares]
        num = len(part.quantized)
        lines += ["", f"`{name}`: {num} layers quantized, {len(kept)} holders of weights kept as they were."]
        if kept:
            lines += ["", "| kept | weights | why |", "|---|---|---|", *_kept(kept)]
    return "\n".join(lines)


def _kept(rows: Sequence[LayerReport]) -> list[str]:
    """The largest that are kept, and why; the others by reason."""
    ordered = sorted(rows, key=lambda r: -r.num_weights)
    shown = [f"| {text(r.name)} | {r.num_weights:,} | {text(r.reason)} |" for r in ordered[:_MAX_KEPT]]
    left = ordered[_MAX_KEPT:]
    more = [f"| and {len(left)} more | {sum(r.num_weights for r in left):,} | |"] if left else []
    return [*shown, *more]


def _bytes(described: Described, num_bytes: int) -> str:
    metrics = described.row["metrics"]
    rows = {"files": num_bytes, "weights in memory": metrics.get("memory/weights_bytes"), **described.memory_bytes}
    lines = [f"| {k} | {int(v):,} | {in_mib(v)} |" for k, v in rows.items() if v is not None]
    if (bits := metrics.get("memory/bits_per_weight_model")) is not None:
        lines.append(f"| bits per weight | {bits:.2f} | of the quantized components, whole |")
    return "\n".join(["## Bytes", "", "| | bytes | |", "|---|---|---|", *lines])


def _quality(row: Row, dataset: str) -> str:
    protocol = row["protocol"]
    metrics = row["metrics"]
    if not any(name.startswith("quality/") for name in metrics):
        return ""
    lines = [
        "## Quality",
        "",
        f"Against the unquantized model on the same inputs (`{dataset}`), with 95 % intervals. The floor is what "
        "another execution of the unquantized model costs.",
        "",
        "| metric | value | interval | floor | |",
        "|---|---|---|---|---|",
    ]
    for name in headline(protocol, [row]):
        if f"quality/{name}" not in metrics:
            continue
        value, floor = metric_value(metrics, f"quality/{name}"), largest_floor(metrics, name)
        interval = "" if value.ci_lo is None else f"{value.ci_lo:.4g} to {value.ci_hi:.4g}"
        inside = "inside the floor" if floor is not None and _is_inside(metrics, name) else ""
        of_floor = "" if floor is None else f"{floor.value:.4g} ({floor.name})"
        unit = f" {METRICS[name].unit}" if METRICS[name].unit not in ("", "1") else ""
        lines.append(f"| {name} | {value.value:.4g}{unit} (n = {value.n}) | {interval} | {of_floor} | {inside} |")
    return "\n".join(lines)


def _is_inside(metrics: Mapping[str, float], name: str) -> bool:
    error, floor = error_metric(name), largest_floor(metrics, name)
    known = METRICS[error].of_reference
    if floor is None or known is None or f"quality/{error}" not in metrics:
        return False
    value = with_other_batch(metric_value(metrics, f"quality/{error}"), metrics, error)
    return is_inside(less(value, known), floor.cost) is True


def _eval_results(row: Row, protocol: str, dataset: str) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    metrics = row["metrics"]
    return [
        EvalResult(
            task_type=_TASKS.get(protocol, "other"),
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=name,
            metric_name=f"{name} against the unquantized model",
            metric_value=float(f"{metrics[f'quality/{name}']:.6g}"),
        )
        for name in headline(protocol, [row])
        if f"quality/{name}" in metrics
    ]


def _checked(found: Verified) -> str:
    lines = [
        "## Checked",
        "",
        f"Loaded with {text(found.loads_with)} in a process without quantlab: each of {found.num_tensors} tensors "
        "has the bits that were measured.",
    ]
    if found.outputs_identical:
        lines.append(f"Its outputs in {found.num_calls} calls on evaluation inputs are identical, bit for bit.")
    elif found.rel_error is None:
        lines.append(f"Outputs were not compared: {text(found.reason)}.")
    else:
        lines.append(
            f"Its outputs in {found.num_calls} calls differ by at most {found.rel_error:.2g} of their norm: "
            f"{text(found.reason)}."
        )
    return "\n".join(lines)


def _recipe(job: Job) -> str:
    fence = "````"
    return (
        "## The recipe that repeats it\n\nSave it as `recipe.yaml`, then `quantlab recipe=recipe.yaml`.\n\n"
        f"{fence}yaml\n{job.recipe_yaml.rstrip().replace(fence, '')}\n{fence}"
    )


def as_row(data: Mapping[str, Any]) -> Row:
    """A ``report.json`` that was read back, with what a card asks of it."""
    empty: Row = {
        "name": "",
        "status": "FINISHED",
        "protocol": "",
        "metrics": {},
        "error": "",
        "failed_stage": "",
        "run_id": None,
        "resumed": False,
        "params": {},
        "unquantized": [],
        "undefined": {},
    }
    known: Any = {**empty, **{k: v for k, v in data.items() if k in empty}}
    row: Row = known
    return row
