"""From words on the command line to a typed :class:`ExperimentConfig`: Hydra's composition with our own checks.

``conf/`` holds the vocabulary (one file a choice), ``recipes/`` the named experiments. A recipe is data: it is read
and checked before Hydra sees it. The command line always wins over a recipe. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, OverrideParseException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from quantlab.backends.table import backends, own_settings
from quantlab.errors import ConfigError, nearest
from quantlab.planning.data import check_data, check_text, no_resolvers
from quantlab.planning.recipe import check_recipe
from quantlab.vocabulary.axes import QuantizationAxes
from quantlab.vocabulary.launching import LAUNCHER_SETTINGS
from quantlab.vocabulary.schema import DigitsModelConfig, ExperimentConfig, ModelConfig

Plugins.instance()  # its scan re-executes plugin modules, so it comes before importing one
from hydra._internal.core_plugins.file_config_source import FileConfigSource  # noqa: E402

_PACKAGE = Path(__file__).resolve().parents[1]
_TYPES: dict[str, Any] = {"bool": bool, "int": int, "float": float, "str": str, "dtype": str}
_MAX_KEY = 200
NUMERIC_GROUPS = ("group_size",)
OPEN_NODES = (
    "quantization.modules_to_not_convert.",
    "quantization.quantization_config",
    "sweep.grid.",
    "sweep.search.objectives",
)


# -- places


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


# -- schema


def node_class(backend: str) -> type[QuantizationAxes]:
    """The schema of the ``quantization`` node for one backend: the axes and that library's own settings."""
    extra = [(name, _node_type(f), dataclasses.field(default=f.default)) for name, f in own_settings(backend).items()]
    return dataclasses.make_dataclass(f"{backend.capitalize()}Axes", extra, bases=(QuantizationAxes,))


def _node_type(field: dataclasses.Field[Any]) -> Any:
    kind = _TYPES.get(field.metadata["kind"], Any)
    return kind | None if field.default is None and kind is not Any else kind


def _register_schema() -> None:
    store = ConfigStore.instance()
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


class RecipeSource(FileConfigSource):
    """``recipes://FILE`` serves one recipe file as the only option of the group ``recipe``."""

    @staticmethod
    def scheme() -> str:
        """The URL scheme."""
        return "recipes"

    def available(self) -> bool:
        """Is the recipe file there?"""
        return Path(self.path).is_file()

    def is_group(self, config_path: str) -> bool:
        """Only the root and ``recipe`` are groups."""
        return config_path in ("", "recipe")

    def is_config(self, config_path: str) -> bool:
        """Only ``recipe/<file name>`` is a config."""
        return config_path.removesuffix(".yaml") == f"recipe/{Path(self.path).stem}"

    def load_config(self, config_path: str) -> Any:
        """The recipe, read by Hydra's own file source so that its header and defaults list are honoured."""
        file = Path(self.path)
        source = FileConfigSource(provider=self.provider, path=f"file://{file.parent}")
        return source.load_config(file.name)

    def list(self, config_path: str, results_filter: ObjectType | None) -> Any:
        """Options below ``config_path``."""
        if config_path == "":
            return [] if results_filter == ObjectType.CONFIG else ["recipe"]
        return [Path(self.path).stem] if config_path == "recipe" and results_filter != ObjectType.GROUP else []


_RECIPE: list[Path] = []  # the recipe of the composition under way; Hydra builds the plugin, so it cannot be passed


class RecipePath(SearchPathPlugin):
    """Puts the recipe under way on Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by Hydra for each session."""
        for file in _RECIPE:
            search_path.append("quantlab", f"recipes://{file}")


def _register_plugins() -> None:
    for plugin in (RecipeSource, RecipePath):
        Plugins.instance().register(plugin)


@contextmanager
def session(recipe: Path | None = None) -> Iterator[None]:
    """A Hydra session on ``conf/``, also inside a running Hydra application."""
    current = GlobalHydra.instance()
    outer, current.hydra = current.hydra, None
    _RECIPE[:] = [recipe] if recipe else []
    _register_schema()
    _register_plugins()
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra = outer
        _RECIPE.clear()


# -- overrides


def parse(overrides: Sequence[str]) -> list[Any]:
    """Hydra's parsed overrides, bare ``quantization`` keys completed; ConfigError for what is no override."""
    for word in overrides:
        if word.startswith(("+", "~")) and not word.startswith(tuple(f"++{node}" for node in OPEN_NODES)):
            raise ConfigError(f"{word}: keys are neither added nor removed; write key=value")
        if "=" not in word:
            raise ConfigError(
                f"{word}: an override is key=value{nearest(word, ['run', 'list', 'compare', 'reproduce'])}; "
                "quantlab --help shows examples"
            )
    parser = OverridesParser.create()
    return [_parsed(parser, word) for word in overrides]


def _parsed(parser: OverridesParser, word: str) -> Any:
    """One word; ConfigError that begins with it where Hydra's grammar or :func:`check_text` does not take it."""
    key = word.partition("=")[0]
    if len(key) > _MAX_KEY:
        raise ConfigError(f"{key[:_MAX_KEY]}...: no such key; quantlab --help lists the groups")
    check_text(word, key)
    try:
        return parser.parse_override(_complete(quote_numbers(word)))
    except (OverrideParseException, HydraException) as error:
        shown = word if len(word) <= _MAX_KEY else f"{word[:_MAX_KEY]}..."
        raise ConfigError(
            f"{shown}: Hydra's grammar does not take it ({str(error).splitlines()[0]}); put the value into quotes, "
            f"and for the shell once more: {key[:40]}='\"...\"'"
        ) from error


def quote_numbers(override: str) -> str:
    """``group_size=32,64`` -> ``group_size='32','64'``: Hydra takes the choice of a group only as a string."""
    key, _, value = override.partition("=")
    items = [v.strip() for v in value.split(",")]
    if key in NUMERIC_GROUPS and all(re.fullmatch(r"\w+", v) for v in items):
        return f"{key}=" + ",".join(f"'{v}'" for v in items)
    return override


def _complete(override: str) -> str:
    key, _, value = override.partition("=")
    top = {f.name for f in dataclasses.fields(ExperimentConfig)}
    if key == "quantization_config":
        return f"++quantization.{override}"
    if key.startswith(OPEN_NODES):
        return f"++{override}"  # Hydra's sign for a new key of a mapping whose keys are free
    if "." in key or key.startswith("+") or key in top or key in groups() or key == "recipe":
        return override
    axes = {f.name for f in dataclasses.fields(QuantizationAxes)}
    own = {name for backend in backends() for name in own_settings(backend)}
    if key in axes | own:
        return f"quantization.{key}={value}"
    raise ConfigError(
        f"{key}: no such key{nearest(key, [*groups(), *top, *axes, *own])}; quantlab --help lists the groups"
    )


def _check_options(parsed: Sequence[Any]) -> None:
    known = groups()
    for override in parsed:
        value = override.value()
        for choice in value if isinstance(value, list) else [value]:
            if (
                override.key_or_group in known
                and choice is not None
                and str(choice) not in known[override.key_or_group]
            ):
                options = known[override.key_or_group]
                raise ConfigError(
                    f"{override.key_or_group}={choice}: there are {', '.join(options)}{nearest(str(choice), options)}"
                )


def _reapply_choices(parsed: Sequence[Any], recipe: dict[str, Any]) -> list[str]:
    """Values of options chosen on the command line that the recipe's own values would hide: the command line wins."""
    out = []
    for override in parsed:
        group = override.key_or_group
        option = conf_dir() / group / f"{override.value()}.yaml"
        if group in recipe and isinstance(recipe[group], dict) and option.is_file():
            node = OmegaConf.to_container(OmegaConf.load(option))
            values = node.get(group, node) if isinstance(node, dict) else {}
            out += [f"{group}.{k}={_literal(v)}" for k, v in values.items() if k in recipe[group] and k != "defaults"]
    return out


def _literal(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_literal(v) for v in value) + "]"
    text = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'" if isinstance(value, str) else text


def override_text(key: str, value: Any) -> str:
    """One ``key=value`` of a recipe's grid or candidate, as it would be typed."""
    if key in groups() and not isinstance(value, (list, dict)):
        return f"{key}='{value}'" if key in NUMERIC_GROUPS else f"{key}={value}"
    return f"{key}={_literal(value)}"


def compose_node(overrides: Sequence[str], recipe: Path | None = None) -> tuple[DictConfig, dict[str, str]]:
    """Compose inside a running :func:`session`: the typed node, and the option chosen of each group.

    Raises ConfigError for a key or value that the schema does not take.
    """
    parsed = parse(overrides)
    _check_options(parsed)
    words = [o.input_line for o in parsed]
    if recipe is not None:
        words = [f"recipe={recipe.stem}", *_reapply_choices(parsed, check_recipe(recipe, groups())), *words]
    try:
        with no_resolvers():
            whole = hydra_compose("config", overrides=words, return_hydra_config=True)
    except HydraException as error:
        raise _as_config_error(error, recipe) from error
    known = groups()
    choices = {str(k): str(v) for k, v in whole.hydra.runtime.choices.items() if k in known}
    with open_dict(whole):
        del whole["hydra"]
    if recipe is not None:
        whole.recipe = recipe.stem
    return whole, choices


def _as_config_error(error: Exception, recipe: Path | None) -> ConfigError:
    lines = [line.strip() for line in f"{error}\n{error.__cause__ or ''}".splitlines() if line.strip()]
    text = " ".join(
        dict.fromkeys(line for line in lines if not line.startswith(("To append", "object_type", "reference_type")))
    )
    key = re.search(r"(?:full_key: |Could not override ')([\w.]+)", text)
    missing = re.search(r"Key '(\w+)' (?:is )?not in (?:struct|'(\w+)')", text)
    if missing and key:
        owner, _, leaf = key[1].rpartition(".")
        return ConfigError(f"{key[1]}: no such key{_nearest_key(owner, leaf)}")
    where = f"{key[1]}: " if key else f"recipe={recipe.name}: " if recipe else ""
    return ConfigError(where + text)


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
    return nearest(leaf, list(node)) if node is not None else ""


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
    check_data(dataclasses.asdict(config), references=False)
    return config
