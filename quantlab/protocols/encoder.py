"""Text encoders: how far the embedding of a text, and the outputs of its tokens, move from the reference's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from quantlab.errors import ConfigError, ModelError, NotFinite, is_of_the_machine
from quantlab.metrics.output_error import output_cosine, output_rel_error
from quantlab.metrics.statistics import same_labels
from quantlab.models.loaded import LoadedModel
from quantlab.modules.calls import Call, Progress
from quantlab.modules.compute_dtype import component_dtype
from quantlab.modules.timing import Clock, ms_per_token
from quantlab.progress import say
from quantlab.protocols.defined import defined
from quantlab.protocols.finite import OVERFLOWS, bad_rows
from quantlab.protocols.tried import MAX_REL_DIFFERENCE, check_runs, check_tokens
from quantlab.vocabulary.reports import Measurements
from quantlab.vocabulary.schema import EvaluationConfig

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

HEADLINE = ("output_cosine", "output_rel_error")


@dataclass(frozen=True)
class EncoderInputs:
    """Tokenized texts, all padded to the longest, so that batches of any size see the same shapes."""

    input_ids: Tensor
    """int64 tensor (texts, length)."""
    attention_mask: Tensor
    """int64 tensor (texts, length): 1 for tokens, 0 for padding."""
    sample_ids: tuple[str, ...]
    sha256: str
    protocol: Mapping[str, Any]
    """``protocol, ctx, text_sha256, n_tokens``."""

    @property
    def num_samples(self) -> int:
        """Number of texts."""
        return len(self.sample_ids)

    def subset(self, indices: Sequence[int] | slice) -> EncoderInputs:
        """The texts with these numbers, in this order."""
        rows = list(range(self.num_samples)[indices] if isinstance(indices, slice) else map(int, indices))
        ids, mask = self.input_ids[rows], self.attention_mask[rows]
        return replace(
            self,
            input_ids=ids,
            attention_mask=mask,
            sample_ids=tuple(self.sample_ids[i] for i in rows),
            sha256=_inputs_sha256(ids, mask),
        )


def check_length(evaluation: EvaluationConfig, module: nn.Module) -> None:
    """ConfigError where the model's positions do not reach. The ``module`` needs no values."""
    length, config = evaluation.context_length, cast("PreTrainedModel", module).config
    longest = getattr(config, "max_position_embeddings", None)
    longest = longest if isinstance(longest, int) and longest > 0 else None  # XLNet's has no end: -1
    if length < 3 or (longest is not None and longest < length):
        to = "or more" if longest is None else f"to {longest}"
        raise ConfigError(f"evaluation.context_length={length}: the model takes 3 {to} tokens; set it to so many")


def encoder_inputs(texts: Sequence[str], evaluation: EvaluationConfig, model: LoadedModel, key: str) -> EncoderInputs:
    """``evaluation.num_samples`` of ``texts``, evenly spaced, cut at ``evaluation.context_length`` tokens.

    ``key`` is the data set as the user named it. ConfigError where there are fewer texts, or where the model's
    positions do not reach; ModelError for a tokenizer that cannot pad.
    """
    wanted, length = evaluation.num_samples, evaluation.context_length
    if wanted < 1:
        raise ConfigError(f"evaluation.num_samples={wanted}: at least one text is wanted")
    if len(texts) < wanted:
        raise ConfigError(
            f"{key}: there are {len(texts)} texts and not evaluation.num_samples={wanted}; "
            "give more texts or fewer samples"
        )
    check_length(evaluation, model.components["model"])
    tokenizer = model.parts["tokenizer"]
    if tokenizer.pad_token_id is None:
        raise ModelError(
            f"model.path: the tokenizer of {model.name} has no padding token, so texts of different "
            "length cannot be run together; use an encoder's tokenizer"
        )
    numbers = [i * len(texts) // wanted for i in range(wanted)]
    chosen = [texts[n] for n in numbers]
    found = tokenizer(chosen, padding=True, truncation=True, max_length=length, return_tensors="pt")
    ids, mask = found["input_ids"], found["attention_mask"]
    digest = hashlib.sha256("\0".join(chosen).encode("utf-8", "surrogatepass")).hexdigest()
    record = {"protocol": "encoder/v1", "ctx": length, "text_sha256": digest, "n_tokens": int(mask.sum())}
    return EncoderInputs(ids, mask, tuple(f"text {n}" for n in numbers), _inputs_sha256(ids, mask), record)


def _inputs_sha256(ids: Tensor, mask: Tensor) -> str:
    digest = hashlib.sha256(repr(tuple(ids.shape)).encode())
    digest.update(ids.numpy().tobytes())
    digest.update(mask.numpy().tobytes())
    return digest.hexdigest()


def check(model: LoadedModel, inputs: EncoderInputs) -> None:
    """ModelError for a model that cannot be run or measured, see :mod:`quantlab.protocols.tried`."""
    module: Any = model.components["model"]
    check_tokens(model, inputs.input_ids, module.get_input_embeddings)
    check_runs(model, lambda: _run(model, inputs.subset([0]), 1, None)[0])
    _tell_padding(model, inputs)


def _tell_padding(model: LoadedModel, inputs: EncoderInputs) -> None:
    """A word where the text with most padding gets another answer without it: some take no mask (FNet), or look past it
    (MobileBERT reads each token's neighbours). A text's numbers then depend on the texts beside it."""
    import torch

    shortest = int(inputs.attention_mask.sum(1).argmin())
    padded = inputs.subset([shortest])
    tokens = padded.attention_mask[0].bool()
    if bool(tokens.all()):
        return
    alone = replace(padded, input_ids=padded.input_ids[:, tokens], attention_mask=padded.attention_mask[:, tokens])
    try:
        ours, theirs = (_run(model, given, 1, None)[0]["tokens"][0] for given in (alone, padded))
        moved = float((theirs[tokens] - ours).norm() / ours.norm().clamp_min(1e-30))
    except (RuntimeError, ValueError, LookupError) as error:  # it takes certain lengths alone
        if is_of_the_machine(error):
            raise
        return
    dtype = component_dtype(model.components["model"], model.dtype)
    if moved > max(MAX_REL_DIFFERENCE, 8 * torch.finfo(dtype).eps):
        say(
            f"model.path: {model.name} answers a text otherwise when it is padded (relative difference {moved:.2g} for "
            f"{padded.sample_ids[0]}); here each is padded to {len(tokens)} tokens, so its numbers depend on the texts "
            "beside it: give texts of one length, or the module and an input for each text to quantlab.evaluate in "
            "Python",
            "warning",
        )


def observe(
    model: LoadedModel,
    inputs: EncoderInputs,
    evaluation: EvaluationConfig,
    progress: Progress | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """``tokens``: last hidden states, fp32 (texts, length, width), zero at padding; ``pooled``: their mean over a
    text's tokens (texts, width). Raises NotFinite naming the text where they are NaN or infinite."""
    return _run(model, inputs, batch_size or evaluation.batch_size, progress)[0]


def calls(
    model: LoadedModel,
    inputs: EncoderInputs,
    evaluation: EvaluationConfig,
    components: Sequence[str],
    progress: Progress | None = None,
) -> Iterator[tuple[str, Call]]:
    """The model's calls on the texts, ``evaluation.batch_size`` at once."""
    for start in range(0, inputs.num_samples, evaluation.batch_size):
        rows = slice(start, start + evaluation.batch_size)
        given = {"input_ids": inputs.input_ids[rows], "attention_mask": inputs.attention_mask[rows]}
        for name in components:
            yield name, {"args": [], "kwargs": given, "dtype": model.dtype, "step": 0}
        if progress:
            progress(min(rows.stop, inputs.num_samples), inputs.num_samples)


def measure(
    model: LoadedModel,
    inputs: EncoderInputs,
    evaluation: EvaluationConfig,
    reference: Mapping[str, Any],
    reference_model: LoadedModel,
    progress: Progress | None = None,
    batch_size: int | None = None,
) -> Measurements:
    """By text: ``output_cosine`` of the pooled embedding, ``output_rel_error`` of all token outputs."""
    found, ms = _run(model, inputs, batch_size or evaluation.batch_size, progress)
    metrics = {
        "output_cosine": lambda: output_cosine(found["pooled"], reference["pooled"]),
        "output_rel_error": lambda: output_rel_error(found["tokens"], reference["tokens"]),
    }
    undefined: dict[str, str] = {}
    return Measurements(
        samples=defined(metrics, undefined),
        clusters=same_labels([inputs.subset([i]).sha256 for i in range(inputs.num_samples)]),
        sample_ids=inputs.sample_ids,
        undefined=undefined,
        timings_ms={"prefill_ms_per_token": ms},
    )


def _run(
    model: LoadedModel, inputs: EncoderInputs, batch_size: int, progress: Progress | None
) -> tuple[dict[str, Tensor], float]:
    import torch

    module, pooled, tokens, shapes = model.components["model"], [], [], []
    clock = Clock(model.device)
    for start in range(0, inputs.num_samples, batch_size):
        ids = inputs.input_ids[start : start + batch_size].to(model.device)
        mask = inputs.attention_mask[start : start + batch_size].to(model.device)
        clock.start()
        with torch.no_grad():
            hidden = module(input_ids=ids, attention_mask=mask).last_hidden_state
        clock.stop()
        shapes.append(tuple(ids.shape))
        hidden = hidden.detach().float().masked_fill(mask[..., None] == 0, 0.0).cpu()
        if bad := bad_rows(hidden):
            text = inputs.sample_ids[start + bad[0]]
            raise NotFinite(
                f"quality/output_cosine: the output of {text} holds NaN or infinity; {OVERFLOWS}",
                f"the output of {text}",
            )
        tokens.append(hidden)
        pooled.append(hidden.sum(1) / mask.cpu().sum(1, keepdim=True).clamp_min(1))
        if progress:
            progress(min(start + batch_size, inputs.num_samples), inputs.num_samples)
    return {"pooled": torch.cat(pooled), "tokens": torch.cat(tokens)}, ms_per_token(shapes, clock)
