"""Models that read one sequence and write another: the decoder's next-token distributions on given pairs, by teacher
forcing, against the reference's, and perplexity. The unit of uncertainty is the pair; one that is there twice is one.

What the output head is given is stored of the reference, and its logits are made anew in fp32, as of language models
(:mod:`quantlab.protocols.language`); ``final_logits_bias`` (BART) is added.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from quantlab.errors import ModelError, NotFinite
from quantlab.metrics.kl import token_statistics
from quantlab.metrics.statistics import bootstrap_interval, same_labels
from quantlab.models.causal_lm import network_of
from quantlab.models.loaded import LoadedModel
from quantlab.modules.calls import Call, Progress
from quantlab.modules.compute_dtype import component_dtype
from quantlab.protocols.defined import defined
from quantlab.protocols.finite import OVERFLOWS, bad_rows
from quantlab.protocols.language_checks import LOG_PROB_ERROR, log_prob_error
from quantlab.protocols.output_head import logits_of
from quantlab.protocols.tried import check_runs, check_tokens
from quantlab.vocabulary.reports import Measurements
from quantlab.vocabulary.schema import EvaluationConfig

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

HEADLINE = ("kld_mean", "same_top1", "ppl")


@dataclass(frozen=True, eq=False)
class PairInputs:
    """What is read and what is written, all padded to the longest, so that batches of any size see the same shapes."""

    source: Mapping[str, Tensor]
    """``input_ids`` (int64) and ``attention_mask``; or sound, ``input_features`` or ``input_values`` (fp32), with its
    mask where the model's extractor makes one: (pairs, ...)."""
    decoder_input_ids: Tensor
    """int64 (pairs, length): what the decoder has read before it writes each token."""
    targets: Tensor
    """int64 (pairs, length): the tokens that it should write; -100 behind their end."""
    sample_ids: tuple[str, ...]
    protocol: Mapping[str, Any]
    """``protocol, ctx, text_sha256, n_tokens``."""

    @property
    def num_samples(self) -> int:
        """Number of pairs."""
        return len(self.sample_ids)

    @property
    def input_ids(self) -> Tensor:
        """The tokens of a pair that calibration and evaluation may not share."""
        return self.targets.clamp_min(0)

    @property
    def sha256(self) -> str:
        """Digest of all tensors."""
        digest = hashlib.sha256()
        for name, tensor in sorted({**self.source, "in": self.decoder_input_ids, "out": self.targets}.items()):
            digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def subset(self, indices: Sequence[int] | slice) -> PairInputs:
        """The pairs with these numbers, in this order."""
        rows = list(range(self.num_samples)[indices] if isinstance(indices, slice) else map(int, indices))
        return replace(
            self,
            source={name: tensor[rows] for name, tensor in self.source.items()},
            decoder_input_ids=self.decoder_input_ids[rows],
            targets=self.targets[rows],
            sample_ids=tuple(self.sample_ids[i] for i in rows),
        )


def check(model: LoadedModel, inputs: PairInputs) -> None:
    """ModelError for a model that cannot be run or measured, see :mod:`quantlab.protocols.tried`."""
    network = network_of(model.components["model"])
    check_tokens(model, inputs.source.get("input_ids", inputs.input_ids), network.get_input_embeddings)
    check_tokens(model, inputs.input_ids, network.get_output_embeddings)
    one = inputs.subset([0])

    def run() -> dict[str, Tensor]:
        hidden = _run(model, one, 1, None)[0]
        return {"hidden": hidden, "logits": _logits(model)(hidden[0])}

    check_runs(model, run)
    _check_logits(model, one, run()["logits"])


def _check_logits(model: LoadedModel, one: PairInputs, ours: Tensor) -> None:
    """ModelError where the model's own logits on one pair are not what its head makes of its last hidden states."""
    import torch

    module: Any = model.components["model"]
    with torch.no_grad():
        logits = module(**_arguments(model, one, slice(0, 1), model.device)).logits[0]
    rounding = 4 * torch.finfo(logits.dtype).eps * float(logits.float().abs().max())
    if (error := log_prob_error(logits, ours)) > LOG_PROB_ERROR + rounding:
        raise ModelError(
            f"model.path: {model.name} changes its logits after its output head in a way that is not known here (a "
            f"log-probability differs by {error:.2g} nats); give the module and its inputs to quantlab.evaluate"
        )


def observe(
    model: LoadedModel,
    inputs: PairInputs,
    evaluation: EvaluationConfig,
    progress: Progress | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """``hidden``: fp32 (pairs, length, width), what the output head is given at each position of the decoder."""
    return {"hidden": _run(model, inputs, batch_size or evaluation.batch_size, progress)[0]}


def calls(
    model: LoadedModel,
    inputs: PairInputs,
    evaluation: EvaluationConfig,
    components: Sequence[str],
    progress: Progress | None = None,
) -> Iterator[tuple[str, Call]]:
    """The model's calls on the pairs, ``evaluation.batch_size`` at once."""
    for start in range(0, inputs.num_samples, evaluation.batch_size):
        given = _arguments(model, inputs, slice(start, start + evaluation.batch_size), "cpu")
        for name in components:
            yield name, {"args": [], "kwargs": given, "dtype": model.dtype, "step": 0}
        if progress:
            progress(min(start + evaluation.batch_size, inputs.num_samples), inputs.num_samples)


def measure(
    model: LoadedModel,
    inputs: PairInputs,
    evaluation: EvaluationConfig,
    reference: Mapping[str, Any],
    reference_model: LoadedModel,
    progress: Progress | None = None,
    batch_size: int | None = None,
) -> Measurements:
    """By pair, means over its tokens: ``kld_mean`` (nats a token, KL(reference || candidate)), ``same_top1``,
    ``ln_ppl_ratio`` (nats), ``delta_p_mean``; ``ppl`` and ``ppl_ref`` over all tokens as estimates."""
    import numpy as np

    hidden, ms_per_token = _run(model, inputs, batch_size or evaluation.batch_size, progress)
    heads = _logits(reference_model), _logits(model)
    tokens = []
    for i in range(inputs.num_samples):
        length = int((inputs.targets[i] >= 0).sum())
        ref, cand = heads[0](reference["hidden"][i, :length]), heads[1](hidden[i, :length])
        tokens.append(token_statistics(ref, cand.to(ref.device), inputs.targets[i, :length]))
    by_pair = {name: np.array([t[name].mean() for t in tokens]) for name in tokens[0]}
    lengths = np.array([len(t["kld"]) for t in tokens])
    undefined: dict[str, str] = {}

    def perplexity(nll: NDArray[np.float64]) -> Callable[[NDArray[np.int64]], float]:
        return lambda rows: float(np.exp((nll[rows] * lengths[rows]).sum() / lengths[rows].sum()))

    drawn = (evaluation.num_bootstrap, evaluation.bootstrap_seed)
    num = len(lengths)
    clusters = same_labels([inputs.subset([i]).sha256 for i in range(num)])
    ppl, ppl_ref = perplexity(by_pair["nll_candidate"]), perplexity(by_pair["nll_reference"])
    estimates = {
        "ppl": lambda: bootstrap_interval(ppl, num, clusters, None, *drawn),
        "ppl_ref": lambda: bootstrap_interval(ppl_ref, num, clusters, None, *drawn),
    }
    return Measurements(
        samples={
            "kld_mean": by_pair["kld"],
            "same_top1": by_pair["same_top1"],
            "ln_ppl_ratio": by_pair["nll_candidate"] - by_pair["nll_reference"],
            "delta_p_mean": by_pair["delta_p"],
        },
        clusters=clusters,
        sample_ids=inputs.sample_ids,
        estimates=defined(estimates, undefined),
        undefined=undefined,
        timings_ms={"prefill_ms_per_token": ms_per_token},
    )


def _logits(model: LoadedModel) -> Callable[[Tensor], Tensor]:
    head, bias = logits_of(model), getattr(model.components["model"], "final_logits_bias", None)
    if bias is None:
        return head
    return lambda hidden: (out := head(hidden)) + bias.detach().float().to(out.device)


def _arguments(model: LoadedModel, inputs: PairInputs, rows: slice, device: str) -> dict[str, Any]:
    given = {**inputs.source, "decoder_input_ids": inputs.decoder_input_ids}
    dtype = component_dtype(model.components["model"], model.dtype)
    found: dict[str, Any] = {
        name: tensor[rows].to(device=device, dtype=dtype if tensor.is_floating_point() else None)
        for name, tensor in given.items()
    }
    return {**found, "use_cache": False}


def _run(model: LoadedModel, inputs: PairInputs, batch_size: int, progress: Progress | None) -> tuple[Tensor, float]:
    """What the head is given, fp32 on the CPU (pairs, length, width), and ms a token of a batch."""
    import torch

    module: Any = model.components["model"]
    caught: list[Tensor] = []
    found, times = [], []
    hook = (
        network_of(module)
        .get_output_embeddings()
        .register_forward_pre_hook(lambda _head, args: caught.append(args[0].detach()))
    )
    try:
        for start in range(0, inputs.num_samples, batch_size):
            given = _arguments(model, inputs, slice(start, start + batch_size), model.device)
            began = time.perf_counter()
            with torch.no_grad():
                module(**given)
            if str(model.device).startswith("cuda"):
                torch.cuda.synchronize(model.device)
            times.append((time.perf_counter() - began) * 1000 / given["decoder_input_ids"].numel())
            found.append(caught.pop().float().cpu())
            if bad := bad_rows(found[-1].flatten(1)):
                which = f"the last hidden state of {inputs.sample_ids[start + bad[0]]}"
                raise NotFinite(f"quality/kld_mean: {which} holds NaN or infinity; {OVERFLOWS}", which)
            if progress:
                progress(min(start + batch_size, inputs.num_samples), inputs.num_samples)
    finally:
        hook.remove()
    return torch.cat(found), statistics.median(times[1:] or times)  # the first batch warms up
