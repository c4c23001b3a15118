"""``model=auto``, and the families of models that write and of models that see: whole runs from tiny folders."""

import json

import numpy as np
import pytest
import torch

from quantlab.errors import ConfigError, ModelError
from quantlab.models import seq2seq, vision
from quantlab.models.auto import family_of_checkpoint
from quantlab.vocabulary.schema import ModelConfig
from tests.models.test_whole_model import BERT, CLIP, T5, VISION, WHISPER, V, saved
from tests.support.tiny_text_models import TEXT

BART = {
    "vocab_size": V,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    "init_std": 0.3,
}
SPEECH = {
    **{k: v for k, v in WHISPER.items() if k not in ("num_mel_bins", "begin_suppress_tokens")},
    "num_conv_layers": 1,
    "conv_kernel_sizes": (3,),
    "conv_channels": 32,
    "max_source_positions": 400,
}
MOONSHINE = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 64,
    "encoder_num_hidden_layers": 1,
    "decoder_num_hidden_layers": 1,
    "encoder_num_attention_heads": 4,
    "decoder_num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "initializer_range": 0.3,
}
LLAMA = {**BERT, "num_key_value_heads": 2}
BOTH = {
    "text_config": {**CLIP, "vocab_size": V, "max_position_embeddings": 77},
    "vision_config": VISION,
    "projection_dim": 16,
}
SEGFORMER = {
    "hidden_sizes": (16, 16, 32, 32),
    "depths": (1, 1, 1, 1),
    "num_attention_heads": (1, 1, 2, 2),
    "decoder_hidden_size": 32,
    "initializer_range": 0.3,
}
FOLDERS = {
    "LlamaForCausalLM": ("causal_lm", "LlamaConfig", LLAMA),
    "GPT2LMHeadModel": ("causal_lm", "GPT2Config", {"vocab_size": V, "n_embd": 32, "n_layer": 1, "n_head": 4}),
    "BertForMaskedLM": ("encoder", "BertConfig", BERT),
    "BertModel": ("encoder", "BertConfig", BERT),
    "T5EncoderModel": ("encoder", "T5Config", T5),
    "CLIPTextModel": ("encoder", "CLIPTextConfig", {**CLIP, "vocab_size": V}),
    "T5ForConditionalGeneration": ("seq2seq", "T5Config", T5),
    "BartForConditionalGeneration": ("seq2seq", "BartConfig", BART),
    "WhisperForConditionalGeneration": ("seq2seq", "WhisperConfig", WHISPER),
    "Speech2TextForConditionalGeneration": ("seq2seq", "Speech2TextConfig", SPEECH),
    "MoonshineForConditionalGeneration": ("seq2seq", "MoonshineConfig", MOONSHINE),
    "ViTModel": ("vision", "ViTConfig", VISION),
    "Dinov2Model": ("vision", "Dinov2Config", VISION),
    "ViTForImageClassification": ("vision", "ViTConfig", VISION),
    "SegformerForSemanticSegmentation": ("vision", "SegformerConfig", SEGFORMER),
    "CLIPModel": ("vision", "CLIPConfig", BOTH),
    "Siglip2VisionModel": ("vision", "Siglip2VisionConfig", {**VISION, "num_patches": 16}),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_checkpoint_says_which_family_it_is_of(name, tmp_path):
    family, config_name, sizes = FOLDERS[name]
    assert family_of_checkpoint(str(saved(tmp_path / "model", name, config_name, **sizes))) == family


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "neither a config.json nor a model_index.json"),
        ({"config.json": json.dumps({"architectures": ["SomethingForRewards"]})}, "knows no family for Some"),
        ({"config.json": json.dumps({"model_type": "odd"})}, "knows no family for odd"),
    ],
)
def test_what_is_of_no_family_is_told(files, told, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match=rf"^model.path={tmp_path}: .*{told}"):
        family_of_checkpoint(str(tmp_path))
    with pytest.raises(ModelError, match=r"^model.path=null: model=auto looks at a checkpoint"):
        family_of_checkpoint(None)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("config.json", "{", "config.json: not a readable JSON file"),
        ("config.json", "[1]", "config.json: a mapping is wanted, not list"),
        ("model_index.json", "{'a'", "model_index.json: not a readable JSON file"),
    ],
)
def test_a_damaged_configuration_is_told_as_what_it_is(name, text, told, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=rf"^model.path={tmp_path}: {told}.*copy or download it again$"):
        family_of_checkpoint(str(tmp_path))


def test_a_hub_that_cannot_be_asked_is_no_missing_file(monkeypatch):
    from huggingface_hub import errors

    def answer(error):
        monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: (_ for _ in ()).throw(error))

    answer(errors.LocalEntryNotFoundError("offline"))
    with pytest.raises(ModelError, match="^model.path=some/model: model_index.json is not here and the Hub cannot be"):
        family_of_checkpoint("some/model")
    answer(OSError("401 Client Error"))
    with pytest.raises(ModelError, match="cannot be had from the Hub .401 Client Error.; check the name"):
        family_of_checkpoint("some/model")
    answer(errors.EntryNotFoundError("404"))
    with pytest.raises(ModelError, match="neither a config.json nor a model_index.json is there"):
        family_of_checkpoint("some/model")


def pictures(folder, num=6):
    from PIL import Image

    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(num):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def pairs(folder, name):
    """A file of pairs; for those that hear of sounds, each longer than the last."""
    from scipy.io import wavfile

    lines, texts = [], TEXT.splitlines()
    for i in range(8):
        if name in HEARERS:
            noise = np.random.default_rng(i).normal(size=8000 + 1000 * i) * 3000
            wavfile.write(folder / f"{i}.wav", 16000, noise.astype(np.int16))
            lines.append({"audio": f"{i}.wav", "target": texts[i]})
        else:
            lines.append({"source": texts[i], "target": texts[20 + i]})
    file = folder / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def processor(folder, name):
    import transformers

    if name in HEARERS:
        kind, settings = HEARERS[name]
        getattr(transformers, kind)(**settings).save_pretrained(folder)
    elif name.startswith("Siglip2"):
        transformers.Siglip2ImageProcessor(patch_size=VISION["patch_size"], max_num_patches=16).save_pretrained(folder)
    else:
        size = {"height": 32, "width": 32}
        settings = {"image_processor_type": "ViTImageProcessor", "size": size, "do_resize": True, "do_normalize": True}
        (folder / "preprocessor_config.json").write_text(
            json.dumps({**settings, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_rescale": True})
        )


HEARERS = {
    "WhisperForConditionalGeneration": ("WhisperFeatureExtractor", {"feature_size": 16, "chunk_length": 1}),
    "Speech2TextForConditionalGeneration": (
        "Speech2TextFeatureExtractor",
        {"feature_size": 80, "num_mel_bins": 80, "return_attention_mask": True},
    ),
    "MoonshineForConditionalGeneration": ("Wav2Vec2FeatureExtractor", {"return_attention_mask": True}),
}
"""Models that read sound -> what makes of it what they read."""
RUN = ["evaluation.num_samples=4", "evaluation.batch_size=2", "evaluation.num_bootstrap=20", "device=cpu"]
WRITERS = ["T5ForConditionalGeneration", "BartForConditionalGeneration", *HEARERS]
SEERS = ["ViTModel", "Dinov2Model", "ViTForImageClassification", "CLIPModel", "Siglip2VisionModel"]
SEERS += ["SegformerForSemanticSegmentation"]
"""The last one is given patches, a mask and how many there are."""


SOME = ("T5ForConditionalGeneration",)  # pictures: in the calibration of pairs and pictures


@pytest.mark.parametrize(
    "name", [n if n in SOME else pytest.param(n, marks=pytest.mark.slow) for n in (*WRITERS, *SEERS)]
)
def test_models_that_write_and_models_that_see_run_whole(name, shell):
    _, config_name, sizes = FOLDERS[name]
    folder = saved(shell.folder / "model", name, config_name, **sizes)
    data = ["dataset=pairs", f"dataset.path={pairs(shell.folder, name)}", "evaluation.context_length=32"]
    if name in SEERS:
        data = [f"dataset.path={pictures(shell.folder / 'pictures')}"]
    if name in SEERS or name in HEARERS:
        processor(folder, name)
    rows = shell.rows("model=auto", f"model.path={folder}", *data, *RUN, "backend=quanto", "dtype=int8,int2", "-m")
    metric = "quality/output_rel_error" if name in SEERS else "quality/kld_mean"
    value = {n: r["metrics"][metric] for n, r in rows.items()}
    assert value["reference"] == 0
    assert abs(value["floor_batch"]) < 1e-5
    assert 0 < value["quanto int8"] < value["quanto int2"]
    assert rows["quanto int8"]["params"]["model"]["family"] == ("vision" if name in SEERS else "seq2seq")
    if name in WRITERS:
        metrics = rows["quanto int8"]["metrics"]
        assert metrics["quality/ppl"] == pytest.approx(metrics["quality/ppl_ref"], rel=0.05)


def test_perplexity_is_that_of_the_models_own_loss(tmp_path):
    """By transformers' own cross entropy on the same pairs."""
    from quantlab.datasets import pairs as dataset
    from quantlab.protocols import seq2seq as protocol
    from quantlab.vocabulary.schema import DatasetConfig, EvaluationConfig

    for name in WRITERS:
        _, config_name, sizes = FOLDERS[name]
        (tmp_path / name).mkdir()
        folder = saved(tmp_path / name / "model", name, config_name, **sizes)
        if name in HEARERS:
            processor(folder, name)
        model = seq2seq.load(ModelConfig(path=str(folder)), "cpu", tmp_path)
        module = model.components["model"]
        if name.startswith("Bart"):
            module.final_logits_bias.normal_()
        evaluation = EvaluationConfig(num_samples=4, batch_size=2, context_length=24, num_bootstrap=10)
        inputs = dataset.load(DatasetConfig(path=str(pairs(tmp_path / name, name))), evaluation, model)
        assert ("attention_mask" in inputs.source) == (not name.startswith("Whisper")), "sounds are of several lengths"
        reference = protocol.observe(model, inputs, evaluation)
        found = protocol.measure(model, inputs, evaluation, reference, model)
        with torch.no_grad():
            loss = module(**inputs.source, labels=inputs.targets).loss
        assert found.estimates["ppl"].value == pytest.approx(float(loss.exp()), rel=1e-4)


BAD = {
    "no lines": ("", "no pair is in it"),
    "no JSON": ("{", "line 1 is no JSON"),
    "no target": ('{"source": "a"}', "line 1 is no pair of texts"),
    "mixed": ('{"source": "a", "target": "b"}\n{"audio": "a.wav", "target": "b"}', "line 2 has audio, target"),
    "a number": ('{"source": 1, "target": "b"}', "line 1 is no pair"),
    "too few": ('{"source": "a", "target": "b"}', "there are 1 pairs and not evaluation.num_samples=4"),
    "sound for a reader": ('{"audio": "a.wav", "target": "b"}\n' * 4, "reads text, and the lines have audio"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_pairs_are_refused_by_name(case, shell):
    text, told = BAD[case]
    folder = saved(shell.folder / "model", "T5ForConditionalGeneration", "T5Config", **T5)
    (shell.folder / "bad.jsonl").write_text(text)
    words = ["model=seq2seq", f"model.path={folder}", "dataset=pairs", "dataset.path=bad.jsonl", *RUN]
    code, _, err = shell(*words, "backend=quanto", "dtype=int8")
    assert code == 2
    assert told in err
    assert "dataset.path=" in err


@pytest.mark.parametrize("task", ["SemanticSegmentation", "ImageClassification"])
def test_a_model_that_sees_is_measured_with_its_head(task, tmp_path):
    name = f"SegformerFor{task}"
    folder = saved(tmp_path / "model", name, "SegformerConfig", **SEGFORMER)
    processor(folder, "ViTModel")
    assert type(vision.load(ModelConfig(path=str(folder)), "cpu", tmp_path).components["model"]).__name__ == name


def test_a_class_that_no_family_builds_is_told_by_name(tmp_path):
    folder = saved(tmp_path / "model", "ViTModel", "ViTConfig", **VISION)
    told = r"ViTModel is none of the classes that AutoModelForSeq2SeqLM and .*; model\.family=vision loads all of it"
    with pytest.raises(ModelError, match=rf"^model\.path=\S+: {told}"):
        seq2seq.load(ModelConfig(path=str(folder), family="seq2seq"), "cpu", tmp_path)


def test_a_model_without_its_processor_is_told(tmp_path):
    folder = saved(tmp_path / "model", "ViTModel", "ViTConfig", **VISION)
    with pytest.raises(ModelError, match=r"\(image processor\): it cannot be loaded .*preprocessor_config.json"):
        vision.load(ModelConfig(path=str(folder)), "cpu", tmp_path)
