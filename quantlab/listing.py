"""``quantlab list``: what there is, printed from the tables that the code itself uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

from quantlab.backends.table import PACKAGES
from quantlab.capabilities import CAPABILITIES, Capability, refusal
from quantlab.composition import conf_dir, recipes
from quantlab.dtypes import DTYPES
from quantlab.metrics import METRICS

Row = dict[str, Any]


def backends() -> list[Row]:
    """One row a backend: whether its library is installed, and its dtypes."""
    return [{"backend": b, "installed": _installed(b), "dtypes": " ".join(rows)} for b, rows in CAPABILITIES.items()]


def _installed(backend: str) -> str:
    from importlib import metadata

    if backend == "none":
        return "yes"
    name = {"optimum.quanto": "optimum-quanto", "modelopt": "nvidia-modelopt"}.get(PACKAGES[backend], PACKAGES[backend])
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"no: pip install 'quantlab-recipes[{backend}]'"


def dtypes() -> list[Row]:
    """One row a dtype: its payload bits, and which backends store it."""
    return [
        {
            "dtype": d.name,
            "bits": d.bits,
            "backends": " ".join(b for b, rows in CAPABILITIES.items() if d.name in rows),
            "what it is": d.description,
        }
        for d in DTYPES.values()
    ]


def combinations() -> list[Row]:
    """One row for each dtype of each backend: what the capability table says, or why it is refused."""
    nothing = dict.fromkeys(f.name for f in fields(Capability))
    return [
        {
            "backend": backend,
            "dtype": dtype,
            "offered": dtype in rows,
            "reason": refusal(backend, dtype),
            **(asdict(rows[dtype]) if dtype in rows else nothing),
        }
        for backend, rows in CAPABILITIES.items()
        for dtype in DTYPES
    ]


def _options(group: str) -> list[Row]:
    return [
        {group: f.stem, "what it is": headline(f.read_text(encoding="utf-8"))}
        for f in sorted((conf_dir() / group).glob("*.yaml"))
    ]


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


BRIEF = {
    "combinations": (
        ("backend", "dtype", "group_sizes", "activation_dtypes", "algorithms"),
        "All others are refused; their reasons, and all else that the table says: --json",
    )
}
"""List -> the columns that a terminal has room for, and what is said of the rest."""

LISTS: dict[str, Callable[[], list[Row]]] = {
    "backends": backends,
    "dtypes": dtypes,
    "combinations": combinations,
    "models": lambda: _options("model"),
    "datasets": lambda: _options("dataset"),
    "evaluations": lambda: _options("evaluation"),
    "recipes": list_recipes,
    "metrics": metrics,
}
