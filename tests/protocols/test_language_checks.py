"""Models whose numbers would mean nothing are refused before anything is measured, also where the cache is warm."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import MethodType

import pytest
import torch

from quantlab.errors import ModelError
from quantlab.models import causal_lm
from quantlab.modules.layers import changed_tensors
from quantlab.protocols import encoder, language, language_checks
from quantlab.protocols.encoder import encoder_inputs
from quantlab.protocols.language import text_inputs
from quantlab.protocols.language_checks import _run
from quantlab.vocabulary.schema import EvaluationConfig, ModelConfig
from tests.support.tiny_text_models import TEXT, byte_tokenizer, save_bert, save_llama

EVALUATION = EvaluationConfig(num_samples=2, batch_size=2, context_length=32)


def load(folder, cache, dtype="float32"):
    return causal_lm.load(ModelConfig(family="causal_lm", path=str(folder), dtype=dtype), "cpu", cache)


def check(model):
    language.check(model, text_inputs(TEXT, EVALUATION, model, "dataset=text"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def model(folder, tmp_path):
    return load(folder, tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_honest_model_passes(folder, tmp_path, dtype):
    check(load(folder, tmp_path, dtype))


def changed_by(model, change):
    """The model with a forward after which ``change(network)`` happens, as RWKV rescales its weights once."""
    module = copy.deepcopy(model.components["model"])
    own = type(module).forward

    def forward(self, *args, **kwargs):
        out = own(self, *args, **kwargs)
        with torch.no_grad():
            change(self)
        return out

    module.forward = MethodType(forward, module)
    return model.with_components({"model": module})


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.model.layers[0].mlp.down_proj.weight.mul_(0.5),
        lambda net: net.model.layers[1].mlp.down_proj.weight.data.add_(1e-3),
        lambda net: net.model.norm.weight.data.copy_(net.model.norm.weight * 2),
    ],
)
def test_a_model_that_changes_itself_when_it_runs_is_refused(model, change):
    with pytest.raises(ModelError, match=r"changes its own weights when it first runs \(model\.(layers\.|norm)"):
        check(changed_by(model, change))


def test_what_changes_is_told_by_name():
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    with changed_tensors(net) as changed:
        net(torch.randn(8, 4))
    assert {"1.running_mean", "1.running_var", "1.num_batches_tracked"} == set(changed)
    with changed_tensors(net) as changed:
        net.eval()(torch.randn(8, 4))
    assert changed == []


def test_an_encoder_is_not_scored_as_a_causal_model(tmp_path):
    from transformers import BertConfig, BertLMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    for is_decoder in (False, True):
        config = BertConfig(**sizes, num_attention_heads=2, is_decoder=is_decoder, initializer_range=0.3)
        saved = tmp_path / str(is_decoder)
        BertLMHeadModel(config).save_pretrained(saved)
        byte_tokenizer().save_pretrained(saved)
        model = load(saved, tmp_path)
        if is_decoder:
            check(model)
        else:
            with pytest.raises(ModelError, match=r"is no causal language model.*model=encoder"):
                check(model)


@pytest.mark.parametrize("length", [8, 512])
def test_what_sees_later_tokens_is_refused_however_many_there_are_and_however_little_it_heeds_them(tmp_path, length):
    from transformers import XLNetConfig, XLNetLMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 259, "d_model": 64, "d_inner": 128, "n_layer": 2, "n_head": 4, "pad_token_id": 0}
    XLNetLMHeadModel(XLNetConfig(**sizes)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model = load(tmp_path, tmp_path)
    inputs = text_inputs(TEXT, replace(EVALUATION, context_length=length), model, "dataset=text")
    with pytest.raises(ModelError, match=r"is no causal language model: other tokens at the end .*model=encoder"):
        language.check(model, inputs)


@pytest.mark.parametrize("tokens", [[5] * 16, [258] * 16, [258, *range(15)], [0, *[258] * 15], [7, 8]])
def test_every_token_of_the_second_half_is_exchanged_for_another_of_the_vocabulary(model, tokens, monkeypatch):
    seen = []

    def run(key, module, ids):
        seen.append(ids)
        return _run(key, module, ids)

    monkeypatch.setattr(language_checks, "_run", run)
    ids = torch.tensor([tokens])
    language_checks._check_causal("x", model.components["model"], ids)
    first, other = seen
    half = len(tokens) // 2
    assert torch.equal(first[:, :half], other[:, :half])
    assert (first[:, half:] != other[:, half:]).all()
    assert int(other.min()) >= 0
    assert int(other.max()) < 259


def test_tokens_beyond_the_embedding_are_refused_before_they_are_looked_up(tmp_path):
    model = load(save_llama(tmp_path / "small"), tmp_path)
    module = copy.deepcopy(model.components["model"])
    module.resize_token_embeddings(40)
    with pytest.raises(ModelError, match=r"has embeddings for 40 tokens, and its tokenizer gives the token"):
        check(model.with_components({"model": module}))


def test_a_model_that_reads_no_text_alone_is_refused_in_words(model):
    """As BLIP-2 and Kosmos-2, which want a picture with each text."""
    module = copy.deepcopy(model.components["model"])

    def forward(self, pixel_values, input_ids=None, use_cache=False):
        raise AssertionError("it is never called with a picture")

    module.forward = MethodType(forward, module)
    told = r"^model\.path: .*cannot be run on what models of the protocol language are given \(.*'pixel_values'\); "
    with pytest.raises(ModelError, match=told):
        check(model.with_components({"model": module}))


def test_an_encoder_that_changes_itself_is_refused(tmp_path):
    from quantlab.models import encoder as family

    save_bert(tmp_path / "bert")
    model = family.load(ModelConfig(family="encoder", path=str(tmp_path / "bert")), "cpu", tmp_path)
    inputs = encoder_inputs(["one text", "another"], EvaluationConfig(num_samples=2, context_length=16), model, "text")
    encoder.check(model, inputs)
    bad = changed_by(model, lambda net: net.embeddings.word_embeddings.weight.data.mul_(0.9))
    with pytest.raises(ModelError, match=r"changes its own weights .*word_embeddings"):
        encoder.check(bad, inputs)


def test_a_token_beyond_the_embedding_is_found_in_any_window(model):
    inputs = text_inputs(TEXT, EVALUATION, model, "dataset=text")
    inputs.input_ids[1, 5] = 10**6
    with pytest.raises(ModelError, match=r"^model.path: .* has embeddings for \d+ tokens, .* the token 1000000"):
        language.check(model, inputs)
