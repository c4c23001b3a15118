"""Models that see and read are loaded as what they are; text alone is read, and what never runs is not quantized."""

import pytest
import torch

from quantlab.errors import ModelError
from quantlab.models import causal_lm, seq2seq
from quantlab.models.defaults import beside_the_language_model
from quantlab.models.outlines import outline
from quantlab.stages.quantize import quantize_component
from quantlab.stages.select import QuantizationRequest
from quantlab.vocabulary.axes import QuantizationAxes
from quantlab.vocabulary.schema import ModelConfig
from tests.support.tables import the_scheme
from tests.support.tiny_text_models import byte_tokenizer, save_llama

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 259,
    "max_position_embeddings": 4096,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SEEING = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
SEEING |= {"image_size": 28, "patch_size": 14}


def gemma3():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {**TEXT, "head_dim": 8, "sliding_window": 64}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=SEEING, mm_tokens_per_image=4))


def mistral3():
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    text = {**TEXT, "model_type": "mistral", "head_dim": 8}
    seeing = {**SEEING, "model_type": "pixtral", "head_dim": 8}
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=seeing))


def qwen2_vl():
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text = {**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}}
    seeing = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 14, "mlp_ratio": 2}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=seeing))


def mllama():
    """One of those of whose configuration AutoModelForCausalLM makes the language model alone, as Qwen 3.5's."""
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    own = {"vision_output_dim": 32, "intermediate_layers_indices": [0], "num_global_layers": 1, "max_num_tiles": 1}
    seeing = {**SEEING, **own, "attention_heads": 4, "supported_aspect_ratios": [[1, 1]]}
    text = {**TEXT, "cross_attention_layers": [1], "rope_scaling": {"rope_type": "default"}}
    return MllamaForConditionalGeneration(MllamaConfig(text_config=text, vision_config=seeing))


def voxtral():
    """It hears, and so is none of those that see."""
    from transformers import VoxtralConfig, VoxtralForConditionalGeneration

    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    hearing = {**sizes, "num_mel_bins": 16, "max_source_positions": 64}
    text = {**TEXT, "model_type": "llama", "head_dim": 8}
    return VoxtralForConditionalGeneration(VoxtralConfig(text_config=text, audio_config=hearing, audio_token_id=5))


BESIDE = {
    "gemma3": "vision_tower",
    "mistral3": "vision_tower",
    "qwen2_vl": "visual",
    "mllama": "vision_model",
    "voxtral": "audio_tower",
}
MAKERS = {"gemma3": gemma3, "mistral3": mistral3, "qwen2_vl": qwen2_vl, "mllama": mllama, "voxtral": voxtral}


@pytest.fixture(scope="module", params=MAKERS)
def checkpoint(request, tmp_path_factory):
    torch.manual_seed(0)
    model, folder = MAKERS[request.param]().eval(), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return request.param, model, folder


def loaded(folder, cache):
    return causal_lm.load(ModelConfig(family="causal_lm", path=str(folder)), "cpu", cache)


def test_it_is_loaded_as_what_it_is(checkpoint, tmp_path):
    _, model, folder = checkpoint
    found = loaded(folder, tmp_path)
    assert type(found.components["model"]) is type(model)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits
        assert torch.equal(found.components["model"](input_ids=ids, use_cache=False).logits, want)


def test_what_is_quantized_is_what_reads_text(checkpoint, tmp_path):
    name, _, folder = checkpoint
    found = loaded(folder, tmp_path)
    request = QuantizationRequest(
        component="model",
        scheme=the_scheme(QuantizationAxes(backend="torchao", dtype="int8")),
        compute_dtype="float32",
        device="cpu",
        default_exclusions=found.default_exclusions["model"],
    )
    quantized, report = quantize_component(request, found.copy_of("model"), found.components["model"])
    layers = {row.name: row.status for row in report.layers if row.kind == "linear"}
    seeing = {n: s for n, s in layers.items() if BESIDE[name] in n or "projector" in n}
    assert len(seeing) >= 5
    assert set(seeing.values()) == {"excluded"}
    assert {s for n, s in layers.items() if n not in seeing and n != "lm_head"} == {"quantized"}
    assert torch.isfinite(quantized(input_ids=torch.arange(3, 40)[None], use_cache=False).logits).all()


def test_of_one_that_reads_and_writes_what_sees_is_left_out_too(tmp_path):
    from transformers import T5Gemma2Config, T5Gemma2ForConditionalGeneration

    text = {**TEXT, "head_dim": 8, "sliding_window": 64}
    reading = {"text_config": text, "vision_config": SEEING, "mm_tokens_per_image": 4}
    made = T5Gemma2Config(encoder=reading, decoder=text, vocab_size=259)
    torch.manual_seed(0)
    T5Gemma2ForConditionalGeneration(made).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    config = ModelConfig(family="seq2seq", path=str(tmp_path / "model"))
    found = seq2seq.load(config, "cpu", tmp_path).default_exclusions
    seeing = ("model.encoder.vision_tower", "model.encoder.multi_modal_projector")
    assert found["model"] == ("lm_head.out_proj", *seeing)
    assert outline(config, "cpu", lambda _: None).default_exclusions == found


def test_nothing_is_beside_the_text_of_one_whose_halves_have_configurations_of_their_own():
    from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel, T5GemmaConfig
    from transformers import T5GemmaForConditionalGeneration as T5Gemma

    text = {**TEXT, "head_dim": 8}
    pair = T5Gemma(T5GemmaConfig(encoder=text, decoder=text, vocab_size=259))
    assert beside_the_language_model(pair) == []
    sizes = {"vocab_size": 259, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    halves = BertConfig(hidden_size=32, **sizes), BertConfig(hidden_size=64, **sizes)
    pair = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(*halves))
    assert "enc_to_dec_proj" in dict(pair.named_modules())
    assert beside_the_language_model(pair) == []


def test_a_tokenizer_that_knows_no_text_is_an_error(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = save_llama(tmp_path / "llama")
    empty = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), pad_token="<pad>", eos_token="</s>")
    empty.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"\(tokenizer\): it knows 2 tokens and none of text"):
        loaded(folder, tmp_path / "cache")


def test_a_folder_without_a_tokenizer_says_what_to_write_there(tmp_path):
    folder = save_llama(tmp_path / "llama")
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"\(tokenizer\): .*the folder has no file of one: write it there as well"):
        loaded(folder, tmp_path / "cache")


def test_a_model_of_text_alone_has_nothing_beside_it(tmp_path):
    folder = save_llama(tmp_path / "llama")
    assert loaded(folder, tmp_path / "cache").default_exclusions["model"] == ("lm_head",)


def test_a_plan_leaves_out_what_a_run_leaves_out(checkpoint, tmp_path):
    _, _, folder = checkpoint
    made = outline(ModelConfig(family="causal_lm", path=str(folder)), "cpu", lambda _: None)
    assert made.default_exclusions == loaded(folder, tmp_path).default_exclusions
