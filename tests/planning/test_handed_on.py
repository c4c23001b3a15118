"""A run that is handed on: its recipe.yaml runs anywhere, and leaves open what only its author has."""

from __future__ import annotations

import pytest
import yaml

from quantlab.errors import ConfigError
from quantlab.planning.plan import plan

PLACES = [
    "output_dir=ABS/out",
    "tracking.uri=sqlite:////ABS/x.db",
    "tracking.experiment=mine",
    "launcher.num_workers=3",
]
OWN = {
    "dataset.path": ["model=smollm2_135m", "dataset=text", "dataset.path=ABS/text.txt"],
    "model.path": ["model=diffusers", "model.path=ABS/model"],
    "weights of digits": ["model.path=ABS/weights"],
    "prompts": ["model=flux_schnell", "dataset.path=ABS/prompts.txt"],
    "in the home folder": ["model=causal_lm", "model.path=~/model"],
    "calibration.path": ["model=smollm2_135m", "calibration=text", "calibration.path=ABS/c.txt"],
    "an importance matrix": ["dtype=q4_k", "algorithm=imatrix", "quantization.imatrix_file=ABS/i.gguf"],
}


def given(tmp_path, words):
    return [w.replace("ABS", str(tmp_path)) for w in ("backend=gguf", *words)]


def write(tmp_path, job):
    file = tmp_path / "recipe.yaml"
    file.write_text(job.recipe_yaml)
    return f"recipe={file}"


def test_where_things_go_is_no_part_of_it(tmp_path):
    (job,) = plan(given(tmp_path, PLACES)).jobs
    assert str(tmp_path) not in job.recipe_yaml
    assert not {"output_dir", "tracking", "launcher"} & set(yaml.safe_load(job.recipe_yaml))
    again = plan([write(tmp_path, job)])
    assert again.asked_for == {}
    usual = again.jobs[0].config
    assert (usual.output_dir, usual.tracking.experiment) == ("outputs", "quantlab")


def test_what_decides_numbers_stays(tmp_path):
    (job,) = plan(["backend=quanto", "tracking.save_checkpoint=false", "dataset.seed=4"]).jobs
    config = plan([write(tmp_path, job)]).jobs[0].config
    assert (config.tracking.save_checkpoint, config.dataset.seed) == (False, 4)


@pytest.mark.parametrize("what", OWN)
def test_a_path_of_its_authors_own_is_a_key_to_give_and_never_another_file(tmp_path, what):
    words = given(tmp_path, OWN[what])
    typed = words[-1]
    key = typed.partition("=")[0]
    (job,) = plan(words).jobs
    assert str(tmp_path) not in job.recipe_yaml
    assert f"# Give it {key}=... as well" in job.recipe_yaml
    recipe = write(tmp_path, job)
    with pytest.raises(
        ConfigError,
        match=rf"^recipe=\S*recipe.yaml: line [0-9]+: {key}: is left to whoever runs this recipe; give {key}=",
    ):
        plan([recipe])
    (again,) = plan([recipe, typed]).jobs
    assert {k: v for k, v in again.resolved.items() if k != "recipe"} == {
        k: v for k, v in job.resolved.items() if k != "recipe"
    }


def test_a_relative_path_stays_and_so_does_a_hub_id(tmp_path):
    (job,) = plan(
        ["model=causal_lm", "model.path=owner/name", "dataset=text", "dataset.path=data/x.txt", "backend=quanto"]
    ).jobs
    found = plan([write(tmp_path, job)])
    assert (found.jobs[0].config.model.path, found.jobs[0].config.dataset.path) == ("owner/name", "data/x.txt")
    assert set(found.asked_for) == {"model.path", "dataset.path"}


def test_the_printed_config_and_a_process_of_its_own_have_all(tmp_path):
    (job,) = plan(given(tmp_path, PLACES)).jobs
    assert str(tmp_path / "out") in job.whole_yaml
    assert job.whole_yaml.startswith("# @package _global_\n")
