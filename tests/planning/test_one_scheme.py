"""Points that are one scheme in several words are one point: in grids, lists of candidates and searches."""

from dataclasses import replace

import pytest

import quantlab
from quantlab.errors import ConfigError
from quantlab.planning.space import distinct
from quantlab.vocabulary.axes import QuantizationAxes
from tests.support.shell import digits_words
from tests.support.tables import BACKENDS, CAPABILITIES, the_scheme

ONE = {
    "the library's own group size, ModelOpt": (["backend=modelopt", "dtype=int4"], "group_size=auto,128"),
    "the number first": (["backend=modelopt", "dtype=int4"], "group_size=128,auto"),
    "torchao's": (["backend=torchao", "dtype=int4"], "group_size=128,auto"),
    "torchao's int3": (["backend=torchao", "dtype=int3"], "group_size=auto,128"),
    "bitsandbytes' block": (["backend=bitsandbytes", "dtype=nf4"], "group_size=64,auto"),
    "a block that is the format": (["backend=gguf", "dtype=q4_k"], "group_size=auto,32"),
    "a scale a row": (["backend=modelopt", "dtype=int8"], "group_size=auto,none"),
    "the backend's first dtype": (["backend=quanto"], "dtype=auto,int8"),
    "its first algorithm": (["backend=modelopt", "dtype=int4"], "algorithm=auto,max"),
    "its activations": (["backend=torchao", "dtype=int8"], "activation_dtype=none,auto"),
    "the model's dtype": (["backend=quanto", "dtype=int4", "model.dtype=float32"], "compute_dtype=auto,float32"),
    "a fallback": (
        ["backend=quanto", "dtype=int4", "quantization.on_mismatch=int8", "model.dtype=float32"],
        "compute_dtype=auto,float32",
    ),
    "settings at their defaults": (
        ["backend=modelopt", "dtype=int8", "algorithm=smoothquant", "activation_dtype=int8"],
        "quantization.algorithm_settings={alpha:0.5},{}",
    ),
    "exclusions in another order": (
        ["backend=quanto", "dtype=int8"],
        "quantization.modules_to_not_convert.own=[blocks.0,blocks.1],[blocks.1,blocks.0,blocks.1]",
    ),
    "data that nothing is calibrated on": (["backend=quanto", "dtype=int8"], "calibration.num_samples=8,16"),
    "the reference, which has no groups": (["backend=none"], "calibration.seed=1,2"),
    "torchao's mapping on a CPU": (
        ["backend=torchao", "dtype=int3", "device=cpu"],
        "quantization.mapping_type=auto,SYMMETRIC",
    ),
    "torchao's packing on a CPU": (
        ["backend=torchao", "dtype=int4", "device=cpu"],
        "quantization.int4_packing_format=unpacked_to_int8,auto",
    ),
}
TWO = {
    "another number": (["backend=modelopt", "dtype=int4"], "group_size=auto,64"),
    "where a misfit is stored otherwise": (
        ["backend=modelopt", "dtype=int4", "quantization.on_mismatch=skip"],
        "group_size=auto,128",
    ),
    "what a CPU does is not what CUDA does": (
        ["backend=torchao", "dtype=int4", "device=cuda"],
        "quantization.int4_packing_format=auto,unpacked_to_int8",
    ),
    "a device that is not known yet": (
        ["backend=torchao", "dtype=int4", "device=auto"],
        "quantization.int4_packing_format=auto,unpacked_to_int8",
    ),
    "a model of 16 bits may keep layers in 32": (
        ["backend=quanto", "dtype=int4", "model.dtype=bfloat16"],
        "compute_dtype=auto,bfloat16",
    ),
    "another dtype than the model's": (
        ["backend=quanto", "dtype=int4", "model.dtype=float32"],
        "compute_dtype=auto,bfloat16",
    ),
    "another list": (
        ["backend=quanto", "dtype=int8"],
        "quantization.modules_to_not_convert.own=[blocks.0],[blocks.1]",
    ),
    "the family's list or none": (["backend=quanto"], "quantization.replace_default_exclusions=false,true"),
    "misfits that are errors or not": (["backend=quanto"], "quantization.on_mismatch=error,skip"),
    "data that is calibrated on": (
        ["backend=gguf", "dtype=q4_k", "algorithm=imatrix"],
        "calibration.num_samples=10,20",
    ),
    "double quantization": (["backend=bitsandbytes", "dtype=nf4"], "quantization.bnb_4bit_use_double_quant=false,true"),
    "another seed": (["backend=quanto"], "dataset.seed=1,2"),
}


@pytest.mark.parametrize("case", ONE)
def test_one_point(case):
    fixed, swept = ONE[case]
    plan = quantlab.compose([*fixed, swept])
    assert len(plan.jobs) == 1
    (merged,) = plan.merged
    assert merged.name == plan.jobs[0].name
    assert len(merged.spellings) == 2


@pytest.mark.parametrize("case", TWO)
def test_two_points(case):
    fixed, swept = TWO[case]
    plan = quantlab.compose([*fixed, swept])
    assert len(plan.jobs) == 2
    assert plan.merged == ()


def test_the_one_that_never_fails_alone_is_run():
    """A layer that 128 does not divide is an error with the number; lists of quantlab's own may match nothing."""
    for order in ("auto,128", "128,auto"):
        plan = quantlab.compose(["backend=modelopt", "dtype=int4", f"group_size={order}"])
        assert plan.merged[0].spellings == ("group_size=auto", "group_size=128")
        assert plan.jobs[0].axes.group_size == "auto"
    shipped = quantlab.compose(["backend=quanto", "modules_to_not_convert=[output]"]).jobs[0]
    axes = replace(shipped.axes, modules_to_not_convert={"own": list(shipped.schemes[""].exclusions)})
    typed = replace(shipped, schemes={"": the_scheme(axes)}, point={"own": "typed"})
    for order in ([typed, shipped], [shipped, typed]):
        kept, merged = distinct(order)
        assert [dict(job.schemes[""].shipped_exclusions) for job in kept] == [
            {"output": shipped.schemes[""].exclusions}
        ]
        assert merged[0].name == shipped.name


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_format_once_over_all_its_group_sizes(backend):
    """Over the table: a number is the same as the library's choice, or another scheme, never both."""
    for dtype, row in CAPABILITIES[backend].items():
        each = [
            the_scheme(QuantizationAxes(backend=backend, dtype=dtype, group_size=g)).spelled_out()
            for g in ("auto", *row.group_sizes)
        ]
        different = [each[0]]
        different += [one for one in each[1:] if one not in different]
        assert len(different) >= len(row.group_sizes)
        assert len(different) in (len(each), len(each) - 1)


def test_candidates_that_are_one_whatever_their_names(tmp_path):
    """A second name for one scheme was a row that no comparison had."""
    recipe = tmp_path / "list.yaml"
    recipe.write_text(
        "# @package _global_\nsweep:\n  candidates:\n"
        "    - {backend: modelopt, dtype: int4}\n"
        "    - {backend: modelopt, dtype: int4, group_size: 128}\n"
        "    - {quantization_config: {quant_method: modelopt, quant_type: INT4, weight_only: true, channel_quantize: -1,"
        " block_quantize: 128}}\n"
        "    - {backend: modelopt, dtype: int4, name: again}\n"
    )
    plan = quantlab.compose(recipe=str(recipe))
    assert [job.name for job in plan.jobs] == ["modelopt int4"]
    assert [one.name for one in plan.merged] == ["modelopt int4"]
    assert len(plan.merged[0].spellings) == 4
    assert any("name=again" in said for said in plan.merged[0].spellings)


def test_a_search_has_each_scheme_once():
    words = ["backend=torchao,modelopt,bitsandbytes,gguf", "dtype=int4,nf4,q4_k", "group_size=auto,32,64,128"]
    plan = quantlab.compose([*words, "sweep.on_invalid=skip", "sweep.search.num_trials=4"])
    told = [canonical for canonical in (str(job.schemes[""].spelled_out()) for job in plan.jobs)]
    assert len(told) == len(set(told))
    assert {one.name for one in plan.merged} == {
        "torchao int4",
        "modelopt int4",
        "torchao nf4",
        "bitsandbytes nf4",
        "gguf q4_k",
    }


def test_the_request_is_told_which_words_were_one(capsys):
    from quantlab.cli import main

    with pytest.raises(SystemExit, match="0"):
        main(["-m", "backend=modelopt", "dtype=int4,int8", "group_size=auto,128", "sweep.dry_run=true"])
    out = capsys.readouterr().out
    assert out.startswith("3 jobs:")
    assert "  one scheme: group_size=auto = group_size=128 (modelopt int4)\n" in out


@pytest.mark.slow
def test_a_sweep_measures_it_once_and_says_so(shell):
    words = *digits_words(), "sweep.floors=false"
    rows = shell.rows("-m", "backend=bitsandbytes", "dtype=nf4", "group_size=auto,64", *words)
    assert list(rows) == ["bitsandbytes nf4"]
    told = shell("-m", "backend=bitsandbytes", "dtype=nf4", "group_size=auto,64", *words)
    assert "run once, as these are one scheme in several words: group_size=auto = group_size=64" in "".join(told[1:])


OF_THE_SWEEP = {
    "num_threads": "num_threads=1,2",
    "device": "device=cpu,auto",
    "output_dir": "output_dir=a,b",
    "tracking.experiment": "tracking.experiment=x,y",
    "launcher": "launcher=serial,pool",
    "sweep.floors": "sweep.floors=true,false",
    "memory.placement": "memory.placement=resident,streamed",
    "evaluation.deterministic": "evaluation.deterministic=true,false",
}


@pytest.mark.parametrize("key", OF_THE_SWEEP)
def test_what_all_jobs_of_a_sweep_share_has_one_value(key):
    """The first job's counted, and the others' rows had names that were not so."""
    with pytest.raises(ConfigError, match=f"^{key}: .*give it one value"):
        quantlab.compose(["backend=quanto", "dtype=int8", OF_THE_SWEEP[key]])
    name, _, values = OF_THE_SWEEP[key].partition("=")
    entries = ", ".join(f"{{backend: quanto, dtype: int8, {name}: {value}}}" for value in values.split(","))
    if not key.startswith("sweep"):
        with pytest.raises(ConfigError, match=rf"^{key}: .*give it one value"):
            quantlab.compose([f"sweep.candidates=[{entries}]"])
    assert len(quantlab.compose(["backend=quanto", "dtype=int8,int4", f"{name}={values.partition(',')[0]}"]).jobs) == 2


def test_what_each_job_has_for_itself_may_be_swept():
    for words in ("dataset.seed=1,2", "evaluation.num_samples=10,20", "calibration.seed=1,2 algorithm=awq_lite"):
        assert len(quantlab.compose(["backend=modelopt", "dtype=int4", *words.split()]).jobs) == 2


def test_a_recipe_s_list_of_candidates_holds_some(tmp_path):
    """Of an empty one the shipped default was measured, which nobody asked for."""
    recipe = tmp_path / "none.yaml"
    recipe.write_text("# @package _global_\nsweep:\n  candidates: []\n")
    with pytest.raises(ConfigError, match=r"line 3: sweep.candidates: the list is empty; .* leave it out"):
        quantlab.compose(recipe=str(recipe))
