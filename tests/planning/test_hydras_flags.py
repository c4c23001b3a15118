"""Flags that Hydra's users know: they do their work, or say what does."""

from __future__ import annotations

import subprocess

import pytest

from quantlab.cli import dispatch
from quantlab.errors import ConfigError
from quantlab.planning.completion import SCRIPT, completions
from quantlab.planning.listing import LISTS
from quantlab.planning.places import conf_dir, groups, recipe_dirs
from quantlab.planning.plan import plan


def said(capsys, *words):
    assert dispatch(list(words)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "flag", [["--cfg"], ["--cfg", "job"], ["--cfg=job"], ["-c", "job"], ["--cfg", "job", "--resolve"]]
)
def test_the_config_of_a_job(capsys, flag):
    text = said(capsys, "backend=quanto", *flag)
    assert text == said(capsys, "--cfg", "backend=quanto")
    assert "# @package _global_" in text


@pytest.mark.parametrize(
    "flag",
    [
        ["--cfg", "hydra"],
        ["-c", "all"],
        ["--cfg=hydra"],
        ["--package", "x"],
        ["-p"],
        ["--config-name=x"],
        ["--run"],
        ["--hydra-help"],
        ["--experimental-rerun=x"],
        ["--inof"],
    ],
)
def test_flags_that_do_nothing_here_are_refused(flag):
    with pytest.raises(ConfigError) as caught:
        dispatch(["backend=quanto", *flag])
    assert str(caught.value).startswith(("--cfg ", flag[0]))


def test_version_and_places(capsys):
    assert said(capsys, "--version").startswith("quantlab ")
    text = said(capsys, "--info")
    assert str(conf_dir()) in text
    assert all(str(folder) in text for folder in recipe_dirs())
    assert said(capsys, "-i") == text


def test_completion():
    assert completions("back") == ["backend="]
    assert completions("backend=to") == ["backend=torchao"]
    assert completions("dtype=int8,nf") == ["dtype=int8,nf4"]
    assert "recipe=digits_backends" in completions("recipe=digits_b")
    assert completions("device=c") == ["device=cpu", "device=cuda"]
    assert completions("sweep.on_inv") == ["sweep.on_invalid="]
    assert completions("evaluation.num_samples=") == []
    assert completions("nowhere.x=") == []
    assert completions("", "list") == list(LISTS)
    assert {f"{g}=" for g in groups()} <= set(completions(""))


def test_the_completions_script_is_bash():
    done = subprocess.run(["bash", "-n"], input=SCRIPT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    program = f"""
quantlab() {{ printf '%s\\n' "$2torchao" | grep -q . && echo "asked: $1 $2" >&3; echo "${{2}}rchao"; }}
{SCRIPT}
COMP_LINE="quantlab backend=to"; COMP_POINT=${{#COMP_LINE}}
COMP_WORDS=(quantlab backend = to); COMP_CWORD=3
_quantlab 2>/dev/null
echo "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", program + "\n"], capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("torchao")
    assert "backend=" not in done.stdout


@pytest.mark.parametrize(
    ("word", "same"),
    [
        ("quantization.backend=torchao", "backend=torchao"),
        ("quantization.dtype=int4", "dtype=int4"),
        ("quantization.group_size=64", "group_size=64"),
        ("++quantization.group_size=64", "group_size=64"),
    ],
)
def test_an_axis_by_its_parameters_name_is_the_choice(tmp_path, word, same):
    usual = [w for w in ("backend=torchao", "dtype=int4") if w != same]
    (first,), (second,) = plan([*usual, word]).jobs, plan([*usual, same]).jobs
    assert first.resolved == second.resolved
    assert dict(first.choices) == dict(second.choices)
    file = tmp_path / "again.yaml"
    file.write_text(first.recipe_yaml)
    again = plan([f"recipe={file}"]).jobs[0].resolved
    assert {k: v for k, v in again.items() if k != "recipe"} == {
        k: v for k, v in first.resolved.items() if k != "recipe"
    }


def test_an_axis_by_its_parameters_name_in_a_sweep():
    jobs = plan(["quantization.backend=torchao,quanto", "quantization.dtype=int8"], multirun=True).jobs
    assert [job.name for job in jobs] == ["torchao int8", "quanto int8"]
