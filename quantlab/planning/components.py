"""One scheme for each component: which part of a model gets which, from the nodes of a config. Torch-free.

The node ``quantization`` is the scheme of the components that ``model.components`` names, or that the family quantizes
by default; ``components.NAME`` is that of one component. Both are decided by the same function.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import OmegaConf

from quantlab.backends.pipelines import components_of, is_of_a_pipeline
from quantlab.backends.scheme import Scheme, pasted_scheme, scheme_of
from quantlab.backends.stored import block_of, pasted_file
from quantlab.backends.table import backend_of, backends, own_settings
from quantlab.errors import ConfigError, DoesNotFit, ModelError, NotQuantized, QuantlabError, nearest
from quantlab.models.pipeline_files import DENOISER, NO_DENOISER
from quantlab.models.table import components_of_family
from quantlab.planning.composition import node_class
from quantlab.planning.places import AXIS_GROUPS, groups, option_dirs
from quantlab.planning.words import COMPONENTS, parse
from quantlab.vocabulary.axes import QuantizationAxes
from quantlab.vocabulary.fields import check_types, checked_path
from quantlab.vocabulary.schema import ExperimentConfig

DEFAULT = ""
"""Key of the scheme of the components that ``model.components`` names, or that the family quantizes by default."""
NO_SCHEME = {"backend": "none"}
"""The node of a component that stays as it is."""
_SPELLED = ("backend", "dtype", "group_size", "activation_dtype", "compute_dtype", "algorithm")
"""Axes that are written out in a job's config."""
_NODE = "quantization"
_LISTS = "modules_to_not_convert"


@dataclass(frozen=True, kw_only=True)
class Decided:
    """What one node asks for."""

    axes: QuantizationAxes
    """The node, with what a pasted dictionary says."""
    scheme: Scheme | None
    settings: Mapping[str, Any]
    """The backend's own keys."""
    file: str = ""
    """The file that its ``quantization_config`` was read from."""


def decided(axes: QuantizationAxes, typed: Collection[str] = ()) -> Decided:
    """The scheme of a node; ``typed`` are its keys that the user typed. Raises ConfigError for what cannot be."""
    shipped = groups()[_LISTS]
    settings = {name: getattr(axes, name) for name in own_settings(axes.backend) if hasattr(axes, name)}
    if not axes.quantization_config:
        return Decided(axes=axes, scheme=scheme_of(axes, settings, shipped), settings=settings)
    file = pasted_file(axes.quantization_config)
    scheme = pasted_scheme(axes, settings, typed, shipped)
    settings = {name: getattr(scheme.native, name) for name in scheme.backend.settings}
    node = node_class(scheme.backend.name)(**{**vars(scheme.axes), **settings})
    return Decided(axes=node, scheme=scheme, settings=settings, file=file)


def check_node(axes: QuantizationAxes) -> None:
    """ConfigError for lists and files of a node that cannot be called so."""
    for name in axes.modules_to_not_convert:
        if not re.fullmatch(r"[\w-]{1,60}", name, re.ASCII):
            raise ConfigError(
                f"quantization.modules_to_not_convert.{name[:60]}: a list is called by letters, digits, _ and -; "
                "the entries stand in it, as in quantization.modules_to_not_convert.mine='[proj_out]'"
            )
    for name, field in own_settings(axes.backend).items():
        value = getattr(axes, name, None)
        if field.metadata["kind"] == "str" and not field.metadata["choices"] and value is not None:  # a file's
            checked_path(f"quantization.{name}", value)


# -- the nodes of single components


def component_nodes(config: ExperimentConfig) -> dict[str, QuantizationAxes]:
    """Component -> its node, checked as ``quantization`` is by its schema; in one order, however they were typed:
    denoisers first."""
    names = sorted(config.components, key=lambda name: (not DENOISER.fullmatch(str(name)), str(name)))
    return {name: _node(str(name), config.components[name]) for name in names}


def _node(name: str, said: Any) -> QuantizationAxes:
    key = f"{COMPONENTS}.{name}"
    if not re.fullmatch(r"[A-Za-z_]\w{0,99}", name, re.ASCII):
        raise ConfigError(f"{key[:80]}: no component is called so; name one, as in {COMPONENTS}.transformer")
    if not isinstance(said, Mapping):
        raise ConfigError(f"{key}={str(said)[:80]}: a scheme is wanted, as in {key}='{{backend: quanto, dtype: int8}}'")
    given = {str(k): v for k, v in said.items() if v is not None}
    backend = given.get("backend", "none" if "quantization_config" in given else None)
    if backend is None:
        raise ConfigError(f"{key}.backend: is missing; there are none, {', '.join(backends())}")
    with told_under(key):
        if backend != "none":
            backend_of(str(backend))
        made = node_class(str(backend))
        known = {f.name for f in dataclasses.fields(made)}
        for leaf in given:
            if leaf not in known:
                having = [b for b in backends() if leaf in own_settings(b)]
                of = f" with backend={backend}; {leaf} is a setting of {' and '.join(having)}" if having else ""
                raise ConfigError(f"{key}.{leaf[:80]}: no such key{of or nearest(leaf, known)}")
        node = made(**{**given, "backend": backend, **_lists(given.get(_LISTS))})
        check_types(node)
        check_node(node)
    return node


def _lists(entries: Any) -> dict[str, Any]:
    """``modules_to_not_convert`` of a component: lists by name; or names of shipped lists and entries, in one list."""
    if not isinstance(entries, list):
        return {}
    lists: dict[str, list[Any]] = {}
    for entry in entries:
        if entry in groups()[_LISTS]:
            file = next(f for folder in option_dirs() if (f := folder / _LISTS / f"{entry}.yaml").is_file())
            lists |= {str(name): list(found) for name, found in OmegaConf.load(file).items()}
        else:
            lists.setdefault("own", []).append(entry)
    return {_LISTS: lists}


def written_out(name: str, said: Mapping[str, Any], found: Decided) -> dict[str, Any]:
    """A component's node for a job's config: what was said, its axes written out, a file as its content.

    ConfigError where a component that stays as it is has settings.
    """
    if found.scheme is None:
        if more := [key for key, value in said.items() if key != "backend" and value not in (None, "auto")]:
            key = f"{COMPONENTS}.{name}.{more[0]}"
            raise ConfigError(f"{key}: backend=none leaves it as it is; choose a backend, or leave {more[0]} out")
        return dict(NO_SCHEME)
    axes = vars(found.scheme.axes)
    kept = {k: v for k, v in said.items() if v is not None and k not in _SPELLED}
    lists = {_LISTS: axes[_LISTS]} if axes[_LISTS] else {}
    pasted = {"quantization_config": axes["quantization_config"]} if axes["quantization_config"] else {}
    return {**{name: axes[name] for name in _SPELLED}, **kept, **lists, **pasted}


# -- what is said twice


def spread(config: ExperimentConfig) -> ExperimentConfig:
    """A pasted dictionary of a whole pipeline (Diffusers' ``PipelineQuantizationConfig``) as single components."""
    pasted = config.quantization.quantization_config
    key = f"{_NODE}.quantization_config"
    if not pasted:
        return config
    try:
        block = block_of(pasted)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error
    if not is_of_a_pipeline(block):
        return config
    try:
        found = components_of(block)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error
    if twice := sorted(set(found) & set(config.components)):
        raise ConfigError(f"{COMPONENTS}.{twice[0]}: {key} has a scheme for {twice[0]} too; leave one of them out")
    nodes = {name: {"quantization_config": native} for name, native in found.items()}
    return replace(config, quantization=QuantizationAxes(), components={**config.components, **nodes})


def check_said_once(words: Sequence[str]) -> None:
    """ConfigError for a component, or a key of one, that is typed twice: the last would win without a word."""
    seen: set[str] = set()
    for override in parse(words):
        key = override.key_or_group
        if key.split(".")[0] != COMPONENTS:
            continue
        _check_braces(key, override.input_line.partition("=")[2])
        value = None if override.is_sweep_override() else override.value()
        for leaf in _leaves(key, value):
            if leaf in seen or any(other.startswith(f"{leaf}.") for other in seen):
                raise ConfigError(f"{leaf}: is said twice; keep one of them")
            seen.add(leaf)


def _leaves(key: str, value: Any) -> Iterator[str]:
    """The keys that a value sets, down to those of a component."""
    if isinstance(value, Mapping) and key.count(".") < 2 and value:
        for inner, below in value.items():
            if inner is None or isinstance(inner, (int, float)):
                raise ConfigError(
                    f"{key}.{inner}: no component is called so; a component is named as the pipeline names it"
                )
            yield from _leaves(f"{key}.{inner}", below)
    else:
        yield key


def _check_braces(key: str, text: str) -> None:
    """ConfigError for a key that one mapping of Hydra's grammar has twice."""
    levels: list[set[str]] = []
    for token in re.finditer(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"|[{}]|([\w.]+)\s*:", text):
        if token[0] == "{":
            levels.append(set())
        elif token[0] == "}" and levels:
            levels.pop()
        elif token[1] and levels:
            if token[1] in levels[-1]:
                raise ConfigError(f"{key}: {token[1]} is named twice; keep one of them")
            levels[-1].add(token[1])


# -- the whole request beside single components


def is_asked_for(keys: Collection[str]) -> bool:
    """Whether somebody chose a scheme for the whole request, by these keys."""
    return any(_leaf(key) in (*AXIS_GROUPS, "quantization_config") for key in keys)


def without_default(config: ExperimentConfig, keys: Collection[str]) -> ExperimentConfig:
    """A config of single components whose request as a whole asks for nothing: what ``conf/`` chooses for everyone is
    no scheme of theirs. ConfigError for keys of the node that then say something of nothing."""
    if not config.components or is_asked_for(keys):
        return config
    for key in keys:
        if key.startswith(f"{_NODE}.") or key == _LISTS:
            raise ConfigError(
                f"{key}: the request has schemes for single components only ({', '.join(config.components)}); write "
                f"{COMPONENTS}.{next(iter(config.components))}.{_leaf(key)}, or choose backend= for the others"
            )
    return replace(config, quantization=QuantizationAxes())


def _leaf(key: str) -> str:
    return key.removeprefix(f"{_NODE}.")


def check_contradiction(config: ExperimentConfig, default: Collection[str]) -> None:
    """ConfigError where a component has a scheme of its own and that of the request; ``default`` are those that the
    request's is of, as far as they are known."""
    axes = config.quantization
    if axes.backend == "none" and axes.dtype != "auto":
        if own := [name for name, said in config.components.items() if said.get("backend") != "none"]:
            raise ConfigError(
                f"dtype={axes.dtype}: a cast of the model, and {COMPONENTS}.{own[0]} is quantized; leave one out"
            )
        return
    for name in config.components:
        if axes.backend != "none" and name in default:
            raise ConfigError(
                f"backend={axes.backend}: is for {', '.join(default)}, and {COMPONENTS}.{name} says otherwise for "
                f"{name}; leave one of them out, or name the others: model.components=[...]"
            )


def names_of(config: ExperimentConfig, default: Sequence[str]) -> list[str]:
    """The components that a job is about; ``default`` are those that the family quantizes where nobody names any."""
    named = config.model.components or default
    if config.components and config.quantization.backend == "none":
        named = ()
    return list(dict.fromkeys([*named, *config.components]))


def with_those_of_others(configs: Sequence[ExperimentConfig]) -> list[ExperimentConfig]:
    """The configs of a sweep, each counting also the components that others on the same model have schemes for: bytes
    and bits of its rows are then of the same parts."""
    found: dict[str, dict[str, None]] = {}
    for config in configs:
        found.setdefault(str(dataclasses.astuple(config.model)), {}).update(dict.fromkeys(config.components))
    return [_with(config, found[str(dataclasses.astuple(config.model))]) for config in configs]


def _with(config: ExperimentConfig, names: Collection[str]) -> ExperimentConfig:
    has_whole = config.quantization.backend != "none"
    if not names or not (config.components or has_whole):
        return config
    default = config.model.components or components_of_family(config.model)
    others = [n for n in names if n not in config.components and not (has_whole and n in default)]
    if has_whole and not default:  # of the Hub: what may be among those that are quantized by default is left alone
        others = [n for n in others if NO_DENOISER.search(n)]
    more = {n: dict(NO_SCHEME) for n in others}
    return replace(config, components={**config.components, **more}) if more else config


# -- messages


def told(key: str, text: str) -> str:
    """A message about a scheme, of the component that the user typed ``key`` for; "" leaves it as it is."""
    if not key or text.startswith(key):
        return text
    text = with_keys_of(key, text.removeprefix(f"{_NODE}."))
    first = re.match(r"\w+", text)
    known = {f.name for f in dataclasses.fields(QuantizationAxes)}
    known |= {name for backend in backends() for name in own_settings(backend)}
    return f"{key}.{text}" if first and first[0] in known else f"{key}: {text}"


def with_keys_of(key: str, text: str) -> str:
    """A text with the node's keys as those of the component that the user typed ``key`` for."""
    return text.replace(f"{_NODE}.", f"{key}.") if key else text


@contextmanager
def told_under(key: str) -> Iterator[None]:
    """Errors about a scheme begin with the component that the user typed ``key`` for."""
    try:
        yield
    except (ConfigError, NotQuantized) as error:
        if not key or str(error).startswith(key):
            raise
        raise _same_kind(error)(told(key, str(error))) from error


def _same_kind(error: QuantlabError) -> type[QuantlabError]:
    return next(kind for kind in (ModelError, DoesNotFit, ConfigError, NotQuantized) if isinstance(error, kind))


@contextmanager
def named_by_users(config: ExperimentConfig) -> Iterator[None]:
    """Errors about a component that the model has not begin with the key that named it."""
    try:
        yield
    except ConfigError as error:
        for name in config.components:
            if (start := f"model.components={name}: ") and str(error).startswith(start):
                raise ConfigError(f"{COMPONENTS}.{name}: {str(error).removeprefix(start)}") from error
        raise
