"""Which layers a list of exclusions takes under the rule of Diffusers or transformers, and lists that say a choice.

One key, ``modules_to_not_convert`` (bitsandbytes: ``llm_int8_skip_modules``), has six meanings in these libraries. A
dictionary that comes from one of them keeps its meaning: its entries are expanded on the model to full paths by
:func:`expand`. The other way, :func:`express` finds a list that the library resolves to exactly given layers.

Rules, as Diffusers 0.42 and transformers 5.23 apply them:

=========================  =========================================================================================
Diffusers bitsandbytes     the layer's own name, its whole path, or ``entry + "."`` anywhere in the path
Diffusers torchao          the path of the weight (``...to_q.weight``), or ``entry + "."`` anywhere in it
Diffusers quanto           the layer's own name
Diffusers gguf             any one component of the path
Diffusers modelopt         the glob ``*entry*`` on the path of the weight's quantizer (``...to_q.weight_quantizer``)
ModelOpt's export          the glob ``entry`` on the layer's path, or on that of a module around it
transformers               a regular expression from the start of the path up to a dot, or an ending of the path (for
                           torchao: of the weight's path); no list at all: tied weights, the last module and the output
                           embeddings
=========================  =========================================================================================

Both add to any list what the model's class keeps in float32 (``_keep_in_fp32_modules``: T5's ``wo``), and read it by
the same rule. ``_keep_in_fp32_modules_strict`` of transformers is about dtypes alone: its layers are quantized.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from quantlab.errors import ConfigError
from quantlab.modules.holders import Holder, holders
from quantlab.modules.hooks import before_adapters
from quantlab.modules.layers import fits, linear_layers, resolve_exclusions
from quantlab.vocabulary.amounts import some_of
from quantlab.vocabulary.dtypes import dtype_name
from quantlab.vocabulary.native import LIBRARY_RULE, QuantizationConfigMixin, Rule

if TYPE_CHECKING:
    from torch import nn

_Made = TypeVar("_Made")
_KEPT = "which its class keeps in float32"


def taken_by_transformers(entry: str, path: str) -> bool:
    """transformers' rule, the same for all of its backends but torchao, which gives it the path of the weight."""
    try:
        expression = re.compile(rf"(?:{entry})(?:(?<=\.)|(?=\.|$)).*").pattern
        return fits(expression, path, f"modules_to_not_convert={entry}") or path.endswith(entry)
    except re.error as error:
        raise ConfigError(
            f"modules_to_not_convert={entry}: transformers reads it as a regular expression, which it "
            f"is not ({error}); escape it"
        ) from error


def rule_of(config: QuantizationConfigMixin | type[QuantizationConfigMixin], library: str) -> Rule:
    """How ``library`` reads the exclusions of this backend; ConfigError where it does not quantize with it."""
    if library not in config.exclusion_rules:
        raise ConfigError(
            f"exclusion_rule={library}: {library} does not quantize with {config.method()}; set it to "
            f"{' or '.join([*config.exclusion_rules, 'quantlab'])}"
        )
    return config.exclusion_rules[library]


def taken(rule: Rule, entries: Sequence[str], paths: Iterable[str]) -> dict[str, str]:
    """Path -> the first entry that takes it under a library's rule."""
    found = {path: next((e for e in entries if rule(e, path)), None) for path in paths}
    return {path: entry for path, entry in found.items() if entry is not None}


# -- a library's list on a model


def library_of(model: nn.Module) -> str:
    """``transformers`` for a model of transformers, else ``diffusers``: who would have read its config.json."""
    return "transformers" if hasattr(model, "get_output_embeddings") else "diffusers"


def expand(
    config: QuantizationConfigMixin, model: nn.Module, keep: bool = True
) -> tuple[dict[str, str], tuple[str, ...]]:
    """The Linear layers of ``model`` that a config with a library's rule leaves out.

    ``keep``: those too that the model's class keeps in float32.

    Returns:
        Full path -> why; and the entries that take no layer (the libraries accept those without a word).
    """
    library = config.exclusion_rule
    if library == LIBRARY_RULE:
        library = library_of(model)
    if library == "quantlab":
        raise ConfigError("exclusion_rule=quantlab: its entries are matched by quantlab.modules.layers")
    method, rule = config.method(), rule_of(config, library)
    paths, given = linear_paths(model), config.exclusions
    entries = tuple(given or ())
    if given is None and library == "transformers":
        entries = _transformers_defaults(model)
    plain = before_adapters(model, paths)
    found = taken(rule, entries, plain)
    reasons = {plain[p]: f"{library} {method}: {entry}" for p, entry in found.items()}
    if keep:
        kept = taken(rule, _kept_in_float32(model), plain)
        reasons = {plain[p]: f"{library} {method}: {entry}, {_KEPT}" for p, entry in kept.items()} | reasons
    for path, why in config.disabled_layers(paths).items():
        reasons.setdefault(path, why)
    return reasons, tuple(e for e in entries if given and not any(rule(e, p) for p in paths))


def kept_in_float32(model: nn.Module) -> dict[str, str]:
    """Layer -> why, for the holders of weights that classes of ``model`` keep in float32 when they are loaded.

    They are left out by default, whatever quantizes: they lose most, and code of theirs may look at the weight's dtype.
    """
    found: dict[str, str] = {}
    for root, part in model.named_modules():
        for entry in _kept_in_float32(part):
            inside = f".{entry.removesuffix('.weight')}."
            for path, holder in holders(part).items():
                if inside in f".{path}.":
                    why = f"{type(part).__name__}: {entry}, {_KEPT}{_here(holder)}"
                    found.setdefault(f"{root}.{path}".lstrip("."), why)
    return found


def _here(holder: Holder) -> str:
    """In what it is kept, where that is no float32: transformers widens it in models of float16 alone."""
    dtype = dtype_name(holder.weight.dtype) if holder.has_weight else "float32"
    return "" if dtype == "float32" else f" (where the model is of float16; here it stays {dtype})"


def linear_paths(model: nn.Module) -> list[str]:
    """Paths of every Linear layer, at each place where it sits, as the libraries walk them."""
    from torch import nn

    return [n for n, m in model.named_modules(remove_duplicate=False) if n and isinstance(m, nn.Linear)]


def _transformers_defaults(model: nn.Module) -> tuple[str, ...]:
    """What transformers leaves out where nobody said anything."""
    if not hasattr(model, "get_output_embeddings"):
        raise ConfigError(
            "exclusion_rule=transformers: without modules_to_not_convert it leaves out the model's own "
            "output layers, and this is no model of transformers; name the modules, or [] for none"
        )
    from transformers.quantizers.base import get_keys_to_not_convert

    return tuple(sorted(get_keys_to_not_convert(model)))


# -- a choice of layers as a library's list


def exclusions_for(config: QuantizationConfigMixin, model: nn.Module | None, library: str) -> list[str] | None:
    """A list that ``library`` resolves, on ``model``, to exactly the layers that ``config`` leaves out.

    ``model=None`` is enough where the list is that library's own already, or empty.

    Raises:
        ConfigError: the list needs the model, or no list of that library says these layers (they are named).
    """
    method, names, rule = config.method(), config.exclusions, rule_of(config, library)
    if config.exclusion_rule in (library, LIBRARY_RULE):
        return list(names) if names is not None else None
    if model is None:
        if not names and config.exclusion_rule == "quantlab":
            return [] if library == "transformers" else None  # an absent list has a meaning of its own there
        raise ConfigError(
            f"modules_to_not_convert={list(names or ())}: {library}'s rule for {method} is another than "
            f"quantlab's; give the model, to_{library}(model), and a list is found that says the same"
        )
    wanted = _left_out(config, model)
    paths = linear_paths(model)
    kept = taken(rule, _kept_in_float32(model), paths)
    if beyond := [path for path in kept if path not in wanted]:
        raise ConfigError(
            f"modules_to_not_convert: {library} also leaves out {some_of(beyond)}, which the model "
            "keeps in float32; add them, so that both say the same"
        )
    entries = express(config, library, wanted, paths)
    return entries or ([] if library == "transformers" else None)


def kept_by_loader(
    config: QuantizationConfigMixin, library: str, model: nn.Module, paths: Sequence[str]
) -> dict[str, str]:
    """Of the Linear layers at ``paths`` those that ``library`` leaves out whatever its list says -> the entry."""
    return taken(rule_of(config, library), _kept_in_float32(model), paths)


def _kept_in_float32(model: nn.Module) -> tuple[str, ...]:
    entries = getattr(model, "_keep_in_fp32_modules", None) or ()
    return (entries,) if isinstance(entries, str) else tuple(sorted(entries))


def excluded_layers(config: QuantizationConfigMixin, model: nn.Module) -> set[str]:
    """Paths of the Linear layers of ``model`` that the config's exclusions take, by whichever rule it has."""
    layers = linear_layers(model)
    if config.exclusion_rule != "quantlab":
        return set(expand(config, model)[0])
    every = [name for name, _ in model.named_modules()]
    own = resolve_exclusions(list(layers), config.exclusions or (), every)
    return {*own, *config.disabled_layers(list(layers)), *(set(kept_in_float32(model)) & set(layers))}


def _left_out(config: QuantizationConfigMixin, model: nn.Module) -> set[str]:
    """Paths of the Linear layers that quantlab would not quantize with this config, at each place where they sit."""
    out = excluded_layers(config, model)
    done = {id(layer) for name, layer in linear_layers(model).items() if name not in out}
    return {path for path in linear_paths(model) if id(model.get_submodule(path)) not in done}


def express(
    config: QuantizationConfigMixin | type[QuantizationConfigMixin],
    library: str,
    wanted: set[str],
    paths: Sequence[str],
) -> list[str]:
    """Entries that the library's rule resolves to exactly ``wanted`` among ``paths``.

    Raises:
        ConfigError: naming the layers that no entry takes without taking others.
    """
    rule, entries, missing = rule_of(config, library), [], []
    covered: set[str] = set()
    for path in (p for p in paths if p in wanted):
        if path in covered:
            continue
        for entry in _spellings(path, library):
            found = {p for p in paths if rule(entry, p)}
            if path in found and found <= wanted:
                entries.append(entry)
                covered |= found
                break
        else:
            missing.append(path)
    if missing:
        raise ConfigError(
            f"modules_to_not_convert: no list of {library} says {some_of(missing)} for {config.method()} "
            f"without other layers{_others(rule, missing[0], wanted, paths)}; exclude those too, or keep "
            "to quantlab"
        )
    return entries


def _spellings(path: str, library: str) -> list[str]:
    """Ways to name a layer: containers from the root, itself, its weight, then endings from the longest."""
    parts = path.split(".")
    heads = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
    tails = [".".join(parts[i:]) for i in range(1, len(parts))]
    exact = [rf"{re.escape(path)}$", rf"{re.escape(path)}\.weight$"] if library == "transformers" else []
    return [*heads, f"{path}.weight", *tails, *parts, *exact]


def _others(rule: Rule, path: str, wanted: set[str], paths: Sequence[str]) -> str:
    extra = [p for p in paths if rule(path, p) or rule(path.rpartition(".")[2], p)]
    extra = [p for p in extra if p not in wanted]
    return f" ({some_of(extra, 4)})" if extra else ""


# -- building the libraries' objects


def refuse_ours(config: QuantizationConfigMixin, library: str, held: Iterable[str] = ()) -> None:
    """ConfigError naming the settings of ours that are not default, for a class that cannot hold them."""
    held = {*held, "exclusion_rule"}
    lost = {k: v for k, v in config.extra_settings().items() if k not in held}
    if lost:
        listed = ", ".join(f"{k}={v!r}" for k, v in lost.items())
        raise ConfigError(
            f"{listed}: the {type(config).__name__} of {library} has no such setting and would quantize "
            "otherwise without a word; leave it out, or quantize with quantlab"
        )


def build(make: Callable[..., _Made], arguments: Mapping[str, Any], where: str) -> _Made:
    """Construct a library's config object; its refusal becomes a ConfigError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # Diffusers repeats its deprecation each time
            return make(**arguments)
    except (TypeError, ValueError, AttributeError, KeyError, ImportError) as error:
        raise ConfigError(
            f"{where}: the installed library cannot build this config ({error}); change the setting, or "
            "quantize with quantlab"
        ) from error
