"""What a recipe that does not come with quantlab decides beyond numbers: where things go, and what is read or loaded.

Such values are shown and asked for once. Who agrees is remembered by the recipe's content, so that a changed one is
asked for again; what the user typed on the command line is never asked for.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from quantlab.backends.table import own_settings
from quantlab.errors import ConfigError
from quantlab.planning.composition import compose_node, typed
from quantlab.planning.job import Job, Plan
from quantlab.planning.places import conf_dir, groups, shipped_recipes
from quantlab.planning.recipe import Recipe
from quantlab.planning.words import COMPONENTS, parse
from quantlab.progress import printable
from quantlab.vocabulary.launching import COMMANDS
from quantlab.vocabulary.schema import ExperimentConfig

_GROUPS = ("tracking", "launcher", "model", "dataset", "calibration")
"""Groups whose options hold guarded keys; an option that the user chose is the user's word."""
_SHOWN_CHARACTERS = 200


def asked_for(recipe: Recipe | None, jobs: Sequence[Job], words: Sequence[str]) -> dict[str, str]:
    """Key -> value of all that a recipe decides and must ask for; nothing of a recipe that comes with quantlab.

    Called inside a session of the composition. Raises ConfigError for what is never taken from a recipe: commands.
    """
    if recipe is None or all(file.parent == shipped_recipes().resolve() for file in recipe.files):
        return {}
    parsed = parse(words)
    keys = {o.key_or_group for o in parsed} - set(groups())
    chosen = [o.input_line for o in parsed if o.key_or_group in _GROUPS and not o.is_sweep_override()]
    usual = dict(_guarded(typed(compose_node(chosen)[0])))
    found: dict[str, list[str]] = {}
    for job in jobs:
        for key, value in (*_guarded(job.config), *job.pasted_files.items()):
            by_user = any(key == k or key.startswith(f"{k}.") for k in keys)
            if not by_user and value != usual.get(key) and not (key == "model.path" and value in _shipped_paths()):
                found.setdefault(key, []).append(printable(str(value), _SHOWN_CHARACTERS))
    if commands := [key for key in found if key.removeprefix("launcher.settings.").split(".")[0] in COMMANDS]:
        raise ConfigError(f"{commands[0]}: runs commands, which no recipe says; type it on the command line")
    return {key: ", ".join(dict.fromkeys(values)) for key, values in found.items()}


def _guarded(config: ExperimentConfig) -> Iterator[tuple[str, Any]]:
    """The keys that decide where things go and what is read, with what the config says."""
    yield "output_dir", config.output_dir
    yield "export.path", config.export.path
    yield "checkpoint", config.checkpoint
    for name in ("model", "dataset", "calibration", "reference"):
        yield f"{name}.path", getattr(config, name).path
    yield from _leaves("tracking", dataclasses.asdict(config.tracking))
    plain = dataclasses.asdict(type(config.launcher.settings)())
    told = dict(_leaves("", plain))
    for key, value in _leaves("", dataclasses.asdict(config.launcher.settings)):
        if value != told.get(key):
            yield f"launcher.settings{key}", value
    yield "launcher.engine", config.launcher.engine
    yield "launcher.num_workers", config.launcher.num_workers
    own = {f"{COMPONENTS}.{name}": said for name, said in config.components.items()}
    for node, said in {"quantization": vars(config.quantization), **own}.items():
        for name, field in own_settings(str(said.get("backend"))).items():
            if (
                field.metadata["kind"] == "str" and not field.metadata["choices"]
            ):  # free text: a file, as far as one knows
                yield f"{node}.{name}", said.get(name)


def _leaves(prefix: str, node: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(f"{prefix}.{key}", value)
        else:
            yield f"{prefix}.{key}", value


def _shipped_paths() -> set[Any]:
    """Paths of the models that come with quantlab, and none."""
    files = (conf_dir() / "model").glob("*.yaml")
    return {OmegaConf.select(OmegaConf.load(file), "model.path") for file in files}


# -- who has agreed


def trusted_file() -> Path:
    """The user's list of recipes that were agreed to: a line each, its digest first."""
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "quantlab" / "trusted_recipes"


def is_trusted(plan: Plan) -> bool:
    """Whether there is nothing to ask for, or the user has agreed to this very content before."""
    if not plan.asked_for:
        return True
    try:
        lines = trusted_file().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return False
    return plan.recipe_digest in {line.split()[0] for line in lines if line.strip()}


def remember(plan: Plan) -> None:
    """Note that the user has agreed; where the list cannot be written, it is asked for again the next time."""
    file, name = trusted_file(), plan.recipe.name if plan.recipe else ""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as lines:
            lines.write(f"{plan.recipe_digest} {printable(name)}\n")
    except OSError:
        return


def question(plan: Plan) -> str:
    """What a recipe decides, a line a key."""
    lines = [f"  {key} = {value}" for key, value in plan.asked_for.items()]
    return "\n".join([f"{plan.typed_recipe}: it does not come with quantlab, and decides:", *lines])


def require_trust(plan: Plan, trust: bool) -> None:
    """ConfigError with what a recipe decides, unless the user has agreed to it, now or before."""
    if not trust and not is_trusted(plan):
        raise ConfigError(
            f"{question(plan)}\nto agree, give --trust (in Python trust=True) or answer at a terminal; or type these "
            "keys yourself, which then count"
        )
