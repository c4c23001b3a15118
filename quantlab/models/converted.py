"""A checkpoint whose tensors transformers loads under other names, or makes others of: a mixture's experts lie in the
files one by one, and are one parameter in the model.

What is read for a tensor of the model are the files' tensors that it is made of, by transformers' own rules, when it is
asked for.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quantlab.errors import ModelError
from quantlab.modules.source import Shards

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def as_loaded_by_name(module: Any, shards: Shards) -> Shards:
    """The tensors of a checkpoint by the names that they have in ``module``, an empty one of transformers."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(module)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    known, prefix = module.state_dict(), module.base_model_prefix
    files = dict(shards.files)
    made: dict[str, Callable[[torch.dtype], Tensor]] = {}
    parts: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    for stored in sorted(shards.files, key=dot_natural_key):  # the order that experts are numbered in
        name, pattern = rename_source_key(stored, renamings, converters, prefix, known)
        if name not in known and stored in known:
            continue
        if pattern is not None:
            parts.setdefault(name, (by_pattern[pattern], []))[1].append((pattern, stored))
        elif name != stored:
            made[name] = functools.partial(shards.tensor, stored)
        if name != stored:
            del files[stored]
    for name, (rule, of) in parts.items():
        files.pop(name, None)
        before, _, behind = name.partition(rule.target_patterns[0])
        for target in (before + pattern + behind for pattern in rule.target_patterns):
            made[target] = functools.partial(_converted, module, shards, rule, name, of, target)
    return replace(shards, files=files, made=made)


def _converted(
    module: Any, shards: Shards, rule: Any, name: str, parts: Sequence[tuple[str, str]], wanted: str, dtype: torch.dtype
) -> Tensor:
    """The tensor ``wanted`` of those that a rule makes, first of them ``name``: ``parts`` are (pattern, stored)."""
    rule = copy.deepcopy(rule)  # it collects what it converts
    for pattern, stored in parts:
        rule.add_tensor(name, stored, pattern, shards.tensor(stored, dtype))
    try:
        found = rule.convert(name, model=module, config=module.config)[wanted]
    except (RuntimeError, ValueError, LookupError, TypeError) as error:
        raise ModelError(
            f"{shards.key}: transformers cannot make {wanted} of {parts[0][1]} and others ({error}); copy or download "
            "it again, or pass memory.placement=resident"
        ) from error
    tensor: Tensor = found[0] if isinstance(found, list) else found
    return tensor
