"""Documents whose tables come from tracked runs: every block is filled in every document, and nothing else changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from quantlab.backends.table import backends
from quantlab.docs import NEEDS, command, main, needs, plan_block
from quantlab.errors import ConfigError
from quantlab.tracking import Store

METRICS = {
    "quality/latent_rel_mse/n": 20.0,
    "quality/floor_bf16/latent_rel_mse": 1e-5,
    "memory/weights_bytes": 2.0**20,
    "memory/compression": 3.0,
    "quantization/coverage": 0.9,
}
ENVIRONMENT = {
    "versions": {"python": "3.11", "torch": "2.13"},
    "git": None,
    "hardware": {"gpus": [], "cpu_capability": "AVX2", "torch_threads": 2},
}
TEXT = "before\n<!-- {kind}: {name} -->\nold\n<!-- end -->\nafter\n"


def row(name: str, bits: float, error: float) -> dict[str, object]:
    metrics = {**METRICS, "memory/bits_per_weight_quantized": bits, "quality/latent_rel_mse": error}
    return {"name": name, "status": "FINISHED", "protocol": "diffusion", "metrics": metrics, "error": "", "params": {}}


@pytest.fixture
def project(store: Store, runs: Path, base: Path) -> Path:
    """A project with a tracked sweep of its recipe."""
    first, *_ = backends()
    rows = [row(f"{first} a", 4.0, 5e-4), row(f"{first} b", 8.0, 1e-5), row(f"{first} c", 8.0, 1e-4)]
    tags = {"quantlab.recipe": "mine", "quantlab.kind": "sweep"}
    with store.start_run("mine", runs / "20260101-000000-mine", {}, tags) as run:
        run.log_json({"rows": rows, "skipped": [], "environment": ENVIRONMENT, "seconds": 90.0}, "rows.json")
    (base / "recipes").mkdir()
    (base / "recipes" / "mine.yaml").write_text("# What?\n# Expect: not yet run\na: 1\n")
    (base / "README.md").write_text(TEXT.format(kind="figure", name="mine"))
    (base / "recipes" / "README.md").write_text(
        TEXT.format(kind="figure", name="mine") + TEXT.format(kind="table", name="mine")
    )
    return base


def test_every_document_is_filled(project: Path, runs: Path) -> None:
    assert main(project, runs) == ["README.md", "recipes/README.md", "recipes/mine.yaml"]
    front, recipes = ((project / name).read_text() for name in ("README.md", "recipes/README.md"))
    assert "](recipes/mine.svg)" in front
    assert "](mine.svg)" in recipes
    assert "| 5.0e-4 |" in recipes
    assert "Measured" in recipes
    for text in (front, recipes):
        assert text.startswith("before\n<!-- ")
        assert text.endswith("<!-- end -->\nafter\n")
        assert "old" not in text
    assert "# Expect: measured" in (project / "recipes" / "mine.yaml").read_text()
    assert (project / "recipes" / "mine.svg").read_text().startswith("<?xml")
    assert main(project, runs) == []


def test_what_was_found_finished_cost_its_time_on_its_day(
    project: Path, runs: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep that found jobs of earlier ones took no minute: what they cost then is told, and since when."""
    with monkeypatch.context() as then:
        then.setattr("quantlab.tracking.record.now_ms", iter((1_735_700_000_000, *2 * [1_735_700_600_000])).__next__)
        with store.start_run("b", runs / "20250101-000000-b", {}, {}) as run:
            job = run.run_id
    file = next(runs.glob("*-mine")) / "rows.json"
    found = json.loads(file.read_text())
    found["rows"][1] |= {"resumed": True, "run_id": job}
    file.write_text(json.dumps(found))
    main(project, runs)
    assert "measured 2025-01-01, 3 schemes in 11.5 min" in (project / "recipes" / "mine.yaml").read_text()
    assert "Measured 2025-01-01 in 11.5 min" in (project / "recipes" / "README.md").read_text()
    shutil.rmtree(runs / "20250101-000000-b")
    with pytest.raises(ConfigError, match="mine: 1 of its rows .* sweep.force=true"):
        main(project, runs)


def test_a_block_without_a_run_stays(project: Path, runs: Path) -> None:
    (project / "quantlab" / "metrics").mkdir(parents=True)
    texts = {"README.md": TEXT.format(kind="table", name="other"), "quantlab/README.md": "no block\n"}
    for name, text in texts.items():
        (project / name).write_text(text)
    (project / "quantlab" / "metrics" / "README.md").write_text(TEXT.format(kind="list", name="metrics"))
    assert {"README.md", "quantlab/README.md"}.isdisjoint(main(project, runs))
    assert {name: (project / name).read_text() for name in texts} == texts
    assert "latent_rel_mse" in (project / "quantlab" / "metrics" / "README.md").read_text()


def test_elsewhere_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no README"):
        main(tmp_path, tmp_path / "outputs" / "runs")


RECIPES = Path(__file__).parents[1] / "recipes"
ON_GPUS = [file for file in sorted(RECIPES.glob("*.yaml")) if "\ndevice: cuda" in file.read_text()]


def test_each_recipe_for_a_gpu_says_what_memory_it_needs() -> None:
    assert len(ON_GPUS) >= 5
    assert [file.name for file in ON_GPUS if not NEEDS.search(file.read_text())] == []


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(f, marks=() if f.stem == "sdxl_int8" else pytest.mark.slow, id=f.stem) for f in ON_GPUS],
)
def test_that_memory_is_the_plans(recipe: Path) -> None:
    assert needs(recipe) in recipe.read_text()


@pytest.mark.slow
def test_the_plan_in_the_readme_is_what_the_command_prints() -> None:
    assert plan_block("flux_dev_24_gib") in (RECIPES.parent / "README.md").read_text()


# -- as a command


@pytest.mark.parametrize("word", ["--help", "-h", "help"])
def test_help_changes_nothing(project, monkeypatch, capsys, word):
    monkeypatch.chdir(project)
    before = (project / "README.md").read_text()
    assert command([word]) == 0
    assert capsys.readouterr().out.startswith("python -m quantlab.docs [RUNS]")
    assert (project / "README.md").read_text() == before


@pytest.mark.parametrize(
    ("words", "begins"),
    [
        (["--hlep"], "--hlep: no such option"),
        (["outputs/runs", "more"], "more: one folder of runs"),
        (["outputs/absent"], "outputs/absent: no such folder"),
    ],
)
def test_what_it_does_not_know_is_refused(project, monkeypatch, capsys, words, begins):
    monkeypatch.chdir(project)
    (project / "outputs" / "runs").mkdir(parents=True, exist_ok=True)
    before = (project / "README.md").read_text()
    assert command(words) == 2
    out, err = capsys.readouterr()
    assert (out, err.startswith(begins)) == ("", True)
    assert "--help" in err
    assert (project / "README.md").read_text() == before


def test_without_words_it_updates(project, runs, monkeypatch, capsys):
    monkeypatch.chdir(project)
    assert command([str(runs)]) == 0
    assert capsys.readouterr().out.startswith("updated: README.md")
    assert command([str(runs)]) == 0
    assert capsys.readouterr().out == "updated: nothing\n"
    (project / "README.md").unlink()
    assert command([]) == 2
    assert "no README.md here" in capsys.readouterr().err
