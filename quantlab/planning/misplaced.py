"""What people write into a recipe that belongs elsewhere in it, or is said otherwise: refused with what to write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from quantlab.errors import ConfigError, nearest
from quantlab.planning.places import groups
from quantlab.planning.words import WHOLE_NODES
from quantlab.vocabulary.axes import QuantizationAxes
from quantlab.vocabulary.schema import ExperimentConfig

_ENTRY = "- {backend: quanto, dtype: int8}"
_MAX = 80


def check_place(key: str, value: Any) -> None:
    """ConfigError for a top-level key of ours that does not stand there, or holds what it cannot."""
    nodes = {field.name for field in fields(ExperimentConfig) if is_dataclass(field.default_factory)}
    options, shown = groups().get(key), str(value)[:_MAX]
    is_node = isinstance(value, Mapping) or value is None
    if options is not None and not (key in nodes and is_node):
        choice = shown if shown in options else options[0]
        near = "" if shown in options or is_node else nearest(shown, options)
        keys = f"; its keys stand in a mapping, as in {_example(key)}" if key in nodes else ""
        raise ConfigError(
            f"{key}: {shown}: it is chosen in the defaults list, as in defaults: [override /{key}: {choice}]"
            f"{keys}{near}"
        )
    _check_axis(key, key, shown)
    if key in ("grid", "candidates"):
        raise ConfigError(f"{key}: it stands below sweep:, as in sweep: {{{key}: ...}}")
    if key in nodes and not is_node:
        raise ConfigError(f"{key}: {shown}: a mapping of keys is wanted, as in {_example(key)}")


def _check_axis(said: str, key: str, value: Any) -> None:
    """ConfigError for an axis that is no group: a word like the others on the command line, and no choice."""
    if key in {field.name for field in fields(QuantizationAxes)}:
        raise ConfigError(f"{said}: it stands below quantization:, as in quantization: {{{key}: {value}}}")


def _example(node: str) -> str:
    """``evaluation: {num_samples: 50}``."""
    key, _, value = WHOLE_NODES.get(node, "KEY=VALUE").partition("=")
    *above, last = [node, *key.split(".")]
    return "".join(f"{name}: {{" for name in above) + f"{last}: {value}" + "}" * len(above)


def check_sweep(sweep: Mapping[str, Any]) -> None:
    """ConfigError for a grid that is no mapping of lists, for candidates that are no list of schemes, and for both."""
    grid, candidates = sweep.get("grid") or {}, sweep.get("candidates") or []
    if grid and candidates:
        raise ConfigError("sweep.grid and sweep.candidates exclude each other; keep one")
    if not isinstance(candidates, list):
        raise ConfigError(f"sweep.candidates: a list of schemes is wanted, an entry each: {_ENTRY}")
    for i, entry in enumerate(candidates):
        if not isinstance(entry, Mapping):
            raise ConfigError(f"sweep.candidates[{i}]: {str(entry)[:_MAX]}: a scheme is keys and values: {_ENTRY}")
    if not isinstance(grid, Mapping):
        raise ConfigError("sweep.grid: keys with lists of values are wanted, as in grid: {dtype: [int8, int4]}")
    for key, values in grid.items():
        if not isinstance(values, list):
            raise ConfigError(f"sweep.grid.{key}: a list of values is wanted, as in {key}: [{str(values)[:_MAX]}]")


def check_entry(entry: Any, said: str, group: str, chosen: Any) -> None:
    """ConfigError for an entry of a defaults list that is no choice of an option of ours."""
    options = groups()
    shown = f"- {said}: {chosen}"[:_MAX] if isinstance(entry, Mapping) and len(entry) == 1 else str(entry)[:_MAX]
    if group not in options:
        _check_axis(shown, group, chosen)
        raise ConfigError(
            f"{shown}: a choice from our groups is wanted, as in - override /backend: quanto; there are "
            f"{', '.join(options)}{nearest(group, options)}"
        )
    if not said.startswith("override "):
        raise ConfigError(f"{shown}: a choice stands in the place of ours: - override /{group}: {chosen}")
    for option in chosen if isinstance(chosen, list) else [chosen]:
        if str(option) not in options[group]:
            near = nearest(str(option), options[group])
            raise ConfigError(f"{group}={str(option)[:_MAX]}: there are {', '.join(options[group])}{near}")
