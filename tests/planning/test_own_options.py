"""``--config-dir``: a user's own options of our groups; they are data, hide nothing, and a run of theirs is for anyone."""

from __future__ import annotations

import json

import pytest

from quantlab.cli import dispatch, help_text
from quantlab.errors import ConfigError
from quantlab.planning.places import groups, own_options
from quantlab.planning.plan import plan

OWN = {
    "dtype/w8a8.yaml": "# @package quantization\ndtype: int8\nactivation_dtype: int8\n",
    "modules_to_not_convert/heads.yaml": "# @package quantization.modules_to_not_convert\nheads: ['re:.*head.*']\n",
    "model/mine.yaml": "# @package _global_\n# My own.\ndefaults:\n  - /model_schema@model: base\n  - override /dataset: text\n"
    "  - override /evaluation: language\n  - override /calibration: text\n  - _self_\n"
    "model: {family: causal_lm, path: my/model}\ndataset: {path: mine.txt}\n",
    "evaluation/long.yaml": "# @package evaluation\nnum_samples: 500\nbatch_size: 50\n",
}


@pytest.fixture
def folder(tmp_path):
    for name, text in OWN.items():
        file = tmp_path / "conf" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "conf"


CHOSEN = {
    "dtype=w8a8": lambda c: (c.quantization.dtype, c.quantization.activation_dtype) == ("int8", "int8"),
    "modules_to_not_convert=[heads,norms]": lambda c: set(c.quantization.modules_to_not_convert) == {"heads", "norms"},
    "model=mine": lambda c: (c.model.path, c.dataset.path) == ("my/model", "mine.txt"),
    "evaluation=long": lambda c: (c.evaluation.num_samples, c.evaluation.batch_size) == (500, 50),
}


@pytest.mark.parametrize("word", CHOSEN)
def test_an_own_option_is_chosen_like_ours_and_its_run_is_for_anyone(folder, word):
    with own_options(str(folder)):
        (job,) = plan(
            ["backend=torchao", "dtype=int4", word] if word[:5] != "dtype" else ["backend=torchao", word]
        ).jobs
        assert CHOSEN[word](job.config)
    with pytest.raises(ConfigError, match=rf"^{word.partition('=')[0]}="):
        plan(["backend=torchao", word])
    for text in (job.recipe_yaml, job.whole_yaml):
        (folder / "again.yaml").write_text(text)
        (again,) = plan([f"recipe={folder / 'again.yaml'}"]).jobs
        assert {k: v for k, v in again.resolved.items() if k != "recipe"} == {
            k: v for k, v in job.resolved.items() if k != "recipe"
        }


def test_a_grid_over_an_own_name(folder):
    with own_options(str(folder)):
        jobs = plan(["backend=torchao,quanto", "dtype=w8a8,int4", "sweep.on_invalid=skip"], multirun=True).jobs
    found = [(a.backend, a.dtype, a.activation_dtype) for a in (j.axes for j in jobs)]
    assert found == [
        ("torchao", "int8", "int8"),
        ("torchao", "int4", "none"),
        ("quanto", "int8", "int8"),
        ("quanto", "int4", "none"),
    ]


@pytest.mark.parametrize("flag", [["--config-dir", "DIR"], ["--config-dir=DIR"], ["-cd", "DIR"]])
def test_the_flag(folder, capsys, flag):
    flag = [w.replace("DIR", str(folder)) for w in flag]
    assert dispatch(["backend=torchao", *flag, "dtype=w8a8", "sweep.dry_run=true"]) == 0
    assert "torchao int8 a-int8" in capsys.readouterr().out
    assert dispatch(["--info", *flag]) == 0
    assert str(folder) in capsys.readouterr().out
    assert dispatch(["list", "models", "--json", *flag]) == 0
    assert "mine" in {row["model"] for row in json.loads(capsys.readouterr().out)}
    assert "w8a8" not in groups()["dtype"], "it lasts as long as the request"


BAD = {
    "nowhere": (None, "no such folder"),
    "empty": ({}, "no option in it"),
    "a taken name": (
        {"dtype/int8.yaml": "# @package quantization\ndtype: int4\n"},
        "dtype/int8.yaml has the name of a shipped option",
    ),
    "a choice that another hides": (
        {"dtype/w4.yaml": "# @package quantization\ndtype: int4\ngroup_size: 64\n"},
        "sets group_size",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_folders_that_are_refused(tmp_path, what):
    files, told = BAD[what]
    own = tmp_path / "own"
    if files is not None:
        own.mkdir()
        for name, text in files.items():
            (own / name).parent.mkdir()
            (own / name).write_text(text)
    with pytest.raises(ConfigError, match=rf"^--config-dir .*{told}"):
        dispatch(["--config-dir", str(own), "backend=quanto"])


@pytest.mark.parametrize(
    "text",
    [
        "# @package launcher.settings\nextra: {_target_: os.system}\n",
        "# @package _global_\nname: ${oc.env:HOME}\n",
        "# @package _global_\ndefaults: [override /hydra/launcher: nowhere]\n",
        "# @package nowhere\nx: 1\n",
        "a: [",
    ],
)
def test_an_own_option_is_data(tmp_path, text):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "mine.yaml").write_text(text)
    with own_options(str(tmp_path)), pytest.raises(ConfigError):
        plan(["backend=quanto", "evaluation=mine"])


def test_a_recipe_that_chooses_one_asks_for_what_it_decides(folder):
    (folder.parent / "r.yaml").write_text("# @package _global_\ndefaults: [override /model: mine]\n")
    with own_options(str(folder)):
        asked = plan([f"recipe={folder.parent / 'r.yaml'}", "backend=quanto"]).asked_for
    assert asked == {"model.path": "my/model", "dataset.path": "mine.txt"}


@pytest.mark.parametrize("word", CHOSEN)
def test_a_folder_conf_is_read_only_where_it_is_named(folder, monkeypatch, word):
    monkeypatch.chdir(folder.parent)
    group, _, name = word.partition("=")
    name = name.strip("[]").partition(",")[0]
    with pytest.raises(ConfigError, match=rf"^{group}=.*; conf/{group}/{name}.yaml is read by --config-dir conf$"):
        plan(["backend=torchao", word])
    with own_options("conf"):
        assert plan(["backend=torchao", word]).jobs
    with pytest.raises(ConfigError) as refused:
        plan([f"{group}=../{group}/{name}"])
    assert "--config-dir" not in str(refused.value)


def test_help_says_how_a_folder_of_ones_own_is_read():
    assert "--config-dir conf for ./conf" in help_text()
