"""From words on the command line to a typed :class:`ExperimentConfig`: Hydra's composition with our own checks.

``conf/`` holds the vocabulary (one file a choice), ``recipes/`` the named experiments. A recipe is data: it is read
and checked before Hydra sees it. The command line always wins over a recipe. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.conf import HydraConf
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from quantlab.backends.table import backends, own_settings
from quantlab.errors import ConfigError, nearest
from quantlab.planning.data import check_data, no_resolvers
from quantlab.planning.places import conf_dir, groups, option_dirs
from quantlab.planning.recipe import Recipe
from quantlab.planning.words import COMPONENTS, check_options, elsewhere, literal, of_compare, parse
from quantlab.vocabulary.axes import QuantizationAxes
from quantlab.vocabulary.fields import check_types
from quantlab.vocabulary.launching import LAUNCHER_SETTINGS
from quantlab.vocabulary.schema import DigitsModelConfig, ExperimentConfig, ModelConfig

_TYPES: dict[str, Any] = {"bool": bool, "int": int, "float": float, "str": str, "dtype": str}


# -- schema


def node_class(backend: str) -> type[QuantizationAxes]:
    """The schema of the ``quantization`` node for one backend: the axes and that library's own settings."""
    extra = [(name, _node_type(f), dataclasses.field(default=f.default)) for name, f in own_settings(backend).items()]
    return dataclasses.make_dataclass(f"{backend.capitalize()}Axes", extra, bases=(QuantizationAxes,))


def _node_type(field: dataclasses.Field[Any]) -> Any:
    kind = _TYPES.get(field.metadata["kind"], Any)
    return kind | None if field.default is None and kind is not Any else kind


class _Nodes(dict[str, Any]):
    """Nodes of the config store. Hydra copies its sources, and the store with them, for each composition."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Nodes:
        return self  # what is taken out of the store is copied there


@functools.cache
def schema_nodes() -> _Nodes:
    """What the config store holds in our sessions: making it takes a third of a composition, and it never changes."""
    store, nodes = ConfigStore.instance(), _Nodes()
    with _stored(nodes):
        # Hydra's own node without what runs, logs and helps an application: half of a composition, and none of it read
        store.store(group="hydra", name="config", node=HydraConf(defaults=[]), provider="hydra")
        store.store(name="schema", node=ExperimentConfig)
        store.store(group="model_schema", name="base", node=ModelConfig)
        store.store(group="model_schema", name="digits_dit", node=DigitsModelConfig)
        for engine, settings in LAUNCHER_SETTINGS.items():
            store.store(group="launcher_schema", name=engine, node=settings)
        for backend in ("none", *backends()):
            store.store(group="quantization_schema", name=backend, node=node_class(backend))
            if not (conf_dir() / "backend" / f"{backend}.yaml").is_file():  # what the file of ours says
                schema = [{"/quantization_schema@_here_": backend}, "_self_"]
                node = {"defaults": schema, "backend": backend}
                store.store(group="backend", name=backend, package="quantization", node=node)
    return nodes


@contextmanager
def _stored(nodes: _Nodes) -> Iterator[None]:
    """Inside, the config store holds these nodes: those of an application around us may have the same names."""
    store = ConfigStore.instance()
    outer, store.repo = store.repo, nodes
    try:
        yield
    finally:
        store.repo = outer


_RECIPE: list[Recipe] = []  # the recipe of the composition under way; Hydra builds the plugins, so it cannot be passed
_OPTION = "chosen"


class RecipeSource(ConfigSource):
    """``recipes://`` serves the recipe under way, as it was read and checked, as the only option of ``recipe``."""

    @staticmethod
    def scheme() -> str:
        """The URL scheme."""
        return "recipes"

    def available(self) -> bool:
        """Is there a recipe?"""
        return bool(_RECIPE)

    def is_group(self, config_path: str) -> bool:
        """Only the root and ``recipe`` are groups."""
        return config_path in ("", "recipe")

    def is_config(self, config_path: str) -> bool:
        """Only the one option is a config."""
        return config_path.removesuffix(".yaml") == f"recipe/{_OPTION}"

    def load_config(self, config_path: str) -> ConfigResult:
        """The recipe's content; its keys are ours."""
        config = OmegaConf.create(dict(_RECIPE[0].content))
        return ConfigResult(self.provider, f"recipes://{_RECIPE[0].file}", config, header={"package": "_global_"})

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Options below ``config_path``."""
        if config_path == "":
            return [] if results_filter == ObjectType.CONFIG else ["recipe"]
        return [_OPTION] if config_path == "recipe" and results_filter != ObjectType.GROUP else []


class OptionSource(ConfigSource):
    """``options://FOLDER`` serves a folder's options, each parsed once: a grid composes the same ones for every job."""

    @staticmethod
    def scheme() -> str:
        """The URL scheme."""
        return "options"

    def _file(self, config_path: str) -> str:
        return os.path.join(self.path, self._normalize_file_name(config_path))

    def available(self) -> bool:
        """Is there the folder?"""
        return self.is_group("")

    def is_group(self, config_path: str) -> bool:
        """A folder in it."""
        return os.path.isdir(os.path.join(self.path, config_path))

    def is_config(self, config_path: str) -> bool:
        """A YAML file in it."""
        return os.path.isfile(self._file(config_path))

    def load_config(self, config_path: str) -> ConfigResult:
        """The file's content as it is now, which Hydra may change."""
        file = self._file(config_path)
        with open(file, encoding="utf-8") as f:
            text = f.read()
        header = self._get_header_dict(text[:512])
        return ConfigResult(self.provider, self.full_path(), OmegaConf.create(_content(file, text)), header)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Options below ``config_path``."""
        found: list[str] = []
        for name in os.listdir(os.path.join(self.path, config_path)):
            self._list_add_result(found, os.path.join(config_path, name), name, results_filter)
        return sorted(set(found))


@functools.cache
def _content(file: str, _text: str) -> Any:
    return OmegaConf.to_container(OmegaConf.load(file))


class OwnPath(SearchPathPlugin):
    """Puts our options, the user's own and the recipe under way on Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by Hydra for each session, also for those of an application around us, which keep their paths."""
        if ConfigStore.instance().repo is not schema_nodes():
            return
        search_path.get_path().clear()  # Hydra's own options, too, which a command cannot choose
        for provider, folder in zip_longest(["main"], option_dirs(), fillvalue="quantlab"):
            search_path.append(provider, f"options://{folder}")
        if _RECIPE:
            search_path.append("quantlab", "recipes://chosen")


def _register_plugins() -> None:
    for plugin in (RecipeSource, OptionSource, OwnPath):
        Plugins.instance().register(plugin)


@contextmanager
def session(recipe: Recipe | None = None) -> Iterator[None]:
    """A Hydra session on ``conf/``, also inside a running Hydra application."""
    current = GlobalHydra.instance()
    outer, current.hydra = current.hydra, None
    _RECIPE[:] = [recipe] if recipe else []
    _register_plugins()
    try:
        with _stored(schema_nodes()), initialize_config_dir(str(conf_dir()), version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra = outer
        _RECIPE.clear()


# -- composition


def _reapply_choices(parsed: Sequence[Any], recipe: Mapping[str, Any]) -> list[str]:
    """Values of options chosen on the command line that the recipe's own values would hide: the command line wins."""
    out = []
    for override in parsed:
        group = override.key_or_group
        files = (folder / group / f"{override.value()}.yaml" for folder in option_dirs())
        option = next((file for file in files if file.is_file()), None)
        if group in recipe and isinstance(recipe[group], dict) and option is not None:
            node = OmegaConf.to_container(OmegaConf.load(option))
            values = node.get(group, node) if isinstance(node, dict) else {}
            out += [f"{group}.{k}={literal(v)}" for k, v in values.items() if k in recipe[group] and k != "defaults"]
    return out


def compose_node(overrides: Sequence[str], recipe: Recipe | None = None) -> tuple[DictConfig, dict[str, str]]:
    """Compose inside a running :func:`session`: the typed node, and the option chosen of each group.

    Raises ConfigError for a key or value that the schema does not take.
    """
    parsed = parse(overrides)
    check_options(parsed)
    words = [o.input_line for o in parsed]
    if recipe is not None:
        replaced = [f"~{o.key_or_group}" for o in parsed if _replaces(o, recipe)]
        words = [f"recipe={_OPTION}", *_reapply_choices(parsed, recipe.content), *replaced, *words]
    try:
        with no_resolvers():
            whole = hydra_compose("config", overrides=words, return_hydra_config=True)
    except Exception as error:  # noqa: BLE001  whatever Hydra makes of words that we let through; re-raised as ours
        raise _as_config_error(error, overrides, recipe) from error
    known = groups()
    choices = {str(k): str(v) for k, v in whole.hydra.runtime.choices.items() if k in known}
    with open_dict(whole):
        del whole["hydra"]
    if recipe is not None:
        whole.recipe = recipe.file.stem
    return whole, choices


def _replaces(override: Any, recipe: Recipe) -> bool:
    """Whether a word gives a component of the recipe another scheme: nothing of the recipe's is then left in it."""
    node, _, name = override.key_or_group.partition(".")
    own = recipe.content.get(COMPONENTS)
    return node == COMPONENTS and isinstance(own, Mapping) and name in own and isinstance(override.value(), Mapping)


def _as_config_error(error: Exception, words: Sequence[str], recipe: Recipe | None) -> ConfigError:
    lines = [line.strip() for line in f"{error}\n{error.__cause__ or ''}".splitlines() if line.strip()]
    text = " ".join(
        dict.fromkeys(line for line in lines if not line.startswith(("To append", "object_type", "reference_type")))
    )
    key = re.search(r"(?:full_key: |Could not override ')([\w.]+)", text)
    missing = re.search(r"Key '(\w+)' (?:is )?not in (?:struct|'(\w+)')", text)
    if missing and key:
        owner, _, leaf = key[1].rpartition(".")
        return ConfigError(f"{key[1]}: no such key{_nearest_key(owner, leaf)}")
    merged = re.search(r"Error merging override \+*([\w./-]+)=", text)
    mistyped = re.search(r"Value '(.{0,200}?)'.{0,60}? (?:could not be converted to|is not a valid) (\w+)", text)
    below = [word.partition("=")[0] for word in words if key and word.startswith(f"{key[1]}.")]
    if below and key:
        return ConfigError(f"{below[0]}: {key[1]} is one value, with nothing below it; write {key[1]}=...")
    if mistyped and key:
        return ConfigError(f"{key[1]}={mistyped[1]}: {_KINDS.get(mistyped[2], mistyped[2])} is wanted")
    if key and "is not Optional" in text:
        return ConfigError(f"{key[1]}=null: a value is wanted")
    if key and (several := re.search(r"Cannot convert '(?:list|dict)' to string: '(.{0,200}?)' ", text)):
        return ConfigError(f"{key[1]}={several[1]}: one word is wanted")
    if merged and "is not a subclass of" in text:
        return ConfigError(f"{merged[1]}: settings lie below it; write {merged[1]}.NAME=value{of_compare(merged[1])}")
    where = merged[1] if merged else key[1] if key else f"recipe={recipe.typed}" if recipe else " ".join(words)[:200]
    return ConfigError(f"{where}: {text}")


_KINDS = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false", "bool": "true or false"}
"""Type, as OmegaConf calls it -> as a message does."""
RENAMED = {"evaluation.seed": "evaluation.bootstrap_seed seeds the intervals, and dataset.seed what is sampled from"}
"""Key of an earlier version -> what says the same today."""


def _nearest_key(owner: str, leaf: str) -> str:
    if f"{owner}.{leaf}" in RENAMED:
        return f"; {RENAMED[f'{owner}.{leaf}']}"
    if owner == "quantization":
        having = [b for b in backends() if leaf in own_settings(b)]
        if having:
            return f" with this backend; {leaf} is a setting of {' and '.join(having)}"
        return nearest(
            leaf,
            [f.name for f in dataclasses.fields(QuantizationAxes)] + [n for b in backends() for n in own_settings(b)],
        )
    node: Any = OmegaConf.structured(ExperimentConfig)
    node = OmegaConf.select(node, owner) if owner else node
    return (nearest(leaf, list(node)) if node is not None else "") or elsewhere(leaf)


def typed(node: DictConfig) -> ExperimentConfig:
    """The composed node as dataclasses; ConfigError naming the key for what is no data, missing or mistyped."""
    check_data(OmegaConf.to_container(node, resolve=False))
    try:
        with no_resolvers():
            config = OmegaConf.to_object(node)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{getattr(error, 'full_key', '')}: {str(error).splitlines()[0]}") from error
    if not isinstance(config, ExperimentConfig):
        raise ConfigError("config: the composed node lost its schema; conf/config.yaml must start with - schema")
    check_types(config)
    check_data(dataclasses.asdict(config), references=False)
    return config
