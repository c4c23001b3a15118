"""What language models say, for people: greedy continuations of prompts, and the tokens that change most.

Nothing of it is a metric. A continuation is a few forward calls with the model's own cache (or without, for one
that has none, or whose cache says something else), so that any model that is evaluated has one; of equal logits the
first token counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quantlab.models.causal_lm import network_of
from quantlab.models.loaded import LoadedModel
from quantlab.progress import say, under_way
from quantlab.vocabulary.schema import EvaluationConfig

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

PROMPT_TOKENS = 32
"""A prompt is the beginning of a window, at most so long and at most half of it."""
MAX_WORST = 12
CONTEXT_TOKENS = 16
"""So many tokens before a changed one are shown."""
_NEARLY_LIKELIEST = 0.05
"""Of the logits' standard deviation: what rounding alone moves a logit by, with a cache and without, stays below."""


def prompts_of(input_ids: Tensor, evaluation: EvaluationConfig) -> Tensor:
    """int64 (prompts, tokens): the beginnings of the first windows."""
    return input_ids[: evaluation.num_continuations, : max(1, min(PROMPT_TOKENS, input_ids.shape[1] // 2))]


def continued(model: LoadedModel, input_ids: Tensor, evaluation: EvaluationConfig) -> Tensor:
    """int64 (prompts, tokens): what the model says next, greedily, all prompts in one batch; nothing for none.

    Together they are never longer than a window, which the model is known to take.
    """
    import torch

    prompts = prompts_of(input_ids, evaluation).to(model.device)
    num = min(evaluation.continuation_tokens, input_ids.shape[1] - prompts.shape[1])
    if not len(prompts) or num < 1:
        return torch.zeros((0, 0), dtype=torch.int64)
    module: Any = network_of(model.components["model"])  # of the call's arguments quantlab's own type has two
    try:
        found = _continued(module, prompts, num, has_cache=True)
        under_way("checking the continuations by one call")
        if not _is_said(module, found, prompts.shape[1]):
            found = _continued(module, prompts, num, has_cache=False)
    except (AttributeError, TypeError, ValueError, NotImplementedError) as error:  # BLT makes none of its configuration
        say(f"{model.name}: it runs with no cache ({str(error)[:200]}); its continuations are made without one")
        found = _continued(module, prompts, num, has_cache=False)
    return found[:, prompts.shape[1] :].cpu()


def _continued(module: Any, prompts: Tensor, num: int, has_cache: bool) -> Tensor:
    import torch

    ids, cache = prompts, None
    with torch.no_grad():
        for done in range(num):
            under_way(f"continuing prompts: {done} of {num} tokens")
            given = ids if cache is None else ids[:, -1:]
            answer = module(input_ids=given, **({"past_key_values": cache} if has_cache else {}), use_cache=has_cache)
            cache = getattr(answer, "past_key_values", None) if has_cache else None
            ids = torch.cat([ids, answer.logits[:, -1].float().argmax(-1, keepdim=True).to(ids.device)], 1)
    return ids


def _is_said(module: Any, ids: Tensor, start: int) -> bool:
    """Whether each token from ``start`` is the likeliest where the model reads the whole text at once: with a cache
    some begin their positions anew at each call, unless ``generate`` tells them (Bamba)."""
    import torch

    with torch.no_grad():
        logits = module(input_ids=ids[:, :-1], use_cache=False).logits[:, start - 1 :].float()
    chosen = logits.gather(-1, ids[:, start:, None].to(logits.device))[..., 0]
    return bool((chosen >= logits.amax(-1) - _NEARLY_LIKELIEST * logits.std(-1)).all())


def texts_of(
    model: LoadedModel, input_ids: Tensor, tables: Mapping[str, NDArray[np.float64]], first_target: int,
    continuations: tuple[Tensor | None, Tensor], evaluation: EvaluationConfig,
) -> dict[str, Any]:  # fmt: skip
    """``continuations``: prompt, the reference's and the candidate's tokens; ``worst``: the tokens whose distribution
    changed most, with what stands before them and what either model holds to be likeliest there. All as text.

    ``tables`` has ``kld``, ``top_reference`` and ``top_candidate``, each (chunks, scored tokens).
    """
    tokenizer = model.parts["tokenizer"]

    def pieces(ids: Tensor) -> list[str]:
        return [str(tokenizer.decode([int(i)])) for i in ids]

    of_reference, of_candidate = continuations
    said = []
    if of_reference is not None:
        for prompt, ours, theirs in zip(prompts_of(input_ids, evaluation), of_reference, of_candidate, strict=False):
            text = str(tokenizer.decode([int(i) for i in prompt]))
            said.append({"prompt": text, "reference": pieces(ours), "candidate": pieces(theirs)})
    return {"continuations": said, "worst": _worst(tokenizer, input_ids, tables, first_target)}


def _worst(
    tokenizer: Any, input_ids: Tensor, tables: Mapping[str, NDArray[np.float64]], first_target: int
) -> list[dict[str, Any]]:
    import numpy as np

    kld = np.where(np.isfinite(tables["kld"]), tables["kld"], np.inf)
    order = np.argsort(-kld, axis=None, kind="stable")[:MAX_WORST]
    found = []
    for chunk, at in zip(*np.unravel_index(order, kld.shape), strict=True):
        ids, place = input_ids[int(chunk)], first_target + int(at)
        value = float(tables["kld"][chunk, at])
        if value <= 0 or not np.isfinite(value):
            continue
        found.append(
            {
                "window": int(chunk),
                "position": place,
                "before": str(tokenizer.decode([int(i) for i in ids[max(0, place - CONTEXT_TOKENS) : place]])),
                "token": str(tokenizer.decode([int(ids[place])])),
                "reference": str(tokenizer.decode([int(tables["top_reference"][chunk, at])])),
                "candidate": str(tokenizer.decode([int(tables["top_candidate"][chunk, at])])),
                "kld_nats": value,
            }
        )
    return found
