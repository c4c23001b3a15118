"""A recipe is data: what it may hold, and a run written as one.

A recipe is a Hydra config of the group ``recipe`` (``# @package _global_``): a defaults list that overrides our groups,
values for our keys, and at most one of ``sweep.grid`` and ``sweep.candidates``. It never names code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader

from quantlab.errors import ConfigError, nearest
from quantlab.planning.data import check_data

AXIS_GROUPS = ("backend", "dtype", "group_size")


def check_recipe(file: Path, options: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The recipe's content, or ConfigError for what a recipe may not hold. ``options`` are those of our groups.

    Refused: a ``hydra`` key, whatever says more than data (:func:`quantlab.planning.data.check_data`), a defaults list
    that does more than choose from our groups, literal axes in ``quantization`` (a group choice says the same and the
    command line can override it), and a grid beside a list of candidates.
    """
    where = f"recipe={file.name}"
    try:
        text = file.read_text(encoding="utf-8")
        content = yaml.load(text, Loader=get_yaml_loader())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: not a readable YAML file ({str(error).splitlines()[0]})") from error
    except Exception as error:  # noqa: BLE001  yaml's errors share no base with the above; re-raised as ours
        raise ConfigError(f"{where}: not valid YAML ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: a recipe is a mapping of our keys, not {type(content).__name__}")
    if not re.match(r"#\s*@package\s+_global_\s*$", text.partition("\n")[0]):
        raise ConfigError(f"{where}: its keys are ours only under a header; make the first line: # @package _global_")
    try:
        _check_content(content, options)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return {str(k): v for k, v in content.items()}


def _check_content(content: dict[str, Any], options: Mapping[str, Sequence[str]]) -> None:
    if "hydra" in content:
        raise ConfigError("hydra is not allowed: a recipe is data and never names code to run")
    _check_defaults(content.get("defaults") or [], options)
    check_data({k: v for k, v in content.items() if k != "defaults"})
    if bad := [k for k in content if not str(k).isidentifier()]:
        raise ConfigError(f"{bad[0]}: no such key; nest it, as in evaluation: {{num_samples: 50}}")
    nodes = {name: content.get(name) or {} for name in ("quantization", "sweep", "launcher")}
    if bad := [name for name, node in nodes.items() if not isinstance(node, dict)]:
        raise ConfigError(f"{bad[0]}: a mapping of keys is wanted, not {nodes[bad[0]]!r}")
    if axes := {"backend", "dtype", "group_size"} & set(nodes["quantization"]):
        key = sorted(axes)[0]
        raise ConfigError(
            f"quantization.{key} hides {key}=... of the command line; "
            f"choose it in the defaults list: - override /{key}: ..."
        )
    sweep = nodes["sweep"]
    if sweep.get("grid") and sweep.get("candidates"):
        raise ConfigError("sweep.grid and sweep.candidates exclude each other; keep one")


def _check_defaults(entries: Any, options: Mapping[str, Sequence[str]]) -> None:
    """ConfigError unless each entry is ``override /GROUP: OPTION``; Hydra's own groups and files elsewhere are none."""
    for entry in entries if isinstance(entries, list) else [entries]:
        if entry == "_self_":
            continue
        said = next(iter(entry), None) if isinstance(entry, dict) and len(entry) == 1 else None
        group = str(said).removeprefix("override ").strip().removeprefix("/") if said is not None else ""
        if "hydra" in str(entry):
            raise ConfigError("defaults: a defaults list overrides our groups, never hydra's")
        if not str(said).startswith("override ") or group not in options:
            raise ConfigError(
                f"defaults: {str(entry)[:80]}: a choice from our groups is wanted, as in - override /backend: quanto; "
                f"there are {', '.join(options)}"
            )
        chosen = entry[said]
        for option in chosen if isinstance(chosen, list) else [chosen]:
            if str(option) not in options[group]:
                raise ConfigError(
                    f"defaults: {group}={str(option)[:80]}: there are {', '.join(options[group])}"
                    f"{nearest(str(option), options[group])}"
                )


def replay_yaml(resolved: Mapping[str, Any], choices: Mapping[str, str]) -> str:
    """One job as a recipe: ``quantlab recipe=FILE`` composes the identical config again.

    Args:
        resolved: the whole resolved config, plain data.
        choices: option of each group that the job chose.
    """
    quantization = dict(resolved["quantization"])
    chosen = {**choices, **{g: str(quantization.pop(g)) for g in AXIS_GROUPS}}
    chosen.pop("launcher", None)  # who runs a job is no part of it
    chosen["modules_to_not_convert"] = "[]"  # its lists are written out below
    body = {k: v for k, v in resolved.items() if k not in ("sweep", "recipe", "quantization", "launcher")}
    defaults = [{f"override /{g}": [] if c == "[]" else c} for g, c in chosen.items()]
    text: str = OmegaConf.to_yaml(OmegaConf.create({"defaults": defaults, **body, "quantization": quantization}))
    return "# @package _global_\n# Written by a run; quantlab recipe=THIS_FILE repeats it.\n" + text
