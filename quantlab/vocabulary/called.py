"""How the public functions are called: a wrong call is told in words, with the argument that was meant. Torch-free."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

from quantlab.errors import ConfigError, nearest
from quantlab.vocabulary.capabilities import LAYER_KINDS
from quantlab.vocabulary.native import QuantizationConfigMixin

_P = ParamSpec("_P")
_T = TypeVar("_T")
_PLAIN = (bool, int, float, str, Path, types.NoneType)
"""Types whose values are looked at; what else there is, a function looks at itself."""


def called_in_words(
    meant: Mapping[str, str] | None = None, others: str = "", own: Sequence[str] = ()
) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """A public function that says what is wrong with a call: ConfigError, and nothing has run.

    ``meant``: word that people write -> the argument. ``others``: what is said of a word that is no argument, with
    ``{word}`` for it as the command line takes it. ``own``: arguments that the function looks at itself.
    """

    def decorate(function: Callable[_P, _T]) -> Callable[_P, _T]:
        signature = inspect.signature(function)

        def check(args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            name = f"quantlab.{function.__name__}"
            takes = f"{name} takes {', '.join(signature.parameters)}"
            for word, value in kwargs.items():
                if word in signature.parameters:
                    continue
                if word in (meant or {}):
                    own_word = (meant or {})[word]
                    raise ConfigError(f"{word}={value!r}: {name} calls it {own_word}: {own_word}={value!r}; {takes}")
                way = others.format(word=repr(f"{word}={value}"))
                raise ConfigError(f"{word}={value!r}: {takes}{nearest(word, signature.parameters) or way}")
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise ConfigError(f"{name}: {error}; {takes}") from error
            hints = _hints(function)
            for word, value in bound.arguments.items():
                wanted = _kinds_of(hints[word])
                if word not in own and all(one in _PLAIN for one in wanted) and not _is_one_of(value, wanted):
                    listed = " or ".join(
                        "None" if one is types.NoneType else getattr(one, "__name__", "") for one in wanted
                    )
                    raise ConfigError(f"{word}={repr(value)[:80]}: {name} takes a value of {listed} there")

        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            check(args, kwargs)
            return function(*args, **kwargs)  # alone: a traceback of others' errors shows the lines around it

        return call

    return decorate


@functools.cache
def _hints(function: Callable[..., object]) -> dict[str, type]:
    return typing.get_type_hints(function)


def _kinds_of(hint: object) -> tuple[object, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _is_one_of(value: object, wanted: tuple[object, ...]) -> bool:
    if isinstance(value, bool):  # it is an int, too, and no number that anyone means
        return bool in wanted
    return any(isinstance(one, type) and isinstance(value, one) for one in wanted) or (
        isinstance(value, int) and float in wanted
    )


def check_batches(name: str, given: object) -> None:
    """ConfigError for what is no list of batches; None is none at all."""
    if given is not None and not isinstance(given, (list, tuple)):
        raise ConfigError(f"{name}={type(given).__name__}: a list of batches is wanted: {name}=[batch]")


def checked_kinds(given: object) -> list[str]:
    """``layer_kinds`` as a list; ConfigError for what is none, and for a kind that does not exist."""
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise ConfigError(f"layer_kinds={given!r}: a list of kinds is wanted, such as layer_kinds=['linear', 'conv']")
    if unknown := [kind for kind in given if kind not in LAYER_KINDS]:
        near = nearest(str(unknown[0]), LAYER_KINDS)
        raise ConfigError(f"layer_kinds: there is no {unknown[0]!r}, but {', '.join(LAYER_KINDS)}{near}")
    return list(given)


def check_configs(configs: object) -> None:
    """ConfigError for what is no list of native configs."""
    if not isinstance(configs, (list, tuple)):
        raise ConfigError(f"configs={type(configs).__name__}: a list of configs is wanted: [config]")
    for config in configs:
        check_config(config)


def check_config(config: object) -> None:
    """ConfigError for what is no native config."""
    if not isinstance(config, QuantizationConfigMixin):
        way = "QuantoConfig('int8')" if not isinstance(config, Mapping) else "quantlab.config_from_dict(config)"
        raise ConfigError(f"config={type(config).__name__}: one of quantlab's configs is wanted, e.g. {way}")
