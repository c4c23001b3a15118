"""What is there twice is one sample: the same error again says nothing new of its mean."""

import pytest
import torch

from quantlab.datasets.pairs import pair_inputs
from quantlab.models import seq2seq as seq2seq_family
from quantlab.models import vision as vision_family
from quantlab.protocols import encoder, language, seq2seq, vision
from quantlab.protocols.encoder import encoder_inputs
from quantlab.protocols.language import PERPLEXITY_PROTOCOLS, text_inputs
from quantlab.protocols.vision import VisionInputs
from quantlab.stages.evaluate import summarize
from quantlab.vocabulary.schema import EvaluationConfig, ModelConfig
from tests.models.test_auto import processor
from tests.models.test_whole_model import T5, VISION, saved
from tests.support.tiny_text_models import TEXT, load_bert, load_llama, save_bert, save_llama, with_noise

NUM = 12
SETTINGS = EvaluationConfig(num_samples=NUM, batch_size=4, context_length=48, num_bootstrap=50)
TWICE = [*range(NUM), *range(NUM)]


def summary(protocol, model, inputs):
    reference = protocol.observe(model, inputs, SETTINGS)
    return summarize(protocol.measure(with_noise(model, 0.1), inputs, SETTINGS, reference, model), SETTINGS)


def check(protocol, model, inputs):
    once, twice = summary(protocol, model, inputs), summary(protocol, model, inputs.subset(TWICE))
    for name, value in once.items():
        if not name.startswith("kld_p"):  # quantiles lie between two values
            assert twice[name].value == pytest.approx(value.value, rel=1e-5, abs=1e-6), name
        if value.se and name in ("kld_mean", "ln_ppl_ratio", "output_rel_error", "ppl"):
            assert twice[name].se == pytest.approx(value.se, rel=0.02), name


def test_texts_of_an_encoder(tmp_path):
    model = load_bert(save_bert(tmp_path), tmp_path)
    lines = [line * (1 + i % 4) for i, line in enumerate(TEXT.splitlines()[:NUM])]
    inputs = encoder_inputs(lines, SETTINGS, model, "dataset=text")
    check(encoder, model, inputs)
    assert encoder.measure(model, inputs, SETTINGS, encoder.observe(model, inputs, SETTINGS), model).clusters is None


@pytest.mark.parametrize("protocol", ["ppl/v1", "ppl/v2"])
def test_windows_of_a_text(protocol, tmp_path):
    model = load_llama(save_llama(tmp_path), tmp_path)
    size = SETTINGS.context_length
    settings = EvaluationConfig(
        num_samples=2 * NUM, batch_size=4, context_length=size, num_bootstrap=50, perplexity_protocol=protocol
    )
    assert PERPLEXITY_PROTOCOLS[protocol].bos == "prepend"
    text = TEXT[: size * NUM]
    once, again = (text_inputs(text * times, settings, model, "dataset=text") for times in (3, 2))
    for inputs in (once, again):
        assert len(set(inputs.clusters)) == len({row.numpy().tobytes() for row in inputs.input_ids})
    check(language, model, text_inputs(TEXT, SETTINGS, model, "dataset=text"))


def test_pairs(tmp_path):
    model = seq2seq_family.load(
        ModelConfig(path=str(saved(tmp_path / "model", *("T5ForConditionalGeneration", "T5Config"), **T5))),
        "cpu",
        tmp_path,
    )
    lines = TEXT.splitlines()[: 2 * NUM]
    check(seq2seq, model, pair_inputs(lines[:NUM], lines[NUM:], [], SETTINGS, model))


def test_pictures(tmp_path):
    path = str(saved(tmp_path / "model", *("ViTModel", "ViTConfig"), **VISION))
    processor(tmp_path / "model", "ViTModel")
    model = vision_family.load(ModelConfig(path=path), "cpu", tmp_path)
    size = VISION["image_size"]
    pixels = torch.randn(NUM, 3, size, size, generator=torch.Generator().manual_seed(0))
    check(vision, model, VisionInputs(pixels, tuple(map(str, range(NUM)))))
