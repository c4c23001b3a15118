"""What a recipe of others decides (places, addresses, engines) is shown and asked for once; what the user types is not."""

from __future__ import annotations

import dataclasses
import io
import shutil
import sys

import pytest

import quantlab
from quantlab.cli import agree, dispatch
from quantlab.errors import ConfigError
from quantlab.planning.places import recipes
from quantlab.planning.plan import plan
from quantlab.planning.trust import is_trusted, question, remember, trusted_file
from quantlab.running import sweep
from quantlab.vocabulary.schema import ExperimentConfig

DECIDED = {
    "tracking.uri": ("tracking: {uri: 'http://stranger:5000'}", "http://stranger:5000"),
    "tracking.experiment": ("tracking: {experiment: theirs}", "theirs"),
    "tracking.required": ("tracking: {required: false}", "False"),
    "output_dir": ("output_dir: ../elsewhere", "../elsewhere"),
    "export.path": ("export: {path: ../elsewhere}", "../elsewhere"),
    "dataset.path": ("defaults: [override /dataset: prompts]\ndataset: {path: /etc/passwd}", "/etc/passwd"),
    "calibration.path": ("calibration: {path: secrets.txt}", "secrets.txt"),
    "model.path": ("defaults: [override /model: diffusers]\nmodel: {path: someone/elses}", "someone/elses"),
    "launcher.engine": ("defaults: [override /launcher: slurm]", "slurm"),
    "launcher.num_workers": ("launcher: {num_workers: 9}", "9"),
    "launcher.settings.partition": (
        "defaults: [override /launcher: slurm]\nlauncher: {settings: {partition: theirs}}",
        "theirs",
    ),
    "launcher.settings.ray.init.address": (
        "defaults: [override /launcher: ray]\nlauncher: {settings: {ray: {init: {address: 'ray://x'}}}}",
        "ray://x",
    ),
    "quantization.imatrix_file": (
        "defaults: [override /backend: gguf, override /dtype: q4_k]\nquantization: {algorithm: imatrix, imatrix_file: x.gguf}",
        "x.gguf",
    ),
}
ELSEWHERE = {
    "a grid": ("dataset: {name: prompts}\nsweep: {grid: {dataset.path: [a, b]}}", "dataset.path", "a, b"),
    "a candidate": ("sweep: {candidates: [{backend: quanto, tracking.uri: 'http://x'}]}", "tracking.uri", "http://x"),
    "another key": ("name: 'http://y'\ntracking: {uri: '${name}'}", "tracking.uri", "http://y"),
    "a shipped option": ("defaults: [override /tracking: server]", "tracking.uri", "http://127.0.0.1:5000"),
    "marks that turn the line around": ('output_dir: "a\\u202eb"', "output_dir", "a\\u202eb"),
}
USERS = {
    "tracking.uri": ["tracking.uri=sqlite:///mine.db"],
    "output_dir": ["output_dir=mine"],
    "dataset.path": ["dataset.path=mine.txt"],
    "model.path": ["model=diffusers", "model.path=mine"],
    "launcher.num_workers": ["launcher.num_workers=2"],
}


def written(folder, text, name="mine.yaml"):
    file = folder / name
    file.write_text(f"# @package _global_\n{text}\n")
    return f"recipe={file}"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.mark.parametrize("key", DECIDED)
def test_what_a_recipe_decides_is_shown_and_refused_without_a_word_of_the_user(tmp_path, key):
    text, value = DECIDED[key]
    found = plan([written(tmp_path, text)])
    assert found.asked_for[key] == value
    assert set(found.asked_for) <= {key, *(k for k in found.asked_for if k.startswith(("launcher.", "model.path")))}
    with pytest.raises(ConfigError, match=r"^recipe=\S*mine.yaml: it does not come with quantlab") as caught:
        sweep.run_plan(found)
    assert f"  {key} = {value}\n" in str(caught.value)
    assert "--trust" in str(caught.value)


@pytest.mark.parametrize("way", ELSEWHERE)
def test_wherever_it_is_said(tmp_path, way):
    text, key, value = ELSEWHERE[way]
    assert plan([written(tmp_path, text)]).asked_for[key] == value


def test_every_text_that_is_a_place_is_guarded():
    """A new key with a path or an address in its name is guarded, or is named here."""
    from quantlab.planning.trust import _guarded

    def leaves(node, prefix=""):
        for field in dataclasses.fields(node):
            value = getattr(node, field.name)
            if dataclasses.is_dataclass(value):
                yield from leaves(value, f"{prefix}{field.name}.")
            else:
                yield f"{prefix}{field.name}"

    places = {
        k for k in leaves(ExperimentConfig()) if k.split(".")[-1].endswith(("path", "uri", "dir", "file", "folder"))
    }
    assert places <= {key for key, _ in _guarded(ExperimentConfig())}


@pytest.mark.parametrize("key", USERS)
def test_what_the_user_typed_is_not_asked_for(tmp_path, key):
    recipe = written(tmp_path, DECIDED[key][0])
    assert key not in plan([recipe, *USERS[key]]).asked_for


def test_an_option_of_the_users_does_not_cover_the_recipes_own_value(tmp_path):
    recipe = written(tmp_path, "tracking: {uri: 'http://stranger', experiment: theirs}")
    assert plan([recipe, "tracking=server"]).asked_for == {}, "the option's values win, and are the user's"
    recipe = written(tmp_path, "tracking: {save_checkpoint: false}")
    assert plan([recipe, "tracking=server"]).asked_for == {"tracking.save_checkpoint": "False"}


@pytest.mark.parametrize(
    "name", ["flux_dev_nf4", *(pytest.param(n, marks=pytest.mark.slow) for n in ("digits_backends", "smollm2_imatrix"))]
)
def test_a_shipped_recipe_asks_for_nothing_and_its_copy_neither(tmp_path, name):
    assert plan([f"recipe={name}"]).asked_for == {}
    shutil.copyfile(recipes()[name], tmp_path / "copy.yaml")
    asked = plan([f"recipe={tmp_path / 'copy.yaml'}"]).asked_for
    assert asked == {}


@pytest.mark.parametrize(
    "text", ["sweep: {grid: {dtype: [int8, int4]}}", "evaluation: {num_samples: 30}", "device: cpu"]
)
def test_numbers_and_schemes_are_never_asked_for(tmp_path, text):
    assert plan([written(tmp_path, text)]).asked_for == {}


@pytest.mark.parametrize("setting", ["setup: [rm -rf x]", "additional_parameters: {wrap: x}"])
def test_commands_are_never_taken_from_a_recipe_and_may_be_typed(tmp_path, setting):
    text = f"defaults: [override /launcher: slurm]\nlauncher: {{settings: {{{setting}}}}}"
    with pytest.raises(ConfigError, match=r"^recipe=\S*mine.yaml: line 3: launcher.settings\..*runs commands"):
        plan([written(tmp_path, text)])
    words = ["launcher=slurm", "backend=quanto", "launcher.settings.setup=['module load cuda']"]
    assert plan(words).jobs[0].config.launcher.settings.setup == ["module load cuda"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Answers at a terminal; what was shown there."""

    def answer(text):
        shown = Terminal()
        monkeypatch.setattr(sys, "stdin", Terminal(text))
        monkeypatch.setattr(sys, "stderr", shown)
        return shown

    return answer


def test_it_is_asked_for_once_and_again_when_the_recipe_changes(tmp_path, terminal):
    recipe = written(tmp_path, "output_dir: there")
    shown = terminal("y\n")
    agree(plan([recipe]), trust=False)
    assert "output_dir = there" in shown.getvalue()
    shown = terminal("")
    agree(plan([recipe]), trust=False)
    assert shown.getvalue() == ""
    sweep.require_trust(plan([recipe, "backend=quanto"]), trust=False)
    written(tmp_path, "output_dir: elsewhere")
    with pytest.raises(ConfigError, match=r"^recipe=\S*mine.yaml: not agreed to"):
        agree(plan([recipe]), trust=False)


@pytest.mark.parametrize("answer", ["", "n\n", "\n", "maybe\n"])
def test_no_answer_is_no(tmp_path, terminal, answer):
    terminal(answer)
    with pytest.raises(ConfigError, match="not agreed to"):
        agree(plan([written(tmp_path, "output_dir: there")]), trust=False)
    assert not trusted_file().exists()


def test_the_users_list_may_be_damaged_or_unwritable(tmp_path):
    found = plan([written(tmp_path, "output_dir: there")])
    trusted_file().parent.mkdir(parents=True)
    trusted_file().write_bytes(b"\xff\xfe\n")
    assert not is_trusted(found)
    trusted_file().unlink()
    trusted_file().mkdir()
    remember(found)
    assert not is_trusted(found)
    assert "output_dir = there" in question(found)


def test_from_python_trust_is_an_argument(tmp_path, monkeypatch):
    began = []
    monkeypatch.setattr(
        sweep, "open_session", lambda *args, **more: began.append(1) or (_ for _ in ()).throw(ConfigError("begun"))
    )
    file = written(tmp_path, "output_dir: there").removeprefix("recipe=")
    with pytest.raises(ConfigError, match="trust=True"):
        quantlab.run(recipe=file)
    assert not began
    with pytest.raises(ConfigError, match="^begun"):
        quantlab.run(recipe=file, trust=True)


def test_a_printed_config_asks_for_nothing(tmp_path, capsys):
    recipe = written(tmp_path, "output_dir: there")
    assert dispatch([recipe, "backend=quanto", "--cfg"]) == 0
    assert "output_dir: there" in capsys.readouterr().out


def test_a_dry_run_shows_the_jobs_and_then_ends_as_the_run_does(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [written(tmp_path, "output_dir: there"), "backend=quanto"]
    ended = []
    for more in (["sweep.dry_run=true"], []):
        with pytest.raises(ConfigError, match="--trust") as caught:
            dispatch([*words, *more])
        ended.append(str(caught.value))
    assert ended[0] == ended[1]
    assert capsys.readouterr().out.startswith("1 job:\n")
    with pytest.raises(ConfigError, match="trust=True"):
        quantlab.run(recipe=words[0].removeprefix("recipe="), overrides=[*words[1:], "sweep.dry_run=true"])
    assert not (tmp_path / "there").exists()


def test_a_dry_run_that_is_agreed_to_gives_lines_that_are(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = written(tmp_path, "output_dir: there")
    assert dispatch([recipe, "backend=quanto", "sweep.dry_run=true", "--trust"]) == 0
    line = capsys.readouterr().out.splitlines()[2].split()
    assert line[0] == "quantlab"
    assert dispatch([*line[1:], "sweep.dry_run=true"]) == 0


def test_a_dry_run_at_a_terminal_says_that_its_run_asks(tmp_path, terminal, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = terminal("")
    assert dispatch([written(tmp_path, "output_dir: there"), "backend=quanto", "sweep.dry_run=true"]) == 0
    assert "  output_dir = there\nthe run asks whether you agree\n" in shown.getvalue()
    assert not trusted_file().exists()
