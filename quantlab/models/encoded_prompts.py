"""Prompts are encoded once: what ``encode_prompt`` of a pipeline returned is kept on the disk, by all it depends on."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from quantlab.models.loaded import LoadedModel, Pipeline
from quantlab.modules.kept import SUFFIX, Damaged, read_tree, set_aside, write_tree
from quantlab.modules.residence import Prompts, Residence
from quantlab.modules.trees import replaced
from quantlab.vocabulary.native import canonical_json

_ENCODE = "encode_prompt"


def candidates_of(model: LoadedModel) -> dict[str, Any]:
    """Name -> component of a model of a pipeline, for those that are not the reference's."""
    reference = model.parts["pipeline"]
    return {name: m for name, m in model.components.items() if m is not getattr(reference, name, m)}


def reuse_prompts(pipe: Pipeline, model: LoadedModel, arguments: Mapping[str, object]) -> None:
    """Let a pipeline take encoded prompts from the disk, where the model has a place for them; where parts come and go,
    encoders go when they have encoded some. ``arguments`` are those of the pipeline's call.

    Where an encoder is a candidate's each prompt is encoded by it.
    """
    changed: Any = pipe
    own = getattr(changed, _ENCODE, None)
    is_measured = bool(_encoders(candidates_of(model), model))
    prompts, residence = (None if is_measured else model.parts.get("prompts")), model.parts.get("residence")
    if callable(own) and (prompts is not None or residence is not None):
        dtypes = {name: str(getattr(m, "dtype", "")) for name, m in sorted(pipe.components.items())}
        call = {name: said for name, value in arguments.items() if (said := _said(value)) is not None}
        asked = canonical_json([dtypes, call])  # some pipelines look at their parts' dtypes, or at the call's guidance
        encoded = functools.partial(_encoded, pipe, own, residence, prompts, model.device, asked)
        setattr(changed, _ENCODE, encoded)


def _encoders(names: Collection[str], model: LoadedModel) -> set[str]:
    return set(names) - {*model.parts["denoisers"], "vae"}


@contextlib.contextmanager
def padding_as_loaded(pipe: Pipeline) -> Iterator[None]:
    """While open, a pipeline may change the side that its tokenizers pad on; afterwards it is as before.

    Some set it where they encode prompts, and look at it when they are made and in their later steps: it would depend
    on what ran before.
    """
    before = _padding(pipe)
    try:
        yield
    finally:
        _pad(pipe, before)


def _padding(pipe: Pipeline) -> dict[str, str]:
    sides = {name: getattr(part, "padding_side", None) for name, part in pipe.components.items()}
    return {name: side for name, side in sides.items() if isinstance(side, str)}


def _pad(pipe: Pipeline, sides: Mapping[str, str]) -> None:
    for name, side in sides.items():
        tokenizer: Any = pipe.components[name]
        tokenizer.padding_side = side


def _encoded(
    pipe: Pipeline,
    own: Callable[..., Any],
    residence: Residence | None,
    prompts: Prompts | None,
    device: str,
    asked: str,
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    said = None if prompts is None else _said([list(args), kwargs])
    file = None
    if prompts is not None and said is not None:
        digest = hashlib.sha256(f"{prompts.key}|{asked}|{said}".encode()).hexdigest()[:32]
        file = prompts.folder / f"{digest}{SUFFIX}"
        if file.exists():
            try:
                kept = read_tree(file)
                _pad(pipe, kept["padding"])
                return replaced(kept["found"], lambda t: t.to(device) if hasattr(t, "to") else None)
            except Damaged as error:
                set_aside(file, error)
    # from the disk tensors come without gaps; so they do at first, as kernels may be chosen by it
    found = replaced(own(*args, **kwargs), lambda t: t.contiguous() if hasattr(t, "contiguous") else None)
    if residence is not None:
        residence.leave()
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(TypeError):  # of other things than tensors and plain values
            write_tree({"found": found, "padding": _padding(pipe)}, file)
    return found


def _said(given: object) -> str | None:
    """What a call is given as text; None where something in it is not known by its value."""
    import torch

    def plain(value: object) -> object:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, (torch.device, torch.dtype)):
            return str(value)
        if isinstance(value, torch.Tensor):
            raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            return [str(value.dtype), list(value.shape), hashlib.sha256(raw.numpy().data).hexdigest()]
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        raise TypeError(type(value).__name__)

    try:
        return canonical_json(plain(given))
    except TypeError:
        return None
