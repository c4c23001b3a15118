"""Windows of a text: no more of it is tokenized than they hold, and they are what the whole would give."""

from __future__ import annotations

import re

import pytest
import torch

from quantlab.errors import ConfigError
from quantlab.protocols.language import text_inputs
from quantlab.protocols.sections import sections
from quantlab.vocabulary.schema import EvaluationConfig
from tests.protocols.test_language import fake_model
from tests.support.tiny_text_models import TEXT, byte_tokenizer

LONG = TEXT * 200


class Words:
    """A tokenizer whose tokens are words with what follows them; it notes what it was given."""

    def __init__(self):
        self.read = 0

    def __call__(self, text):
        self.read += len(text)
        return [hash(word) for word in re.findall(r"\S+\s*", text)]


def test_no_more_is_tokenized_than_is_needed():
    words = Words()
    found = sections(LONG, 4, 50, words)
    assert words.read < 0.02 * len(LONG)
    assert all(len(ids) == 50 for ids in found.values())


@pytest.mark.parametrize("num", [1, 3, 7])
def test_a_window_is_the_start_of_its_section(num):
    found = sections(LONG, num, 50, Words())
    assert len(found) == num
    assert next(iter(found)) == 0
    for i, (start, ids) in enumerate(found.items()):
        assert i * len(LONG) // num <= start < (i + 1) * len(LONG) // num
        assert start == 0 or LONG[start - 1].isspace()
        assert ids == Words()(LONG[start:])[:50]


def test_long_words_take_more_text():
    text = " ".join("x" * 300 + str(i) for i in range(500))
    found = sections(text, 2, 40, Words())
    assert [len(ids) for ids in found.values()] == [40, 40]


def test_a_text_without_white_space_has_sections_too():
    found = sections("字" * 4000, 4, 30, list)
    assert list(found) == [0, 1000, 2000, 3000]


def test_a_section_with_too_few_tokens_has_the_whole_text_cut():
    """White space alone in one half: by sections there is no second window, in the whole text there are many."""
    text = TEXT + " " * len(TEXT)
    assert sections(text, 2, 50, lambda part: part.split()) is None
    assert sections("", 1, 4, list) is None
    tokenizer = byte_tokenizer()
    evaluation = EvaluationConfig(num_samples=len(TEXT) // 64, context_length=64)
    found = text_inputs(TEXT, evaluation, fake_model(tokenizer), "dataset=text")
    assert found.sample_ids[:2] == ("window 0", "window 1")
    assert found.protocol["protocol"] == "ppl/v2"
    with pytest.raises(ConfigError, match="the text has"):
        text_inputs("short", evaluation, fake_model(tokenizer), "dataset=text")


@pytest.mark.parametrize("adds_bos", [False, True])
def test_the_ids_say_where_a_window_begins(adds_bos):
    tokenizer = byte_tokenizer(adds_bos)
    evaluation = EvaluationConfig(num_samples=3, context_length=64)
    found = text_inputs(LONG, evaluation, fake_model(tokenizer), "dataset=text")
    for name, window in zip(found.sample_ids, found.input_ids, strict=True):
        start = int(name.removeprefix("window at "))
        expected = tokenizer(LONG[start : start + 64], add_special_tokens=False)["input_ids"]
        assert torch.equal(window, torch.tensor(([1] if adds_bos else []) + expected)[:64])
