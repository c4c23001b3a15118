"""What is planned is what is loaded: no head that is not measured, no half that is not read, no pooler that is not there."""

import pytest

from quantlab.models import encoder, seq2seq, vision
from quantlab.models.outlines import outline
from quantlab.vocabulary.schema import ModelConfig
from tests.models.test_auto import BOTH, processor
from tests.models.test_whole_model import BERT, T5, VISION, saved

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
