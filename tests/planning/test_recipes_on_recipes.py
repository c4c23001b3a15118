"""A recipe that builds on another: siblings and named ones, values over values, and no way out of the recipes."""

from __future__ import annotations

import pytest

from quantlab.errors import ConfigError
from quantlab.planning.plan import plan

BASE = """
defaults: [override /backend: quanto, override /dtype: int4]
evaluation: {num_samples: 30, batch_size: 10}
quantization: {modules_to_not_convert: {mine: [a]}}
"""


def put(folder, name, text):
    file = folder / f"{name}.yaml"
    file.write_text(f"# @package _global_\n{text}\n")
    return f"recipe={file}"


@pytest.mark.parametrize("way", ["/recipe: base", "recipe: base", "base", "/recipe: base.yaml"])
def test_a_sibling_by_its_name(tmp_path, way):
    put(tmp_path, "base", BASE)
    recipe = put(
        tmp_path,
        "mine",
        f"defaults: [{way}, override /dtype: int8]\nevaluation: {{num_samples: 40}}\n"
        "quantization: {modules_to_not_convert: {more: [b]}}",
    )
    (job,) = plan([recipe]).jobs
    asked = job.config
    assert (asked.quantization.backend, asked.quantization.dtype) == ("quanto", "int8")
    assert (asked.evaluation.num_samples, asked.evaluation.batch_size) == (40, 10)
    assert asked.quantization.modules_to_not_convert == {"mine": ["a"], "more": ["b"]}
    assert asked.recipe == "mine"
    (job,) = plan([recipe, "dtype=int2", "evaluation.batch_size=5"]).jobs
    assert (job.config.quantization.dtype, job.config.evaluation.batch_size) == ("int2", 5)


@pytest.mark.slow
def test_a_shipped_one_by_its_name_and_another_list_in_its_place(tmp_path):
    recipe = put(tmp_path, "mine", "defaults: [/recipe: digits_backends]\nevaluation: {num_samples: 40}")
    assert [j.name for j in plan([recipe]).jobs] == [j.name for j in plan(["recipe=digits_backends"]).jobs]
    assert plan([recipe]).asked_for == {}
    recipe = put(tmp_path, "mine", "defaults: [/recipe: digits_backends]\nsweep: {grid: {backend: [quanto, torchao]}}")
    assert len(plan([recipe]).jobs) == 2


def test_of_the_same_name_it_is_the_shipped_one(tmp_path):
    recipe = put(tmp_path, "digits_backends", "defaults: [/recipe: digits_backends]\ndataset: {seed: 3}")
    jobs = plan([recipe]).jobs
    assert len(jobs) == 11
    assert {j.config.dataset.seed for j in jobs} == {3}


def test_what_the_lower_one_decides_is_asked_for_and_counts_for_what_was_agreed_to(tmp_path):
    put(tmp_path, "base", "output_dir: there")
    recipe = put(tmp_path, "mine", "defaults: [/recipe: base]")
    first = plan([recipe])
    assert first.asked_for == {"output_dir": "there"}
    put(tmp_path, "base", "output_dir: elsewhere")
    assert plan([recipe]).recipe_digest != first.recipe_digest


def test_a_chain(tmp_path):
    put(tmp_path, "a", BASE)
    put(tmp_path, "b", "defaults: [a]\nevaluation: {num_samples: 40}")
    (job,) = plan([put(tmp_path, "c", "defaults: [b]\ndataset: {seed: 2}")]).jobs
    assert (job.config.evaluation.num_samples, job.config.dataset.seed) == (40, 2)


REFUSED = {
    "defaults: [/recipe: mine]": "no such recipe",
    "defaults: [/recipe: nowhere]": "no such recipe",
    "defaults: [/recipe: ../outside]": "by its name",
    "defaults: ['/etc/passwd']": "by its name",
    "defaults: [/recipe: other, base]": "builds on one other",
    "defaults: [/recipe: loop]": "builds on itself",
    "defaults: [/recipe: bad]": "_target_ is not allowed",
    "defaults: [/recipe: [base]]": "by its name",
    "defaults: [/recipe: '${name}']": "by its name",
    "recipe: base": "built on in the defaults list",
    "sweep: {candidates: [{recipe: base}]}": "no such key",
    "sweep: {grid: {recipe: [base]}}": "no such key",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_refused(tmp_path, text):
    put(tmp_path, "other", "")
    put(tmp_path, "base", BASE)
    put(tmp_path, "bad", "launcher: {settings: {_target_: x}}")
    put(tmp_path, "loop", "defaults: [/recipe: mine]")
    (tmp_path / "other.yaml").write_text("# @package _global_\ndevice: cpu\n")
    with pytest.raises(ConfigError, match=rf"^recipe=\S+.yaml: .*{REFUSED[text]}"):
        plan([put(tmp_path, "mine", text)])


def test_any_file_name_will_do(tmp_path):
    (job,) = plan([put(tmp_path, "my first [recipe] = 'x'", "device: cpu"), "backend=quanto"]).jobs
    assert job.config.recipe == "my first [recipe] = 'x'"
