"""What must hold of a model before it is measured, tried on one sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from quantlab.errors import ModelError, QuantlabError, first_line, is_of_the_machine
from quantlab.models.loaded import LoadedModel
from quantlab.modules.trees import named_tensors
from quantlab.protocols.unchanged import must_stay_unchanged

if TYPE_CHECKING:
    from torch import Tensor

_Ran = TypeVar("_Ran")
MAX_REL_DIFFERENCE = 1e-3
"""Of two runs of one model on one sample: kernels that add in any order stay below, what is drawn does not."""


def check_tokens(model: LoadedModel, ids: Tensor, embedding: Callable[[], object]) -> None:
    """ModelError for token ids beyond what ``embedding`` gives, the module that has a row for each."""
    try:
        weight = getattr(embedding(), "weight", None)
    except NotImplementedError:  # some embed characters by several hashes
        return
    if weight is not None and weight.dim() == 2 and (largest := int(ids.max())) >= len(weight):
        raise ModelError(
            f"model.path: {model.name} has embeddings for {len(weight)} tokens, and its tokenizer gives the token "
            f"{largest}; use the tokenizer that belongs to the weights"
        )


def check_runs(model: LoadedModel, run: Callable[[], Mapping[str, object]]) -> None:
    """Run the model twice: ``run`` gives its outputs on one sample.

    Raises ModelError for one that does not take what its family is given, that changes its weights when it runs, or
    that answers one sample in two ways, as what draws at random does: errors could not be told from draws.
    """
    with must_stay_unchanged(model):
        first = tried(model, run)
    check_repeats(f"model.path: {model.name}", first, run())


def check_repeats(key: str, first: object, again: object) -> None:
    """ModelError where two runs on one sample differ by more than :data:`MAX_REL_DIFFERENCE`."""
    second = named_tensors(again)
    for name, out in named_tensors(first).items():
        other = second.get(name)
        if other is None or other.shape != out.shape:
            found = "outputs of another shape"
        else:
            moved = float((other.float() - out.float()).norm() / out.float().norm().clamp_min(1e-30))
            found = f"relative difference {moved:.2g}" if moved > MAX_REL_DIFFERENCE else ""
        if found:
            raise ModelError(
                f"{key} answers one sample in two ways ({found}), so that errors could "
                "not be told from what it draws at random; switch that off in it (a mask, a dropout), or give it to "
                "quantlab.evaluate with inputs that say what is drawn"
            )


def tried(model: LoadedModel, run: Callable[[], _Ran]) -> _Ran:
    """What ``run`` gives; ModelError for a model that does not take what its family is given."""
    try:
        return run()
    except QuantlabError:
        raise
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
        if is_of_the_machine(error):  # no memory, a lost device: nothing of the model
            raise
        raise ModelError(
            f"model.path: {type(model.components['model']).__name__} of {model.name} cannot be run on what models of "
            f"the protocol {model.protocol} are given ({first_line(error)}); choose another model.family, or give "
            "the module and its inputs to quantlab.evaluate in Python"
        ) from error
