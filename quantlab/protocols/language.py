"""Language models: divergence from the reference's next-token distributions on the same text, and perplexity.

The reference's last hidden states are stored, not its logits (31 times smaller for a vocabulary of 128k, and exact):
its logits are made anew, block by block, from its own output head in fp32. So are the candidate's; 16-bit logits would
inflate the divergence of a good model by a quarter. A model whose logits are not what its head makes has its own
forward make them, window by window (the parameter ``resolved.logits`` says ``head`` or ``own``, for reference, floors
and candidates alike). The unit of uncertainty is the chunk of text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from quantlab.errors import ConfigError, MetricUndefined, nearest
from quantlab.metrics.kl import kld_quantiles, token_statistics
from quantlab.metrics.perplexity import ln_ppl_ratio, perplexity
from quantlab.metrics.statistics import bootstrap_interval
from quantlab.models.causal_lm import network_of
from quantlab.models.loaded import LoadedModel
from quantlab.modules.calls import Call, Progress
from quantlab.modules.timing import Clock, ms_per_token
from quantlab.progress import say
from quantlab.protocols.continuations import continued, texts_of
from quantlab.protocols.defined import defined
from quantlab.protocols.finite import require_finite_rows
from quantlab.protocols.language_checks import check_language_model, way_of_logits
from quantlab.protocols.output_head import LogitsByParts, logits_by_parts
from quantlab.protocols.reference_logits import Distributed, reference_distributions
from quantlab.protocols.sections import sections
from quantlab.vocabulary.reports import Measurements, MetricValue
from quantlab.vocabulary.schema import EvaluationConfig

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

HEADLINE = ("kld_mean", "same_top1", "ppl")
TOKENS_AT_ONCE = 256
"""Positions whose logits exist at the same time, in fp32, for both models; a head's products are the same for 512."""


# -- what is scored


@dataclass(frozen=True)
class PerplexityProtocol:
    """How a text is cut into windows (disjoint, a last partial one dropped), and which positions count."""

    context_length: int | None
    """Tokens of a window; None: ``evaluation.context_length``."""
    bos: str
    """``prepend``: every window begins with what the tokenizer begins a text with; ``stream``: the text as a whole
    begins as the tokenizer begins it; ``replace``: it begins with BOS, which then also takes the place of every
    window's first token. Neither is added where the tokenizer itself begins no text with it, nor is it scored."""
    second_half_only: bool
    """Score the targets after the window's middle; else every target but the first token."""
    is_file_of_text: bool
    """True where ``</s>`` in the text is four characters and one line end at the text's end is left out; else special
    markers become what the tokenizer makes of them, which is their tokens."""
    source: str
    in_sections: bool = False
    """The windows begin where sections of the text do, as many as are asked for, and no more of it is tokenized. Where
    a section has too few tokens, and in other protocols, they are some of the windows of the whole text's tokens."""

    def first_target(self, context_length: int) -> int:
        """The first position whose token is predicted and scored."""
        return context_length // 2 + 1 if self.second_half_only else 1


PERPLEXITY_PROTOCOLS: dict[str, PerplexityProtocol] = {
    "ppl/v2": PerplexityProtocol(None, "prepend", False, False, "this project", in_sections=True),
    "ppl/v1": PerplexityProtocol(None, "prepend", False, False, "this project, until its version 2"),
    "ppl/gptq2048": PerplexityProtocol(2048, "stream", False, False, "GPTQ (arXiv 2210.17323) and AWQ, 2047 of 2048"),
    # llama-perplexity -f FILE: common/arg.cpp drops the last line end, common_tokenize leaves parse_special at false
    "ppl/llamacpp512": PerplexityProtocol(512, "replace", True, True, "llama.cpp's llama-perplexity, 255 of 512"),
}


@dataclass(frozen=True)
class TextInputs:
    """Windows of one text as token ids."""

    input_ids: Tensor
    """int64 tensor (chunks, context_length)."""
    sample_ids: tuple[str, ...]
    clusters: NDArray[np.int64]
    """int64 array (chunks,): the window's number in the text, or that of its section; of the first of equal ones."""
    sha256: str
    """Of the token ids and the protocol record."""
    protocol: Mapping[str, Any]
    """``protocol, ctx, stride, bos, text_sha256, n_tokens``: perplexities are comparable where all of it is equal."""
    first_target: int = 1

    @property
    def num_samples(self) -> int:
        """Number of chunks."""
        return len(self.sample_ids)

    def subset(self, indices: Sequence[int] | slice) -> TextInputs:
        """The chunks with these numbers, in this order."""
        rows = list(range(self.num_samples)[indices] if isinstance(indices, slice) else map(int, indices))
        chosen = self.input_ids[rows]
        return replace(
            self,
            input_ids=chosen,
            sample_ids=tuple(self.sample_ids[i] for i in rows),
            clusters=self.clusters[rows],
            sha256=_inputs_sha256(chosen, self.protocol),
        )


def text_inputs(text: str, evaluation: EvaluationConfig, model: LoadedModel, key: str) -> TextInputs:
    """``evaluation.num_samples`` windows, spread evenly over ``text``, as the named perplexity protocol cuts it.

    ``key`` is the data set as the user named it (``dataset.path=...``) and begins the message about a text that is too
    short. ConfigError for that, for an unknown protocol, and for a context that the model or the protocol cannot have.
    """
    import numpy as np
    import torch

    protocol, length = check_length(evaluation, model.components["model"])
    tokenizer = model.parts["tokenizer"]
    bos_id = _bos_id(tokenizer)
    prefix = _begins_with(tokenizer) if protocol.bos == "prepend" else []
    first_target = max(protocol.first_target(length), len(prefix))
    stride, wanted = length - len(prefix), evaluation.num_samples
    if wanted < 1:
        raise ConfigError(f"evaluation.num_samples={wanted}: at least one chunk of text is wanted")

    def tokens(part: str) -> list[int]:
        return _stream(part, evaluation, protocol, tokenizer)

    found = sections(text, wanted, stride, tokens) if protocol.in_sections else None
    if found is not None:
        numbers, windows = np.arange(wanted, dtype=np.int64), list(found.values())
        names = [f"window at {start}" for start in found]
    else:
        stream = tokens(text)
        num_windows = len(stream) // stride
        if num_windows < wanted:
            raise ConfigError(
                f"{key}: the text has {len(stream)} tokens, which is {num_windows} windows of {length} tokens and not "
                f"evaluation.num_samples={wanted}; give a longer text, fewer samples or a shorter context_length"
            )
        numbers = np.arange(wanted, dtype=np.int64) * num_windows // wanted
        windows, names = [stream[n * stride : (n + 1) * stride] for n in numbers], [f"window {n}" for n in numbers]
    firsts: dict[tuple[int, ...], int] = {}
    clusters = [firsts.setdefault(tuple(w), int(n)) for w, n in zip(windows, numbers, strict=True)]
    ids = torch.tensor([prefix + window for window in windows], dtype=torch.int64)
    if bos_id is not None and protocol.bos == "replace":
        ids[:, 0] = bos_id
    if not protocol.is_file_of_text:
        _tell_markers(text, ids[0, :2].tolist(), tokenizer, key)
    record = {
        "protocol": evaluation.perplexity_protocol,
        "ctx": length,
        "stride": stride,
        "bos": protocol.bos if prefix or bos_id is not None else "none",
        "text_sha256": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
        "n_tokens": wanted * (length - first_target),
    }
    return TextInputs(
        input_ids=ids,
        sample_ids=tuple(names),
        clusters=np.array(clusters, dtype=np.int64),
        sha256=_inputs_sha256(ids, record),
        protocol=record,
        first_target=first_target,
    )


def check_length(evaluation: EvaluationConfig, module: nn.Module) -> tuple[PerplexityProtocol, int]:
    """The protocol and the tokens of its windows; ConfigError where the model's positions do not reach.

    The ``module`` needs no values.
    """
    name = evaluation.perplexity_protocol
    if name not in PERPLEXITY_PROTOCOLS:
        raise ConfigError(
            f"evaluation.perplexity_protocol={name}: there are {', '.join(PERPLEXITY_PROTOCOLS)}"
            f"{nearest(name, PERPLEXITY_PROTOCOLS)}"
        )
    protocol = PERPLEXITY_PROTOCOLS[name]
    key = f"evaluation.context_length={evaluation.context_length}"
    if protocol.context_length is not None:
        key = f"evaluation.perplexity_protocol={name}"
    length = protocol.context_length or evaluation.context_length
    if length < 4:
        raise ConfigError(f"{key}: a window needs at least 4 tokens; 256 and more are usual")
    longest = getattr(network_of(module).config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < length:  # XLNet's has no end: -1
        free = "" if protocol.context_length is None else " with evaluation.perplexity_protocol=ppl/v2"
        raise ConfigError(
            f"{key}: the model takes at most {longest} tokens at once; use a shorter evaluation.context_length{free}"
        )
    return protocol, length


def _stream(
    text: str, evaluation: EvaluationConfig, protocol: PerplexityProtocol, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """The whole text as tokens, with BOS where the protocol wants it at the text's start."""
    if not protocol.is_file_of_text:
        plain: list[int] = tokenizer(text, add_special_tokens=protocol.bos == "stream", verbose=False)["input_ids"]
        return plain
    try:
        ids: list[int] = tokenizer(
            text.removesuffix("\n"), add_special_tokens=False, split_special_tokens=True, verbose=False
        )["input_ids"]
    except ValueError as error:
        raise ConfigError(
            f"evaluation.perplexity_protocol={evaluation.perplexity_protocol}: this tokenizer cannot read special "
            f"markers as text ({error}); use evaluation.perplexity_protocol=ppl/v2"
        ) from error
    bos_id = _bos_id(tokenizer)
    return ids if bos_id is None else [bos_id, *ids]


def _tell_markers(text: str, first: Sequence[int], tokenizer: PreTrainedTokenizerBase, key: str) -> None:
    """Say which special markers the text holds; ``first`` are the first two tokens of the first window."""
    found = {marker: num for marker in tokenizer.all_special_tokens if (num := text.count(marker))}
    if found:
        listed = ", ".join(f"{num} x {marker}" for marker, num in found.items())
        doubled = list(first) == [_bos_id(tokenizer)] * 2
        note = "; it begins with two start tokens, its own and the tokenizer's: take its own away" if doubled else ""
        say(
            f"{key}: special markers in the text are read as tokens ({listed}), by ppl/llamacpp512 as text{note}",
            "warning",
        )


def _begins_with(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts before a text: none, BOS, or several marks (GLM's ``[gMASK]<sop>``)."""
    whole: list[int] = tokenizer("a")["input_ids"]
    text: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    places = [i for i in range(len(whole)) if text and whole[i : i + len(text)] == text]
    bos_id = _bos_id(tokenizer)
    return whole[: places[0]] if places else [] if bos_id is None else [bos_id]


def _bos_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of BOS where the tokenizer itself begins a text with it; having a BOS token is not enough (SmolLM2)."""
    ids = tokenizer("a")["input_ids"]
    bos: int | None = tokenizer.bos_token_id
    return bos if bos is not None and ids and ids[0] == bos else None


def _inputs_sha256(ids: Tensor, record: Mapping[str, Any]) -> str:
    head = repr((tuple(ids.shape), sorted(record.items()))).encode()
    return hashlib.sha256(head + ids.numpy().tobytes()).hexdigest()


# -- running a model


def check(model: LoadedModel, inputs: TextInputs) -> None:
    """ModelError for a model whose numbers would mean nothing; see :func:`check_language_model`."""
    check_language_model(model, inputs.input_ids[:1], int(inputs.input_ids.max()))


def observe(
    model: LoadedModel,
    inputs: TextInputs,
    evaluation: EvaluationConfig,
    progress: Progress | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """``hidden``: fp32 tensor (chunks, context_length, width), what the output head is given at each position;
    ``logits``: how logits are to be made of it, see :mod:`quantlab.protocols.output_head`; ``continuations``: int64
    tensor (prompts, tokens), what the model says next.

    Raises MetricUndefined naming the chunk where a hidden state is NaN or infinite.
    """
    hidden, _ = _run(model, inputs, batch_size or evaluation.batch_size, progress)
    said = continued(model, inputs.input_ids, evaluation)
    return {"hidden": hidden, "logits": way_of_logits(model, inputs.input_ids[:1]), "continuations": said}


def calls(
    model: LoadedModel,
    inputs: TextInputs,
    evaluation: EvaluationConfig,
    components: Sequence[str],
    progress: Progress | None = None,
) -> Iterator[tuple[str, Call]]:
    """The model's calls on the windows, ``evaluation.batch_size`` at once."""
    dtype = model.dtype
    for start in range(0, inputs.num_samples, evaluation.batch_size):
        ids = inputs.input_ids[start : start + evaluation.batch_size]
        for name in components:
            yield name, {"args": [], "kwargs": {"input_ids": ids, "use_cache": False}, "dtype": dtype, "step": 0}
        if progress:
            progress(start + len(ids), inputs.num_samples)


def measure(
    model: LoadedModel,
    inputs: TextInputs,
    evaluation: EvaluationConfig,
    reference: Mapping[str, Any],
    reference_model: LoadedModel,
    progress: Progress | None = None,
    batch_size: int | None = None,
) -> Measurements:
    """The candidate's damage by chunk: ``kld_mean`` (nats a token, KL(reference || candidate)), ``same_top1``,
    ``ln_ppl_ratio`` (nats), ``delta_p_mean``; quantiles, perplexities and ``delta_p_rms`` as estimates.

    Reference against itself with one batch size gives 0 and 1 exactly. A number that is infinite (a token of
    probability 0) is undefined, by itself. Raises MetricUndefined naming the chunk whose logits are NaN or all of
    whose numbers are infinite.
    """
    hidden, ms = _run(model, inputs, batch_size or evaluation.batch_size, progress)
    way = reference["logits"]
    of_reference = reference_distributions(logits_by_parts(reference_model, way))
    tokens = _token_table(of_reference, logits_by_parts(model, way), reference["hidden"], hidden, inputs)
    said = reference.get("continuations"), continued(model, inputs.input_ids, evaluation)
    samples = {
        "kld_mean": tokens["kld"].mean(1),
        "same_top1": tokens["same_top1"].mean(1),
        "ln_ppl_ratio": ln_ppl_ratio(tokens["nll_candidate"], tokens["nll_reference"]).mean(1),
        "delta_p_mean": tokens["delta_p"].mean(1),
    }
    undefined: dict[str, str] = {}
    return Measurements(
        samples=samples,
        clusters=inputs.clusters,
        sample_ids=inputs.sample_ids,
        estimates=_estimates(tokens, inputs.clusters, evaluation, undefined),
        undefined=undefined,
        resolved={"logits": way},
        texts=texts_of(model, inputs.input_ids, tokens, inputs.first_target, said, evaluation),
        timings_ms={"prefill_ms_per_token": ms},
    )


def measure_logits(
    logits: Iterator[NDArray[np.float32]],
    inputs: TextInputs,
    evaluation: EvaluationConfig,
    reference: Mapping[str, Any],
    reference_model: LoadedModel,
) -> Measurements:
    """``kld_mean`` and ``ppl`` of each window's ``logits`` (tokens, vocabulary), made by another program, as of
    :func:`measure`. Raises MetricUndefined as that, and for another vocabulary."""
    import torch

    def given(_ids: Tensor, _hidden: Tensor, parts: Sequence[slice]) -> Iterator[Tensor]:
        window = torch.from_numpy(next(logits).copy())
        yield from (window[part] for part in parts)

    hidden = reference["hidden"]
    of_reference = reference_distributions(logits_by_parts(reference_model, reference["logits"]))
    tokens = _token_table(of_reference, given, hidden, hidden, inputs)
    undefined: dict[str, str] = {}
    estimates = _estimates(tokens, inputs.clusters, evaluation, undefined)
    return Measurements(
        samples={"kld_mean": tokens["kld"].mean(1)},
        clusters=inputs.clusters,
        sample_ids=inputs.sample_ids,
        estimates={"ppl": estimates["ppl"]} if "ppl" in estimates else {},
        undefined=undefined,
    )


def _run(model: LoadedModel, inputs: TextInputs, batch_size: int, progress: Progress | None) -> tuple[Tensor, float]:
    """Hidden states before the output head, fp32 on the CPU, and the typical time of a batch in ms a token.

    The hook passes only the last position on to the head: the logits of the others are made later, in fp32.
    """
    import torch

    module = network_of(model.components["model"])
    caught: list[Tensor] = []
    found: list[Tensor] = []
    shapes: list[tuple[int, ...]] = []
    clock = Clock(model.device)

    def catch(_head: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        caught.append(args[0].detach())
        return (args[0][:, -1:], *args[1:])

    hook = module.get_output_embeddings().register_forward_pre_hook(catch)
    try:
        for start in range(0, inputs.num_samples, batch_size):
            ids = inputs.input_ids[start : start + batch_size].to(model.device)
            clock.start()
            with torch.no_grad():
                module(input_ids=ids, use_cache=False)
            clock.stop()
            shapes.append(tuple(ids.shape))
            found.append(caught.pop().float().cpu())
            require_finite_rows(found[-1].flatten(1), inputs.sample_ids[start:], "last hidden state")
            if progress:
                progress(min(start + batch_size, inputs.num_samples), inputs.num_samples)
    finally:
        hook.remove()
    return torch.cat(found), ms_per_token(shapes, clock)


# -- from hidden states to logits


def _token_table(
    of_reference: Distributed, of_candidate: LogitsByParts, reference: Tensor, candidate: Tensor, inputs: TextInputs
) -> dict[str, NDArray[np.float64]]:
    """The statistics of every scored token: name -> float64 array (chunks, scored tokens of a chunk)."""
    import numpy as np

    if reference.shape[:2] != inputs.input_ids.shape:
        raise MetricUndefined(
            f"quality/kld_mean: the reference was observed on {tuple(reference.shape[:2])} tokens, "
            f"the inputs are {tuple(inputs.input_ids.shape)}; observe it on the same inputs"
        )
    length, first = inputs.input_ids.shape[1], inputs.first_target
    targets = [slice(start, min(start + TOKENS_AT_ONCE, length)) for start in range(first, length, TOKENS_AT_ONCE)]
    parts = [slice(part.start - 1, part.stop - 1) for part in targets]
    columns: dict[str, list[NDArray[np.float64]]] = {}
    refs = of_reference(reference, inputs, parts)
    for i, sample_id in enumerate(inputs.sample_ids):
        ids = inputs.input_ids[i]
        cands = of_candidate(ids, candidate[i], parts)
        for part in targets:
            ref = next(refs)
            cand = next(cands).to(ref.log_p.device)
            top = cand.max(-1)
            require_finite_rows(top.values.reshape(1, -1), [sample_id], "candidate's logits")
            for whose, likeliest in (("top_reference", ref.top1), ("top_candidate", top.indices)):
                columns.setdefault(whose, []).append(likeliest.double().cpu().numpy())
            for name, values in token_statistics(ref, cand, ids[part]).items():
                columns.setdefault(name, []).append(values)
            del ref, cand  # before the next ones are made
    return {name: np.concatenate(parts).reshape(inputs.num_samples, length - first) for name, parts in columns.items()}


def _estimates(
    tokens: Mapping[str, NDArray[np.float64]],
    clusters: NDArray[np.int64],
    evaluation: EvaluationConfig,
    undefined: MutableMapping[str, str],
) -> dict[str, MetricValue]:
    """The numbers that are not means over chunks, with intervals from resampled chunks; the ``undefined`` apart."""
    known: dict[bytes, dict[str, float]] = {}

    def quantiles(chunks: NDArray[np.int64]) -> dict[str, float]:
        key = chunks.tobytes()  # all quantiles see the same draws: each draw is sorted once
        if key not in known:
            known[key] = kld_quantiles(tokens["kld"][chunks].reshape(-1))
        return known[key]

    def quantile(name: str) -> Callable[[NDArray[np.int64]], float]:
        return lambda chunks: quantiles(chunks)[name]

    square = (tokens["delta_p"] ** 2).mean(1)
    nll = {"ppl": tokens["nll_candidate"].mean(1), "ppl_ref": tokens["nll_reference"].mean(1)}  # chunks of one length
    statistics: dict[str, Callable[[NDArray[np.int64]], float]] = {
        **{name: quantile(name) for name in ("kld_median", "kld_p90", "kld_p99", "kld_p999", "kld_max", "kld_min")},
        "ppl": lambda chunks: perplexity(nll["ppl"][chunks]),
        "ppl_ref": lambda chunks: perplexity(nll["ppl_ref"][chunks]),
        "delta_p_rms": lambda chunks: float(square[chunks].mean() ** 0.5),
    }
    num, drawn = len(square), (evaluation.num_bootstrap, evaluation.bootstrap_seed)

    def interval(statistic: Callable[[NDArray[np.int64]], float]) -> Callable[[], MetricValue]:
        return lambda: bootstrap_interval(statistic, num, clusters, None, *drawn)

    return defined({name: interval(statistic) for name, statistic in statistics.items()}, undefined)
