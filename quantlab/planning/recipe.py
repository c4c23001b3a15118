"""A recipe is data: what it may hold, and a run written as one.

A recipe is a Hydra config of the group ``recipe`` (``# @package _global_``): a defaults list that overrides our groups
and may build on another recipe, values for our keys, and at most one of ``sweep.grid`` and ``sweep.candidates``. It
never names code.
"""

from __future__ import annotations

import functools
import hashlib
import operator
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf._utils import get_yaml_loader

from quantlab.errors import ConfigError
from quantlab.planning.data import check_data
from quantlab.planning.lines import line_told, lines_of
from quantlab.planning.misplaced import check_entry, check_place, check_sweep
from quantlab.planning.places import AXIS_GROUPS, recipe_file, shipped_groups
from quantlab.planning.words import MULTIPLE_GROUPS
from quantlab.progress import printable
from quantlab.vocabulary.files import read_text


@dataclass(frozen=True)
class Recipe:
    """A recipe as it is composed: read and checked once, with those that it builds on merged into it."""

    file: Path
    typed: str
    """How the user named it."""
    content: Mapping[str, Any]
    files: tuple[Path, ...]
    """Its own file and those that it builds on."""
    digest: str
    """``sha256:...`` of the bytes of all files."""

    @property
    def chosen(self) -> set[str]:
        """The groups that it chooses from, and the keys of ``quantization`` that it sets."""
        entries = (str(next(iter(entry))) for entry in self.content.get("defaults") or [])
        node = self.content.get("quantization")
        keys = node if isinstance(node, Mapping) else ()
        return {*(entry.removeprefix("override /") for entry in entries), *(f"quantization.{key}" for key in keys)}

    def check_given(self, keys: Collection[str]) -> None:
        """ConfigError for a key that it leaves open (``???``) and that is not among those that the user gives."""
        for key in _open_keys(self.content, ""):
            if key not in keys:
                raise ConfigError(f"{key}: is left to whoever runs this recipe; give {key}=...")


def _open_keys(node: Mapping[str, Any], path: str) -> Iterator[str]:
    for key, value in node.items():
        if value == MISSING:
            yield f"{path}{key}"
        elif isinstance(value, Mapping):
            yield from _open_keys(value, f"{path}{key}.")


def read_recipe(file: Path, typed: str) -> Recipe:
    """The recipe in ``file``, or ConfigError, under the name that was ``typed``, for what a recipe may not hold.

    Refused: a ``hydra`` key, whatever says more than data (:func:`quantlab.planning.data.check_data`), a defaults list
    that does more than choose from our groups and build on another recipe, literal axes in ``quantization`` (a group
    choice says the same and the command line can override it), and a grid beside a list of candidates.
    """
    content, texts = _read(file, typed, ())
    digest = hashlib.sha256(b"\0".join(texts.values())).hexdigest()
    return Recipe(file=file, typed=typed, content=content, files=tuple(texts), digest=f"sha256:{digest}")


def _read(file: Path, typed: str, above: tuple[Path, ...]) -> tuple[dict[str, Any], dict[Path, bytes]]:
    """``file`` over the recipe that it builds on, and the bytes of all files; ``above``: those that build on it."""
    where = f"recipe={typed}"
    if file in above:
        raise ConfigError(
            f"{where}: builds on itself ({' -> '.join(f.stem for f in (*above, file))}); drop one of them"
        )
    try:
        text = read_text(file, where, "give a recipe: a YAML file")
        raw = text.encode()
        content = yaml.load(text, Loader=get_yaml_loader())
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001  yaml's errors share no base with the above; re-raised as ours
        raise ConfigError(f"{where}: {_not_yaml(error, len(text.splitlines()))}") from error
    if not isinstance(content, dict):
        what = "nothing stands in it" if content is None else "it is one value or a list"
        raise ConfigError(
            f"{where}: {what}, and a recipe has keys, as in evaluation: {{num_samples: 50}}; quantlab init FILE "
            "model.path=PATH writes one"
        )
    if not re.match(r"#\s*@package\s+_global_\s*$", text.partition("\n")[0]):
        raise ConfigError(
            f"{where}: line 1: its keys are ours only under a header; make the first line: # @package _global_"
        )
    try:
        if "hydra" in content:
            raise ConfigError("hydra is not allowed: a recipe is data and never names code to run")
        check_data(content)  # before any of it is told: what an alias repeats without end has no text that ends
        base, choices = _defaults(file, content.get("defaults") or [], text)
        content = {str(k): v for k, v in content.items() if k != "defaults"}
        _check_content(content)
    except ConfigError as error:
        line = "" if str(error).startswith("line ") else line_told(str(error), [file])
        raise ConfigError(f"{where}: {line}{error}") from error
    if base is None:
        return {"defaults": choices, **content}, {file: raw}
    under, texts = _read(base, str(Path(typed).with_name(base.name)), (*above, file))
    said = {next(iter(entry)) for entry in choices}
    choices = [*(entry for entry in under.pop("defaults") if next(iter(entry)) not in said), *choices]
    return {"defaults": choices, **_over(under, content)}, {file: raw, **texts}


def _not_yaml(error: Exception, length: int) -> str:
    """What is wrong with a text of ``length`` lines, and where."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f"not valid YAML ({' '.join(str(error).split())[:200]})"
    text = f"{error.context or ''} {error.problem or ''}".strip()
    way_out = "; indent with spaces" if "'\\t'" in text else ""
    last = min(error.problem_mark.line + 1, length)  # the end of the file is behind its last line
    is_left_open = text.startswith(("while scanning", "while parsing a flow"))  # a quote, a bracket: found out later
    first = min(error.context_mark.line + 1, last) if is_left_open and error.context_mark else last
    lines = f"line {last}" if first == last else f"lines {first} to {last}"
    return f"{lines}: not valid YAML ({text[:200]}){way_out}"


def _over(under: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    """``content`` over ``under``: mappings are merged, other values replaced; of grid and candidates one stays."""
    merged = dict(under)
    for key, value in content.items():
        old = merged.get(key)
        if key == "sweep" and isinstance(old, dict) and isinstance(value, dict) and {"grid", "candidates"} & set(value):
            old = {k: v for k, v in old.items() if k not in ("grid", "candidates")}
        merged[key] = _over(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _check_content(content: dict[str, Any]) -> None:
    if "recipe" in content:
        raise ConfigError("recipe: another recipe is built on in the defaults list: - /recipe: NAME")
    if bad := [k for k in content if not str(k).isidentifier()]:
        raise ConfigError(f"{bad[0]}: no such key; nest it, as in evaluation: {{num_samples: 50}}")
    for key, value in content.items():
        check_place(key, value)
    nodes = {name: content.get(name) or {} for name in ("quantization", "sweep")}
    if axes := set(AXIS_GROUPS) & set(nodes["quantization"]):
        key = sorted(axes)[0]
        raise ConfigError(
            f"quantization.{key} hides {key}=... of the command line; "
            f"choose it in the defaults list: - override /{key}: ..."
        )
    check_sweep(nodes["sweep"])


def _defaults(file: Path, entries: Any, text: str) -> tuple[Path | None, list[dict[str, Any]]]:
    """What a defaults list says: the recipe that is built on, and the choices from our groups.

    ConfigError, with its line in ``text``, for an entry that is neither: Hydra's own groups and files elsewhere are
    none.
    """
    base: Path | None = None
    choices: list[dict[str, Any]] = []
    for i, entry in enumerate(entries if isinstance(entries, list) else [entries]):
        try:
            base = _add_default(file, entry, base, choices)
        except ConfigError as error:
            lines = lines_of(text)
            line = lines.get(("defaults", i)) or lines.get(("defaults",))
            raise ConfigError(f"line {line}: defaults: {error}") from error
    return base, choices


def _add_default(file: Path, entry: Any, base: Path | None, choices: list[dict[str, Any]]) -> Path | None:
    """The recipe that is built on, as far as the entries to this one say; a choice is added to ``choices``."""
    said, chosen = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else (entry, None)
    group = str(said).removeprefix("override ").strip().removeprefix("/")
    if "hydra" in str(entry):
        raise ConfigError("a defaults list overrides our groups, never hydra's")
    if entry == "_self_":
        return base
    if isinstance(entry, str) or group == "recipe":
        if base is not None:
            raise ConfigError(f"{str(entry)[:80]}: a recipe builds on one other; put that one on this")
        return _named_recipe(file, str(chosen if group == "recipe" else entry))
    check_entry(entry, str(said), group, chosen)
    choices.append({f"override /{group}": chosen})
    return base


def _named_recipe(file: Path, name: str) -> Path:
    """The recipe beside ``file`` of that name, else the one that ``recipe=NAME`` finds; never a path."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ConfigError(f"{name[:80]}: a recipe is built on by its name, as in - /recipe: digits_backends")
    sibling = file.parent / f"{name.removesuffix('.yaml')}.yaml"
    return sibling.resolve() if sibling.is_file() and sibling.resolve() != file else recipe_file(name)


def _option_of(family: str) -> str:
    """A shipped option of ``model`` whose schema fits the family."""
    return family if family in shipped_groups()["model"] else "causal_lm"


_PATHS = ("checkpoint", "model.path", "dataset.path", "calibration.path", "reference.path", "quantization.imatrix_file")


def own_paths(components: Collection[str]) -> tuple[str, ...]:
    """Keys that may lead to files of the user's own; ``components`` are those with schemes of their own."""
    return (*_PATHS, *(f"components.{name}.imatrix_file" for name in components))


def replay_yaml(resolved: Mapping[str, Any], choices: Mapping[str, str], *, whole: bool = False) -> str:
    """One job as a recipe: ``quantlab recipe=FILE`` composes the identical config again.

    It is for anyone: without ``whole`` it says nothing of where things go (``output_dir``, ``tracking``, ``export``),
    and an absolute path is left open (``???``), a key of its own for whoever runs it.

    Args:
        resolved: the whole resolved config, plain data.
        choices: option of each group that the job chose.
    """
    left_out = {"sweep", "recipe", "launcher", *(() if whole else ("export", "output_dir", "tracking"))}
    body: dict[str, Any] = {
        k: dict(v) if isinstance(v, Mapping) else v for k, v in resolved.items() if k not in left_out
    }
    chosen = {**choices, **{g: str(body["quantization"].pop(g)) for g in AXIS_GROUPS}}
    chosen = {g: c for g, c in chosen.items() if g not in left_out}
    own = [g for g, c in chosen.items() if c not in ("[]", *shipped_groups()[g]) and g not in MULTIPLE_GROUPS]
    chosen = {g: c for g, c in chosen.items() if g not in own}  # their values are written out, and others lack the file
    if "model" in own:  # its schema: that of an option of the same family
        chosen["model"] = _option_of(resolved["model"]["family"])
    chosen["modules_to_not_convert"] = "[]"  # its lists are written out below
    header = "# @package _global_\n# Written by a run; quantlab recipe=THIS_FILE repeats it.\n"
    if not whole:
        if resolved["tracking"]["save_checkpoint"] is False:  # decides what is measured, and not where it goes
            body["tracking"] = {"save_checkpoint": False}
        body["components"] = {name: dict(said) for name, said in body["components"].items()}
        for key in own_paths(resolved["components"]):
            *nodes, name = key.split(".")
            node: Any = functools.reduce(operator.getitem, nodes, body)
            path = node.get(name)
            if path and Path(path).expanduser().is_absolute():
                node[name] = "???"
                header += f"# Give it {key}=... as well: its author's own was {printable(Path(path).name)}.\n"
    quantization = body.pop("quantization")
    defaults = [{f"override /{g}": [] if c == "[]" else c} for g, c in chosen.items()]
    text: str = OmegaConf.to_yaml(OmegaConf.create({"defaults": defaults, **body, "quantization": quantization}))
    return header + text
