"""Plain data: what a recipe, and whatever is composed of it, may hold. No word of it is run, imported or looked up."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from omegaconf.basecontainer import BaseContainer
from omegaconf.errors import GrammarParseError
from omegaconf.grammar.gen.OmegaConfGrammarParser import OmegaConfGrammarParser
from omegaconf.grammar_parser import parse

from quantlab.errors import ConfigError

_WORD_OF_CODE = re.compile(r"_[a-z]+(_[a-z]+)*_")
"""How Hydra spells what makes a mapping a call: ``_target_``, ``_partial_``, ``_args_`` and their like."""
_BREAKS = re.compile(r"[^\w${}]+")
_MAX_DEPTH = 24
_MAX_VALUES = 100_000
_MAX_REFERENCES = 16
"""More of them, each to a value with some, would make a text of any length."""
_MAX_INTEGER = 2**63

_OF_LINES = ("quantization_config", "model.call")


@contextmanager
def no_resolvers() -> Iterator[None]:
    """Inside, OmegaConf knows no resolver: an interpolation that is not a key of the config is an error."""
    held = BaseContainer._resolvers
    BaseContainer._resolvers = {}
    try:
        yield
    finally:
        BaseContainer._resolvers = held


def check_data(node: Any, path: str = "", *, references: bool = True) -> None:
    """ConfigError naming the key where a tree of plain values says more than data.

    Refused: keys that make a mapping a call, however they are nested or joined by dots; interpolations that are not a
    key of the config (with ``references=False``: any, as they would be read again); characters that no name has.
    """
    num_references = 0
    for count, (where, value, depth) in enumerate(_values(node, path, 0)):
        if depth > _MAX_DEPTH or count > _MAX_VALUES:
            raise ConfigError(
                f"{where[:80]}: too much for a config ({_MAX_VALUES} values, {_MAX_DEPTH} levels); cut it"
            )
        if isinstance(value, int) and abs(value) > _MAX_INTEGER:
            raise ConfigError(f"{where}: a number of more than 64 bits; write a smaller one")
        if isinstance(value, str):
            check_text(value, where)
            num_references += value.count("${")
            if num_references > _MAX_REFERENCES:
                raise ConfigError(f"{where}: more than {_MAX_REFERENCES} references to keys; write the value itself")
            if "${" in value and (not references or _calls(value, where)):
                raise ConfigError(f"{where}: {value[:80]} reaches outside the config; write the value itself")


def _values(node: Any, path: str, depth: int) -> Iterator[tuple[str, Any, int]]:
    """Each value of a tree with its path and depth; keys are checked on the way."""
    if isinstance(node, Mapping) and depth <= _MAX_DEPTH:
        for key, value in node.items():
            _check_key(str(key), path)
            yield from _values(value, f"{path}.{key}" if path else str(key), depth + 1)
    elif isinstance(node, (list, tuple)) and depth <= _MAX_DEPTH:
        for value in node:
            yield from _values(value, path, depth + 1)
    else:
        yield path, node, depth


def _check_key(key: str, path: str) -> None:
    where = f"{path}.{key[:80]}" if path else key[:80]
    check_text(key, path or "a key", lines=False)
    if any(_WORD_OF_CODE.fullmatch(part) for part in _BREAKS.split(key.replace("${", " ").replace("}", " "))):
        raise ConfigError(f"{where} is not allowed: a recipe is data and never names code to run")
    if "${" in key:
        raise ConfigError(f"{where}: a key is written out; write the key itself")


def check_text(text: str, where: str, *, lines: bool = True) -> None:
    """ConfigError for characters that no name, path or number has: control characters and halves of a character.

    ``lines``: a value under :data:`_OF_LINES`, pasted text or what a pipeline is told (lyrics), may have several.
    """
    broken = "\n\t" if lines and any(key in where for key in _OF_LINES) else ""
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs") and character not in broken:
            raise ConfigError(f"{where}: it holds the control character {character!r}; write printable text")


def _calls(text: str, where: str) -> bool:
    """Whether an interpolation in ``text`` names a resolver, in whatever way its name is made."""
    try:
        found: list[Any] = [parse(text)]
    except (GrammarParseError, RecursionError) as error:
        raise ConfigError(f"{where}: {text[:80]} is no reference to a key; write the value itself") from error
    while found:
        node = found.pop()
        if isinstance(node, OmegaConfGrammarParser.InterpolationResolverContext):
            return True
        found += list(node.getChildren()) if hasattr(node, "getChildren") else []
    return False
