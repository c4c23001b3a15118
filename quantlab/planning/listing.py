"""``quantlab list``: what there is, printed from the tables that the code itself uses."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, fields
from importlib import metadata
from typing import Any

import yaml

from quantlab.backends.table import backends as table
from quantlab.backends.table import offers, own_settings
from quantlab.datasets.table import DATASETS, Dataset
from quantlab.errors import ConfigError, nearest
from quantlab.metrics import METRICS, metric_called
from quantlab.models.table import FAMILIES
from quantlab.planning.glossary import ALSO, SHOWN, WORDS
from quantlab.planning.places import groups, option_dirs, recipes
from quantlab.report.table import OF_SPEED
from quantlab.report.verdicts import RULES
from quantlab.vocabulary.axes import QuantizationAxes, resolve_axes
from quantlab.vocabulary.capabilities import Capability
from quantlab.vocabulary.dtypes import DTYPES

Row = dict[str, Any]


def backends() -> list[Row]:
    """One row a backend: whether its library is installed, and its dtypes."""
    return [
        {"backend": name, "installed": _installed(name), "dtypes": " ".join(offer.rows)}
        for name, offer in offers().items()
    ]


def _installed(backend: str) -> str:
    if backend == "none":
        return "yes"
    row = table()[backend]
    try:
        return metadata.version(row.distributions[0])
    except metadata.PackageNotFoundError:
        return f"no: pip install '{row.install}'"


def dtypes() -> list[Row]:
    """One row a dtype: its payload bits, and which backends store it."""
    return [
        {
            "dtype": d.name,
            "bits": d.bits,
            "backends": " ".join(b for b, offer in offers().items() if d.name in offer.rows),
            "what it is": d.description,
        }
        for d in DTYPES.values()
    ]


DEVICES = ("cpu", "cuda")


def combinations(device: str = "") -> list[Row]:
    """One row for each dtype of each backend: what the capability table says, or why it is refused.

    ``device``: of one kind of device, whether such a device is here or not, with what it and the shapes must be.
    """
    nothing = dict.fromkeys(f.name for f in fields(Capability))
    return [
        {
            "backend": backend,
            "dtype": dtype,
            "offered": dtype in offer.rows and (not device or device in offer.rows[dtype].devices),
            "reason": _not_there(offer.rows[dtype], device) if dtype in offer.rows else offer.refusal(dtype),
            "needs": offer.rows[dtype].needs(device or "cuda") if dtype in offer.rows else None,
            **(asdict(offer.rows[dtype]) if dtype in offer.rows else nothing),
        }
        for backend, offer in offers().items()
        for dtype in DTYPES
    ]


def _not_there(row: Capability, device: str) -> str:
    return f"runs on {' and '.join(row.devices)} only" if device and device not in row.devices else ""


KINDS = {
    "linear": "`nn.Linear`, its subclasses, GPT-2's `Conv1D`, the matrices of `nn.MultiheadAttention`",
    "conv": "`nn.Conv1d` to `nn.Conv3d`, transposed ones too",
    "embedding": "`nn.Embedding`; one that is tied to the output head is stored once for both",
    "expert": "packed experts: a parameter with a matrix for each (Mixtral, Qwen3-MoE, gpt-oss, DeepSeek)",
    "recurrent": "the matrices of `nn.LSTM`, `nn.GRU`, `nn.RNN` and their cells",
    "parameter": "matrices that a part holds itself (routers, tables of positions, `nn.Bilinear`)",
}
"""Value of ``quantization.layer_kinds`` -> the layers."""


def kinds() -> list[Row]:
    """One row a kind of layer: which dtypes of each backend store it."""
    return [
        {
            "kind": kind,
            **{
                name: _some([d for d, row in offers()[name].rows.items() if kind in row.layer_kinds], name)
                for name in table()
            },
            "what it is": what,
        }
        for kind, what in KINDS.items()
    ]


def _some(dtypes: list[str], backend: str) -> str:
    """Dtypes of a backend in few words: all of them, or all but a few."""
    others = [d for d in offers()[backend].rows if d not in dtypes]
    return "all" if not others else f"all but {' '.join(others)}" if dtypes else "none"


ALGORITHMS = {
    "max": "the library's plain rounding, by the weights alone",
    "mse": "scales that make the weights' squared error least",
    "hqq": "zero points by half-quadratic optimization of the weights' error (HQQ)",
    "imatrix": "each input channel's errors weighed by its mean squared activation (llama.cpp)",
    "smoothquant": "outliers of activations moved into the weights (arXiv 2211.10438)",
    "awq": "channels with large activations scaled up before rounding (arXiv 2306.00978)",
    "awq_lite": "AWQ's scales, searched over few exponents",
    "awq_clip": "AWQ's clipping: the largest weights cut where the outputs gain",
    "awq_full": "awq_lite, then awq_clip",
    "svdquant": "awq_lite, and an unquantized low-rank branch beside the weight (arXiv 2411.05007)",
    "gptq": "column by column, later columns correct earlier ones' errors (arXiv 2210.17323)",
    "local_hessian": "scales that make the outputs' error least, block by block of inputs",
}
"""Value of ``algorithm`` -> how the stored weights are found."""


def algorithms() -> list[Row]:
    """One row for each algorithm of each backend: the dtypes that take it, and whether it needs calibration data."""
    pairs = dict.fromkeys((b, a) for b in table() for row in offers()[b].rows.values() for a in row.algorithms)
    return [
        {
            "backend": backend,
            "algorithm": algorithm,
            "needs data": _needs_data(backend, algorithm),
            "dtypes": " ".join(d for d, row in offers()[backend].rows.items() if algorithm in row.algorithms),
            "what it is": ALGORITHMS.get(algorithm, ""),
        }
        for backend, algorithm in pairs
    ]


def _needs_data(backend: str, algorithm: str) -> str:
    """``yes``, ``no``, or which of its schemes do, as the configs themselves say; and the device, if only one."""
    rows = offers()[backend].rows
    if all(algorithm in row.cuda_algorithms for row in rows.values() if algorithm in row.algorithms):
        return "yes, and CUDA"
    said: set[bool] = set()
    scales: list[dict[str, Any]] = [{}]
    scales += [{"activation_scales": "static"}] if "activation_scales" in own_settings(backend) else []
    for dtype, row in rows.items():
        for activation_dtype in row.activation_dtypes if algorithm in row.algorithms else ():
            axes = QuantizationAxes(
                backend=backend, dtype=dtype, algorithm=algorithm, activation_dtype=activation_dtype
            )
            for settings in scales:
                with suppress(ConfigError):  # a combination that is refused
                    said.add(
                        table()[backend].module.Config.from_resolved(resolve_axes(axes, offers()), settings).needs_data
                    )
    return "for static activations" if len(said) > 1 else "yes" if True in said else "no"


def _options(group: str) -> list[Row]:
    return [
        {group: f.stem, "what it is": sentence(f.read_text(encoding="utf-8"))}
        for folder in option_dirs()
        for f in sorted((folder / group).glob("*.yaml"))
    ]


def models() -> list[Row]:
    """One row a model, by family: what it is, and the data sets that its kind of model is run on."""
    rows = []
    for folder in option_dirs():
        for file in sorted((folder / "model").glob("*.yaml")):
            text = file.read_text(encoding="utf-8")
            family = ((yaml.safe_load(text) or {}).get("model") or {}).get("family", "")
            protocol = FAMILIES[family].protocol if family in FAMILIES else ""
            data = [d.name for d in DATASETS.values() if protocol in d.protocols and _is_for(d, family)]
            rows.append(
                {"model": file.stem, "family": family, "datasets": " ".join(data), "what it is": sentence(text)}
            )
    order = ["auto", *FAMILIES]
    return sorted(rows, key=lambda row: order.index(row["family"]) if row["family"] in order else len(order))


def _is_for(dataset: Dataset, family: str) -> bool:
    """Of the data sets of diffusion, those of pipelines are for pipelines alone."""
    return FAMILIES[family].protocol != "diffusion" or (dataset.conditions is not None) == (
        FAMILIES[family].look is not None
    )


def sentence(text: str) -> str:
    """The first sentence of a YAML file's comment."""
    lines = (line.lstrip("# ").strip() for line in text.splitlines() if line.startswith("#"))
    whole = " ".join(line for line in lines if line and not line.startswith("@package"))
    return whole.partition(". ")[0].rstrip(".") + "." if whole else ""


def headline(text: str) -> str:
    """The first comment line of a YAML file that is not Hydra's ``@package`` header."""
    comments = (line.lstrip("# ").strip() for line in text.splitlines() if line.startswith("#"))
    return next((c for c in comments if c and not c.startswith("@package")), "")


def list_recipes() -> list[Row]:
    """One row a recipe: its question."""
    return [
        {"recipe": name, "question": headline(f.read_text(encoding="utf-8"))} for name, f in sorted(recipes().items())
    ]


def metrics() -> list[Row]:
    """One row a metric."""
    better = {True: "higher", False: "lower", None: ""}
    return [
        {
            "metric": f"quality/{m.name}",
            "unit": m.unit,
            "better": better[m.higher_is_better],
            "protocols": " ".join(m.protocols),
            "what it is": m.description,
        }
        for m in METRICS.values()
    ]


def words() -> list[Row]:
    """One row a word."""
    return [{"word": word, "what it is": text} for word, text in WORDS.items()]


def meaning(word: str) -> str:
    """What a word of ours is: of the glossary, a verdict, a metric, a dtype, an algorithm, a kind of layer, a backend
    or a group of options; also in the plural, and by another name of the same.

    Raises ConfigError, with the nearest ones, for any other.
    """
    known = {group: f"chosen as {group}=OPTION: {', '.join(options)}" for group, options in groups().items()}
    known |= {name: f"a backend; its dtypes: {', '.join(offer.rows)}" for name, offer in offers().items()}
    known |= {n: f"{m.description}{f' [{m.unit}]' if m.unit not in ('', '1') else ''}" for n, m in METRICS.items()}
    known |= {n: f"{d.description} ({d.bits} bits)" for n, d in DTYPES.items()}
    speed = "median of repetitions after a warm-up, _p90: 90th percentile of the times; evaluation.speed=true"
    known |= {f"{n}{end}": f"{text}; {speed}" for n, text in OF_SPEED.items() for end in ("", "_p90")}
    known |= SHOWN | RULES | ALGORITHMS | KINDS | {w.lower(): text for w, text in WORDS.items()}
    for other, same in ALSO.items():
        told = f"the same as {same}: {WORDS[same]}"
        known |= {other: told, other.rpartition("/")[2]: known.get(other.rpartition("/")[2], told)}
    known |= dict.fromkeys(("low..high", "..", "interval", "ci", "confidence interval"), SHOWN["(low..high)"])
    name = word.lower().removeprefix("perf/")
    for spelled in (word.lower(), name, metric_called(name), name.removesuffix("s")):
        if spelled in known:
            return known[spelled]
    close = nearest(name, known)
    raise ConfigError(f"help {word}: no such word{close}; quantlab list words shows the glossary")


BRIEF: dict[str, tuple[tuple[str, ...], str]] = {
    "combinations": (
        ("backend", "dtype", "group_sizes", "activation_dtypes", "algorithms"),
        "All others are refused; their reasons, and all else that the table says: --json; device=cuda or device=cpu "
        "lists what runs there, and what it needs",
    ),
    "words": (("word", "what it is"), "One of them: quantlab help WORD"),
    "combinations of a device": (
        ("backend", "dtype", "activation_dtypes", "needs"),
        "Of shapes, of the device and of the machine; all else that the table says: --json",
    ),
}
"""List -> the columns that a terminal has room for, and what is said of the rest."""

LISTS: dict[str, Callable[[], list[Row]]] = {
    "backends": backends,
    "dtypes": dtypes,
    "combinations": combinations,
    "kinds": kinds,
    "algorithms": algorithms,
    "models": models,
    "datasets": lambda: _options("dataset"),
    "evaluations": lambda: _options("evaluation"),
    "recipes": list_recipes,
    "metrics": metrics,
    "words": words,
}
