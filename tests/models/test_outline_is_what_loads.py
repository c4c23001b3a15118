"""What is planned is what is loaded: no head that is not measured, no half that is not read, no pooler that is not there."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantlab.errors import ModelError
from quantlab.models import causal_lm, diffusers_pipeline, encoder, seq2seq, vision
from quantlab.models.outlines import outline
from quantlab.models.sources import component_source
from quantlab.vocabulary.schema import ModelConfig
from tests.models.test_auto import BOTH, processor
from tests.models.test_whole_model import BERT, T5, VISION, saved
from tests.support.tiny_parts import seeded
from tests.support.tiny_text_models import save_llama
from tests.support.tiny_unets import _stable_diffusion

ROBERTA = {**BERT, "type_vocab_size": 1, "pad_token_id": 0}
CASES = {
    "BertForMaskedLM": ("encoder", "BertConfig", BERT),
    "BertForSequenceClassification": ("encoder", "BertConfig", BERT),
    "BertForTokenClassification": ("encoder", "BertConfig", BERT),
    "RobertaForMaskedLM": ("encoder", "RobertaConfig", ROBERTA),
    "BertModel": ("encoder", "BertConfig", BERT),
    "T5EncoderModel": ("encoder", "T5Config", T5),
    "CLIPModel": ("vision", "CLIPConfig", BOTH),
    "ViTForMaskedImageModeling": ("vision", "ViTConfig", VISION),
    "ViTForImageClassification": ("vision", "ViTConfig", VISION),
    "T5ForConditionalGeneration": ("seq2seq", "T5Config", T5),
}
LOAD = {"encoder": encoder.load, "vision": vision.load, "seq2seq": seq2seq.load}


@pytest.mark.parametrize("name", CASES)
def test_the_outline_has_the_parameters_that_are_loaded(name, tmp_path):
    family, config_name, sizes = CASES[name]
    folder = saved(tmp_path / "model", name, config_name, **sizes)
    if family == "vision":
        processor(folder, name)
    config = ModelConfig(family=family, path=str(folder))
    loaded = LOAD[family](config, "cpu", tmp_path).components["model"]
    planned = outline(config, "cpu", lambda _: None).components["model"]
    shapes = [{n: tuple(p.shape) for n, p in part.named_parameters()} for part in (planned, loaded)]
    assert shapes[0] == shapes[1]


GPTJ = {"vocab_size": 259, "n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 8, "n_positions": 64}
TIED = {**GPTJ, "tie_word_embeddings": True}
MIXTRAL = {**BERT, "num_key_value_heads": 2, "num_local_experts": 11, "num_experts_per_tok": 2}
MADE = {
    "positions that its class computes": ("causal_lm", "GPTJForCausalLM", "GPTJConfig", GPTJ),
    "parameters that its class makes in float32": (
        "encoder",
        "DebertaModel",
        "DebertaConfig",
        {**BERT, "relative_attention": True, "pos_att_type": ["c2p"]},
    ),
    "experts that lie in the files one by one": ("causal_lm", "MixtralForCausalLM", "MixtralConfig", MIXTRAL),
    "an output that has another name in the files": ("causal_lm", "GPTNeoXForCausalLM", "GPTNeoXConfig", BERT),
    "a model whose files are those of one with a head": ("encoder", "BertForMaskedLM", "BertConfig", BERT),
    "a head that is tied, and stored": ("causal_lm", "GPTJForCausalLM", "GPTJConfig", TIED),
    "a head that is tied by its configuration, and stored with other values": (
        "causal_lm",
        "GPTJForCausalLM",
        "GPTJConfig",
        TIED,
    ),
}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", MADE)
def test_what_is_streamed_is_what_is_loaded(name, dtype, tmp_path):
    """Each tensor to the bit, also where no file has it, and each in the dtype that loading gives it."""
    family, *made, sizes = MADE[name]
    folder = saved(tmp_path / "model", *made, **sizes)
    if name.startswith("a head"):
        file = folder / "model.safetensors"
        stored = load_file(file)
        head = stored["transformer.wte.weight"].clone()
        save_file({**stored, "lm_head.weight": head + head.std() if "other" in name else head}, file, {"format": "pt"})
    config = ModelConfig(family=family, path=str(folder), dtype=dtype)
    loaded = {"causal_lm": causal_lm.load, **LOAD}[family](config, "cpu", tmp_path).components["model"]
    planned = outline(config, "cpu", lambda _: None).components["model"]
    source = component_source("model", loaded, dtype, "cpu")
    source.fill_others(source.module, ())
    for kind in ("named_parameters", "named_buffers"):
        want, have, known = (dict(getattr(part, kind)()) for part in (loaded, source.module, planned))
        assert {n: t.dtype for n, t in known.items()} == {n: t.dtype for n, t in want.items()}
        assert [n for n in want if have[n].dtype != want[n].dtype or not torch.equal(have[n], want[n])] == []


def test_a_part_whose_class_is_a_pipelines_own(tmp_path):
    """Stable Diffusion's safety checker, LTX-2's connectors, Kolors' text encoder: at the top of neither library."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    made = seeded(5, StableDiffusionSafetyChecker, CLIPConfig(**BOTH))
    pictures = CLIPImageProcessor(size=30, crop_size=30)
    whole = tmp_path / "whole"
    _stable_diffusion("StableDiffusionPipeline", safety_checker=made, feature_extractor=pictures).save_pretrained(whole)
    config = ModelConfig(family="diffusers", path=str(whole))
    loaded = diffusers_pipeline.load(config, "cpu", tmp_path / "cache").parts["pipeline"].components["safety_checker"]
    planned = outline(config, "cpu", lambda _: None).components["safety_checker"]
    source = component_source("safety_checker", loaded, "float32", "cpu")
    source.fill_others(source.module, ())
    want, have, known = (dict(part.named_parameters()) for part in (loaded, source.module, planned))
    assert {n: p.shape for n, p in known.items()} == {n: p.shape for n, p in want.items()}
    assert [n for n in want if not torch.equal(have[n], want[n])] == []


def test_a_number_that_json_does_not_have(tmp_path):
    """transformers writes an infinite one as a mapping."""
    sizes = {"num_heads": 8, "head_dim": 8, "expand": 2, "state_size": 8, "n_groups": 1, "num_hidden_layers": 1}
    folder = saved(tmp_path / "model", "Mamba2ForCausalLM", "Mamba2Config", vocab_size=259, hidden_size=32, **sizes)
    assert "__float__" in (folder / "config.json").read_text()
    planned = outline(ModelConfig(family="causal_lm", path=str(folder)), "cpu", lambda _: None).components["model"]
    assert list(planned.config.time_step_limit) == [0.0, float("inf")]


def test_a_value_of_another_type_is_one_message(tmp_path):
    folder = save_llama(tmp_path / "model")
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "hidden_size": "many"}))
    asked = ModelConfig(family="causal_lm", path=str(folder))
    for look in (lambda: outline(asked, "cpu", lambda _: None), lambda: causal_lm.load(asked, "cpu", tmp_path)):
        with pytest.raises(ModelError, match=r"^model\.path=.*'hidden_size': TypeError: .* expected int.*; "):
            look()
