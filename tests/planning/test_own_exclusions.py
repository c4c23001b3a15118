"""Layers of one's own that stay unquantized, as people write them: what works, and the way out of what does not."""

from __future__ import annotations

import pytest
from torch import nn

import quantlab
from quantlab.errors import ConfigError
from quantlab.running.outlined import refused_by_shape

BASE = ["backend=quanto", "dtype=int4"]
OWN = "quantization.modules_to_not_convert.mine"


@pytest.mark.parametrize("key", [OWN, "modules_to_not_convert.mine"])
def test_a_list_by_its_name(key: str):
    (job,) = quantlab.compose([*BASE, f"{key}=[proj_out_1]"]).jobs
    assert job.config.quantization.modules_to_not_convert == {"mine": ["proj_out_1"]}
    listed = f"[{{backend: quanto, dtype: int4}}, {{backend: quanto, dtype: int4, {key}: ['blocks.0.*', proj_out]}}]"
    plain, own = quantlab.compose([f"sweep.candidates={listed}"]).jobs
    assert own.config.quantization.modules_to_not_convert == {"mine": ["blocks.0.*", "proj_out"]}
    assert plain.name == "quanto int4"
    assert own.name == "quanto int4 (modules_to_not_convert.mine=[blocks.0.*,proj_out])"
    first, second = quantlab.compose([*BASE, f"{key}=[a],[b]"]).jobs
    assert [first.name, second.name] == [f"quanto int4 (modules_to_not_convert.mine=[{x}])" for x in "ab"]


@pytest.mark.parametrize(
    ("word", "way"),
    [
        ("modules_to_not_convert=[proj_out_1]", f"; layers of your own: {OWN}='[proj_out_1]'"),
        ("modules_to_not_convert='*.proj_out'", f"; layers of your own: {OWN}='[*.proj_out]'"),
        ("modules_to_not_convert={mine: [a]}", f"; layers of your own: {OWN}='[proj_out]'"),
        ("modules_to_not_convert=[norm]", "; did you mean norms?"),
    ],
)
def test_layers_in_the_place_of_a_shipped_list(word: str, way: str):
    with pytest.raises(ConfigError) as told:
        quantlab.compose([*BASE, word])
    assert str(told.value).endswith(way)
    if "own" in way:
        told_word = way.partition(": ")[2].replace("'", "")
        assert quantlab.compose([*BASE, told_word]).jobs


PART = "components.transformer"
OF_PART = f"{PART}={{backend: quanto, dtype: int4, modules_to_not_convert: "
TYPED = {
    "modules_to_not_convert.first": [*BASE, "modules_to_not_convert.first=[ENTRY]"],
    "modules_to_not_convert.listed": [
        "sweep.candidates=[{backend: quanto, dtype: int4, modules_to_not_convert.listed: [ENTRY]}]"
    ],
    f"{PART}.modules_to_not_convert": [OF_PART + "[ENTRY]}"],
    f"{PART}.modules_to_not_convert.named": [OF_PART + "{named: [ENTRY]}}"],
}


def refused(words: list[str], entry: str) -> str:
    jobs = quantlab.compose([*(w.replace("ENTRY", f"'{entry}'") for w in words), "device=cpu"]).jobs
    [told] = refused_by_shape(jobs, is_far=False).values()
    return str(told)


@pytest.mark.parametrize("typed", TYPED)
def test_what_is_wrong_with_a_list_begins_with_the_key_that_was_typed(typed: str):
    for entry in ("nothing_here", "re:("):
        assert refused(TYPED[typed], entry).startswith(f"{typed}={entry}: ")
    assert refused(TYPED[typed], "re:.*").startswith(f"{typed}: all ")


def test_of_two_lists_the_one_is_named_that_matches_nothing():
    words = [*BASE, f"{OWN}=[proj_out_1]", "modules_to_not_convert.other=[ENTRY]"]
    assert refused(words, "nothing_here").startswith("modules_to_not_convert.other=nothing_here: ")
    assert refused(words, "re:.*").startswith("modules_to_not_convert: all ")


def test_an_entry_of_a_librarys_class_by_the_name_that_it_has_there():
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    config = quantlab.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["nothing"])
    with pytest.raises(ConfigError, match=r"^llm_int8_skip_modules=nothing: matches none"):
        quantlab.quantize(module, config)
