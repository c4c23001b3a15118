"""Layers of one's own that stay unquantized, as people write them: what works, and the way out of what does not."""

from __future__ import annotations

import pytest

import quantlab
from quantlab.errors import ConfigError

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
