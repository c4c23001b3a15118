"""Where the vocabulary and the recipes lie. Torch-free."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantlab.backends.table import backends
from quantlab.errors import ConfigError, nearest
from quantlab.vocabulary.fields import checked_path

AXIS_GROUPS = ("backend", "dtype", "group_size")
"""Groups of one key of the ``quantization`` node each, which all have a choice at all times."""
ARCHITECTURES = "architectures"
"""Folder of ``conf/`` with data and no options: what models are made of."""
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
        path = checked_path("recipe", value).resolve()
        if not path.is_file():
            raise ConfigError(f"recipe={value}: no such file; quantlab list recipes shows the named ones")
        return path
    known = recipes()
    if value not in known:
        is_beside = os.path.isfile(f"{value}.yaml")  # False, and no error, for what can be no path
        near = f"; did you mean recipe={value}.yaml?" if is_beside else nearest(value, known)
        raise ConfigError(
            f"recipe={value}: no such recipe{near}; quantlab list recipes shows them, "
            "and recipe=path/to/file.yaml runs your own"
        )
    return known[value]


_OWN: list[Path] = []  # the folder of --config-dir, as long as its request lasts; Hydra's plugins cannot be given it


@contextmanager
def own_options(folder: str | None) -> Iterator[None]:
    """Inside, the groups have also the options in ``folder`` (``dtype/mine.yaml``), none of which hides a shipped one.

    Raises ConfigError, beginning with ``--config-dir``, for a folder that is none or an option of a name that is taken.
    """
    if folder is None:
        yield
        return
    own, shipped = checked_path("--config-dir", folder).resolve(), groups()
    if not own.is_dir():
        raise ConfigError(f"--config-dir {folder}: no such folder; name one with groups in it, as in dtype/mine.yaml")
    found = [file for group in shipped for file in sorted((own / group).glob("*.yaml"))]
    if taken := [file for file in found if file.stem in shipped[file.parent.name]]:
        name = taken[0].relative_to(own)
        raise ConfigError(f"--config-dir {folder}: {name} has the name of a shipped option; rename it")
    if not found:
        raise ConfigError(f"--config-dir {folder}: no option in it; there are the groups {', '.join(shipped)}")
    for file in found:
        said = {line.partition(":")[0] for line in file.read_text(encoding="utf-8", errors="replace").splitlines()}
        if hidden := {file.parent.name} & set(AXIS_GROUPS) and said & set(AXIS_GROUPS) - {file.parent.name}:
            name, key = file.relative_to(own), sorted(hidden)[0]
            raise ConfigError(
                f"--config-dir {folder}: {name} sets {key}, which the choice {key}=... hides; drop it there"
            )
    _OWN.append(own)
    try:
        yield
    finally:
        _OWN.remove(own)


def own_option(group: str, name: str) -> str:
    """What to say where ``./conf`` has an option of that name: it is read only where the user says so.

    A folder of that name comes with other people's checkouts too, and an option may say where results go.
    """
    is_there = re.fullmatch(r"[\w.-]{1,200}", name) and Path("conf", group, f"{name}.yaml").is_file()
    return f"; conf/{group}/{name}.yaml is read by --config-dir conf" if is_there and not _OWN else ""


def option_dirs() -> list[Path]:
    """Folders with options of our groups: the shipped one, and the user's."""
    return [conf_dir(), *_OWN]


def shipped_groups() -> dict[str, list[str]]:
    """Config group -> the options that anyone has."""
    found = _files_by_group(conf_dir())
    more = {"backend": set(backends())}  # those of other packages have no file here
    return {group: sorted(options | more.get(group, set()), key=_by_number) for group, options in found.items()}


def _by_number(option: str) -> tuple[int, str]:
    """Numbers first, as they count, and then words."""
    return (int(option), "") if option.isdigit() else (sys.maxsize, option)


@functools.cache
def _files_by_group(conf: Path) -> dict[str, frozenset[str]]:
    """The shipped options, read from the disk once: a grid asks for them once a value."""
    return {d.name: frozenset(f.stem for f in d.glob("*.yaml")) for d in sorted(conf.iterdir()) if _is_group(d)}


def _is_group(folder: Path) -> bool:
    return folder.is_dir() and folder.name != ARCHITECTURES


def groups() -> dict[str, list[str]]:
    """Config group -> its options, the user's own (``--config-dir``) last."""
    shipped = shipped_groups()
    own = {group: sorted(f.stem for d in _OWN for f in (d / group).glob("*.yaml")) for group in shipped}
    return {group: [*options, *own[group]] for group, options in shipped.items()}
