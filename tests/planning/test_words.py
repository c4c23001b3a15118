"""Hydra's words as its users know them: they do what Hydra does with them, or are refused in words."""

from __future__ import annotations

import pytest

from quantlab.cli import dispatch
from quantlab.errors import ConfigError
from quantlab.planning.plan import plan
from quantlab.planning.words import MAX_COMBINATIONS, literal, parse

SWEPT = {
    "dtype=glob(int*)": ["torchao int8", "torchao int4", "torchao int3", "torchao int2"],
    "dtype=glob([int*,nf*],exclude=int?)": ["torchao nf4"],
    "modules_to_not_convert=[],[norms]": [{}, {"norms"}],
    "modules_to_not_convert=[norms],[output,norms],[]": [{"norms"}, {"output", "norms"}, {}],
    "evaluation.num_samples=range(10,40,10)": [10, 20, 30],
    "evaluation.guidance_scale=range(1,2,0.5)": [1.0, 1.5],
    "evaluation.num_samples=choice(10,20)": [10, 20],
    "dataset.seed=sort(3,1,2)": [1, 2, 3],
    "group_size=64,32": [64, 32],
    "group_size=choice(64,32)": [64, 32],
}


def what(word, job):
    key = word.partition("=")[0]
    if key == "dtype":
        return job.name
    if key == "modules_to_not_convert":
        return set(job.config.quantization.modules_to_not_convert) or {}
    if key == "group_size":
        return job.config.quantization.group_size
    node, name = key.split(".")
    return getattr(getattr(job.config, node), name)


@pytest.mark.parametrize("word", SWEPT)
def test_several_values(word):
    usual = ["backend=torchao", "sweep.on_invalid=skip", *(["dtype=int4"] if "dtype" not in word else [])]
    found = [what(word, job) for job in plan([*usual, word], multirun=True).jobs]
    assert sorted(map(str, found)) == sorted(map(str, SWEPT[word]))


@pytest.mark.parametrize("word", [*SWEPT, "evaluation.guidance_scale=interval(0,1)"])
def test_several_values_need_their_flag(word):
    with pytest.raises(ConfigError, match=r"several values are a sweep; add -m$"):
        plan(["backend=torchao", "dtype=int4", word] if "dtype" not in word else ["backend=torchao", word])


def test_a_key_of_a_free_mapping_needs_the_flag_too():
    with pytest.raises(ConfigError, match=r"^sweep.grid.x=range\(1,3\): several values are a sweep; add -m$"):
        plan(["sweep.grid.x=range(1,3)"])


REFUSED = {
    "evaluation.guidance_scale=interval(0,1)": r"^evaluation.guidance_scale: interval\(\) has no single values; .*range",
    "dtype=interval(0,1)": r"^dtype: interval\(\)",
    "dtype=glob(zzz*)": r"^dtype: glob\(\) matches none of ",
    "device=glob(*)": r"^device: glob\(\) chooses among the options of a group",
    "evaluation.num_samples=range(1,1000000000)": rf"^evaluation.num_samples: more than {MAX_COMBINATIONS} combinations",
    "dataset.seed=range(0,200),": r"^dataset.seed=range\(0,200\),: a value is wanted behind the last comma",
}


@pytest.mark.parametrize("word", REFUSED)
def test_what_is_no_list_of_values(word):
    with pytest.raises(ConfigError, match=REFUSED[word]):
        plan(["backend=torchao", word], multirun=True)


def test_the_size_of_a_grid_counts_all_its_axes():
    words = ["backend=torchao", "dataset.seed=range(0,200)", "evaluation.bootstrap_seed=range(0,200)"]
    with pytest.raises(ConfigError, match=r"^dataset.seed: more than \d+ combinations"):
        plan(words, multirun=True)


@pytest.mark.parametrize("path", ["~", "~/models/x", "~root/a b", "~/a.b-c/[1]"])
def test_a_home_folder_needs_no_quotes(path):
    (job,) = plan(["model=causal_lm", f"model.path={path}", "backend=quanto"]).jobs
    assert job.config.model.path == path


SIGNS = {
    "++evaluation.num_samples=30": ("evaluation", "num_samples", 30),
    "++device=cpu": (None, "device", "cpu"),
    "+quantization.modules_to_not_convert.mine=[proj_out]": (
        "quantization",
        "modules_to_not_convert",
        {"mine": ["proj_out"]},
    ),
    "++quantization.modules_to_not_convert.mine=[a]": ("quantization", "modules_to_not_convert", {"mine": ["a"]}),
}


@pytest.mark.parametrize("word", SIGNS)
def test_signs_that_do_what_hydra_does(word):
    node, name, value = SIGNS[word]
    (job,) = plan(["backend=quanto", word]).jobs
    assert getattr(getattr(job.config, node) if node else job.config, name) == value


@pytest.mark.parametrize(
    "word", ["+dtype=int8", "~dtype", "~dtype=int8", "+evaluation.x=1", "~quantization", "+++device=cpu", "~"]
)
def test_signs_that_are_refused(word):
    with pytest.raises(ConfigError) as caught:
        plan(["backend=quanto", word])
    assert str(caught.value).startswith(word.split("=")[0])


@pytest.mark.parametrize(
    "key",
    [
        "hydra.run.dir",
        "hydra.sweep.dir",
        "hydra.job.chdir",
        "hydra.verbose",
        "hydra/launcher",
        "hydra.launcher.n_jobs",
        "hydra",
    ],
)
def test_hydras_own_keys_are_refused_with_what_does_their_work(key):
    for sign in ("", "+", "++"):
        with pytest.raises(ConfigError, match=rf"^\+*{key}(: Hydra's own keys do nothing here; |=x: keys are neither)"):
            plan(["backend=quanto", f"{sign}{key}=x"])


@pytest.mark.parametrize("word", ["quantization.x=['", "name='a", "name=a]b", "name={a", "name=(", "a.b.=1"])
def test_the_grammars_errors_name_the_bad_word(word):
    with pytest.raises(ConfigError) as caught:
        plan(["backend=quanto", "dtype=int8", word, "device=cpu"])
    assert str(caught.value).startswith(word)


ONLY_IMPOSSIBLE = ["backend=quanto", "dtype=nf4,fp4"]


@pytest.mark.parametrize("more", [[], ["sweep.dry_run=true"], ["sweep.search.num_trials=2"], ["--cfg"]])
@pytest.mark.parametrize("skip", [[], ["sweep.on_invalid=skip"]])
def test_a_sweep_of_nothing_but_impossible_points_is_refused_with_each(more, skip):
    with pytest.raises(ConfigError) as caught:
        dispatch(["-m", *ONLY_IMPOSSIBLE, *skip, *more])
    text = str(caught.value)
    assert text.startswith("2 of 2 combinations are impossible")
    assert "sweep.on_invalid=skip" not in text, "the advice would be what is set, or would change nothing"
    assert text.endswith("none is left; change a value")


def test_a_grid_that_is_empty_says_which_list(tmp_path):
    with pytest.raises(ConfigError, match=r"^sweep.grid.dtype: a list of values is wanted, not \[\]"):
        plan(["backend=quanto", "sweep.grid.dtype=[]"])
    with pytest.raises(ConfigError, match=r"^sweep.candidates\[0\]: an entry is empty"):
        plan(["sweep.candidates=[{}]"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["digits_backends"], "digits_backends: an override is key=value; did you mean recipe=digits_backends?"),
        (["recipe", "digits_backends"], "recipe: an override is key=value; write recipe=..."),
        (["backend", "=", "torchao"], "backend: an override is key=value; write backend=..., without spaces"),
        (["--recipe", "digits_backends"], "--recipe: no such option; keys have no dashes: recipe=..."),
        (["--backend=quanto"], "--backend=quanto: no such option; keys have no dashes: backend=..."),
        (["num_samples=5"], "num_samples: no such key; did you mean "),
        (["--columns", "backend=quanto"], "--columns: it needs a value"),
        (["bootstrap_seed=5"], "bootstrap_seed: no such key; did you mean evaluation.bootstrap_seed?"),
        (["device=gpu"], "device=gpu: no such choice; a GPU is device=cuda"),
        (["tracking=mlflow"], "tracking=mlflow: no such choice; MLflow is tracking=sqlite"),
        (["-m", "backend=quanto", "dtype=int8,int4,"], "dtype=int8,int4,: a value is wanted behind the last comma"),
        (["-m", "backend=torchao", "dtype=int4", "group_size=[32,64]"], "group_size=[32, 64]: one choice is wanted, and"
         " several are a sweep: -m group_size=32,64"),
    ],
)  # fmt: skip
def test_what_people_type_is_answered_with_what_they_meant(words, told):
    with pytest.raises(ConfigError) as caught:
        dispatch(words)
    assert str(caught.value).startswith(told)


def test_a_recipe_of_the_folder_is_named_with_its_ending(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").touch()
    with pytest.raises(ConfigError, match=r"^recipe=mine: no such recipe; did you mean recipe=mine.yaml\?"):
        plan(["recipe=mine"])


OF_FOUR = (
    "nf4, fp4 (backend=bitsandbytes); int4, nf4, nvfp4, mxfp4 (backend=torchao); int4 (backend=quanto); q4_0, q4_1, "
    "iq4_nl, q4_k, iq4_xs (backend=gguf); int4, nvfp4, mxfp4 (backend=modelopt)"
)
IN_BITS = {
    **dict.fromkeys(("4", "4bit", "load_in_4bit", "w4a16", "q4"), OF_FOUR),
    "8-bit": "int8 (backend=bitsandbytes); int8, float8_e4m3",
    "fp8": "float8_e4m3, float8_e5m2, mxfp8 (backend=torchao); float8_e4m3",
    "FP16": "bfloat16, float16 (backend=none)",
    "bf16": "bfloat16, float16 (backend=none)",
    "uint4": "int4 (backend=torchao); int4 (backend=quanto); int4 (backend=modelopt)",
    "int5": "q5_0, q5_1, q5_k (backend=gguf)",
}


@pytest.mark.parametrize("word", IN_BITS)
def test_a_dtype_that_is_a_number_of_bits_is_answered_with_what_has_them(word):
    with pytest.raises(ConfigError) as caught:
        plan(["backend=quanto", f"dtype={word}"])
    assert str(caught.value).startswith(f"dtype={word}: no dtype is called so; of ")
    assert f" bits there are {IN_BITS[word]}" in str(caught.value)


def test_what_rounds_activations_too_is_told():
    with pytest.raises(ConfigError, match=r"backend=quanto.*; activations are rounded by .*activation_dtype=int8$"):
        plan(["backend=quanto", "dtype=w8a8"])


@pytest.mark.parametrize(("word", "meant"), [("e4m3", "float8_e4m3"), ("E5M2", "float8_e5m2"), ("q4_k_m", "q4_k")])
def test_a_dtype_by_a_part_of_its_name(word, meant):
    with pytest.raises(ConfigError, match=rf"; did you mean {meant}\?$"):
        plan(["backend=quanto", f"dtype={word}"])


@pytest.mark.parametrize("word", ["7", "1", "99bit", "w7a8"])
def test_bits_that_nobody_has_are_answered_with_all_dtypes(word):
    with pytest.raises(ConfigError, match=r": there are auto, bfloat16"):
        plan(["backend=quanto", f"dtype={word}"])


def test_bits_in_a_candidate_are_answered_with_its_line(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "# @package _global_\nsweep:\n  candidates:\n    - {backend: quanto, dtype: 4}\n"
    )
    with pytest.raises(ConfigError, match=r"line 4: sweep.candidates\[0\].dtype=4: no dtype is called so; of 4 bits"):
        plan([f"recipe={tmp_path / 'mine.yaml'}"])


@pytest.mark.parametrize("text", ["re:a\\.b", "C:\\x", "end\\", "it's", "\\'", "a\\\\'b\\", "\\d+", "'", "\\\\"])
def test_a_value_is_what_was_written_whatever_its_backslashes(text):
    (read,) = parse([f"model.path={literal(text)}"])
    assert read.value() == text


def test_an_expression_with_a_backslash_is_the_same_on_the_command_line_in_python_and_in_a_candidate(tmp_path):
    typed = r"quantization.modules_to_not_convert.first=['re:layers\.[0-9]\..*']"
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "# @package _global_\n# Question?\nsweep:\n  candidates:\n"
        "    - {backend: quanto, dtype: int8, modules_to_not_convert.first: ['re:layers\\.[0-9]\\..*']}\n"
    )
    jobs = [*plan([typed, "backend=quanto", "dtype=int8"]).jobs, *plan([f"recipe={recipe}"]).jobs]
    found = [job.config.quantization.modules_to_not_convert["first"] for job in jobs if job.name.startswith("quanto")]
    assert [list(own) for own in found] == [["re:layers\\.[0-9]\\..*"]] * 2
