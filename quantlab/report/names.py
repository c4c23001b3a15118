"""What rows are called where a reader sees several of one name: each reference and its floors say of which inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quantlab.report.selection import shared_settings
from quantlab.tracking.results import Row
from quantlab.tracking.values import flatten
from quantlab.vocabulary.files import ends_of_paths, leads_to_a_file
from quantlab.vocabulary.numbers import is_scheme


def told_apart(rows: Sequence[Row]) -> list[str]:
    """The rows' names, with what sets apart those of the unquantized model of which several are called alike.

    Names of schemes are told apart when they are planned. A run that stands there twice has one name.
    """
    bare = [not is_scheme(row["name"], row["metrics"]) for row in rows]
    same: dict[str, list[Mapping[str, str]]] = {}
    for row, is_bare in zip(rows, bare, strict=True):
        if is_bare:
            same.setdefault(row["name"], []).append(_settings(row))
    return [_name(row, same[row["name"]]) if is_bare else row["name"] for row, is_bare in zip(rows, bare, strict=True)]


def once_each(rows: Sequence[Row]) -> list[Row]:
    """The rows without those of the unquantized model whose run stands there already: jobs that share all share it."""
    seen: set[tuple[str, str]] = set()
    found = []
    for row in rows:
        key = (row["name"], row.get("run_id") or "")
        if not key[1] or is_scheme(row["name"], row["metrics"]) or key not in seen:
            found.append(row)
        seen.add(key)
    return found


def _settings(row: Row) -> Mapping[str, str]:
    return shared_settings(flatten(row.get("params", {})))


def _name(row: Row, others: Sequence[Mapping[str, str]]) -> str:
    own = _settings(row)
    varied = sorted({k for other in others for k in {**own, **other} if own.get(k) != other.get(k)})
    told = []
    for key in varied:
        value = own.get(key, "null")
        if leads_to_a_file(key):
            value = ends_of_paths({other.get(key, "null") for other in others})[value]
        told.append(f"{key}={value}")
    return f"{row['name']} ({' '.join(told)})" if told else row["name"]
