"""``quantlab plan`` as it is typed."""

import json
import subprocess
import sys

import pytest

from quantlab import cli
from quantlab.planning.architectures import shipped_architectures
from quantlab.planning.listing import LISTS
from quantlab.planning.places import recipes
from quantlab.planning.plan import plan
from quantlab.running.forecast import forecast

OPTIONS = sorted(set(shipped_architectures()) - {"minilm_l6"})


def run(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", *words])
    return ended.value.code, capsys.readouterr().out


def test_one_combination_is_tables_and_a_verdict(capsys):
    code, out = run(capsys, "model=qwen3_0_6b", "backend=gguf", "dtype=q4_k", "quantization.file_type=q4_k_m",
                    "memory.device_gib=8")  # fmt: skip
    assert code == 0
    assert "model in a file of llama.cpp: " in out
    assert "fits 8 GiB on the device: resident" in out
    assert "model keeps:" in out


def test_a_grid_is_a_table_and_its_reasons(capsys):
    code, out = run(capsys, "-m", "model=qwen3_0_6b", "backend=quanto,gguf", "dtype=int8,q8_0")
    assert code == 0
    assert "quanto int8" in out
    assert "gguf q8_0" in out
    assert "scheme" in out
    assert "combination" not in out, "what is possible has its scheme's name, as in every other table"
    assert out.count("impossible: ") == 2


@pytest.mark.parametrize("words", [["dtype=int8"], ["-m", "dtype=int8,int4"]])
def test_it_says_for_which_device_it_plans(capsys, words):
    """One may sit at a CPU, where dtype and formats are other ones."""
    _, on_gpu = run(capsys, "model=qwen3_0_6b", "backend=torchao", *words)
    _, on_cpu = run(capsys, "model=qwen3_0_6b", "backend=torchao", *words, "device=cpu")
    said = [" ".join(out.split()) for out in (on_gpu, on_cpu)]
    assert "activations estimated; on a GPU (device=cpu: on a CPU)" in said[0]
    assert "activations estimated; on a CPU" in said[1]


def test_a_recipe_as_json(capsys):
    code, out = run(capsys, "recipe=smollm2_bitwidths", "--json")
    found = json.loads(out)
    assert code == 0
    assert len(found) > 2
    assert {row["components"][0]["parameters"] for row in found} == {134_515_008}
    assert not any(row["refused"] for row in found), "a shipped recipe has no scheme that fails"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(recipes()))
def test_no_shipped_recipe_has_a_scheme_that_fails(recipe):
    asked = plan([f"recipe={recipe}"])
    mismatch = {job.config.quantization.on_mismatch for job in asked.jobs}
    for price in forecast(asked):
        assert not price.refused or not price.components or mismatch == {"skip"}


def test_a_format_that_is_stored_wider_than_it_says_is_marked_as_in_a_run(capsys):
    words = ["model=qwen3_0_6b", "device=cpu"]
    own = "components.model={backend: torchao, dtype: int4}"
    for asked in ([*words, own], [*words, "backend=torchao", "dtype=int4"]):
        _, out = run(capsys, *asked)
        assert len([line for line in out.splitlines() if "│" in line and "~" in line]) == 3  # codes, all, total
        assert "~ simulated: stored wider than the dtype says" in out
        [price] = json.loads(run(capsys, *asked, "--json")[1])
        assert price["is_simulated"] is price["components"][0]["is_simulated"] is True
    _, out = run(capsys, *words, "-m", "backend=quanto,torchao", "dtype=int4")
    assert [line.split("│")[2].strip()[:1] == "~" for line in out.splitlines() if " int4 " in line] == [False, True]
    [price] = json.loads(run(capsys, "model=qwen3_0_6b", "backend=torchao", "dtype=int4", "--json")[1])
    assert price["is_simulated"] is False, "packed on CUDA"


def test_nothing_possible_is_a_bad_request(capsys):
    assert run(capsys, "model=qwen3_0_6b", "backend=quanto", "dtype=nf4")[0] == 2


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_every_shipped_model_has_a_plan(option):
    [price] = forecast(plan([f"model={option}", "backend=quanto", "dtype=int8", "memory.device_gib=24"]))
    assert price.total_bytes > 0
    assert price.fits is not None
    for rows in price.phases.values():
        assert all(phase.device_bytes >= phase.activation_bytes >= 0 for phase in rows)
        assert any(phase.activation_bytes for phase in rows)


NOT_FOR_AN_ANSWER = {"mlflow", "sqlalchemy", "alembic", "pandas", "sklearn", "matplotlib", "optuna", "submitit", "ray"}
LIBRARIES = NOT_FOR_AN_ANSWER | {"torch", "numpy", "scipy", "transformers", "diffusers", "huggingface_hub", "PIL"}
OTHER_BACKENDS = {"modelopt", "optimum.quanto"}
LIGHT = [["--help"], ["--version"], *(["list", what] for what in LISTS), ["help", "floor"]]
LIGHT += [["sweep.dry_run=true", "backend=none"], ["backend=quanto", "dtype=nf4"]]
HEAVY = [["plan", "model=llama_3_2_1b", "backend=gguf", "dtype=q4_k"], ["plan", "backend=bitsandbytes", "dtype=nf4"]]
HEAVY += [["sweep.dry_run=true", "backend=gguf", "dtype=q8_0"]]
NAMES = """
import contextlib, io, json, sys
from quantlab.cli import main
out = {}
for words in json.loads(sys.argv[1]):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        main(words)
    out[" ".join(words)] = sorted(sys.modules)
print(json.dumps(out))
"""


def imported(commands, folder):
    """Command -> what is imported when it has answered, of commands that one process answers in turn."""
    done = subprocess.run(
        [sys.executable, "-c", NAMES, json.dumps(commands)], capture_output=True, text=True, cwd=folder, check=True
    )
    return json.loads(done.stdout)


def test_commands_that_need_no_library_import_none(tmp_path):
    for words, modules in imported(LIGHT, tmp_path).items():
        assert not LIBRARIES & set(modules), words


@pytest.mark.slow
def test_a_plan_imports_what_models_are_made_of_and_nothing_of_runs(tmp_path):
    for words, modules in imported(HEAVY, tmp_path).items():
        assert not (NOT_FOR_AN_ANSWER | OTHER_BACKENDS) & set(modules), words
