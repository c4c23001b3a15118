"""Whatever a model does to its logits: what is measured is a plain loop over the model's own logits."""

from __future__ import annotations

import copy
import dataclasses
import math
from types import MethodType

import numpy as np
import pytest
import torch
import transformers

from quantlab.errors import ModelError
from quantlab.modules.layers import linear_layers
from quantlab.protocols import language, output_head
from quantlab.protocols.language import text_inputs
from quantlab.vocabulary.schema import EvaluationConfig
from tests.support.tiny_text_models import TEXT, byte_tokenizer, load_llama, save_llama, with_noise

EVALUATION = EvaluationConfig(num_samples=4, batch_size=3, context_length=40, num_bootstrap=10)
SIZES = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.4,
    "max_position_embeddings": 128,
}
FAMILIES = {
    "Gemma2": {"final_logit_softcapping": 0.5},
    "RecurrentGemma": {"logits_soft_cap": 0.5, "lru_width": 32, "attention_window_size": 64},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 7.0},
    "Llama": {},
}


def saved_and_loaded(name, folder, dtype="float32"):
    torch.manual_seed(0)
    asked = {**SIZES, **FAMILIES[name]}
    if name == "RecurrentGemma":
        asked["num_hidden_layers"] = 3  # two recurrent blocks and one of attention
    config = getattr(transformers, f"{name}Config")(**asked)
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return load_llama(folder, folder, dtype=dtype)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return load_llama(save_llama(folder), folder)


def measured(candidate, model):
    inputs = text_inputs(TEXT, EVALUATION, model, "dataset=text")
    language.check(model, inputs)
    reference = language.observe(model, inputs, EVALUATION)
    return language.measure(candidate, inputs, EVALUATION, reference, model), inputs


def plain_loop(candidate, model, inputs):
    """Each number by chunk, of the models' own logits in float64."""
    with torch.no_grad():
        p, q = (
            m.components["model"](input_ids=inputs.input_ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)
            for m in (model, candidate)
        )
    targets = inputs.input_ids[:, 1:, None]
    nll_p, nll_q = (-x.gather(-1, targets)[..., 0] for x in (p, q))
    terms = torch.where(p.exp() > 0, p.exp() * (p - q), 0.0)
    means = {
        "kld_mean": terms.sum(-1).mean(1),
        "same_top1": (p.argmax(-1) == q.argmax(-1)).double().mean(1),
        "ln_ppl_ratio": (nll_q - nll_p).mean(1),
    }
    return {name: values.numpy() for name, values in means.items()}, math.exp(nll_q.mean()), math.exp(nll_p.mean())


def assert_is_the_plain_loop(candidate, model, way, rel=1e-4):
    found, inputs = measured(candidate, model)
    samples, ppl, ppl_ref = plain_loop(candidate, model, inputs)
    assert found.resolved == {"logits": way}
    for name, values in samples.items():
        np.testing.assert_allclose(found.samples[name], values, rtol=rel, atol=1e-6, err_msg=name)
    assert found.estimates["ppl"].value == pytest.approx(ppl, rel=rel)
    assert found.estimates["ppl_ref"].value == pytest.approx(ppl_ref, rel=rel)
    same = language.measure(model, inputs, EVALUATION, language.observe(model, inputs, EVALUATION), model)
    assert (same.samples["kld_mean"] == 0).all()
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_every_known_setting_is_the_plain_loop(name, tmp_path, monkeypatch):
    model = saved_and_loaded(name, tmp_path)
    found = assert_is_the_plain_loop(with_noise(model, 0.1), model, "head")
    assert found.samples["kld_mean"].min() > 0
    if name != "Llama":  # the setting matters here: a forgotten one would be seen
        monkeypatch.setattr(output_head, "LOGIT_SETTINGS", {})
        assert_is_the_plain_loop(with_noise(model, 0.1), model, "own")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_settings_are_known_in_16_bit_too(name, dtype, tmp_path, capsys):
    model = saved_and_loaded(name, tmp_path, dtype)
    inputs = text_inputs(TEXT, EVALUATION, model, "dataset=text")
    language.check(model, inputs)
    assert capsys.readouterr().err.count("logits=own") == 0


def changed_logits(model, change):
    """The model with a forward after which ``change(logits, ids)`` happens to its logits."""
    module = copy.deepcopy(model.components["model"])
    own = type(module).forward

    def forward(self, input_ids, **settings):
        out = own(self, input_ids, **settings)
        out.logits = change(out.logits, input_ids)
        return out

    module.forward = MethodType(forward, module)
    return model.with_components({"model": module})


def capped(cap):
    return lambda logits, ids: (logits / cap).tanh() * cap


def banned(logits, ids):
    return logits.index_fill(-1, torch.tensor([255, 256]), -math.inf)


def repetition_penalty(logits, ids):
    return logits - 2.0 * torch.nn.functional.one_hot(ids, logits.shape[-1]).to(logits)


def warmer_with_the_position(logits, ids):
    return logits * (1 + torch.arange(logits.shape[1])[:, None] / 50).to(logits)


CHANGES = {
    "capped a little": capped(30.0),
    "capped hard": capped(1.0),
    "banned tokens": banned,
    "by the token": repetition_penalty,
    "by the position": warmer_with_the_position,
    "a little": lambda logits, ids: logits * 1.003,
    "in place": lambda logits, ids: logits.mul_(0.5),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_not_known_is_taken_from_the_model_itself(change, llama, capsys):
    model = changed_logits(llama, change)
    candidate = changed_logits(with_noise(llama, 0.1), change)
    assert_is_the_plain_loop(candidate, model, "own")
    assert "logits=own" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["capped a little", "a little", "capped hard"])
def test_a_small_change_is_noticed_in_16_bit(change, tmp_path):
    """Rounding of 16-bit logits hides no change of them: the head's own result is compared, not one made again."""
    model = changed_logits(load_llama(save_llama(tmp_path), tmp_path, dtype="bfloat16"), CHANGES[change])
    found, inputs = measured(model, model)
    assert found.resolved == {"logits": "own"}
    assert found.estimates["ppl"].value == pytest.approx(plain_loop(model, model, inputs)[1], rel=1e-5)


def test_a_setting_that_the_model_does_not_read(llama):
    module = copy.deepcopy(llama.components["model"])
    module.config.logits_scaling = 8.0  # Llama's code has no such thing
    model = llama.with_components({"model": module})
    assert_is_the_plain_loop(with_noise(model, 0.1), model, "own")


def test_another_batch_size_is_seen_in_own_logits_too(llama):
    """A layer whose result depends on its batch: the hidden states that are scored are those of the batch that ran."""
    module = copy.deepcopy(changed_logits(llama, capped(1.0)).components["model"])
    layer = next(iter(linear_layers(module)))
    module.get_submodule(layer).register_forward_hook(lambda _m, _a, out: out * (1 + 0.05 * len(out)))
    model = llama.with_components({"model": module})
    inputs = text_inputs(TEXT, EVALUATION, model, "dataset=text")
    reference = language.observe(model, inputs, EVALUATION)
    found = [language.measure(model, inputs, EVALUATION, reference, model, batch_size=b) for b in (3, 1)]
    assert (found[0].samples["kld_mean"] == 0).all()
    assert (found[1].samples["kld_mean"][:3] > 1e-6).all()


def test_logits_that_are_random_are_refused(llama):
    model = changed_logits(llama, lambda logits, ids: logits + torch.randn_like(logits))
    inputs = text_inputs(TEXT, EVALUATION, model, "dataset=text")
    with pytest.raises(ModelError, match=r"^model.path: .* gives other logits for the same tokens.*another model$"):
        language.check(model, inputs)


def test_a_head_that_does_not_run_is_refused(llama):
    module = copy.deepcopy(llama.components["model"])

    def forward(self, input_ids, **settings):
        hidden = self.model(input_ids=input_ids).last_hidden_state
        return transformers.modeling_outputs.CausalLMOutput(logits=hidden @ self.lm_head.weight.T)

    module.forward = MethodType(forward, module)
    model = llama.with_components({"model": module})
    inputs = text_inputs(TEXT, EVALUATION, model, "dataset=text")
    with pytest.raises(ModelError, match="without running its output embedding"):
        language.check(model, inputs)


def test_a_head_that_waits_on_the_host_is_multiplied_where_the_model_runs(llama):
    """As with group offloading on a GPU: another device would sum in another order."""
    away = dataclasses.replace(llama, device="meta")
    hidden = torch.zeros(3, 32)
    assert output_head.logits_of(llama)(hidden).device.type == "cpu"
    assert output_head.logits_of(away)(hidden.to("meta")).device.type == "meta"


@pytest.mark.parametrize("bias", [False, True])
def test_a_large_head_is_widened_in_parts(llama, monkeypatch, bias):
    head = torch.nn.Linear(32, 259, bias=bias, dtype=torch.bfloat16)
    network = copy.deepcopy(llama.components["model"])
    network.set_output_embeddings(head)
    one = dataclasses.replace(llama, components={"model": network})
    hidden = torch.randn(5, 32)
    whole = output_head.logits_of(one)(hidden)
    monkeypatch.setattr(output_head, "_WEIGHTS_AT_ONCE", 32 * 50)
    torch.testing.assert_close(output_head.logits_of(one)(hidden), whole, rtol=0, atol=1e-6)
    expected = torch.nn.functional.linear(hidden, head.weight.float(), head.bias.float() if bias else None)
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-6)
