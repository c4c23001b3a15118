"""Models of transformers that cannot be measured are refused by what they do on one sample, not by their names."""

from __future__ import annotations

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from scipy.io import wavfile

import quantlab
from quantlab.datasets import images, pairs, text
from quantlab.errors import ModelError
from quantlab.models import encoder, seq2seq, vision
from quantlab.models.auto import another_family
from quantlab.models.loaded import LoadedModel
from quantlab.protocols import encoder as encoder_protocol
from quantlab.protocols import seq2seq as seq2seq_protocol
from quantlab.protocols import vision as vision_protocol
from quantlab.protocols.tried import check_repeats, check_runs
from quantlab.protocols.unchanged import same_memory
from quantlab.stages.reads import weights_read
from quantlab.vocabulary.schema import DatasetConfig, EvaluationConfig, ModelConfig
from tests.support.tiny_families import write_pictures
from tests.support.tiny_text_models import TEXT, byte_tokenizer

TWO = EvaluationConfig(num_samples=2, context_length=48)
SEEING = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
SEEING |= {"image_size": 32, "patch_size": 8}
READING = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
HALF = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
HALF |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64, **IDS}


def of_pictures(folder, made):
    from transformers import ViTImageProcessor

    made.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    model = vision.load(ModelConfig(family="vision", path=str(folder)), "cpu", folder)
    pictures = write_pictures(folder / "pictures", mask=False)
    return model, images.load(DatasetConfig(name="images", path=str(pictures)), TWO, model)


def of_text(folder, made):
    made.save_pretrained(folder)
    byte_tokenizer(max_length=64).save_pretrained(folder)
    (folder / "t.txt").write_text(TEXT)
    model = encoder.load(ModelConfig(family="encoder", path=str(folder)), "cpu", folder)
    return model, text.load(DatasetConfig(name="text", path=str(folder / "t.txt")), TWO, model)


def of_pairs(folder, made):
    made.save_pretrained(folder)
    byte_tokenizer(max_length=64).save_pretrained(folder)
    rows = [{"source": f"Number {i} is seven.", "target": f"Zahl {i} ist sieben."} for i in range(4)]
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = seq2seq.load(ModelConfig(family="seq2seq", path=str(folder)), "cpu", folder)
    return model, pairs.load(DatasetConfig(name="pairs", path=str(folder / "p.jsonl")), TWO, model)


def test_what_draws_at_random_is_refused_and_what_draws_nothing_is_measured(tmp_path):
    from transformers import ViTConfig, ViTMAEConfig, ViTMAEModel, ViTModel

    torch.manual_seed(0)
    with pytest.raises(ModelError, match=r"^model\.path: drawing answers one sample in two ways .*switch that off"):
        vision_protocol.check(*of_pictures(tmp_path / "drawing", ViTMAEModel(ViTMAEConfig(**SEEING))))
    vision_protocol.check(*of_pictures(tmp_path / "plain", ViTModel(ViTConfig(**SEEING))))


def test_what_a_model_made_of_its_weights_as_it_ran_is_not_a_candidates(tmp_path):
    """LeViT keeps the biases of its attention: those of the reference hid what a scheme did to a candidate's."""
    from transformers import LevitConfig, LevitForImageClassification

    torch.manual_seed(0)
    sizes = {"hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1], "image_size": 32}
    made = LevitForImageClassification(LevitConfig(**sizes, key_dim=[8, 8, 8]))
    model, inputs = of_pictures(tmp_path / "levit", made)
    vision_protocol.check(model, inputs)
    reference = vision_protocol.observe(model, inputs, TWO)
    weights_read(model, inputs, TWO, ["model"])
    module = model.copy_of("model")
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("attention_biases"):
                parameter.normal_()
    found = vision_protocol.measure(model.with_components({"model": module}), inputs, TWO, reference, model)
    assert found.samples["output_rel_error"].min() > 0


def test_what_a_model_records_of_its_layers_is_recorded_once_after_it_was_tried():
    """transformers hangs its hooks at the first call, and notes that it has."""
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    module, x = ViTModel(ViTConfig(**sizes, image_size=32)).eval(), torch.zeros(1, 3, 32, 32)
    with torch.no_grad(), same_memory(module):
        first = module(x, output_hidden_states=True).hidden_states
    with torch.no_grad():
        assert len(module(x, output_hidden_states=True).hidden_states) == len(first) == 3


class Noisy(torch.nn.Module):
    def __init__(self, size):
        super().__init__()
        self.inner, self.size = torch.nn.Linear(64, 64), size

    def forward(self, x):
        return self.inner(x) + self.size * torch.randn(64)


@pytest.mark.parametrize(("size", "is_refused"), [(0.1, True), (1e-7, False), (0.0, False)])
def test_a_module_that_draws_is_refused_and_one_that_adds_in_any_order_is_not(size, is_refused):
    ask = pytest.raises(ModelError, match=r"^module: answers one sample in two ways") if is_refused else nullcontext()
    with ask:
        quantlab.evaluate(Noisy(size), [quantlab.QuantoConfig("int8")], inputs=[torch.randn(2, 64)])


def test_what_takes_more_than_it_is_given_is_refused_with_what_it_says(tmp_path):
    from transformers import CLIPConfig, CLIPModel, TimesformerConfig, TimesformerModel

    torch.manual_seed(0)
    words = {**READING, "vocab_size": 259, "max_position_embeddings": 64, **IDS}
    both = CLIPModel(CLIPConfig(text_config=words, vision_config=SEEING, projection_dim=16))
    told = r"^model\.path: \w+ of {} cannot be run on what .* protocol {} .*; choose another model\.family, or give"
    with pytest.raises(ModelError, match=told.format("both", "encoder")):
        encoder_protocol.check(*of_text(tmp_path / "both", both))
    films = TimesformerModel(TimesformerConfig(**SEEING, num_frames=2))
    with pytest.raises(ModelError, match=told.format("films", "vision")):
        vision_protocol.check(*of_pictures(tmp_path / "films", films))


def test_tokens_beyond_the_embeddings_are_named(tmp_path):
    from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertModel

    told = r"^model\.path: small has embeddings for 100 tokens, and its tokenizer gives the token \d+; use the"
    small = BertModel(BertConfig(**READING, vocab_size=100, max_position_embeddings=64))
    with pytest.raises(ModelError, match=told):
        encoder_protocol.check(*of_text(tmp_path / "a" / "small", small))
    writes = BartForConditionalGeneration(BartConfig(**HALF, vocab_size=100, decoder_start_token_id=2))
    with pytest.raises(ModelError, match=told):
        seq2seq_protocol.check(*of_pairs(tmp_path / "b" / "small", writes))


def test_a_decoder_begins_with_the_token_that_its_class_begins_with(tmp_path):
    from transformers import T5GemmaConfig, T5GemmaForConditionalGeneration

    torch.manual_seed(0)
    half = {**READING, "vocab_size": 259, "head_dim": 16, "num_key_value_heads": 1, "max_position_embeddings": 64}
    half |= {"layer_types": ["full_attention"], **IDS}
    whole = T5GemmaForConditionalGeneration(T5GemmaConfig(encoder=half, decoder={**half, "is_decoder": True}, **IDS))
    model, inputs = of_pairs(tmp_path / "t5gemma", whole)
    asked = model.components["model"].prepare_decoder_input_ids_from_labels(inputs.targets)
    assert torch.equal(torch.where(inputs.targets >= 0, inputs.decoder_input_ids, asked), asked)
    seq2seq_protocol.check(model, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "is_refused"), [(1.0, False), (1.5, True)])
def test_logits_that_a_class_changes_behind_its_head_are_no_numbers_of_ours(tmp_path, dtype, scale, is_refused):
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    config = BartConfig(**HALF, vocab_size=259, decoder_start_token_id=2, init_std=0.3)
    model, inputs = of_pairs(tmp_path / "bart", BartForConditionalGeneration(config).to(dtype))
    forward = model.components["model"].forward

    def scaled(**given):
        out = forward(**given)
        out.logits = out.logits * scale
        return out

    model.components["model"].forward = scaled
    told = r"^model\.path: bart changes its logits after its output head in a way .* nats\); give the module"
    with pytest.raises(ModelError, match=told) if is_refused else nullcontext():
        seq2seq_protocol.check(model, inputs)


def test_errors_of_our_own_and_of_memory_stay_what_they_are():
    model = LoadedModel(name="a", protocol="vision", components={"model": torch.nn.Linear(2, 2)}, parts={})
    of_cublas = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when it is full")
    for error in (ModelError("model.path: as it is; do so"), torch.OutOfMemoryError("full"), of_cublas):

        def run(error=error):
            raise error

        with pytest.raises(type(error), match="as it is|full"):
            check_runs(model, run)


@pytest.mark.parametrize("again", [{"a": torch.zeros(2)}, {"a": torch.zeros(3, 2)}, {}])
def test_outputs_that_come_and_go_are_two_answers(again):
    with pytest.raises(ModelError, match=r"^module: answers one sample in two ways \(outputs of another shape\)"):
        check_repeats("module:", {"a": torch.zeros(3)}, again)


@pytest.mark.parametrize(
    ("name", "family", "told"),
    [
        ("Wav2Vec2ForCTC", "encoder", "no other family does; give the module"),
        ("DetrForObjectDetection", "vision", "no other family does; give the module"),
        ("PerceiverForMaskedLM", "encoder", "no other family does; give the module"),
        ("BertForMaskedLM", "causal_lm", "model.family=encoder loads"),
        ("LlamaForCausalLM", "encoder", "model.family=causal_lm loads"),
    ],
)
def test_no_family_is_named_that_would_refuse_it_as_well(name, family, told):
    assert another_family(name, {}, family).startswith(told)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float32"])
def test_sound_is_as_loud_in_any_format(tmp_path, dtype):
    from types import SimpleNamespace

    wave = np.sin(np.arange(1600) / 20) / 2
    scale = {"uint8": 127, "int16": 32767, "int32": 2**31 - 1, "float32": 1}[dtype]
    wavfile.write(tmp_path / "a.wav", 16_000, (wave * scale + 128 * (dtype == "uint8")).round(9).astype(dtype))
    hearing = LoadedModel(
        name="a", protocol="seq2seq", components={}, parts={"processor": SimpleNamespace(sampling_rate=16_000)}
    )
    found = pairs._sound(tmp_path, "a.wav", "dataset.path=x", hearing)
    assert np.abs(found - wave).max() < 0.02
