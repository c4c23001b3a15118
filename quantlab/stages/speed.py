"""Speed: how long a user waits, of one sample or sequence at a time, as a user makes it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantlab.models.loaded import LoadedModel
from quantlab.modules.device import kind_of
from quantlab.modules.timing import Clock
from quantlab.progress import say
from quantlab.protocols.diffusion_inputs import DiffusionInputs
from quantlab.protocols.language import TextInputs
from quantlab.vocabulary.schema import EvaluationConfig

if TYPE_CHECKING:
    from torch import Tensor

WARM_UP, REPEATS = 1, 5
"""Repetitions before it counts, in which kernels are chosen and compiled, and those that count."""
NEW_TOKENS = 32
"""Written after a prompt; the first belongs to the prompt."""

Tick = Callable[[int, int], Any]


def speed(model: LoadedModel, inputs: Any, evaluation: EvaluationConfig, tick: Tick | None = None) -> dict[str, float]:
    """``perf/...`` names without the prefix -> numbers, of :data:`REPEATS` repetitions after :data:`WARM_UP`.

    Language models, one window of ``evaluation.context_length`` tokens at a time by ``generate`` of transformers:
    ``time_to_first_token_ms``, ``prefill_tokens_per_s`` (the window's tokens over that time), ``decode_tokens_per_s``
    (the tokens after the first). Diffusion, one sample at a time from prompt to picture: ``sample_s`` (an image, video
    or sound) and ``step_ms``. Each is the median; with ``_p90`` the 90th percentile of the times, which is the rate
    that nine of ten repetitions reach. Nothing for models of other protocols, which is told.
    """
    if model.protocol not in _MEASURED:
        say(
            f"evaluation.speed=true: there is none for the protocol {model.protocol}; perf/evaluate_s is what there is",
            "warning",
        )
        return {}
    found: Mapping[str, float] = _MEASURED[model.protocol](
        model, inputs, evaluation, tick or (lambda done, total: None)
    )
    return {**found, "speed_warm_up": WARM_UP, "speed_repeats": REPEATS}


def median_and_p90(values: Sequence[float]) -> tuple[float, float]:
    """The median and the 90th percentile (linear interpolation) of one value or more."""
    if len(values) < 2:
        return values[0], values[0]
    return statistics.median(values), statistics.quantiles(values, n=10, method="inclusive")[-1]


class _Streamer:
    """Notes when tokens arrive; each is on the CPU by then."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None: ...


def _language(model: LoadedModel, inputs: TextInputs, evaluation: EvaluationConfig, tick: Tick) -> dict[str, float]:
    import torch

    network: Any = model.components["model"]
    longest = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    length = inputs.input_ids.shape[1]
    if isinstance(longest, int):
        length = max(1, min(length, longest - NEW_TOKENS))
    first, rest = [], []
    for i in range(WARM_UP + REPEATS):
        row = i % inputs.num_samples
        ids = inputs.input_ids[row : row + 1, :length].to(model.device)
        streamer = _Streamer()
        _wait(model.device)
        began = time.perf_counter()
        with torch.no_grad():
            network.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                num_beams=1,
                streamer=streamer,
            )
        arrived = streamer.times[1:]  # the prompt itself comes first
        if i >= WARM_UP:
            first.append(arrived[0] - began)
            rest.append((arrived[-1] - arrived[0]) / (len(arrived) - 1))
        tick(i + 1, WARM_UP + REPEATS)
    (ttft, ttft_p90), (token, token_p90) = median_and_p90(first), median_and_p90(rest)
    return {
        "time_to_first_token_ms": 1e3 * ttft,
        "time_to_first_token_ms_p90": 1e3 * ttft_p90,
        "prefill_tokens_per_s": length / ttft,
        "prefill_tokens_per_s_p90": length / ttft_p90,
        "decode_tokens_per_s": 1 / token,
        "decode_tokens_per_s_p90": 1 / token_p90,
    }


def _diffusion(
    model: LoadedModel, inputs: DiffusionInputs, evaluation: EvaluationConfig, tick: Tick
) -> dict[str, float]:
    assert model.sample is not None, "families of this protocol have a sampler"
    whole, steps = [], list[float]()
    for i in range(WARM_UP + REPEATS):
        part, clock = inputs.subset([i % inputs.num_samples]), Clock(model.device)

        def on_step(_k: int, _latents: Tensor, clock: Clock = clock) -> None:
            clock.stop()
            clock.start()

        _wait(model.device)
        began = time.perf_counter()
        clock.start()
        model.sample(model, part.noise, part.conditioning, evaluation, on_step)
        _wait(model.device)
        if i >= WARM_UP:
            whole.append(time.perf_counter() - began)
            spans = clock.seconds()
            steps += spans[1:] or spans  # what comes before the first, such as text encoders, is in its time
        tick(i + 1, WARM_UP + REPEATS)
    sample, sample_p90 = median_and_p90(whole)
    found = {"sample_s": sample, "sample_s_p90": sample_p90}
    if steps:
        step, step_p90 = median_and_p90(steps)
        found |= {"step_ms": 1e3 * step, "step_ms_p90": 1e3 * step_p90}
    return found


def _wait(device: str) -> None:
    import torch

    if kind_of(device) == "cuda":
        torch.cuda.synchronize(device)


_MEASURED: dict[str, Callable[..., Mapping[str, float]]] = {"language": _language, "diffusion": _diffusion}
