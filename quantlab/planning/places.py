"""Where the vocabulary and the recipes lie. Torch-free."""

from __future__ import annotations

import os
from pathlib import Path

from quantlab.backends.table import backends
from quantlab.errors import ConfigError, nearest

_PACKAGE = Path(__file__).resolve().parents[1]


def _data_dir(installed: str, checkout: str) -> Path:
    inside = _PACKAGE / installed
    return inside if inside.is_dir() else _PACKAGE.parent / checkout


def conf_dir() -> Path:
    """The folder of config groups: inside an installed wheel, or beside the package in a checkout."""
    return _data_dir("_conf", "conf")


def shipped_recipes() -> Path:
    """The folder of the recipes that come with quantlab."""
    return _data_dir("_recipes", "recipes")


def recipe_dirs() -> list[Path]:
    """Folders with recipes: ``QUANTLAB_RECIPES``, ``./recipes``, and the shipped ones last."""
    own = [Path(p).expanduser() for p in os.environ.get("QUANTLAB_RECIPES", "").split(os.pathsep) if p]
    places = [*own, Path.cwd() / "recipes", shipped_recipes()]
    return list(dict.fromkeys(p.resolve() for p in places if p.is_dir()))


def recipes() -> dict[str, Path]:
    """Every recipe that ``recipe=NAME`` finds, by name; a user's own hides a shipped one of the same name."""
    return {f.stem: f for d in reversed(recipe_dirs()) for f in sorted(d.glob("*.yaml"))}


def recipe_file(value: str) -> Path:
    """``NAME`` or a path to a YAML file -> the file; ConfigError with the nearest name where there is none."""
    if value.endswith((".yaml", ".yml")):
        path = Path(value).expanduser().resolve()
        if not path.is_file():
            raise ConfigError(f"recipe={value}: no such file; quantlab list recipes shows the named ones")
        return path
    known = recipes()
    if value not in known:
        raise ConfigError(
            f"recipe={value}: no such recipe{nearest(value, known)}; quantlab list recipes shows them, "
            "and recipe=path/to/file.yaml runs your own"
        )
    return known[value]


def groups() -> dict[str, list[str]]:
    """Config group -> its options."""
    found = {d.name: {f.stem for f in d.glob("*.yaml")} for d in sorted(conf_dir().iterdir()) if d.is_dir()}
    found["backend"] |= set(backends())  # those of other packages have no file here
    return {group: sorted(options) for group, options in found.items()}
