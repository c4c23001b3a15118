"""Jobs that are one scheme on the model at hand, whatever their words, are measured once, and the user is told.

A library's own group size with ``quantization.on_mismatch=skip`` is another scheme than that number where a layer does
not divide by it, and planning knows no layers; the loaded model does.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from quantlab.planning.plan import plan
from quantlab.running.known import Known
from quantlab.running.once import Once
from quantlab.tracking import find_runs
from tests.support.shell import digits_words

TOLD = "run once, as these are one scheme on this model: modelopt int4 = modelopt int4 g128"
WORDS = ("backend=modelopt", "dtype=int4", "group_size=auto,128", "quantization.on_mismatch=skip", "sweep.floors=false")


def known(widths):
    return Known(
        protocol="diffusion", dtype="float32", reference_key="r", judge_sha256="", default=("transformer",), made={},
        classes={"transformer": "DiT"}, left_out=(), is_brought=False, tags={},
        widths={"transformer": {"linear": widths, "conv": [36]}, "text_encoder": {"linear": [100]}},
    )  # fmt: skip


def again(words, widths):
    once = Once()
    found = [once.is_again(known(widths), job) for job in plan([*words, "device=cpu"], multirun=True).jobs]
    once.tell()
    once.tell()
    return found


@pytest.mark.parametrize("backend", ["modelopt", "torchao"])
@pytest.mark.parametrize("order", ["auto,128", "128,auto"])
@pytest.mark.slow
def test_a_number_is_the_librarys_own_where_it_divides_every_layer(backend, order, capsys):
    words = [f"backend={backend}", "dtype=int4", f"group_size={order},64", "quantization.on_mismatch=skip"]
    assert again(words, [128, 256]) == [False, True, False]
    assert capsys.readouterr().err.count("run once, as these are one scheme on this model") == 1
    assert again(words, [128, 192]) == [False, False, False]  # 192 does not divide by 128: stored or left
    assert again([*words, "quantization.layer_kinds=[linear,conv]"], [128]) == [False, False, False]


@pytest.mark.parametrize("backend", ["quanto", "gguf"])
def test_what_becomes_of_misfits_is_one_thing_where_there_are_none(backend):
    dtype = {"quanto": "int8", "gguf": "q4_0"}[backend]
    words = [f"backend={backend}", f"dtype={dtype}", "quantization.on_mismatch=error,skip,bfloat16"]
    assert again(words, [64, 96]) == [False, True, True]
    assert again(words, [64, 36]) == [False, *[backend == "quanto"] * 2]
    assert again(words, []) == [False] * 3, "layers are not known"
    fallback = ["backend=gguf", "dtype=q4_k", "quantization.on_mismatch=error,q4_0"]
    assert again(fallback, [256]) == [False, True]
    assert again(fallback, [288]) == [False, False]


def test_a_format_that_looks_at_more_than_rows_is_not_judged_by_them():
    words = ["backend=torchao", "dtype=nf4", "quantization.on_mismatch=skip,bfloat16"]
    assert again(words, [128]) == [False, False]


def test_each_component_counts_by_its_own_layers():
    words = ["components.text_encoder.backend=modelopt", "components.text_encoder.dtype=int4", "backend=none"]
    words += ["components.text_encoder.on_mismatch=skip", "components.text_encoder.group_size=auto,128"]
    words += ["model=sd3_medium"]
    assert again(words, [128]) == [False, False]


def test_another_reference_is_another_job():
    once, (job,) = Once(), plan(["backend=quanto", "dtype=int8"]).jobs
    assert [once.is_again(known([8]), one) for one in (job, job, replace(job, name="again"))] == [False, False, True]
    (other,) = plan(["backend=quanto", "dtype=int8", "dataset.seed=1"]).jobs
    assert not once.is_again(known([8]), other)


def test_a_sweep_measures_it_once_and_is_found_again(shell):
    words = ("-m", *WORDS, *digits_words())
    code, out, err = shell(*words, "--json")
    assert code == 0, err
    assert [row["name"] for row in json.loads(out)] == ["modelopt int4"]
    assert TOLD in err
    code, out, err = shell(*words, "--json")
    assert [(row["name"], row["resumed"]) for row in json.loads(out)] == [("modelopt int4", True)]
    assert TOLD in err
    assert sorted(shell.tracked()) == ["modelopt int4", "sweep"]
    assert len([run for run in find_runs(shell.store) if run["name"] == "sweep"]) == 1, "the earlier one's answer"


def test_a_search_spends_no_trial_on_it(shell):
    words = [word.replace("auto,128", "128,64,auto") for word in WORDS]
    code, out, err = shell("-m", *words, *digits_words(), "sweep.search.num_trials=3", "--json")
    assert code == 0, err
    assert {row["name"] for row in json.loads(out)} == {"modelopt int4 g128", "modelopt int4 g64"}
    assert "run once, as these are one scheme on this model: modelopt int4 g128 = modelopt int4" in err
    assert "the grid has 2 possible jobs" in err


def test_the_unquantized_model_comes_along_and_is_no_row_twice(shell):
    words = ("-m", "backend=none,quanto", *digits_words("evaluation.num_samples=10"), "--json")
    for is_resumed in (False, True):
        code, out, err = shell(*words)
        assert code == 0, err
        rows = json.loads(out)
        assert [row["name"] for row in rows] == ["reference", "floor_bf16", "floor_batch", "quanto int8"]
        assert {row["resumed"] for row in rows} == {is_resumed}
    alone = ("-m", "sweep.candidates=[{backend: none}]", *words[2:])
    assert [row["name"] for row in json.loads(shell(*alone)[1])] == ["reference", "floor_bf16", "floor_batch"]
    code, out, _ = shell(*words[:-1], "sweep.force=true", "sweep.dry_run=true")
    assert code == 0
    assert "  reference (comes along)" in out
    assert "for 1 job:" in out


def test_the_unquantized_model_is_a_row_where_no_floors_are_wanted():
    def found(*words):
        return again(["backend=none,quanto", "dtype=auto", *words], [128])

    assert found() == [True, False]
    assert found("sweep.floors=false") == [False, False]
    assert found("sweep.force=true") == [True, False]


def test_a_cast_that_is_a_floor_is_told_and_no_row_twice(capsys):
    """A store keeps one run of it, under which the other name would be lost."""
    words = ["backend=none", "dtype=bfloat16,float16"]
    assert again(words, [128]) == [True, False]
    assert "these are one scheme on this model: floor_bf16 = none bfloat16" in capsys.readouterr().err
    assert again([*words, "sweep.floors=false"], [128]) == [False, False]
    named = "sweep.candidates=[{backend: none, name: mine}, {components.transformer.backend: none}]"
    assert again([named], [128]) == [True, True]


def test_each_row_of_a_sweep_is_a_run_of_its_own(shell):
    rows = shell.rows("-m", "backend=none", "dtype=bfloat16,float16", *digits_words("evaluation.num_samples=10"))
    assert list(rows) == ["reference", "floor_bf16", "floor_batch", "none float16"]
    assert len({row["run_id"] for row in rows.values()}) == 4
