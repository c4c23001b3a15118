"""A recipe is data: what it may hold, and a run written as one.

A recipe is a Hydra config of the group ``recipe`` (``# @package _global_``): a defaults list that overrides our groups,
values for our keys, and at most one of ``sweep.grid`` and ``sweep.candidates``. It never names code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from quantlab.errors import ConfigError

AXIS_GROUPS = ("backend", "dtype", "group_size")


def check_recipe(file: Path) -> dict[str, Any]:
    """The recipe's content, or ConfigError for what a recipe may not hold.

    Refused: a ``hydra`` key, a ``_target_`` anywhere, interpolations that leave the config (resolvers), literal
    axes in ``quantization`` (a group choice says the same and the command line can override it), and a grid beside
    a list of candidates.
    """
    where = f"recipe={file.name}"
    try:
        content = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except (OSError, UnicodeDecodeError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{where}: not a readable YAML file ({str(error).splitlines()[0]})") from error
    except Exception as error:  # noqa: BLE001  yaml's errors share no base with the above; re-raised as ours
        raise ConfigError(f"{where}: not valid YAML ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: a recipe is a mapping of our keys, not {type(content).__name__}")
    if not re.match(r"#\s*@package\s+_global_\s*$", file.read_text(encoding="utf-8").partition("\n")[0]):
        raise ConfigError(f"{where}: its keys are ours only under a header; make the first line: # @package _global_")
    _refuse_code(where, content, "")
    axes = {"backend", "dtype", "group_size"} & set(content.get("quantization") or {})
    if axes:
        key = sorted(axes)[0]
        raise ConfigError(
            f"{where}: quantization.{key} hides {key}=... of the command line; "
            f"choose it in the defaults list: - override /{key}: ..."
        )
    sweep = content.get("sweep") or {}
    if sweep.get("grid") and sweep.get("candidates"):
        raise ConfigError(f"{where}: sweep.grid and sweep.candidates exclude each other; keep one")
    return {str(k): v for k, v in content.items()}


def _refuse_code(where: str, node: Any, path: str) -> None:
    if isinstance(node, dict):
        for key, value in node.items():
            here = f"{path}.{key}" if path else str(key)
            if key == "_target_" or here == "hydra":
                raise ConfigError(f"{where}: {here} is not allowed: a recipe is data and never names code to run")
            _refuse_code(where, value, here)
    elif isinstance(node, list):
        for value in node:
            _refuse_code(where, value, path)
        if path == "defaults" and any("hydra/" in str(v) for v in node):
            raise ConfigError(f"{where}: a defaults list overrides our groups, never hydra's")
    elif isinstance(node, str) and re.search(r"\$\{[^}]*:", node):
        raise ConfigError(f"{where}: {path}: {node} reaches outside the config; write the value itself")


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
