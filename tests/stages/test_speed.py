"""How long a user waits, of one sample at a time: what is timed, what it is called, and a candidate that is compiled."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from quantlab.models.loaded import LoadedModel, Sampled
from quantlab.protocols import language
from quantlab.protocols.diffusion_inputs import DiffusionInputs
from quantlab.protocols.language import text_inputs
from quantlab.stages import compiled as compiling
from quantlab.stages import speed as speeds
from quantlab.stages.compiled import MAX_COMPILED, CompileError, compiled, first_run
from quantlab.stages.speed import NEW_TOKENS, REPEATS, WARM_UP, median_and_p90, speed
from quantlab.vocabulary.numbers import flat_metrics
from quantlab.vocabulary.reports import RunReport
from quantlab.vocabulary.schema import EvaluationConfig
from tests.support.tiny_text_models import TEXT, load_llama, save_llama

QUICK = EvaluationConfig(num_samples=2, batch_size=2, context_length=40, num_bootstrap=20, num_inference_steps=3)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    root = tmp_path_factory.mktemp("llama")
    return load_llama(save_llama(root), root)


def test_a_percentile_of_five():
    assert median_and_p90([5.0, 1.0, 2.0, 3.0, 4.0]) == (3.0, pytest.approx(4.6))
    assert median_and_p90([2.0]) == (2.0, 2.0)
    assert REPEATS >= 5


class Watch:
    """A clock that a test moves."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


def test_tokens_of_a_language_model_are_counted_from_the_prompt(llama, monkeypatch):
    watch, calls, network = Watch(), [], llama.components["model"]
    monkeypatch.setattr(speeds, "time", watch)

    def generate(input_ids, attention_mask, max_new_tokens, streamer, **settings):
        calls.append((tuple(input_ids.shape), max_new_tokens, settings["do_sample"]))
        streamer.put(input_ids)
        watch.now += 0.5 * len(calls)  # slower each time
        for _ in range(max_new_tokens):
            streamer.put(torch.tensor([1]))
            watch.now += 0.25
        streamer.end()

    monkeypatch.setattr(network, "generate", generate, raising=False)
    found = speed(llama, text_inputs(TEXT, QUICK, llama, "dataset=text"), QUICK)
    assert calls == [((1, 40), NEW_TOKENS, False)] * (WARM_UP + REPEATS)
    assert found["time_to_first_token_ms"] == pytest.approx(2000.0)  # of 1, 1.5, 2, 2.5, 3 s; the first warms up
    assert found["time_to_first_token_ms_p90"] == pytest.approx(2800.0)
    assert found["prefill_tokens_per_s"] == pytest.approx(20.0)
    assert found["prefill_tokens_per_s_p90"] == pytest.approx(40 / 2.8)
    assert found["decode_tokens_per_s"] == found["decode_tokens_per_s_p90"] == pytest.approx(4.0)


def test_a_real_one_writes_that_many_tokens(llama):
    found = speed(llama, text_inputs(TEXT, QUICK, llama, "dataset=text"), QUICK)
    assert all(math.isfinite(value) and value > 0 for value in found.values())
    assert found["speed_repeats"] == REPEATS
    flat = flat_metrics(RunReport(name="a", status="FINISHED", speed=found))
    assert flat["perf/decode_tokens_per_s"] == found["decode_tokens_per_s"]


def test_an_image_is_timed_end_to_end_and_its_steps_without_the_first(monkeypatch):
    watch, asked = Watch(), []
    monkeypatch.setattr(speeds, "time", watch)
    monkeypatch.setattr("quantlab.modules.timing.time", watch)

    def sample(model, noise, conditioning, evaluation, on_step):
        asked.append((noise.tolist(), conditioning["prompt"]))
        watch.now += 10.0  # text encoders
        for k in range(evaluation.num_inference_steps):
            watch.now += 2.0
            on_step(k, noise)
        watch.now += 5.0  # the decoder
        return Sampled(latents=noise, media={})

    model = LoadedModel(name="fake", protocol="diffusion", components={}, sample=sample)
    inputs = DiffusionInputs(
        noise=torch.tensor([3, 4]), conditioning={"prompt": ["a", "b"]}, sample_ids=("prompt 0", "prompt 1")
    )
    found = speed(model, inputs, QUICK)
    assert asked[:3] == [([3], ["a"]), ([4], ["b"]), ([3], ["a"])]
    assert len(asked) == WARM_UP + REPEATS
    assert (found["sample_s"], found["sample_s_p90"]) == (21.0, 21.0)
    assert (found["step_ms"], found["step_ms_p90"]) == (2000.0, 2000.0)


def test_of_other_models_it_is_told_that_there_is_none(capsys):
    model = LoadedModel(name="fake", protocol="encoder", components={})
    assert speed(model, None, QUICK) == {}
    assert "evaluation.speed=true: there is none for the protocol encoder" in " ".join(capsys.readouterr().err.split())


# -- compiled


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x).relu()


class Uncompiled(Net):
    @torch._dynamo.disable
    def forward(self, x):
        return super().forward(x)


def model_of(net):
    return LoadedModel(name="net", protocol="module", components={"net": net})


def test_a_compiled_model_is_as_before_afterwards(monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    net, x = Net(), torch.ones(2, 4)
    with compiled(model_of(net)), first_run() as found:
        inside = net(x)
    assert torch.equal(inside, net(x))
    assert found == {"compiled_graphs": 1.0, "graph_breaks": 0.0}
    assert net._compiled_call_impl is None


def refuses(graph, inputs):
    raise RuntimeError("this backend knows no relu\nand much more")


@pytest.mark.parametrize(
    ("net", "backend", "told"),
    [
        (Net, refuses, r"^evaluation.compile=true: torch.compile failed with BackendCompilerFailed \(.*no relu"),
        (Uncompiled, "eager", "^evaluation.compile=true: torch.compile made no graph of the model"),
    ],
)
def test_what_cannot_be_compiled_says_why(monkeypatch, net, backend, told):
    monkeypatch.setattr(compiling, "BACKEND", backend)
    made = net()
    with pytest.raises(CompileError, match=told), compiled(model_of(made)), first_run():
        made(torch.ones(2, 4))
    assert made(torch.ones(2, 4)).shape == (2, 4)


@pytest.mark.slow
def test_what_torch_tells_those_who_develop_it_is_no_reason():
    import torch._inductor.config as inductor

    net, settings = Net(), {"force_disable_caches": True, "cpp.cxx": (None, "no-such-compiler")}
    told = pytest.raises(CompileError, match=r"No working C\+\+ compiler found")
    with inductor.patch(settings), told as caught, compiled(model_of(net)):
        net(torch.ones(2, 4))
    assert "TORCHDYNAMO_VERBOSE" in str(caught.value.__cause__), "which torch does tell"
    assert "TORCHDYNAMO" not in str(caught.value)


def test_a_model_is_compiled_for_each_way_in_which_it_is_measured(monkeypatch):
    """Batches, windows, prompts, single tokens, caches, and strides that the compiler chose: more than torch's eight."""
    monkeypatch.setattr(compiling, "BACKEND", "eager")

    class Ways(Net):
        def forward(self, x, **ways):
            return super().forward(x) + len(ways)

    net = Ways()
    with compiled(model_of(net)), first_run() as found:
        for number in range(12):
            net(torch.ones(2, 4), **dict.fromkeys("abcdefghijkl"[:number]))
    assert found["compiled_graphs"] == 12


@pytest.mark.slow
def test_a_function_that_is_compiled_too_often_is_no_compiled_one(monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "eager")

    class Counting(Net):
        def forward(self, x, by):
            return super().forward(x) * len(by.name)

    made = Counting()

    def called_often():
        with compiled(model_of(made)):
            for number in range(MAX_COMPILED + 8):
                made(torch.ones(2, 4), SimpleNamespace(name="x" * number))

    with compiled(model_of(made)):  # as often as a decorator that all parts of a broken graph have
        for number in range(40):
            made(torch.ones(2, 4), SimpleNamespace(name="x" * number))
    with pytest.raises(CompileError, match=rf"\(a function of it would be compiled more than {MAX_COMPILED} times\)"):
        called_often()


@pytest.mark.slow
def test_a_compiled_language_model_has_the_same_divergence(llama):
    inputs = text_inputs(TEXT, QUICK, llama, "dataset=text")
    reference = language.observe(llama, inputs, QUICK)
    with compiled(llama), first_run() as found:
        measured = language.measure(llama, inputs, QUICK, reference, llama)
        again = language.measure(llama, inputs, QUICK, reference, llama)
    assert found["compiled_graphs"] >= 1
    assert abs(measured.samples["kld_mean"]).max() < 1e-6
    assert abs(again.samples["kld_mean"]).max() < 1e-6
