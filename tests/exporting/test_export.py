"""A measured run as a folder that Diffusers or transformers load without quantlab: the command, the key, the check."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from quantlab.exporting import check, verify
from quantlab.exporting.folder import MANIFEST
from tests.support.shell import digits_words, make_shell, text_words
from tests.support.stores import artifact
from tests.support.tiny_text_models import OTHER, TEXT, save_llama

WORDS = digits_words("evaluation.num_samples=10", "device=cpu")


def language_words(folder: Path, *more: str) -> list[str]:
    """A run on a tiny Llama whose texts lie in ``folder``."""
    if not (folder / "llama").exists():
        save_llama(folder / "llama", hidden_size=64, intermediate_size=128)
        (folder / "text.txt").write_text(TEXT)
        (folder / "other.txt").write_text(OTHER)
    return [
        "model=causal_lm",
        f"model.path={folder / 'llama'}",
        "dataset=text",
        f"dataset.path={folder / 'text.txt'}",
        *text_words("cpu", f"calibration.path={folder / 'other.txt'}"),
        *more,
    ]


@pytest.fixture
def in_process(monkeypatch):
    """The check without a process of its own: what it costs are imports."""

    def compare(request, scratch):
        answers = []
        check.compare(request, answers.append)
        return json.loads(json.dumps(answers[-1])), ""

    monkeypatch.setattr(verify, "_fresh_process", compare)


@pytest.fixture(scope="module")
def exported(template, trained, tmp_path_factory):
    """A tiny Llama that was measured, and then exported by the command, with the real check."""
    shell = make_shell(tmp_path_factory.mktemp("exported") / "my work", template, trained)
    shell.rows(*language_words(shell.folder, "backend=torchao", "dtype=int8"))
    code, out, err = shell("export", "latest", "out", "-q")
    assert code == 0, err
    return shell, out


def test_what_was_measured_is_loaded_by_transformers_without_quantlab(exported):
    shell, out = exported
    assert "transformers LlamaForCausalLM.from_pretrained; bits identical" in out
    assert "outputs identical" in out
    code = (
        "import sys, torch; from transformers import LlamaForCausalLM, AutoTokenizer\n"
        "model = LlamaForCausalLM.from_pretrained('out', dtype=torch.float32)\n"
        "print(type(model.model.layers[0].mlp.up_proj.weight).__name__, len(AutoTokenizer.from_pretrained('out')))\n"
        "print(any(name.split('.')[0] == 'quantlab' for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=shell.folder, capture_output=True, text=True)
    assert done.stdout.split() == ["Int8Tensor", "259", "False"], done.stderr[-2000:]


def test_the_run_says_that_it_was_exported(exported):
    shell, _ = exported
    run = shell.tracked()["torchao int8"]
    assert run["metrics"]["export/outputs_identical"] == 1
    assert run["metrics"]["export/output_rel_error"] == 0
    files = sum(f.stat().st_size for f in (shell.folder / "out").rglob("*"))
    assert run["metrics"]["export/bytes"] == files
    assert run["tags"]["export/loads_with"] == "transformers LlamaForCausalLM.from_pretrained"
    assert run["tags"]["export/outputs_identical"] == "yes"


def test_no_file_says_where_the_model_was(exported):
    shell, _ = exported
    for file in (shell.folder / "out").rglob("*"):
        assert str(shell.folder).encode() not in file.read_bytes(), file
        assert b"_name_or_path" not in file.read_bytes(), file


def test_a_key_of_any_run_exports_it_while_it_is_measured(shell, in_process):
    rows = shell.rows(*WORDS, "backend=quanto", "dtype=int8", "export.path=mine")
    assert rows["quanto int8"]["status"] == "FINISHED"
    manifest = json.loads((shell.folder / "mine" / MANIFEST).read_text())
    assert manifest["parts"]["transformer"]["loader"].startswith("diffusers ")
    run = shell.tracked()["quanto int8"]
    assert run["tags"]["export/loads_with"].startswith("diffusers ")
    assert run["metrics"]["export/bytes"] > 0
    recipe = artifact(shell.store, run["run_id"], "recipe.yaml").decode()
    assert "export" not in recipe
