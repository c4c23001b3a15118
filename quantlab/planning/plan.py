"""From a request to checked jobs: a grid or a list of candidates, every combination validated before the first starts.

A request is what the user typed: overrides, perhaps a recipe. Its jobs are fully composed, typed configs. Nothing
here imports torch, so an impossible combination is refused at once.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from quantlab.backends.stored import pasted_file
from quantlab.backends.table import backends, offers, own_settings
from quantlab.datasets.calibration import check_calibration
from quantlab.datasets.table import check_dataset
from quantlab.errors import ConfigError, QuantlabError, nearest
from quantlab.models.table import components_of_family
from quantlab.planning.auto import chosen_family
from quantlab.planning.components import (
    DEFAULT,
    check_contradiction,
    check_node,
    check_said_once,
    component_nodes,
    decided,
    spread,
    told_under,
    with_those_of_others,
    without_default,
    written_out,
)
from quantlab.planning.composition import compose_node, session, typed
from quantlab.planning.job import Job, Merged, Plan, checkpoint_name, joined_name, scheme_name
from quantlab.planning.lines import candidate_lines, line_told
from quantlab.planning.picking import check_export
from quantlab.planning.places import groups, recipe_file, shipped_groups
from quantlab.planning.placing import check_placement, check_streamed
from quantlab.planning.recipe import Recipe, read_recipe
from quantlab.planning.space import check_search, check_shared, check_space, distinct
from quantlab.planning.trust import asked_for
from quantlab.planning.words import (
    COMPONENTS,
    MAX_COMBINATIONS,
    MULTIPLE_GROUPS,
    OPEN_NODES,
    no_option,
    override_text,
    parse,
    swept_values,
)
from quantlab.progress import counted
from quantlab.protocols.language import PERPLEXITY_PROTOCOLS
from quantlab.vocabulary.axes import QuantizationAxes, resolve_axes
from quantlab.vocabulary.fields import check_values
from quantlab.vocabulary.files import ends_of_paths, leads_to_a_file
from quantlab.vocabulary.launching import LAUNCHER_SETTINGS, LauncherSettings
from quantlab.vocabulary.numbers import FLOORS, REFERENCE
from quantlab.vocabulary.schema import ExperimentConfig, ExportConfig

MAX_NAME = 200
RESERVED = (REFERENCE, *FLOORS)
"""Names of rows by which the reference and the floors are known."""


def plan(overrides: Sequence[str], multirun: bool = False, is_own: bool = False, is_sweep: bool = False) -> Plan:
    """Compose and check every job of a request.

    Args:
        overrides: words as typed (``backend=torchao``, ``group_size=32,64``, ``recipe=NAME``).
        multirun: several values of a key are a sweep; without it they are refused.
        is_sweep: one scheme, too, is a sweep, whose job is not run again where it has finished.
        is_own: quantlab itself wrote the recipe, of a request that was agreed to; nothing is asked for.

    Raises:
        ConfigError: a bad word; or, in a sweep with ``sweep.on_invalid=error``, one message with all impossible
            combinations.
    """
    named, words = _split_recipe(chosen_family(overrides))
    recipe = read_recipe(recipe_file(named), named) if named else None
    try:
        planned = _plan(recipe, words, multirun, is_own, is_sweep)
        has_grid = multirun and any(one.is_sweep_override() for one in parse(words))
        return replace(planned, typed=(*(["-m"] if is_sweep or has_grid else []), *overrides))
    except ConfigError as error:
        if recipe is None or str(error).startswith(_typed(words)):
            raise
        text = str(error).removeprefix(f"recipe={recipe.typed}: ")
        raise type(error)(f"recipe={recipe.typed}: {line_told(text, recipe.files)}{text}") from error


def _typed(words: Sequence[str]) -> tuple[str, ...]:
    """How a message about what the user typed begins."""
    keys = [word.partition("=")[0].lstrip("+~") for word in words]
    return tuple(f"{key}{end}" for key in keys for end in (":", "=", ".", "[") if key)


def _plan(recipe: Recipe | None, words: Sequence[str], multirun: bool, is_own: bool, is_one: bool) -> Plan:
    with session(recipe):
        fixed, axes = _split_sweep(words, multirun)
        check_said_once(words)
        if recipe is not None:
            recipe.check_given({o.key_or_group for o in parse(words)})
        composed = compose_node(fixed, recipe)
        base = typed(composed[0])
        check_values(base)
        if recipe is not None and (recipe.content.get("sweep") or {}).get("candidates") == []:
            raise ConfigError("sweep.candidates: the list is empty; write schemes into it, or leave it out")
        combinations, is_sweep = _combinations(base, axes, fixed)
        is_sweep = is_sweep or is_one
        check_search(base.sweep, is_sweep)
        check_export(base.export, is_sweep)
        merged: list[Merged] = []
        if is_sweep:
            every, invalid = _compose_jobs(combinations, fixed, recipe)
            check_shared(every)
            jobs, merged = distinct(_counting_the_same(every))
            jobs = _told_apart(jobs)
        else:
            jobs, invalid = [replace(make_job(base, fixed, recipe), choices=composed[1])], []
        asks = {} if is_own else asked_for(recipe, jobs, words)
        if is_sweep:  # one of them is exported at its end: no job's own business
            jobs = [replace(job, config=replace(job.config, export=ExportConfig())) for job in jobs]
    skips = base.sweep.on_invalid == "skip" or base.sweep.search.num_trials > 0  # a search is among the possible ones
    if invalid and not (jobs and (skips or base.sweep.dry_run)):
        raise ConfigError(_refusal(invalid, len(combinations), _candidate_lines(base, recipe)))
    if jobs and base.sweep.search.num_trials:
        check_space(jobs)
    return Plan(
        jobs=tuple(jobs),
        is_sweep=is_sweep,
        recipe=recipe.file if recipe else None,
        recipe_digest=recipe.digest if recipe else "",
        asked_for=asks,
        invalid=tuple(invalid),
        merged=tuple(merged),
        dry_run=base.sweep.dry_run,
        export=base.export,
    )


def _split_recipe(overrides: Sequence[str]) -> tuple[str, list[str]]:
    named = [o.partition("=")[2] for o in overrides if o.startswith("recipe=")]
    if len(named) > 1 or any("," in n for n in named):
        raise ConfigError(f"recipe={','.join(named)}: one recipe at a time")
    return named[0] if named and named[0] != "null" else "", [o for o in overrides if not o.startswith("recipe=")]


def _split_sweep(words: Sequence[str], multirun: bool) -> tuple[list[str], dict[str, list[str]]]:
    """Words with one value, and the swept keys with their values as typed."""
    fixed: list[str] = []
    axes: dict[str, list[str]] = {}
    for parsed in parse(words):
        if not parsed.is_sweep_override():
            fixed.append(parsed.input_line)
        elif multirun:
            axes[parsed.key_or_group] = swept_values(parsed)
        else:
            raise ConfigError(
                f"{parsed.input_line.lstrip('+').replace(chr(39), '')}: several values are a sweep; add -m"
            )
    return fixed, axes


def _combinations(
    base: ExperimentConfig, axes: Mapping[str, list[str]], fixed: Sequence[str]
) -> tuple[list[list[str]], bool]:
    typed_keys = {o.key_or_group for o in parse(fixed)} | set(axes)
    swept = {
        k: [f"{k}='{v}'" if k in groups() and not v.startswith("[") else f"{k}={v}" for v in vs]
        for k, vs in axes.items()
    }
    if base.sweep.candidates:
        named = _candidate_keys(base)
        clash = [k for k in typed_keys if any(_is_within(k, n) or _is_within(n, k) for n in named)]
        if clash:
            listed, other = (
                (f"recipe={base.recipe} lists its", "drop the recipe")
                if base.recipe
                else ("sweep.candidates= lists the", f"give {clash[0]} to each of them")
            )
            raise ConfigError(f"{clash[0]}: {listed} candidates; drop {clash[0]}=... or {other}")
        candidates = [[_candidate_override(k, v) for k, v in c.items()] for c in base.sweep.candidates]
        # what is swept changes slowest: candidates on one model and data set come one after the other
        _check_size({**swept, "sweep.candidates": candidates})
        return [[*words, *c] for words in itertools.product(*swept.values()) for c in candidates], True
    for key, values in base.sweep.grid.items():
        _check_key("sweep.grid", key, values)
    grid = {
        k: [override_text(_full_key(k), v) for v in _listed(k, vs)]
        for k, vs in base.sweep.grid.items()
        if _full_key(k) not in typed_keys
    }
    every = {**grid, **swept}
    _check_size(every)
    combos = [list(c) for c in itertools.product(*every.values())]
    return combos, bool(every)


def _is_within(key: str, other: str) -> bool:
    """Whether a key is another one, or of the component that it is."""
    return key == other or (other.startswith(f"{COMPONENTS}.") and key.startswith(f"{other}."))


def _check_size(axes: Mapping[str, Sequence[Any]]) -> None:
    num = math.prod(map(len, axes.values()))
    if num > MAX_COMBINATIONS:
        longest = max(axes, key=lambda key: len(axes[key]))
        raise ConfigError(f"{longest}: more than {MAX_COMBINATIONS} combinations; give it fewer values")


def _listed(key: str, values: Any) -> list[Any]:
    if not isinstance(values, list) or not values:
        raise ConfigError(f"sweep.grid.{key}: a list of values is wanted, not {values!r}")
    return values


def _candidate_keys(base: ExperimentConfig) -> set[str]:
    for i, candidate in enumerate(base.sweep.candidates):
        where = f"sweep.candidates[{i}]"
        if not candidate:
            raise ConfigError(f"{where}: an entry is empty; name a scheme, as in {{backend: quanto, dtype: int8}}")
        for key, value in candidate.items():
            _check_key(where, str(key), [value])
    return {_full_key(k) for c in base.sweep.candidates for k in c}


def _check_key(where: str, key: str, values: Sequence[Any]) -> None:
    """ConfigError unless a grid or a candidate may set ``key``, one of our groups or a key of a job's config, to these.

    A word that nothing knows is a slip of the pen, which ``sweep.on_invalid=skip`` does not pass over.
    """
    top = {f.name for f in fields(ExperimentConfig)} - {"recipe", "sweep"}
    full, options = _full_key(key), groups()
    node, *below = full.split(".")
    if full in options and full not in MULTIPLE_GROUPS:
        for value in values:
            if isinstance(value, list):
                each = ", ".join(map(str, value))
                raise ConfigError(
                    f"{where}.{key}=[{each}]: one choice is wanted; write a candidate for each, or, in the place of "
                    f"sweep.candidates, sweep.grid: {{{key}: [{each}]}}"
                )
            if isinstance(value, (str, int)) and str(value) not in options[full]:
                raise ConfigError(f"{where}.{key}={no_option(full, value)}")
    if full in options or (node in top and all(part.isidentifier() for part in below)):
        settings = {f.name for f in fields(QuantizationAxes)} | {n for b in backends() for n in own_settings(b)}
        if node != "quantization" or below[0] in settings or below[0] in options or full in OPEN_NODES:
            return
        raise ConfigError(f"{where}.{key}: no such key{nearest(below[0], [*settings, *options]) or _LISTED}")
    raise ConfigError(f"{where}.{key}: no such key{nearest(key, [*options, *top]) or _LISTED}")


_LISTED = "; quantlab --help lists the groups"


def _full_key(key: str) -> str:
    axes = {f.name for f in fields(QuantizationAxes)}
    top = {f.name for f in fields(ExperimentConfig)}
    if key.startswith(tuple(f"{group}." for group in MULTIPLE_GROUPS)):  # a list of its own
        return f"quantization.{key}"
    return key if "." in key or key in groups() or (key in top and key not in axes) else f"quantization.{key}"


def _candidate_override(key: str, value: Any) -> str:
    if value is None:
        raise ConfigError(f"sweep.candidates: {key} has no value")
    return override_text(_full_key(str(key)), value)


def _compose_jobs(
    combinations: Sequence[Sequence[str]], fixed: Sequence[str], recipe: Recipe | None
) -> tuple[list[Job], list[tuple[str, str]]]:
    jobs: list[Job] = []
    invalid = []
    for combination in combinations:
        try:
            _check_axes(combination)
            node, choices = compose_node([*fixed, *combination], recipe)
            point = {k: v.strip("'") for k, _, v in (c.partition("=") for c in combination)}
            job = replace(make_job(typed(node), [*fixed, *combination], recipe), choices=choices, point=point)
        except QuantlabError as error:
            invalid.append((" ".join(c.replace("'", "") for c in combination), str(error)))
            continue
        jobs.append(job)
    return jobs, invalid


def _counting_the_same(jobs: Sequence[Job]) -> list[Job]:
    configs = with_those_of_others([job.config for job in jobs])
    return [replace(job, config=config) for job, config in zip(jobs, configs, strict=True)]


def _told_apart(jobs: Sequence[Job]) -> list[Job]:
    """The jobs, with what sets them apart behind names that several have: ``quanto int8 (dataset.seed=7)``."""
    same: dict[str, list[Job]] = {}
    for job in jobs:
        same.setdefault(job.name, []).append(job)

    def name(job: Job) -> str:
        others = same[job.name]
        varied = [k for k, v in job.point.items() if any(other.point.get(k) != v for other in others)]
        told, said = job.name, []
        for key in varied:
            short, value = key.removeprefix("quantization."), job.point[key]
            if leads_to_a_file(key):
                ends = ends_of_paths({other.point[key] for other in others if key in other.point})
                named, value = f" {short}={ends_of_paths([value])[value]}", ends[value]
                if told.endswith(named):  # the scheme's own name has the file
                    told = f"{told.removesuffix(named)} {short}={value}"
                    continue
            said.append(f"{short}={value}".replace("'", ""))
        return f"{told} ({' '.join(said)})" if said else told

    return [replace(job, name=_short(name(job))) for job in jobs]


def _short(name: str) -> str:
    """A name that fits a table and the store: of a long one the beginning, and what tells it from others."""
    if len(name) <= MAX_NAME:
        return name
    return f"{name[: MAX_NAME - 10]}… {hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _check_axes(combination: Sequence[str]) -> None:
    """ConfigError where the axes of a combination are impossible whatever else is composed: known without Hydra.

    Most of a grid over backends and dtypes is impossible, and composing takes a tenth of a second a combination.
    """
    options = shipped_groups()  # of the user's own no more is known than their file says
    chosen: dict[str, str] = {}
    for word in combination:
        key, _, value = word.partition("=")
        if key in ("backend", "dtype", "group_size") and value.strip("'") in options[key]:
            chosen[key] = value.strip("'")
    if {"backend", "dtype"} <= set(chosen):
        resolve_axes(QuantizationAxes(**chosen), offers())  # type: ignore[arg-type]


def _candidate_lines(base: ExperimentConfig, recipe: Recipe | None) -> dict[str, int]:
    """Candidate of a recipe's own file, as its combination is told -> its line; empty of those of others."""
    told = [" ".join(_candidate_override(k, v).replace("'", "") for k, v in c.items()) for c in base.sweep.candidates]
    lines = candidate_lines(recipe.file) if recipe else {}
    is_its = recipe is not None and (recipe.content.get("sweep") or {}).get("candidates") == base.sweep.candidates
    return {text: lines[i] for i, text in enumerate(told) if is_its and i in lines}


def _refusal(invalid: Sequence[tuple[str, str]], num_combinations: int, known: Mapping[str, int]) -> str:
    """What is said of the combinations that cannot be; ``known``: how those of a file end -> their line."""
    are = "is" if num_combinations == 1 else "are"
    every = counted(num_combinations, "combination")
    lines = [f"{len(invalid)} of {every} {are} impossible; no job was started:"]
    for reason in dict.fromkeys(reason for _, reason in invalid):  # of many combinations it is often one
        for combination in (combination for combination, own in invalid if own == reason):
            line = next((f"line {n}: " for said, n in known.items() if f" {combination}".endswith(f" {said}")), "")
            lines.append(f"  {line}{combination}")
        lines.append(f"      {reason}")
    others = len(invalid) < num_combinations
    return "\n".join([*lines, "sweep.on_invalid=skip runs the others" if others else "none is left; change a value"])


# -- jobs


def make_job(config: ExperimentConfig, overrides: Sequence[str] = (), recipe: Recipe | None = None) -> Job:
    """The job of one typed config; raises ConfigError where the combination is impossible.

    A pasted ``quantization_config`` becomes the native config as it is, and the job's axes show what it says.
    """
    _check_config(config)
    check_dataset(config)
    if config.checkpoint is not None:
        return _checkpoint_job(config, overrides)
    file = pasted_file(config.quantization.quantization_config)
    config = spread(config)
    keys = {o.partition("=")[0].lstrip("+") for o in overrides}
    config = without_default(config, keys | (recipe.chosen if recipe else set()))
    own_nodes = component_nodes(config)
    config = replace(config, components={name: config.components[name] for name in own_nodes})
    check_contradiction(config, config.model.components or components_of_family(config.model))
    whole = decided(config.quantization, {key.removeprefix("quantization.") for key in keys})
    schemes, files = {DEFAULT: whole.scheme}, {"quantization": file}
    names, nodes = dict[str, str](), dict[str, dict[str, Any]]()
    for name, node in own_nodes.items():
        with told_under(f"{COMPONENTS}.{name}"):
            own = decided(node, ("backend",))
        schemes[name], files[f"{COMPONENTS}.{name}"] = own.scheme, own.file
        nodes[name] = written_out(name, config.components[name], own)
        if own.scheme is not None:
            names[name] = scheme_name(own.axes, own.scheme, own.settings)
    config = replace(config, quantization=whole.axes, components=nodes)
    found = {name: scheme for name, scheme in schemes.items() if scheme is not None}
    if any(scheme.native.needs_data for scheme in found.values()):
        check_calibration(config)
    for scheme in found.values() if config.memory.placement in ("streamed", "group_offload") else ():
        check_streamed(scheme, config.memory.placement)
    default = scheme_name(whole.axes, whole.scheme, whole.settings)
    alone = any(scheme.native.activation_granularity == "per-tensor" for scheme in found.values())
    return Job(
        name=_short(config.name or (joined_name("" if DEFAULT not in found else default, names) if names else default)),
        config=config,
        schemes=found,
        overrides=tuple(overrides),
        batch_size=1 if alone else None,
        pasted_files={f"{key}.quantization_config": file for key, file in files.items() if file},
    )


def _checkpoint_job(config: ExperimentConfig, overrides: Sequence[str]) -> Job:
    """The job of a checkpoint that is quantized already; ConfigError for a scheme beside it."""
    key = f"checkpoint={config.checkpoint}"
    axes = {f.name for f in fields(QuantizationAxes)}
    for word in overrides:
        name = word.partition("=")[0].lstrip("+")
        if name in axes or name.startswith(("quantization.", f"{COMPONENTS}.")):
            raise ConfigError(
                f"{key}: it is quantized already, and {word} has nothing to choose; leave one of them out"
            )
    if config.components:
        raise ConfigError(
            f"{key}: it has its schemes, and components.{next(iter(config.components))} another; drop one"
        )
    name = config.name or checkpoint_name(config.checkpoint or "")
    if name in RESERVED:
        raise ConfigError(f"{key}: its row would be named {name}, as one of the unquantized model; give it a name=...")
    return Job(name=_short(name), config=replace(config, quantization=QuantizationAxes()), overrides=tuple(overrides))


def _check_config(config: ExperimentConfig) -> None:
    """ConfigError for a value outside the range that the schema declares, and for values that exclude each other."""
    check_values(config)
    if config.name in RESERVED:
        raise ConfigError(
            f"name={config.name}: is that of a row of the unquantized model, and rows are told apart by their names; "
            "choose another"
        )
    engine, settings = config.launcher.engine, config.launcher.settings
    if type(settings) not in (LauncherSettings, LAUNCHER_SETTINGS[engine]):
        raise ConfigError(f"launcher.engine={engine}: its settings are another engine's; choose it with launcher=")
    name = config.evaluation.perplexity_protocol
    if name not in PERPLEXITY_PROTOCOLS:
        raise ConfigError(
            f"evaluation.perplexity_protocol={name}: there are {', '.join(PERPLEXITY_PROTOCOLS)}"
            f"{nearest(name, PERPLEXITY_PROTOCOLS)}"
        )
    check_node(config.quantization)
    check_placement(config)
    timeout = config.sweep.timeout_s
    if timeout is not None and config.sweep.isolation == "none":
        raise ConfigError(
            f"sweep.timeout_s={timeout:g}: only a process can be ended; set sweep.isolation=process, or drop the limit"
        )
