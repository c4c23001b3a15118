"""The quantization configs: real, torch-free values with the interface of Diffusers' hierarchy.

``QuantizationConfigMixin`` is what the five native configs share. Each native config is a frozen dataclass whose
fields are made by :func:`setting`; the field's kind says what it accepts and how a value that YAML, JSON or OmegaConf
produced is brought into its one stored form. Equality and hash are those of the canonical JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, cast, dataclass_transform

from quantlab.errors import ConfigError, nearest
from quantlab.vocabulary.axes import QuantizationAxes, resolve_axes
from quantlab.vocabulary.dtypes import TORCH_DTYPE_NAMES, dtype_name
from quantlab.vocabulary.files import read_json

_T = TypeVar("_T", bound=type)
LIBRARY_RULE = "library"
EXCLUSION_RULES = ("quantlab", "diffusers", "transformers", "modelopt", LIBRARY_RULE)
"""Whose matcher reads ``modules_to_not_convert``; ``modelopt``: that of its exported checkpoints; ``library``: that of
the library whose model it is."""
_TRANSFORMERS_KEYS = (
    "weights",
    "activations",
    "include_embedding",
    "include_input_output_embeddings",
    "untie_embedding_weights",
)
"""Keys of a stored dictionary that transformers alone writes."""
Rule = Callable[[str, str], bool]
"""(entry, path of a Linear layer) -> whether the entry takes it."""


class QuantizationMethod(str, Enum):  # noqa: UP042  (Diffusers' own base classes: it dumps to JSON as its value)
    """The backends, by the name that Diffusers and transformers write as ``quant_method``."""

    BITS_AND_BYTES = "bitsandbytes"
    GGUF = "gguf"
    TORCHAO = "torchao"
    QUANTO = "quanto"
    MODELOPT = "modelopt"


def setting(
    kind: str,
    default: Any = dataclasses.MISSING,
    *,
    choices: Sequence[Any] = (),
    means: Mapping[str, str] | None = None,
    ours: bool = False,
    node: bool = False,
) -> Any:
    """A dataclass field of a native config.

    Args:
        kind: ``bool int float str dtype names mapping any``; ``names`` is a tuple of strings, ``mapping`` plain data.
        default: given by its name (``default=``), as type checkers know it by that alone.
        choices: accepted values, where they are few.
        means: other names of a format -> the choice that it is; told, never guessed by how they are spelled.
        ours: not a field of Diffusers' class; written by ``to_dict`` only where it differs from the default.
        node: may be set in the ``quantization`` node of a recipe (an axis decides the others).
    """
    metadata = {"kind": kind, "choices": tuple(choices), "means": dict(means or {}), "ours": ours, "node": node}
    return dataclasses.field(default=default, metadata=metadata)


def plain(value: Any) -> Any:
    """A deep copy in plain JSON-like data: mappings to dicts, sequences to tuples, dtypes and enums to names.

    Raises ConfigError for what is not data (tensors, callables, objects).
    """
    if value is None or isinstance(value, (bool, int, float)) or type(value) is str:
        return value
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return {k if isinstance(k, int) else str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (Sequence, set, frozenset)):
        return tuple(plain(v) for v in value)
    if str(value).startswith("torch.") and type(value).__name__ == "dtype":
        return dtype_name(value)
    raise ConfigError(f"a config holds plain data, not {type(value).__name__} ({str(value)[:60]})")


def to_json_data(value: Any) -> Any:
    """``plain`` data with lists for tuples and string keys, as JSON has them."""
    if isinstance(value, Mapping):
        return {str(k): to_json_data(v) for k, v in value.items()}
    return [to_json_data(v) for v in value] if isinstance(value, (tuple, list)) else value


def canonical_json(data: Any) -> str:
    """One text for equal data: sorted keys, no spaces."""
    return json.dumps(to_json_data(data), sort_keys=True, separators=(",", ":"))


def _accepts(kind: str, value: Any) -> bool:
    if kind == "bool":
        return isinstance(value, bool)
    if kind in ("int", "float"):
        return isinstance(value, (int,) if kind == "int" else (int, float)) and not isinstance(value, bool)
    if kind == "str":
        return isinstance(value, str)
    if kind == "dtype":
        return dtype_name(value) in TORCH_DTYPE_NAMES
    if kind == "names":
        items = isinstance(value, (Sequence, set, frozenset)) and not isinstance(value, (str, bytes))
        return items and all(isinstance(v, str) and v for v in value)
    if kind == "mapping":
        return isinstance(value, Mapping)
    return True


_WANTED = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a word",
    "dtype": "a dtype",
    "names": "a list of non-empty words",
    "mapping": "a mapping",
    "any": "plain data",
}


def coerce(owner: str, field: dataclasses.Field[Any], value: Any) -> Any:
    """The stored form of ``value`` for ``field``; ConfigError with field, value and what is accepted otherwise."""
    kind, choices = field.metadata["kind"], field.metadata["choices"]
    if value is None and field.default is None:
        return None
    if not _accepts(kind, value):
        wanted = ", ".join(map(str, choices)) if choices else _WANTED[kind]
        raise ConfigError(
            f"{field.name}={value!r}: {owner} accepts {wanted}{' or none' if field.default is None else ''}"
        )
    value = dtype_name(value) if kind == "dtype" else float(value) if kind == "float" else plain(value)
    if kind == "names":
        value = tuple(value)
    if choices and isinstance(value, str):
        same = [c for c in choices if isinstance(c, str) and c.casefold() == value.casefold()]
        value = same[0] if len(same) == 1 else value  # Q4_K_M, as llama.cpp writes it
    if choices and value not in choices:
        means = field.metadata["means"].get(value) if isinstance(value, str) else None
        near = f"; {value} is called {means}" if means else nearest(value, choices) if isinstance(value, str) else ""
        raise ConfigError(f"{field.name}={value!r}: {owner} accepts {', '.join(map(str, choices))}{near}")
    return value


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(setting,))
def quantization_config(cls: _T) -> _T:
    """Make ``cls`` a frozen dataclass whose constructor names the nearest field for an unknown key."""
    made: Any = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
    init = made.__init__

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        args, kwargs = type(self)._fold_arguments(args, kwargs)
        init(self, *args, **kwargs)

    made.__init__ = checked
    return cast(_T, made)


class QuantizationConfigMixin:
    """What the native configs share. Subclasses are made by :func:`quantization_config`."""

    quant_method: ClassVar[str]
    """A :class:`QuantizationMethod`, or the name of a backend that comes from another package."""
    exclusion_rules: ClassVar[Mapping[str, Rule]] = {}
    """Library (``diffusers``, ``transformers``) -> how it reads the exclusions of this backend."""
    written_rule: ClassVar[str] = "quantlab"
    """Whose rule the exclusions of a stored dictionary keep, where its keys do not tell who wrote it."""
    exclusion_rule: str
    """One of :data:`EXCLUSION_RULES`; a field of every config, written by ``to_dict`` where it is not quantlab's."""
    _exclude_attributes_at_init: ClassVar[tuple[str, ...]] = ("quant_method",)
    _exclusions_field: ClassVar[str] = "modules_to_not_convert"

    def __post_init__(self) -> None:
        for field in self._fields():
            object.__setattr__(self, field.name, coerce(type(self).__name__, field, getattr(self, field.name)))
        self._settle_exclusions()
        self.post_init()

    def _settle_exclusions(self) -> None:
        """An entry counts once; no entries are None, and need no rule, except to transformers (None: its defaults)."""
        names = tuple(dict.fromkeys(self.exclusions or ()))
        if not names and self.exclusion_rule not in ("transformers", LIBRARY_RULE):
            object.__setattr__(self, "exclusion_rule", "quantlab")
        keeps_empty = self.exclusions is not None and self.exclusion_rule in ("transformers", LIBRARY_RULE)
        object.__setattr__(self, self._exclusions_field, names if names or keeps_empty else None)

    def post_init(self) -> None:
        """Rules that concern several fields; raises ConfigError. Runs at construction and on every change."""

    # -- dictionaries and JSON

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Build from what ``to_dict``, Diffusers or transformers wrote; ``kwargs`` override.

        A dictionary that does not say whose ``exclusion_rule`` its exclusions have keeps the rule of the library that
        writes such dictionaries: :meth:`to_dict` says it where that is not the config's own.

        Returns the config, or ``(config, unused kwargs)`` with ``return_unused_kwargs``. An unknown key of
        ``config_dict`` is a ConfigError, as is an unknown keyword that is not returned.
        """
        data = cls._read_dict({k: v for k, v in config_dict.items()})
        method = data.get("quant_method", cls.quant_method)
        if plain(method) != cls.method():
            raise ConfigError(f"quant_method={plain(method)!r}: {cls.__name__} is for {cls.method()!r}")
        data = {k: v for k, v in data.items() if k not in cls._exclude_attributes_at_init}
        if "exclusion_rule" not in {**data, **kwargs} and cls._exclusions_field not in kwargs:
            data["exclusion_rule"] = cls._unsaid_rule(config_dict)
        names = {f.name for f in cls._fields()}
        unused = {k: kwargs.pop(k) for k in list(kwargs) if return_unused_kwargs and k not in names}
        config = cls(**{**data, **kwargs})
        return (config, unused) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON data in Diffusers' spelling (fields of ours only where they are not default).

        ``exclusion_rule`` is there where the dictionary would be read by another without it.
        """
        shown = {
            f.name: getattr(self, f.name)
            for f in self._fields()
            if not f.metadata["ours"] or getattr(self, f.name) != f.default
        }
        return self._with_rule(to_json_data({"quant_method": self.method(), **shown}))

    def to_diff_dict(self) -> dict[str, Any]:
        """What differs from the defaults, and ``quant_method``; ``from_dict`` reads it back to an equal config."""
        default = {f.name: f.default for f in self._fields()}
        changed = {k: v for k, v in self._settings().items() if v != default[k]}
        return self._with_rule(to_json_data({"quant_method": self.method(), **changed}))

    def to_json_string(self, use_diff: bool = True) -> str:
        """JSON text of :meth:`to_diff_dict` or :meth:`to_dict`."""
        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | Path, use_diff: bool = False) -> None:
        """Write :meth:`to_json_string` to a file."""
        Path(json_file_path).write_text(self.to_json_string(use_diff=use_diff), encoding="utf-8")

    @classmethod
    def from_json_file(cls, json_file_path: str | Path) -> Self:
        """Read what :meth:`to_json_file` wrote."""
        data = read_json(json_file_path, str(json_file_path), "give a file that to_json_file wrote")
        if not isinstance(data, dict):
            raise ConfigError(f"{json_file_path}: a mapping of settings is wanted, not {type(data).__name__}")
        config: Self = cls.from_dict(data)
        return config

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Change settings in place, all or nothing, validated; returns the keywords that are not settings."""
        names = {f.name for f in self._fields()}
        known = {k: v for k, v in kwargs.items() if k in names}
        changed = dataclasses.replace(self, **known)  # type: ignore[type-var]
        for name in names:
            object.__setattr__(self, name, getattr(changed, name))
        return {k: v for k, v in kwargs.items() if k not in names}

    # -- axes

    @classmethod
    def from_axes(cls, axes: QuantizationAxes, settings: Mapping[str, Any] | None = None) -> Self:
        """The native config for backend-neutral axes; ``settings`` are the backend's own node keys.

        Raises ConfigError for what the backend does not offer, naming what it does.
        """
        return cls.from_resolved(resolve_axes(axes), settings)

    @classmethod
    def from_resolved(cls, axes: QuantizationAxes, settings: Mapping[str, Any] | None = None) -> Self:
        """:meth:`from_axes` for axes that :func:`~quantlab.vocabulary.axes.resolve_axes` has been through."""
        raise NotImplementedError

    def axes(self) -> QuantizationAxes:
        """The axes that :meth:`from_axes` would turn into this config."""
        raise NotImplementedError

    # -- to other libraries

    def to_diffusers(self, model: Any = None) -> Any:
        """The installed Diffusers' config object that means the same; ``model`` is needed where layers are excluded.

        Raises ConfigError for settings that its class cannot hold, and for exclusions that its rule cannot say.
        """
        raise NotImplementedError

    def to_transformers(self, model: Any = None) -> Any:
        """The installed transformers' config object that means the same; as :meth:`to_diffusers`."""
        raise ConfigError(f"quant_method={self.method()}: transformers has no such config; use to_diffusers")

    # -- what the quantize stage asks

    @classmethod
    def method(cls) -> str:
        """``quant_method`` as plain text: the backend's name."""
        return str(plain(cls.quant_method))

    @property
    def exclusions(self) -> tuple[str, ...] | None:
        """``modules_to_not_convert``, whatever the class calls it."""
        names: tuple[str, ...] | None = getattr(self, self._exclusions_field)
        return names

    @property
    def exclusions_key(self) -> str:
        """What the class calls them."""
        return self._exclusions_field

    def _exclusion_axes(self) -> dict[str, list[str]]:
        """The axes' spelling of the exclusions; those under a library's rule are no axes and stay with the config."""
        names = list(self.exclusions or ()) if self.exclusion_rule == "quantlab" else []
        return {"own": names} if names else {}

    @property
    def needs_data(self) -> bool:
        """Whether the backend must see calibration data before it can quantize by this config."""
        return False

    def check_files(self) -> None:
        """ConfigError, before a model is loaded, for a file of this config that is not there or cannot be read."""

    @property
    def activation_granularity(self) -> str:
        """Which activations share a scale: ``per-tensor`` (all of a call), ``per-token`` or ``per-block``, with
        `` static`` behind it where calibration measured it; "" where activations are left alone."""
        return ""

    @property
    def depends_on_neighbours(self) -> bool:
        """Does what else is in a batch change a sample: one scale for all of a call does it (such a scheme is evaluated
        sample by sample), and a rule that looks at all of a call (such a one is evaluated at two batch sizes)."""
        return self.activation_granularity == "per-tensor"

    def without_data(self) -> Self | None:
        """The same bits with the plain algorithm that needs no data, to compare with; None where there is none."""
        return None

    def disabled_layers(self, paths: Sequence[str]) -> dict[str, str]:
        """Layer -> why, for layers that settings beside ``modules_to_not_convert`` switch off."""
        return {}

    @property
    def other_dtypes(self) -> tuple[str, ...]:
        """Every dtype that :meth:`layer_dtypes` may give a layer."""
        return ()

    def layer_dtypes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        """Layer -> dtype, for layers that get another dtype than the others; ``shapes`` are of their weights."""
        return {}

    def measured(self, shapes: Mapping[str, tuple[int, ...]]) -> Self:
        """The config with what it must know of a whole model, whose layers have weights of these ``shapes``, before it
        is told of some of them."""
        return self

    def spelled_out(self) -> dict[str, Any]:
        """The settings as plain data, equal where two configs say the same in other words: they store the same bits."""
        data: dict[str, Any] = to_json_data(self._settings())
        if (names := self.exclusions) is not None:
            data[self._exclusions_field] = sorted(names)
        return data

    def extra_settings(self) -> dict[str, Any]:
        """The settings of quantlab's own, beyond Diffusers' class, that are not at their default."""
        ours = {f.name: f.default for f in self._fields() if f.metadata["ours"]}
        return {name: getattr(self, name) for name, default in ours.items() if getattr(self, name) != default}

    # -- value semantics

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._canonical() == other._canonical()

    def __hash__(self) -> int:
        return hash((type(self).__name__, self._canonical()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self._settings().items())})"

    # -- for subclasses

    @classmethod
    def _fields(cls) -> tuple[dataclasses.Field[Any], ...]:
        return dataclasses.fields(cls)  # type: ignore[arg-type]

    def _settings(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in self._fields()}

    def _canonical(self) -> str:
        return canonical_json(self._settings())

    @classmethod
    def _fold_arguments(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Constructor arguments as the fields take them; an unknown key is refused with the nearest field."""
        names = [f.name for f in cls._fields()]
        for key in kwargs:
            if key not in names:
                raise ConfigError(
                    f"{key}: {cls.__name__} has no such setting{nearest(key, names)} (it has {', '.join(names)})"
                )
        return args, kwargs

    @classmethod
    def _unsaid_rule(cls, stored: Mapping[str, Any]) -> str:
        """Whose rule the exclusions of a dictionary have that does not say it."""
        return "transformers" if any(key in stored for key in _TRANSFORMERS_KEYS) else cls.written_rule

    def _with_rule(self, data: dict[str, Any]) -> dict[str, Any]:
        said = {k: v for k, v in data.items() if k != "exclusion_rule"}
        read = dataclasses.replace(self, exclusion_rule=self._unsaid_rule(said))  # type: ignore[type-var]
        is_same = read.exclusion_rule == self.exclusion_rule and read.exclusions == self.exclusions
        return said if is_same else {**said, "exclusion_rule": self.exclusion_rule}

    @classmethod
    def _read_dict(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Older and library spellings of a stored dictionary -> today's fields."""
        return data
