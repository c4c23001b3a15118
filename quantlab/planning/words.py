"""The words of a request as Hydra reads them: parsed one by one, completed, checked against our groups. Torch-free."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, QuotedString
from hydra.errors import HydraException, OverrideParseException

from quantlab.backends.table import backends, offers, own_settings
from quantlab.errors import ConfigError, nearest
from quantlab.planning.data import check_text
from quantlab.planning.places import AXIS_GROUPS, groups, own_option, recipes
from quantlab.vocabulary.axes import QuantizationAxes
from quantlab.vocabulary.bits import of_bits
from quantlab.vocabulary.capabilities import CALLED
from quantlab.vocabulary.schema import ExperimentConfig

_MAX_KEY = 200
COMMANDS = ("run", "init", "plan", "list", "help", "compare", "reproduce", "export", "push", "status", "reference")
"""First words of a command line that are no key."""
_PASTED = re.compile(r"\+*(quantization\.|components\.\w+\.)?quantization_config")
"""Keys whose value is pasted."""
MAX_COMBINATIONS = 10_000
"""Of a grid: each is composed and checked before the first job, which takes a tenth of a second."""
WHOLE_NODES = {
    "quantization": "dtype=int8",
    "sweep": "grid.dtype=[int8,int4]",
    "model": "path=PATH",
    "dataset": "seed=1",
    "evaluation": "num_samples=50",
    "calibration": "num_samples=20",
    "tracking": "uri=http://host:5000",
    "launcher": "num_workers=2",
}
"""Nodes whose keys are typed one by one -> an example: one word for all would pass by the groups."""
MULTIPLE_GROUPS = ("modules_to_not_convert",)
"""Groups of which several options are chosen at once."""
_HYDRAS = {
    "hydra.run": "output_dir=... says where runs go",
    "hydra.sweep": "output_dir=... says where runs go",
    "hydra.launcher": "launcher.settings... has its engine's keys",
    "hydra/launcher": "launcher=... chooses who runs the jobs",
    "hydra.sweeper": "sweep... has what a sweep may be told",
    "hydra.verbose": "QUANTLAB_TRACEBACK=1 shows where an error comes from",
    "hydra.job.chdir": "jobs run where quantlab was started",
}
"""Key of Hydra's -> what does its work here."""
NUMERIC_GROUPS = ("group_size",)
COMPONENTS = "components"
"""The node of the schemes of single components, whose keys are their names."""
OPEN_NODES = (
    COMPONENTS,
    "quantization.modules_to_not_convert",
    "quantization.quantization_config",
    "model.call",
    "sweep.grid",
    "sweep.search.objectives",
)


COMPARED = ("metric", "margin", "experiment", "sweep")
"""Keys of ``quantlab compare``, which people also give to a run."""


def of_compare(key: str) -> str:
    """Where such a key belongs; "" for another."""
    return f", and to compare what was run: quantlab compare {key}=..." if key in COMPARED else ""


def parse(overrides: Sequence[str]) -> list[Any]:
    """Hydra's parsed overrides, bare ``quantization`` keys completed; ConfigError for what is no override."""
    parser = OverridesParser.create()
    return [_parsed(parser, word) for word in overrides]


def _parsed(parser: OverridesParser, word: str) -> Any:
    """One word; ConfigError that begins with it where Hydra's grammar or our schema does not take it."""
    key, has_value, value = word.partition("=")
    if _PASTED.fullmatch(key):
        word = f"{key}{'=' * bool(has_value)}{_quoted(value)}"
    elif value.startswith("~") and "'" not in value:  # a home folder: the shell leaves it, and Hydra's grammar has no ~
        word = f"{key}='{value}'"
    shown = word if len(word) <= _MAX_KEY else f"{word[:_MAX_KEY]}..."
    if not has_value or not key:
        raise ConfigError(f"{shown or repr('')}: an override is key=value{_bare(word)}; quantlab --help shows examples")
    if len(key) > _MAX_KEY:
        raise ConfigError(f"{shown}: no such key; quantlab --help lists the groups")
    check_text(word, key)
    if word in _MEANT:
        raise ConfigError(f"{word}: no such choice; {_MEANT[word]}")
    if value.endswith(",") and not value.startswith(("'", '"')):
        raise ConfigError(f"{shown}: a value is wanted behind the last comma, or no comma")
    try:
        return parser.parse_override(quote_numbers(_complete(_unsigned(word))))
    except (OverrideParseException, HydraException) as error:
        raise ConfigError(
            f"{shown}: Hydra's grammar does not take it ({str(error).splitlines()[0]}); put the value into quotes, "
            f"and for the shell once more: {key[:40]}='\"...\"'"
        ) from error


_MEANT = {
    "device=gpu": "a GPU is device=cuda",
    "tracking=mlflow": "MLflow is tracking=sqlite (a file here) and tracking=server (tracking.uri=http://host:5000)",
}
"""What people type by other tools' words -> what it is here."""


def _bare(word: str) -> str:
    """The way from a word without a value to what was meant."""
    if word in recipes() or word.endswith((".yaml", ".yml")):
        return f"; did you mean recipe={word}?"
    return f"; write {word}=..., without spaces" if word in (*groups(), "recipe") else nearest(word, COMMANDS)


def _quoted(value: str) -> str:
    """What was pasted as a ``quantization_config``, in the quotes that Hydra's grammar wants around JSON and paths.

    Several with commas between them are several values; what is a mapping or a string of Hydra's stays as it is.
    """
    found, rest = [], value.strip()
    while rest:
        if rest[0] == "{":
            try:
                said, end = json.JSONDecoder().raw_decode(rest)
            except (ValueError, RecursionError):
                return value
        else:
            said, end = True, rest.find(",") if "," in rest else len(rest)
        item, rest = rest[:end].strip(), rest[end:].lstrip()
        if not said or item[:1] in ("'", '"', "[", "") or item == "null" or rest[:1] not in (",", ""):
            return value
        found.append(literal(item))
        rest = rest[1:].lstrip()
    return ",".join(found)


def _unsigned(word: str) -> str:
    """``word`` without Hydra's signs: ``++`` sets a key that is there, ``+`` adds one where keys are free."""
    bare = word.lstrip("+")
    if word.startswith("~"):
        raise ConfigError(f"{word[:_MAX_KEY]}: no key is removed; write key=null, or the choice that means none")
    if len(word) - len(bare) == 1 and not bare.startswith(OPEN_NODES):
        raise ConfigError(f"{word[:_MAX_KEY]}: keys are neither added nor removed; write key=value")
    if len(word) - len(bare) > 2:
        raise ConfigError(f"{word[:_MAX_KEY]}: no such key; write key=value")
    return bare


def quote_numbers(override: str) -> str:
    """``group_size=32,64`` -> ``group_size='32','64'``: Hydra takes the choice of a group only as a string."""
    key, _, value = override.partition("=")
    items = [v.strip() for v in value.split(",")]
    if key in NUMERIC_GROUPS and all(re.fullmatch(r"\w+", v) for v in items):
        return f"{key}=" + ",".join(f"'{v}'" for v in items)
    return override


def _complete(override: str) -> str:
    key, _, value = override.partition("=")
    if re.match(r"hydra\b", key):
        way = next(
            (way for start, way in _HYDRAS.items() if key.startswith(start)), "quantlab --help shows its own keys"
        )
        raise ConfigError(f"{key}: Hydra's own keys do nothing here; {way}")
    if key in WHOLE_NODES and value.lstrip().startswith("{"):
        raise ConfigError(f"{key}: its keys are set one by one, as in {key}.{WHOLE_NODES[key]}")
    if "@" in key or ("/" in key and not key.startswith(OPEN_NODES)):
        raise ConfigError(f"{key}: no such key; a group is chosen by its name, as in backend=quanto")
    if (
        key.removeprefix("quantization.") in AXIS_GROUPS
    ):  # what runs can be replayed by the choice, and by no other word
        return f"{key.removeprefix('quantization.')}={value}"
    top = {f.name for f in dataclasses.fields(ExperimentConfig)}
    if key == "quantization_config":
        return f"++quantization.{override}"
    if key.partition(".")[0] in MULTIPLE_GROUPS and "." in key:
        return f"++quantization.{override}"
    if key.startswith(OPEN_NODES):
        return f"++{override}"  # Hydra's sign for a new key of a mapping whose keys are free
    if "." in key or key in top or key in groups() or key == "recipe":
        return override
    axes = {f.name for f in dataclasses.fields(QuantizationAxes)}
    own = {name for backend in backends() for name in own_settings(backend)}
    if key in axes | own:
        return f"quantization.{key}={value}"
    if not re.fullmatch(r"\w+", key):
        raise ConfigError(f"{override[:_MAX_KEY]}: an override is key=value; quantlab --help shows examples")
    if told := of_compare(key):
        raise ConfigError(f"{key}: no such key of a run{told}")
    if key in _ELSEWHERE:
        raise ConfigError(f"{key}: no such key; {_ELSEWHERE[key]}")
    near = _of_a_node(key) or nearest(key, [*groups(), *top, *axes, *own])
    raise ConfigError(f"{key}: no such key{near}; quantlab --help lists the groups")


_OWN_MODEL = "a model of your own is model=auto model.path=<a folder, or OWNER/NAME of the Hub>"
_TASKS = (
    "no tasks are run here, a scheme is compared with the unquantized model; quantlab export RUN_ID DIR is for those"
)
_ELSEWHERE = {
    "load_in_4bit": "it is backend=bitsandbytes dtype=nf4 (or fp4)",
    "load_in_8bit": "it is backend=bitsandbytes dtype=int8",
    **dict.fromkeys(("pretrained", "pretrained_model_name_or_path", "model_name_or_path", "model_id"), _OWN_MODEL),
    **dict.fromkeys(("tasks", "num_fewshot", "limit"), _TASKS),
    "torch_dtype": "the unquantized model's is model.dtype",
    "device_map": "it is device=cpu or device=cuda, and memory.placement where a model does not fit",
}
"""Key of another tool -> what says the same here."""


def _of_a_node(key: str) -> str:
    """``"; did you mean evaluation.num_samples?"`` for a key that was typed without its node."""
    nodes = {name: kind for name, kind in get_type_hints(ExperimentConfig).items() if dataclasses.is_dataclass(kind)}
    found = [f"{name}.{key}" for name, kind in nodes.items() if key in {f.name for f in dataclasses.fields(kind)}]
    return f"; did you mean {' or '.join(found)}?" if found else ""


def elsewhere(key: str) -> str:
    """The way to a key that was typed below a node that has none of that name."""
    top = {f.name for f in dataclasses.fields(ExperimentConfig)}
    return f"; {key} stands by itself: {key}=VALUE" if key in (*groups(), *top) else _of_a_node(key)


def check_options(parsed: Sequence[Any]) -> None:
    """ConfigError for a choice that is no option of its group."""
    known = groups()
    for override in parsed:
        group, value = override.key_or_group, override.value()
        if group not in known:
            continue
        options = known[group]
        several = isinstance(value, list)
        if several and group not in MULTIPLE_GROUPS:
            each = ",".join(map(str, value))
            raise ConfigError(
                f"{group}={_shown(value)}: one choice is wanted, and several are a sweep: -m {group}={each}; there "
                f"are {', '.join(options)}"
            )
        for choice in value if several else [value]:
            if not isinstance(choice, (str, int, QuotedString)) or str(choice) not in options:
                raise ConfigError(f"{group}={no_option(group, choice)}")


def no_option(group: str, choice: Any) -> str:
    """What is said of a choice that a group has not, with those that it has and the way to what was meant."""
    options = groups()[group]
    own = own_option(group, str(choice))
    if group == "dtype" and not own and (bits := of_bits(str(choice), offers())):
        return f"{_shown(choice)}: no dtype is called so{bits}"
    near = own or _near(group, str(choice), options)
    none = f", and {group}=[] for none" if group in MULTIPLE_GROUPS else ""
    if group in MULTIPLE_GROUPS and not near:
        entry = str(choice) if isinstance(choice, (str, QuotedString)) else "proj_out"
        near = f"; layers of your own: quantization.{group}.mine='[{entry}]'"
    return f"{_shown(choice)}: there are {', '.join(options)}{none}{near}"


def _near(group: str, choice: str, options: Sequence[str]) -> str:
    """The way to what was meant: the numbers around one, a name that is close, or how a model of one's own is said."""
    if group in NUMERIC_GROUPS and choice.isdigit():
        numbers = sorted(int(o) for o in options if o.isdigit())
        below, above = ([n for n in numbers if n < int(choice)], [n for n in numbers if n > int(choice)])
        around = map(str, [*below[-1:], *above[:1]])
        return f"; the nearest are {' and '.join(around)}"
    if group == "dtype" and (whole := [name for name in options if name.endswith(f"_{choice.lower()}")]):
        return f"; did you mean {whole[0]}?"
    close = nearest(CALLED.get(choice, choice) if group == "backend" else choice, options)
    if group == "model" and not close:
        is_there = "/" in choice or Path(choice).is_dir()
        path = choice if is_there else f"OWNER/{choice}"  # the Hub has no names without an owner any more
        return f"; a model of a folder or of the Hub: model=auto model.path={path}"
    return close


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= _MAX_KEY else f"{text[:_MAX_KEY]}..."


def swept_values(parsed: Any) -> list[str]:
    """The values of a key that several are given for, as typed; ConfigError for what is no list of values.

    ``glob()`` chooses among a group's options, ``range()`` counts; ``interval()`` has no single values.
    """
    key, options = parsed.key_or_group, groups().get(parsed.key_or_group)
    if parsed.is_interval_sweep():
        raise ConfigError(f"{key}: interval() has no single values; write them out, or range(start,stop,step)")
    if isinstance(parsed._value, Glob):
        if options is None:
            raise ConfigError(
                f"{key}: glob() chooses among the options of a group, and this is a key; write the values"
            )
        names = parsed._value.filter(options)
        if not names:
            raise ConfigError(f"{key}: glob() matches none of {', '.join(options)}")
        return list(names)
    values = list(itertools.islice(parsed.sweep_string_iterator(), MAX_COMBINATIONS + 1))
    return [str(v).strip("'\"") if options is not None and not str(v).startswith("[") else str(v) for v in values]


def literal(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(literal(v) for v in value) + "]"
    return f"'{_BEFORE_QUOTE.sub(_escaped, value)}'" if isinstance(value, str) else str(value)


_BEFORE_QUOTE = re.compile(r"(\\*)('|\Z)")
"""Where a backslash means something to Hydra's grammar; elsewhere it is itself."""


def _escaped(found: re.Match[str]) -> str:
    return 2 * found[1] + ("\\'" if found[2] else "")


def override_text(key: str, value: Any) -> str:
    """One ``key=value`` of a recipe's grid or candidate, as it would be typed."""
    if key in groups() and not isinstance(value, (list, dict)):
        return f"{key}='{value}'" if key in NUMERIC_GROUPS else f"{key}={value}"
    return f"{key}={literal(value)}"
