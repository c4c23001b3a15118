"""What a word of the command line may become, for a shell's completion. Torch-free."""

from __future__ import annotations

import dataclasses
from typing import Any

from quantlab.backends.table import backends, own_settings
from quantlab.planning.listing import LISTS
from quantlab.planning.places import groups, recipes
from quantlab.vocabulary.axes import QuantizationAxes
from quantlab.vocabulary.schema import ExperimentConfig

COMMANDS = ("compare", "list", "reproduce", "run")
SCRIPT = """# bash: eval "$(quantlab --shell-completion)"; zsh: autoload -U bashcompinit; bashcompinit, then the same
_quantlab() {
  local word="${COMP_LINE:0:COMP_POINT}"
  word="${word##* }"
  local given="${word%"${COMP_WORDS[COMP_CWORD]#=}"}"
  mapfile -t COMPREPLY < <(quantlab --complete "$word" "${COMP_WORDS[1]}" 2>/dev/null)
  COMPREPLY=("${COMPREPLY[@]#"$given"}")
  [[ "${COMPREPLY[*]}" == *= ]] && compopt -o nospace
}
complete -F _quantlab quantlab"""


def completions(word: str, command: str = "") -> list[str]:
    """The words that ``word`` may become; behind ``list`` the lists."""
    if command == "list" and word != "list":
        return [name for name in LISTS if name.startswith(word)]
    key, has_value, value = word.partition("=")
    if has_value:
        options = [*recipes()] if key == "recipe" else groups().get(key, _choices(key))
        given, comma, last = value.rpartition(",")
        return [f"{key}={given}{comma}{option}" for option in options if option.startswith(last)]
    return sorted(w for w in [*COMMANDS, *(f"{k}=" for k in _keys())] if w.startswith(word))


def _choices(key: str) -> list[str]:
    node: Any = ExperimentConfig()
    *path, name = key.split(".")
    for part in path:
        node = getattr(node, part, None)
    field = {f.name: f for f in dataclasses.fields(node)}.get(name) if dataclasses.is_dataclass(node) else None
    return list(field.metadata.get("choices", ())) if field else []


def _keys() -> set[str]:
    def leaves(node: Any, prefix: str = "") -> list[str]:
        found = []
        for field in dataclasses.fields(node):
            value = getattr(node, field.name)
            found += (
                leaves(value, f"{prefix}{field.name}.") if dataclasses.is_dataclass(value) else [prefix + field.name]
            )
        return found

    own = {name for backend in backends() for name in own_settings(backend)}
    return {*leaves(ExperimentConfig()), *groups(), *(f.name for f in dataclasses.fields(QuantizationAxes)), *own}
