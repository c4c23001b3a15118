"""Pairs of texts as a model's tokenizer makes them: what is read and what is written, each in its own language."""

import json
from types import SimpleNamespace

import pytest
import torch

from quantlab.datasets.pairs import load, pair_inputs
from quantlab.errors import ModelError
from quantlab.vocabulary.schema import DatasetConfig, EvaluationConfig

LANGUAGES = ("eng_Latn", "deu_Latn")


def translator(**languages):
    """A model whose tokenizer puts the language before each text, as NLLB's does."""
    from transformers import M2M100Config, NllbTokenizer

    words = ["<s>", "<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz", *LANGUAGES, "<mask>"]
    tokenizer = NllbTokenizer(
        vocab={word: i for i, word in enumerate(words)}, additional_special_tokens=list(LANGUAGES), **languages
    )
    config = M2M100Config(decoder_start_token_id=tokenizer.eos_token_id)
    module = torch.nn.Module()
    module.config, module.generation_config = config, SimpleNamespace()
    return SimpleNamespace(name="translator", parts={"tokenizer": tokenizer}, components={"model": module})


def test_what_is_written_is_in_the_language_that_is_written():
    model = translator(src_lang="eng_Latn", tgt_lang="deu_Latn")
    tokenizer = model.parts["tokenizer"]
    read, written = (tokenizer.convert_tokens_to_ids(name) for name in LANGUAGES)
    inputs = pair_inputs(["a b", "c"], ["d", "e f g"], [], EvaluationConfig(), model)
    assert inputs.source["input_ids"][:, 0].tolist() == [read, read]
    assert inputs.targets[:, 0].tolist() == [written, written]
    assert inputs.decoder_input_ids[:, :2].tolist() == [[tokenizer.eos_token_id, written]] * 2
    assert tokenizer("a")["input_ids"][0] == read, "the tokenizer is left as it was"


@pytest.mark.parametrize("languages", [{"src_lang": "eng_Latn"}, {}])
def test_a_tokenizer_that_does_not_know_which_language_is_written_is_refused(languages):
    with pytest.raises(ModelError, match=r"^model.path: translator: .*tgt_lang.*tokenizer_config.json"):
        pair_inputs(["a b"], ["c d"], [], EvaluationConfig(), translator(**languages))


def test_halves_of_one_text_are_in_the_language_that_is_read():
    model = translator(src_lang="eng_Latn")
    inputs = pair_inputs(["a b"], ["c d"], [], EvaluationConfig(), model, is_one_language=True)
    assert inputs.targets[0, 0] == inputs.source["input_ids"][0, 0]


@pytest.mark.parametrize(("context_length", "num"), [(256, 0), (5, 1), (3, 2)])
def test_pairs_that_are_cut_are_told(context_length, num, tmp_path, capsys):
    """A text is its letters between its language and its end."""
    lines = [{"source": "ab", "target": "abc"}, {"source": "a", "target": "b"}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = DatasetConfig(name="pairs", path=str(tmp_path / "pairs.jsonl"))
    evaluation = EvaluationConfig(num_samples=2, context_length=context_length)
    inputs = load(data, evaluation, translator(src_lang="eng_Latn", tgt_lang="deu_Latn"))
    said = " ".join(capsys.readouterr().err.split())
    assert inputs.targets.shape[1] <= context_length
    assert (f"{num} of 2 pairs reach evaluation.context_length={context_length} tokens" in said) == bool(num)
    assert bool(said) == bool(num)
