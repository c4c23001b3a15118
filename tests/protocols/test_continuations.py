"""What language models say beside one another: greedy continuations, and the tokens that changed most."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from quantlab.models.causal_lm import network_of
from quantlab.protocols import language
from quantlab.protocols.continuations import continued, prompts_of
from quantlab.protocols.language import text_inputs
from quantlab.vocabulary.schema import EvaluationConfig
from tests.support.tiny_text_models import TEXT, byte_tokenizer, load_llama, save_llama, with_noise

QUICK = EvaluationConfig(
    num_samples=4, batch_size=4, context_length=48, num_bootstrap=50, num_continuations=3, continuation_tokens=10
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_llama(save_llama(tmp_path_factory.mktemp("llama")), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def inputs(model):
    return text_inputs(TEXT, QUICK, model, "dataset=text")


def greedy(model, prompt, num):
    """The whole text anew for each token."""
    ids = prompt[None]
    with torch.no_grad():
        for _ in range(num):
            logits = network_of(model.components["model"])(input_ids=ids, use_cache=False).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids[0, len(prompt) :]


def test_a_continuation_is_the_greedy_one_with_or_without_a_cache(model, inputs, monkeypatch):
    found = continued(model, inputs.input_ids, QUICK)
    prompts = prompts_of(inputs.input_ids, QUICK)
    assert prompts.shape == (3, 24)
    for prompt, tokens in zip(prompts, found, strict=True):
        assert torch.equal(tokens, greedy(model, prompt, 10))
    module = network_of(model.components["model"])
    forward = module.forward

    def without_cache(**given):
        answer = forward(**{**given, "use_cache": False, "past_key_values": None})
        answer.past_key_values = None
        return answer

    monkeypatch.setattr(module, "forward", without_cache)
    assert torch.equal(continued(model, inputs.input_ids, QUICK), found)

    def cannot_make_one(**given):
        if given["use_cache"]:
            raise AttributeError("'BltConfig' object has no attribute 'num_hidden_layers'")
        return forward(**given)

    monkeypatch.setattr(module, "forward", cannot_make_one)
    assert torch.equal(continued(model, inputs.input_ids, QUICK), found)


def test_a_cache_that_forgets_where_it_is_is_not_believed(tmp_path, inputs):
    """Bamba's forward begins its positions anew at each call, unless it is told them; generate tells them."""
    from transformers import BambaConfig, BambaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    mamba = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}
    config = BambaConfig(
        vocab_size=259, num_hidden_layers=2, attn_layer_indices=[1], initializer_range=0.5, **sizes, **mamba
    )
    BambaForCausalLM(config).save_pretrained(tmp_path / "bamba")
    byte_tokenizer().save_pretrained(tmp_path / "bamba")
    model = load_llama(tmp_path / "bamba", tmp_path / "cache")
    found = continued(model, inputs.input_ids, QUICK)
    for prompt, tokens in zip(prompts_of(inputs.input_ids, QUICK), found, strict=True):
        assert torch.equal(tokens, greedy(model, prompt, 10))


@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({"num_continuations": 0}, (0, 0)),
        ({"num_continuations": 100}, (4, 10)),
        ({"continuation_tokens": 4000}, (3, 24)),  # prompt and continuation are a window together
    ],
)
def test_how_many_and_how_long(model, inputs, changes, shape):
    assert continued(model, inputs.input_ids, replace(QUICK, **changes)).shape == shape


def test_measured_texts_hold_both_sides_and_the_worst_tokens(model, inputs):
    reference = language.observe(model, inputs, QUICK)
    same = language.measure(model, inputs, QUICK, reference, model)
    assert all(c["reference"] == c["candidate"] for c in same.texts["continuations"])
    assert same.texts["worst"] == []
    found = language.measure(with_noise(model, 0.3), inputs, QUICK, reference, model)
    said = found.texts["continuations"]
    assert len(said) == 3
    assert TEXT.startswith(said[0]["prompt"])
    assert [len(c["candidate"]) for c in said] == [10] * 3
    worst = found.texts["worst"]
    assert 0 < len(worst) <= 12
    values = [w["kld_nats"] for w in worst]
    assert values == sorted(values, reverse=True)
    assert values[0] == pytest.approx(found.estimates["kld_max"].value)
    first = worst[0]
    ids = inputs.input_ids[first["window"]]
    assert model.parts["tokenizer"].decode([int(ids[first["position"]])]) == first["token"]
    assert first["before"] + first["token"] in model.parts["tokenizer"].decode(ids.tolist())
    assert np.isfinite(values).all()


def test_a_reference_from_before_has_no_side_to_show(model, inputs):
    old = {k: v for k, v in language.observe(model, inputs, QUICK).items() if k != "continuations"}
    found = language.measure(with_noise(model, 0.3), inputs, QUICK, old, model)
    assert found.texts["continuations"] == []
    assert found.texts["worst"]
