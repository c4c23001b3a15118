"""``quantlab init FILE model.path=...``: a first recipe for a model of one's own, with candidates that fit its shapes.

The model is read from its configuration alone. Of each backend, at 8 and at 4 bits, the dtype is taken that rounds
least among those by which every layer can be stored; where there is none, the one that takes most.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from quantlab.backends.scheme import Scheme, scheme_of
from quantlab.backends.table import backends, loggers, offers
from quantlab.datasets.table import DATASETS
from quantlab.errors import ConfigError
from quantlab.models.outline import Outline
from quantlab.models.pipeline_call import fitting, parameters_of
from quantlab.models.table import family_of
from quantlab.modules.holders import holders
from quantlab.planning.components import DEFAULT
from quantlab.planning.job import Job, Plan
from quantlab.planning.listing import models
from quantlab.planning.places import groups
from quantlab.planning.plan import plan
from quantlab.planning.ready import check_files
from quantlab.planning.trust import remember
from quantlab.planning.words import parse
from quantlab.progress import printable
from quantlab.quiet import quiet_libraries
from quantlab.running.first_look import first_look
from quantlab.running.forecast import Book, book_of, price_of
from quantlab.vocabulary.amounts import in_mib, parameters
from quantlab.vocabulary.axes import QuantizationAxes
from quantlab.vocabulary.capabilities import Capability, GroupSize
from quantlab.vocabulary.dtypes import DTYPES
from quantlab.vocabulary.prices import Price
from quantlab.vocabulary.reports import bits_per_weight
from quantlab.vocabulary.schema import ExperimentConfig

USAGE = "quantlab init my.yaml model.path=FOLDER (or a Hub id; more keys as for a run)"
BITS = (8, 4)
MAX_GROUP = 128
MAX_WIDTHS = 6
SIMULATED = "simulated: stored wider than the dtype says"
"""What ``~`` means, as tables have it."""
_OPEN = "dataset.path"
_OF_THE_LIST = {"backend", "dtype", "group_size", "sweep", "quantization", "components", "checkpoint", "recipe"}


@dataclass(frozen=True, kw_only=True)
class Found:
    """One candidate, or why a backend has none."""

    keys: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


def first_recipe(words: Sequence[str]) -> tuple[Path, Plan]:
    """Write the file that ``words`` begin with, and plan what it says.

    Raises ConfigError for words that are none, a file that is there, and what the list of candidates decides.
    """
    if not words or not words[0].endswith((".yaml", ".yml")) or "=" in words[0]:
        raise ConfigError(f"init: write {USAGE}")
    file, asked = Path(words[0]).expanduser(), list(words[1:])
    if file.exists():
        raise ConfigError(f"init: {words[0]} is there already; name another file, or remove it")
    keys = [word.partition("=")[0].lstrip("+") for word in asked]
    if "model" not in keys:
        if "model.path" not in keys:
            raise ConfigError(f"init: which model? {USAGE}, or model=NAME of quantlab list models")
        asked.insert(0, "model=auto")
    if listed := [key for key in keys if key.partition(".")[0] in _OF_THE_LIST]:
        raise ConfigError(f"{listed[0]}: init writes a list of candidates, a backend each; change it in the file")
    quiet_libraries(loggers())  # a pipeline's class is looked at, which imports its library
    job = plan([*asked, "sweep.dry_run=true"]).jobs[0]
    check_files(job)
    if "dataset" not in keys and (pipeline := _pipeline(job.config)) is not None:
        asked.append(fitting(pipeline))
        job = plan([*asked, "sweep.dry_run=true"]).jobs[0]
    text = recipe_text(file.name, asked, job)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"init: {words[0]}: cannot be written ({error.strerror}); name another file") from error
    planned = plan([f"recipe={file}", *([f"{_OPEN}=DATA"] if needs_own_data(job.config) else [])])
    remember(planned)  # its path was typed by whoever has it written
    return file, planned


def recipe_text(name: str, words: Sequence[str], job: Job) -> str:
    """The whole file, with comments; ``words`` chose the job's model, data and evaluation."""
    quiet_libraries(loggers())
    config = replace(job.config, device=_device(job.config))
    book = book_of(config)
    found = list(_candidates(book, replace(job, config=config)))
    if not any(one.keys for one in found):
        raise ConfigError(f"init: no backend takes this model: {'; '.join(one.note for one in found)}")
    choices, body = _said(words, job)
    lines = [
        "# @package _global_",
        f"# What do 8 and 4 bits cost {_called(config)} in quality, and what do they save, backend by backend?",
        f"# Run: quantlab recipe={name}   (what it would run: sweep.dry_run=true; the command line wins over each key)",
        *([f"# First look: quantlab recipe={name} {' '.join(fewer)}"] if (fewer := first_look(config)) else []),
        *(f"# {line}" for line in _of_model(book.outline)),
        "# The first line says that the keys are quantlab's own; the second is what quantlab list recipes shows.",
        "defaults:   # choices from quantlab's groups, a line each; quantlab list models, datasets, evaluations",
        *_beside([(f"  - override /{g}: {option}", _told(g, option, choices)) for g, option in choices.items()]),
    ]
    for node, keys in body.items():
        is_node = isinstance(keys, Mapping)
        lines.append(f"{node}:" if is_node else f"{node}: {_yaml(keys)}")
        lines += _beside(list(_keys(node, keys, 2))) if is_node else []
    lines += [
        "sweep:",
        "  # a row each; the reference and its noise floors come along. MiB and bits/weight are of the quantized",
        "  # components, whole (of their quantized layers), as in the run's table; known from the configuration",
        "  candidates:",
    ]
    rows = [(f"    - {_yaml(one.keys)}", one.note) for one in found if one.keys]
    return "\n".join([*lines, *_beside(rows), *(f"    # {one.note}" for one in found if not one.keys), ""])


def needs_own_data(config: ExperimentConfig) -> bool:
    """Whether the data set is nothing without a file of the user's, and none was named."""
    read = DATASETS[config.dataset.name].read_file
    if read is None or config.dataset.path is not None:
        return False
    try:
        read(None)
    except ConfigError:
        return True
    return False


def left_open(planned: Plan) -> str:
    """The key that a first recipe leaves to whoever runs it; "" where it says all."""
    return _OPEN if any(word.startswith(f"{_OPEN}=") for word in planned.jobs[0].overrides) else ""


def _pipeline(config: ExperimentConfig) -> type | None:
    """The class of a pipeline; None of a model that is none, and where it is not known."""
    look = family_of(config.model).look
    return look(config.model, config.evaluation) if look is not None else None


def _device(config: ExperimentConfig) -> str:
    import torch

    return config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _called(config: ExperimentConfig) -> str:
    path = config.model.path or config.model.family
    return printable(path.rstrip("/").rpartition("/")[2] or path, 80)


def _of_model(outline: Outline) -> Iterator[str]:
    """A line a component that is quantized: class, size, and how wide its rows are, which decides what fits."""
    for part in outline.quantized:
        module = outline.components[part]
        linear = [h for h in holders(module).values() if h.kind == "linear" and h.way]
        widths = sorted({h.view.matrix_shape[1] for h in linear})
        shown = ", ".join(map(str, widths[:MAX_WIDTHS])) + (", ..." if len(widths) > MAX_WIDTHS else "")
        num = parameters(sum(p.numel() for p in module.parameters()))
        yield f"{part}: {type(module).__name__}, {num} parameters, {len(linear)} linear layers, rows of {shown}"


def _candidates(book: Book, job: Job) -> Iterator[Found]:
    for backend in backends():
        for bits in BITS:
            yield _candidate(book, job, backend, bits)


def _candidate(book: Book, job: Job, backend: str, bits: int) -> Found:
    """The dtype of a backend that rounds least of those that fit all layers; else the one that takes most."""
    partly: list[tuple[int, Found]] = []
    why = f"it has no dtype of {bits} bits"
    for dtype, row in _by_error(backend, bits):
        for group_size in _group_sizes(row):
            keys = {"backend": backend, "dtype": dtype, **({"group_size": group_size} if group_size != "auto" else {})}
            for mismatch in ("error", "skip"):
                said = keys if mismatch == "error" else {**keys, "on_mismatch": mismatch}
                try:
                    price = price_of(book, replace(job, name=f"{backend} {dtype}", schemes={DEFAULT: _scheme(said)}))
                except ConfigError as error:
                    why = str(error)
                    break
                if price.why_refused:
                    why = price.why_refused[0]
                    continue
                sizes = _sizes(price)
                taken = sum(part.quantized_parameters for part in price.components)
                if mismatch == "error":
                    return Found(keys=said, note=sizes)
                whole = sum(p.memory.num_parameters for p in price.components if p.scheme)
                partly.append(
                    (taken, Found(keys=said, note=f"{sizes}; {100 * taken / whole:.0f} % of the weights fit"))
                )
    if partly:
        return max(partly, key=lambda one: one[0])[1]
    return Found(note=f"{backend} at {bits} bits is left out: {printable(why, 200)}")


def _by_error(backend: str, bits: int) -> list[tuple[str, Capability]]:
    """The backend's dtypes of so many bits, the least rounding first; of equal ones the larger block."""
    rows = [(d, row) for d, row in offers()[backend].rows.items() if DTYPES[d].bits == bits]
    return sorted(rows, key=lambda r: (DTYPES[r[0]].rel_error + DTYPES[r[0]].max_error, -r[1].in_features_multiple))


def _group_sizes(row: Capability) -> list[GroupSize]:
    numbers = [size for size in row.group_sizes if isinstance(size, int) and size <= MAX_GROUP]
    return ["auto", *sorted(numbers, reverse=True)[:3]] if len(numbers) > 1 else ["auto"]


def _scheme(keys: Mapping[str, Any]) -> Scheme:
    said: dict[str, Any] = {k: str(v) for k, v in keys.items()}
    scheme = scheme_of(QuantizationAxes(**said))
    assert scheme is not None, "no backend is called none"
    return scheme


def _sizes(price: Price) -> str:
    done = [part for part in price.components if part.scheme]
    bits = bits_per_weight(p.memory for p in done)
    of_layers = next((p.bits_per_quantized_weight for p in done if p.bits_per_quantized_weight is not None), bits)
    size = sum(part.memory.weights_bytes for part in done)
    mark, told = ("~", f" ({SIMULATED})") if price.is_simulated else ("", "")
    return f"{bits:.2f} ({of_layers:.2f}) bits/weight, {mark}{in_mib(size)}{told}"


# -- what was typed, as the recipe says it


def _said(words: Sequence[str], job: Job) -> tuple[dict[str, str], dict[str, Any]]:
    """The choices of groups, and the keys by node: what was typed, and what is looked at first anyway."""
    choices = {group: str(job.choices[group]) for group in ("model", "dataset", "evaluation")}
    evaluation, is_pipeline = job.config.evaluation, job.config.model.family == "diffusers"
    steps: tuple[str, ...] = ("num_inference_steps", "guidance_scale") if is_pipeline else ()
    if is_pipeline and (pipeline := _pipeline(job.config)) is not None:
        steps = tuple(name for name in steps if name in parameters_of(pipeline))
    body: dict[str, Any] = {"evaluation": {key: getattr(evaluation, key) for key in ("num_samples", *steps)}}
    if needs_own_data(job.config):
        body["dataset"] = {"path": MISSING}
    for parsed in parse(words):
        key, value = parsed.key_or_group, parsed.value()
        if key in groups():
            choices[key] = str(job.choices.get(key, value))
            continue
        *above, last = key.split(".")
        node = body
        for name in above:
            node = node.setdefault(name, {})
        node[last] = value if isinstance(value, (bool, int, float, type(None))) else _plain(value)
    nodes = [*(node for node in ("model", "dataset", "evaluation") if node in body), *body]
    return choices, {node: body[node] for node in dict.fromkeys(nodes)}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return value if isinstance(value, (bool, int, float)) else str(getattr(value, "text", value))


def _yaml(value: Any) -> str:
    """A value as YAML in one line: plain words as they are, all other text in JSON's quotes, which YAML reads."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_yaml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    if value == MISSING:
        return MISSING
    is_word = isinstance(value, str) and value.replace("_", "").isalnum() and value[0].isalpha()
    reserved = str(value).lower() in ("null", "true", "false", "yes", "no", "on", "off", "y", "n")
    return str(value) if is_word and not reserved else json.dumps(value, ensure_ascii=False)


_NOTES = {
    "dataset.path": "a file or folder of your own",
    "model.path": "a folder that save_pretrained wrote, or a Hub id",
    "model.components": "what is quantized; all else stays as it is",
    "evaluation.num_samples": "more of them, narrower intervals; time goes with them",
    "evaluation.num_inference_steps": "see the model card; time goes with them, too",
    "evaluation.guidance_scale": "see the model card",
}


def _keys(path: str, node: Mapping[str, Any], indent: int) -> Iterator[tuple[str, str]]:
    for key, value in node.items():
        note = _NOTES.get(f"{path}.{key}", "")
        is_open = note and value == MISSING
        later = f"; as long as it is left open: {path}.{key}=... with each command" if is_open else ""
        yield f"{' ' * indent}{key}: {_yaml(value)}", f"{note}{later}"


def _told(group: str, option: str, choices: Mapping[str, str]) -> str:
    """What is said of a choice: how the model is loaded, and which other data it could be run on."""
    if group == "model":
        return "how it is loaded"
    if group == "dataset":
        row = next((row for row in models() if row["model"] == choices["model"]), None)
        if row and row["family"] == "diffusers":
            return "what its call takes"
        others = [name for name in str(row["datasets"]).split() if name != option] if row else []
        return f"or {', '.join(others)} (dataset.path: of your own)" if others else ""
    return "how much is run" if group == "evaluation" else ""


def _beside(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Lines with their comments below one another."""
    width = max((len(line) for line, note in rows if note), default=0)
    return [f"{line:<{width}}   # {note}" if note else line for line, note in rows]
