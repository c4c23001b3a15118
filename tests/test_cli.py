"""The command line: help, lists, configs, dry runs, JSON; what it imports; an installed wheel; signals."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from quantlab import cli
from quantlab.cli import KNOWN_FLAGS, help_text
from quantlab.commands import model_told
from quantlab.models.table import FAMILIES
from quantlab.planning.listing import LISTS
from quantlab.planning.places import groups, recipes
from quantlab.planning.plan import plan
from quantlab.vocabulary.schema import ModelConfig
from tests.support.shell import Shell, digits_words
from tests.support.stores import ROOT


@pytest.fixture
def quick(tmp_path):
    """The command line in an empty folder: for what runs nothing."""
    return Shell(tmp_path)


def ok(shell, *words):
    code, out, err = shell(*words)
    assert (code, err) == (0, "")
    return out


def python(*words, cwd, path=ROOT, **settings):
    """``python WORDS`` with nothing but ``path`` to import from."""
    env = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], env=env, cwd=cwd, capture_output=True, text=True, check=False, **settings
    )


# -- what there is


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"], ["backend=torchao", "--help"], ["list", "-h"]])
def test_help_names_every_group_option_and_list(quick, words):
    text = ok(quick, *words)
    flat = " ".join(text.split())
    for group, options in groups().items():
        assert f"\n  {group} " in text
        assert " ".join(options) in flat
    assert ", ".join(LISTS) in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 120


def test_the_list_of_models_says_what_runs_by_family():
    rows = {row["model"]: row for row in LISTS["models"]()}
    assert [row["family"] for row in rows.values()] == sorted(
        (row["family"] for row in rows.values()), key=["auto", *FAMILIES].index
    )
    assert {row["family"] for row in rows.values()} == {"auto", *FAMILIES}
    assert rows["flux_dev"]["datasets"] == "prompts image_prompts classes none"
    assert rows["digits_dit"]["datasets"] == "digits_classes"
    assert rows["seq2seq"]["datasets"] == "pairs wiki_extracts"
    assert rows["vision"]["datasets"] == "images"
    assert all(row["what it is"].endswith(".") for row in rows.values())


@pytest.mark.parametrize("what", LISTS)
def test_lists_as_tables_and_as_json(quick, what, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    rows = json.loads(ok(quick, "list", what, "--json"))
    assert rows == json.loads(json.dumps(LISTS[what]()))
    assert rows
    text = ok(quick, "list", what)
    assert what == "combinations" or all(str(next(iter(row.values())))[:10] in text for row in rows)


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("what", LISTS)
def test_no_name_of_a_list_is_broken_and_no_sentence_cut(quick, what, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    text, rows = ok(quick, "list", what), [row for row in LISTS[what]() if row.get("offered", True)]
    assert max(map(len, text.splitlines())) <= width
    name = next(iter(rows[0]))
    first = [line.strip("│").split("│")[0].strip() for line in text.splitlines() if line.startswith("│")]
    assert [word for word in first if word] == [str(row[name]) for row in rows]
    assert "what it is" not in rows[0] or "what it is" in text.partition("┡")[0]
    if what in ("datasets", "evaluations"):
        assert all(row["what it is"].endswith(".") for row in rows), "whole sentences"


def test_the_combinations_fit_a_terminal(quick, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = ok(quick, "list", "combinations")
    lines = [[cell.strip() for cell in line.strip("│┃").split("│")] for line in text.splitlines() if "│" in line]
    offered = [
        (r["backend"], r["dtype"]) for r in json.loads(ok(quick, "list", "combinations", "--json")) if r["offered"]
    ]
    assert [(row[0], row[1]) for row in lines if row[0]] == offered, "no name is broken over lines"
    assert max(map(len, text.splitlines())) <= 80


def test_the_lists_show_what_can_be_chosen(quick):
    def column(what, name):
        return {row[name] for row in json.loads(ok(quick, "list", what, "--json"))}

    assert column("models", "model") == set(groups()["model"])
    assert column("recipes", "recipe") == set(recipes())
    assert column("backends", "backend") == set(groups()["backend"])
    assert column("dtypes", "dtype") | {"auto"} == set(groups()["dtype"])
    assert {"quality/latent_rel_mse", "quality/kld_mean"} <= column("metrics", "metric")


# -- what would run


REQUESTS = [
    ["backend=torchao", "dtype=int4", "group_size=64"],
    ["backend=bitsandbytes", "dtype=nf4", "modules_to_not_convert=[norms,output]", "evaluation=quick"],
    ["model=causal_lm", "model.path=somewhere", "dataset=text", "dataset.path=a b.txt", "backend=gguf", "dtype=q4_0"],
]


@pytest.mark.parametrize("words", REQUESTS, ids=" ".join)
def test_a_printed_config_is_a_recipe_that_composes_to_the_same(quick, words):
    file = quick.folder / "printed.yaml"
    file.write_text(ok(quick, *words, "--cfg"))
    again = ok(quick, f"recipe={file}", "--cfg")
    assert again == file.read_text()
    [first], [second] = plan(words).jobs, plan([f"recipe={file}"]).jobs
    assert second.schemes[""].native == first.schemes[""].native


@pytest.mark.parametrize("position", [0, 1, 3])
@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_a_sweep_by_its_flag_in_any_place(quick, flag, position):
    words = ["backend=torchao", "dtype=int4", "group_size=32,64,128", "sweep.dry_run=true"]
    words.insert(position, flag)
    text = ok(quick, *words)
    assert text.startswith("3 jobs:\n")
    assert [line.split()[:3] for line in text.splitlines()[1:7:2]] == [
        ["torchao", "int4", group] for group in ("g32", "g64", "g128")
    ]
    assert list(quick.folder.iterdir()) == [], "a dry run leaves nothing"


def test_a_reason_of_many_combinations_is_said_once(quick):
    for words in (["dtype=int8,int44"], ["dtype=int8,int44", "sweep.dry_run=true"]):
        code, out, err = quick("-m", "backend=quanto,torchao,modelopt", *words)
        assert code == 2
        assert (out + err).count("dtype=int44: there are") == 1
        assert all(f" backend={name} dtype=int44\n" in out + err for name in ("quanto", "torchao", "modelopt"))


@pytest.mark.parametrize("skips", [False, True])
def test_a_dry_run_shows_what_is_impossible_and_ends_as_the_run_does(quick, skips):
    words = ["-m", "backend=quanto,bitsandbytes", "dtype=int8,nf4", *(["sweep.on_invalid=skip"] if skips else [])]
    code, text, err = quick(*words, "sweep.dry_run=true")
    assert text.startswith("3 jobs:\n")
    assert "impossible: backend=quanto dtype=nf4\n      dtype=nf4: quanto offers " in text
    assert code == (0 if skips else 2)
    assert ("refuses 1 of 4 combinations; sweep.on_invalid=skip" in err) != skips


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["recipe=digits_backends", "evaluation=quick"],
        ["recipe=digits_bitwidths"],
        ["-m", "backend=torchao", "dtype=int4", "group_size=32,64"],
        ["-m", "backend=quanto", "modules_to_not_convert=[],[norms]", "sweep.grid={dtype: [int8, int4]}"],
        ["backend=quanto", "dtype=int4", "name='it is (mine)'"],
    ],
    ids=" ".join,
)
def test_each_line_of_a_dry_run_gives_exactly_that_job(quick, words):
    flags = [w for w in words if w == "-m"]
    jobs = plan([w for w in words if w != "-m"], multirun=bool(flags)).jobs
    text = ok(quick, *words, "sweep.dry_run=true")
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("      quantlab ")]
    assert len(commands) == len(jobs)
    for command, job in list(zip(commands, jobs, strict=True))[:4]:
        [single] = plan(command[1:]).jobs
        assert {c: s.native for c, s in single.schemes.items()} == {c: s.native for c, s in job.schemes.items()}
        for part in ("model", "dataset", "evaluation", "calibration", "quantization", "device", "name"):
            assert repr(getattr(single.config, part)) == repr(getattr(job.config, part))


def test_the_lines_of_a_dry_run_are_as_one_would_type_them(quick):
    text = ok(quick, "-m", "backend=torchao", "dtype=int4", "group_size=32,64", "sweep.dry_run=true")
    assert "      quantlab backend=torchao dtype=int4 group_size=32\n" in text


@pytest.mark.parametrize(("typed", "meant"), [("plna", "plan"), ("inti", "init"), ("reproduec", "reproduce")])
def test_a_command_that_was_mistyped(quick, typed, meant):
    code, _, err = quick(typed)
    assert code == 2
    assert f"did you mean {meant}?" in err


@pytest.mark.parametrize(
    ("path", "told"),
    [(None, "causal_lm"), ("owner/Some-LM-1B", "Some-LM-1B"), ("/models/my model/", "my model"), ("/", "causal_lm")],
)
def test_a_table_names_its_model(path, told):
    assert model_told(ModelConfig(family="causal_lm", path=path)) == told


def test_help_alone_is_the_help(quick):
    assert ok(quick, "help") == ok(quick, "--help")


def test_run_may_be_said(quick):
    assert ok(quick, "run", "backend=quanto", "sweep.dry_run=true") == ok(quick, "backend=quanto", "sweep.dry_run=true")


# -- what is printed


def test_the_table_and_json_hold_the_same_rows(shell):
    words = digits_words("backend=quanto", "dtype=int8")
    code, out, err = shell(*words)
    assert code == 0
    names = ("reference", "floor_bf16", "floor_batch", "quanto int8")
    places = [out.index(name) for name in names]
    assert places == sorted(places)
    assert "bits/weight" in out
    assert max(map(len, out.splitlines())) <= 132
    rows = shell.rows(*words)
    assert tuple(rows) == names
    assert f"{rows['quanto int8']['metrics']['memory/compression']:.2f}x" in out


# -- processes


QUESTIONS = [(["--help"], 0), (["list", "models"], 0), (["backend=quanto", "dtype=nf4"], 2)]
ASKED = """
import json, sys
from quantlab.cli import main
for words in json.loads(sys.argv[1]):
    try:
        main(words)
    except SystemExit as ended:
        found = [m for m in ("torch", "mlflow", "transformers", "diffusers") if m in sys.modules]
        print("\\n::", json.dumps([words, ended.code or 0, found]))
"""


def test_torch_is_not_imported_to_answer(tmp_path):
    """One process, question after question: what an earlier one imports, a later one has."""
    done = python("-c", ASKED, json.dumps([words for words, _ in QUESTIONS]), cwd=tmp_path)
    answers = [json.loads(line.removeprefix("::")) for line in done.stdout.splitlines() if line.startswith("::")]
    assert answers == [[words, code, []] for words, code in QUESTIONS], done.stderr


def test_python_m_quantlab(tmp_path):
    done = python("-m", "quantlab", "list", "recipes", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "digits_backends" in done.stdout


PRINTED = [
    pytest.param(["--help"], marks=pytest.mark.slow),
    ["list", "combinations"],
    pytest.param(["list", "combinations", "--json"], marks=pytest.mark.slow),
]


@pytest.mark.parametrize("words", PRINTED)
def test_a_reader_that_has_seen_enough_is_no_error(words, tmp_path):
    """As in ``quantlab ... | head``."""
    read, write = os.pipe()
    os.close(read)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "quantlab", *words]
    done = subprocess.run(command, env=env, cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("words", PRINTED)
def test_an_output_without_room(words, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "quantlab", *words]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, env=env, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr.startswith("quantlab: output: cannot be written (")
    assert done.stderr.endswith("and give the same command again\n")


SIGNALLED = """
import os, signal, sys
from quantlab.protocols.table import PROTOCOLS
from quantlab.cli import main
protocol = PROTOCOLS["diffusion"]

def measure(*args, **kwargs):
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    import time
    time.sleep(30)

protocol.measure = measure
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs are told to ignore
main(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "code", "failure", "said"),
    [
        ("SIGTERM", 143, "SIGTERM: the process was told to end", "quantlab: told to end; finished jobs are kept\n"),
        ("SIGINT", 130, "interrupted by its user", "quantlab: interrupted; finished jobs are kept\n"),
    ],
)
def test_a_signal_leaves_a_failed_run(shell, name, code, failure, said):
    words = ["-m", *digits_words("backend=quanto", "dtype=int8,int4"), "-q", "sweep.floors=false"]
    done = python("-c", SIGNALLED, name, *words, cwd=shell.folder, timeout=120)
    assert done.returncode == code, done.stderr
    assert done.stderr.endswith(said)
    assert "Traceback" not in done.stderr
    failed = shell.tracked("FAILED")
    assert set(failed) == {"sweep", "quanto int8"}
    child = failed["quanto int8"]
    assert child["tags"]["quantlab.failure"].strip() == failure
    assert failed["sweep"]["tags"]["quantlab.failure"].strip() == failure
    assert child["tags"]["quantlab.stage"] == "evaluate"
    assert child["metrics"]["memory/weights_bytes"] > 0
    assert shell.tracked("RUNNING") == {}


# -- a wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The unpacked wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listing = ["git", "ls-files", "-z", "-co", "--exclude-standard"]
    files = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in files.split("\0"):
        if name.startswith(("quantlab/", "conf/", "recipes/")) or name in ("pyproject.toml", "README.md", "LICENSE"):
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target)
    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    words = [sys.executable, "-c", build, str(folder)]
    done = subprocess.run(words, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(folder / done.stdout.strip().splitlines()[-1]) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_what_is_no_code_is_told_to_the_wheel():
    """Its build is slow; here is what it is told."""
    said = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert said["force-include"] == {"conf": "quantlab/_conf", "recipes": "quantlab/_recipes"}
    assert said["packages"] == ["quantlab"]


@pytest.mark.slow
def test_a_wheel_holds_the_vocabulary_and_the_recipes(wheel, tmp_path):
    def names(folder):
        return {p.relative_to(folder).as_posix() for p in folder.rglob("*.yaml")}

    assert names(wheel / "quantlab" / "_conf") == names(ROOT / "conf")
    assert names(wheel / "quantlab" / "_recipes") == names(ROOT / "recipes")
    assert (wheel / "quantlab" / "models" / "assets.txt").is_file()
    listed = python("-m", "quantlab", "list", "recipes", "--json", cwd=tmp_path, path=wheel)
    assert {row["recipe"] for row in json.loads(listed.stdout)} == names_of_recipes()
    composed = python("-m", "quantlab", "recipe=digits_backends", "sweep.dry_run=true", cwd=tmp_path, path=wheel)
    assert composed.stdout.startswith("11 jobs:\n"), composed.stderr


def names_of_recipes():
    return {p.stem for p in (ROOT / "recipes").glob("*.yaml")}


def test_help_fits_a_terminal_of_80_columns_and_its_examples_can_be_pasted(quick, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = ok(quick, "--help")
    assert max(map(len, text.splitlines())) <= 80
    assert text == help_text() + "\n", "it is as it was written: no line is wrapped anew"
    examples = text.partition("for example\n")[2].partition("\n\n")[0].splitlines()
    assert len(examples) >= 4
    for line in examples:
        words = shlex.split(line)[1:]
        if words[0] in ("help", "plan"):
            assert words[0] == "help" or quick(*words[1:], "sweep.dry_run=true")[0] == 0
        else:
            assert quick(*words, "sweep.dry_run=true")[0] == 0, line


@pytest.mark.parametrize("way", sorted({*KNOWN_FLAGS, "-c", "-cd", "--config-dir"}))
def test_help_shows_every_flag(way):
    assert re.search(rf"(?<![\w-]){re.escape(way)}(?![\w-])", help_text())


def test_help_shows_every_command_group_list_and_variable():
    text = help_text()
    commands = re.findall(r'words\[:1\] == \["(\w+)"\]', inspect.getsource(cli)) + ["list"]
    assert {"compare", "reproduce"} <= set(commands)
    sources = "".join(file.read_text() for file in Path(cli.__file__).parent.rglob("*.py"))
    variables = set(re.findall(r'"(QUANTLAB_[A-Z]+)"', sources))
    for word in [*(f"quantlab {command}" for command in commands), *groups(), *LISTS, *variables]:
        assert word in text, word
