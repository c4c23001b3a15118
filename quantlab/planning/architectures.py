"""The architectures that come with quantlab: ``conf/architectures``, one file a model, each value with its source."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import yaml

from quantlab.models.architectures import Architecture, Part
from quantlab.planning.places import ARCHITECTURES, conf_dir


def shipped_architecture(path: str | None) -> Architecture | None:
    """The shipped architecture of a Hub id; None where there is none."""
    return _by_path().get(path or "")


def shipped_architectures() -> dict[str, Architecture]:
    """Name of the file -> architecture."""
    return {file.stem: _read(file) for file in sorted((conf_dir() / ARCHITECTURES).glob("*.yaml"))}


@functools.cache
def _by_path() -> dict[str, Architecture]:
    return {found.path: found for found in shipped_architectures().values()}


def _data(file: Path) -> dict[str, Any]:
    fastest = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # where PyYAML was built with its C library
    data: dict[str, Any] = yaml.load(file.read_text(encoding="utf-8"), Loader=fastest)
    return data


def _read(file: Path) -> Architecture:
    data = _data(file)
    parts = {name: _part(file.parent, said) for name, said in data["components"].items()}
    return Architecture(path=data["path"], dtype=data["dtype"], parts=parts)


def _part(folder: Path, said: dict[str, Any]) -> Part:
    """A component; ``like: flux_dev.text_encoder`` is that of another file."""
    if "like" in said:
        name, _, component = said["like"].partition(".")
        return _part(folder, _data(folder / f"{name}.yaml")["components"][component])
    return Part(class_name=said["class"], config=said["config"], source=said["source"])
