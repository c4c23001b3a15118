"""A checkpoint is loaded whole or not at all, whatever class it was saved from."""

import pytest
import torch

from quantlab.errors import ModelError
from quantlab.models import causal_lm, encoder
from quantlab.protocols import encoder as protocol
from quantlab.protocols.encoder import encoder_inputs
from quantlab.stages.evaluate import evaluate, summarize
from quantlab.vocabulary.schema import EvaluationConfig, ModelConfig
from tests.support.tiny_text_models import TEXT, byte_tokenizer

V = 259
BERT = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
T5 = {
    "vocab_size": V,
    "d_model": 32,
    "d_kv": 8,
    "num_heads": 4,
    "d_ff": 64,
    "num_layers": 2,
    "decoder_start_token_id": 0,
}
WHISPER = {
    "vocab_size": V,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_mel_bins": 16,
    "max_source_positions": 50,
    "max_target_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "begin_suppress_tokens": None,
    "init_std": 0.3,
}
CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def saved(folder, name, config_name, **config):
    import transformers

    torch.manual_seed(0)
    kind, made = getattr(transformers, name), getattr(transformers, config_name)(**config)
    kind(made).save_pretrained(folder)
    byte_tokenizer(max_length=128).save_pretrained(folder)
    return folder


ENCODERS = {
    "BertModel": ("BertConfig", BERT),
    "BertForMaskedLM": ("BertConfig", BERT),
    "RobertaForMaskedLM": ("RobertaConfig", {**BERT, "pad_token_id": 0, "max_position_embeddings": 130}),
    "AlbertForMaskedLM": ("AlbertConfig", {**BERT, "embedding_size": 16}),
    "DistilBertForSequenceClassification": (
        "DistilBertConfig",
        {"vocab_size": V, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
    ),
    "XLNetModel": ("XLNetConfig", {"vocab_size": V, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}),
    "T5EncoderModel": ("T5Config", T5),
    "CLIPTextModel": ("CLIPTextConfig", {**CLIP, "vocab_size": V, "max_position_embeddings": 77, "eos_token_id": 2}),
}
EVALUATION = EvaluationConfig(num_samples=4, batch_size=2, context_length=16, num_bootstrap=10)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_of_every_kind_of_folder_run(name, tmp_path):
    config_name, sizes = ENCODERS[name]
    folder = saved(tmp_path / "model", name, config_name, **sizes)
    model = encoder.load(ModelConfig(family="encoder", path=str(folder)), "cpu", tmp_path)
    inputs = encoder_inputs(TEXT.splitlines(), EVALUATION, model, "dataset=text")
    reference = protocol.observe(model, inputs, EVALUATION)
    measured = summarize(evaluate(model, model, reference, inputs, EVALUATION), EVALUATION)
    assert measured["output_rel_error"].value == 0
    assert not [n for n, _ in model.components["model"].named_parameters() if "pooler" in n and name != "BertModel"]


VISION = {**CLIP, "image_size": 32, "patch_size": 16}
DROPS = {
    "half of T5, as encoder": (encoder, "T5ForConditionalGeneration", "T5Config", T5, "an encoder is half of it"),
    "half of Whisper, as causal LM": (
        causal_lm,
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        WHISPER,
        "does not use 22 weights .*encoder.conv1",
    ),
    "images, as encoder": (encoder, "CLIPVisionModel", "CLIPVisionConfig", VISION, "takes pixel_values and no text"),
    "a head of labels, as causal LM": (
        causal_lm,
        "BertForSequenceClassification",
        "BertConfig",
        {**BERT, "is_decoder": True},
        "classifier|lacks",
    ),
}


@pytest.mark.parametrize("case", DROPS)
def test_what_a_class_would_drop_is_an_error_that_names_it(case, tmp_path):
    family, name, config_name, sizes, told = DROPS[case]
    folder = saved(tmp_path / "model", name, config_name, **sizes)
    with pytest.raises(ModelError, match=rf"^model.path={folder}: .*({told})"):
        family.load(ModelConfig(path=str(folder)), "cpu", tmp_path)
