"""What people get wrong in a recipe: a message with the line of the file, and with what to write."""

from __future__ import annotations

import pytest

from quantlab.errors import ConfigError
from quantlab.planning.lines import lines_of
from quantlab.planning.plan import plan
from quantlab.planning.trust import require_trust

GOOD = "{backend: quanto, dtype: int8}"
MISTAKES = {  # body below a header line -> line, and what the message says
    "model: causal_lm": (2, r"model: causal_lm: it is chosen in the defaults list.*\[override /model: causal_lm\]"),
    "evaluation:\n  seed: 1\ndataset: text": (4, r"dataset: text: .*override /dataset: .*its keys stand in a mapping"),
    "defaults:\n  - model: causal_lm": (3, "- override /model: causal_lm"),
    "defaults:\n  - override /dtype: int8\n  - /model: causal_lm": (4, "- override /model: causal_lm"),
    "defaults:\n  - override /model: causal_llm": (3, "did you mean causal_lm"),
    "defaults:\n  - override /modell: causal_lm": (3, "did you mean model"),
    "defaults: {override /model: causal_llm}": (2, "did you mean causal_lm"),
    "backend: quanto\ndtype: int8": (2, r"backend: quanto: .*\[override /backend: quanto\]"),
    "device: cpu\nbackend: qanto": (3, "did you mean quanto"),
    "algorithm: awq": (2, r"algorithm: it stands below quantization:, as in quantization: {algorithm: awq}"),
    "defaults:\n  - override /algorithm: awq": (3, r"it stands below quantization:, as in quantization: {algorithm: awq}"),
    "defaults:\n  - algorithm: awq": (3, r"it stands below quantization:, as in quantization: {algorithm: awq}"),
    "candidates: []": (2, "below sweep:"),
    "evaluation:\n  num_sample: 5": (3, "evaluation.num_sample: no such key; did you mean num_samples"),
    "evaluation:\n  num_samples: many": (3, "evaluation.num_samples=many: a whole number is wanted"),
    "evaluation:\n  bootstrap_seed: 1\n  num_samples: 0": (4, "evaluation.num_samples=0: a whole number from 1"),
    "evaluation: 5": (2, "evaluation: 5: it is chosen"),
    "memory: resident": (2, "memory: resident: a mapping of keys is wanted"),
    "evaluation.num_samples: 5": (2, "evaluation.num_samples: no such key; nest it"),
    "evalation:\n  num_samples: 5": (2, "did you mean evaluation"),
    "quantization:\n  on_mismach: skip": (3, "did you mean on_mismatch"),
    "quantization:\n  dtype: int8": (3, "- override /dtype: "),
    f"sweep:\n  candidate:\n    - {GOOD}": (3, "did you mean candidates"),
    f"sweep:\n  candidates:\n    - {GOOD}\n    - {{backend: quanto, dtyp: int8}}": (5, "dtyp: no such key; did you mean dtype"),
    f"sweep:\n  candidates:\n    - {GOOD}\n    - backend: quanto\n      dtype: int9": (6, "dtype=int9: .*did you mean int8"),
    "sweep:\n  candidates:\n    - {backend: quanto, dtype: [int8, int4]}": (4, r"one choice .* sweep.grid: {dtype: \[int8, int4\]}"),
    "sweep:\n  candidates:\n    - {backend: qanto}": (4, "did you mean quanto"),
    "sweep:\n  candidates:\n    - {backend: torchao, dtype: int4, group_size: 48}": (4, "the nearest are 32 and 64"),
    f"sweep:\n  candidates:\n    - {GOOD}\n    - {{backend: quanto, dtype: nf4}}": (5, "nf4 is offered by"),
    "sweep:\n  candidates:\n    - quanto int8": (4, "a scheme is keys and values"),
    f"sweep:\n  candidates:\n    {GOOD}": (3, "a list of schemes"),
    "sweep:\n  grid:\n    dtype: int8": (4, r"as in dtype: \[int8\]"),
    "sweep:\n  grid:\n    backend: [quanto]\n    dtyp: [int8]": (5, "did you mean dtype"),
    "sweep:\n  on_invalid: skip\n  grid:\n    backend: [quanto]\n    dtype: [int8, int9]": (6, "did you mean int8"),
    "sweep:\n\tcandidates: []": (3, "not valid YAML .*indent with spaces"),
    "model:\n  path: 'a\nevaluation: {num_samples: 5}\ndevice: cpu": ("3 to 5", "not valid YAML"),
    "evaluation:\n  num_samples: [5\ndevice: cpu": ("3 to 4", "not valid YAML"),
    "sweep:\n  candidates:\n    - {backend: quanto\n    - {backend: gguf}": ("4 to 5", "not valid YAML"),
    "evaluation:\n  num_samples: 5\n  bootstrap_seed\ndevice: cpu": ("4 to 5", "not valid YAML"),
    "evaluation:\n  num_samples: 5\n   bootstrap_seed: 3": (4, "not valid YAML"),
    "evaluation:\n   num_samples: 5\n  bootstrap_seed: 3": (4, "not valid YAML"),
    "device: cpu\ndevice: cuda": (3, "duplicate key device"),
    "hydra: {}": (2, "names code"),
}  # fmt: skip


def put(folder, text, header="# @package _global_\n", name="mine"):
    file = folder / f"{name}.yaml"
    file.write_text(header + text + "\n")
    return f"recipe={file}"


def refusal(*words):
    with pytest.raises(ConfigError) as caught:
        plan(words)
    return str(caught.value)


@pytest.mark.parametrize("text", MISTAKES)
def test_the_line_and_what_to_write(tmp_path, text):
    line, said = MISTAKES[text]
    with pytest.raises(ConfigError, match=rf"(?s)^recipe=\S*mine.yaml: .*lines? {line}: .*{said}") as caught:
        plan([put(tmp_path, text)])
    told = str(caught.value)
    assert told.count("mine.yaml") == 1
    for word in (
        "Merge error",
        "DictConfig",
        "full_key",
        "recipe/chosen",
        *([] if "not valid YAML" in told else ["{'"]),
    ):
        assert word not in told, "in quantlab's words"


def test_without_the_header(tmp_path):
    recipe = put(tmp_path, "device: cpu", header="# a question\n")
    assert (
        refusal(recipe)
        == f"{recipe}: line 1: its keys are ours only under a header; make the first line: # @package _global_"
    )


@pytest.mark.parametrize(("text", "said"), [("", "nothing stands in it"), ("- a\n- b\n", "it is one value or a list")])
def test_what_is_no_mapping_says_how_one_is_written(tmp_path, text, said):
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"^recipe=\S*mine.yaml: {said}, and a recipe has keys.*quantlab init"):
        plan([f"recipe={tmp_path / 'mine.yaml'}"])


def test_what_is_typed_has_no_line(tmp_path):
    recipe = put(tmp_path, "evaluation:\n  num_samples: 5")
    assert refusal(recipe, "evaluation.num_samples=0").startswith("evaluation.num_samples=0: ")
    assert refusal(recipe, "sweep.candidates=[{backend: qanto}]").startswith("sweep.candidates[0].backend=qanto: ")


def test_a_mistake_in_the_recipe_below(tmp_path):
    put(tmp_path, "device: cpu\nevaluation:\n  num_samples: 0", name="base")
    recipe = put(tmp_path, "defaults: [base]\ndataset: {seed: 1}")
    assert refusal(recipe).startswith(f"{recipe}: base.yaml line 4: evaluation.num_samples=0: ")


@pytest.mark.parametrize("text", ["", "device: [", "hydra: {}", "evaluation:\n  num_sample: 5", "output_dir: there"])
def test_the_file_is_named_as_it_was_typed(tmp_path, monkeypatch, text):
    (tmp_path / "rec" / "own").mkdir(parents=True)
    put(tmp_path / "rec", text)
    monkeypatch.chdir(tmp_path / "rec" / "own")
    with pytest.raises(ConfigError, match=r"^recipe=\.\./mine\.yaml: ") as caught:
        require_trust(plan(["recipe=../mine.yaml"]), False)
    assert str(caught.value).count("mine.yaml") == 1


def test_a_recipe_below_is_named_where_it_lies(tmp_path, monkeypatch):
    (tmp_path / "rec").mkdir()
    put(tmp_path / "rec", "device: [", name="base")
    put(tmp_path / "rec", "defaults: [base]")
    monkeypatch.chdir(tmp_path)
    assert refusal("recipe=rec/mine.yaml").startswith("recipe=rec/base.yaml: line 2: not valid YAML")


def test_lines_of_what_refers_to_itself():
    assert lines_of("a: &a\n  b: *a\nc: 1") == {("a",): 1, ("a", "b"): 2, ("c",): 3}
    assert lines_of("a: [") == {}
