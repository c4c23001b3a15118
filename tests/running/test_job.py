"""A run from words to the store: what it leaves, that it can be repeated, and how it fails."""

from __future__ import annotations

import json
import math
import shutil

import pytest

from quantlab.protocols.table import PROTOCOLS
from quantlab.tracking.pictures import read_samples
from tests.support.shell import digits_words, make_shell
from tests.support.stores import artifact

SCHEME = ("backend=torchao", "dtype=int4", "group_size=64")


@pytest.fixture(scope="module")
def run(template, trained, tmp_path_factory):
    """Rows, and the tracked run of a torchao int4 job, and where it ran."""
    shell = make_shell(tmp_path_factory.mktemp("run") / "my work", template, trained)
    rows = shell.rows(*digits_words(*SCHEME))
    return rows, shell.tracked()["torchao int4 g64"], shell


def json_artifact(shell, found, name):
    return json.loads(artifact(shell.store, found["run_id"], name))


# -- what a run leaves


def test_a_run_is_complete_in_the_store(run):
    rows, found, shell = run
    params, metrics, tags = found["params"], found["metrics"], found["tags"]
    assert params["quantization.backend"] == "torchao"
    assert params["quantization.group_size"] == "64"
    assert params["quantization.int4_packing_format"] == "auto"
    assert params["resolved.int4_packing_format"] == "unpacked_to_int8"
    assert params["evaluation.num_inference_steps"] == "2"
    assert params["model.num_train_steps"] == "20"

    for name in ("latent_rel_mse", "psnr_db"):
        for suffix in ("", "/se", "/ci_lo", "/ci_hi", "/n"):
            assert f"quality/{name}{suffix}" in metrics
        assert f"quality/floor_bf16/{name}" in metrics
        assert f"quality/floor_batch/{name}" in metrics
    assert metrics["quality/psnr_db/n"] == 20
    assert metrics["quality/psnr_db/ci_lo"] < metrics["quality/psnr_db"] < metrics["quality/psnr_db/ci_hi"]
    assert metrics["quantization/group_size_min"] == metrics["quantization/group_size_max"] == 64
    assert 0.9 < metrics["quantization/coverage"] < 1
    assert {"perf/load_s", "perf/observe_s", "perf/quantize_s", "perf/evaluate_s"} <= metrics.keys()
    assert any(k.startswith("perf/") and k.endswith("_ms") for k in metrics)
    assert metrics["perf/representative"] == 0
    assert all(math.isfinite(v) for v in metrics.values())
    shown = {k: v for k, v in rows["torchao int4 g64"]["metrics"].items() if not k.startswith("quality/step_")}
    assert metrics == {**metrics, **shown}, "the table shows what is tracked; a curve is one metric with steps"

    assert tags["quantlab.weights_sha256"].startswith("sha256:")
    assert len(tags["quantlab.inputs_sha256"].removeprefix("sha256:")) == 64
    assert len(tags["quantlab.reference_key"]) == 32
    assert len(tags["mlflow.source.git.commit"]) == 40
    assert json.loads(tags["quantlab.versions"])["torch"]


def test_the_artifacts_of_a_run(run):
    rows, found, shell = run
    layers = json_artifact(shell, found, "layers.json")
    by_name = [dict(zip(layers["columns"], row, strict=True)) for row in layers["data"]]
    assert {row["dtype"] for row in by_name if row["status"] == "quantized"} == {"int4"}
    samples = json_artifact(shell, found, "samples.json")
    assert len(samples["sample_id"]) == len(samples["psnr_db"]) == 20
    assert sum(samples["psnr_db"]) / 20 == pytest.approx(found["metrics"]["quality/psnr_db"])
    steps = json_artifact(shell, found, "steps.json")
    assert all(len(curve) == 2 for curve in steps.values())
    assert artifact(shell.store, found["run_id"], "pictures/reference_quantized_difference.png").startswith(b"\x89PNG")
    in_the_grid = shell.store.client.list_artifacts(found["run_id"], "images")
    assert in_the_grid
    assert all("+step+" in file.path for file in in_the_grid), "MLflow shows no image where it cannot read each name"
    images, ids = read_samples(artifact(shell.store, found["run_id"], "pictures/samples.npz"))
    assert images.shape == (8, 3, 8, 8, 1)
    assert set(ids) <= set(samples["sample_id"])
    assert json_artifact(shell, found, "environment.json")["versions"]["torchao"]
    assert set(json_artifact(shell, found, "exclusions.json")) == {"excluded", "left", "skipped", "fallback"}
    assert json_artifact(shell, found, "report.json")["metrics"] == rows["torchao int4 g64"]["metrics"]


def test_the_weights_that_quantlab_trained_are_logged_once(run):
    _, found, shell = run
    assert found["tags"]["quantlab.model_artifact"] == found["tags"]["quantlab.weights_sha256"]
    digest = found["tags"]["quantlab.weights_sha256"].removeprefix("sha256:")[:16]
    folder = shell.folder / "elsewhere"
    folder.mkdir()
    for name in ("model.safetensors", "judge.safetensors"):
        (folder / name).write_bytes(artifact(shell.store, found["run_id"], f"model/{digest}/{name}"))
    words = digits_words("backend=quanto", "dtype=int8", f"model.path={folder}")
    shell.rows(*words)
    again = shell.tracked()["quanto int8"]
    assert again["tags"]["quantlab.weights_sha256"] == found["tags"]["quantlab.weights_sha256"]
    assert "quantlab.model_artifact" not in again["tags"]
    assert not list((shell.folder / "outputs" / "mlartifacts" / again["run_id"]).rglob("*.safetensors"))


def test_a_run_repeats_exactly_from_its_own_recipe(run):
    rows, found, shell = run
    recipe = shell.folder / "again.yaml"
    recipe.write_bytes(artifact(shell.store, found["run_id"], "recipe.yaml"))
    shutil.rmtree(shell.folder / "outputs" / "cache" / "reference")
    again = shell.rows(f"recipe={recipe}")["torchao int4 g64"]
    first = rows["torchao int4 g64"]
    assert again["run_id"] != first["run_id"]
    exact = ("quality/", "quantization/", "memory/weights_bytes")
    compared = [k for k in first["metrics"] if k.startswith(exact)]
    assert len(compared) > 20
    assert {k: again["metrics"][k] for k in compared} == {k: first["metrics"][k] for k in compared}


def test_the_reference_against_itself_is_exact(run):
    rows = run[0]
    assert list(rows) == ["reference", "floor_bf16", "floor_batch", "torchao int4 g64"]
    reference = rows["reference"]["metrics"]
    assert reference["quality/latent_rel_mse"] == 0
    assert reference["quality/psnr_db"] == 100
    assert reference["quality/n_identical"] == 20
    assert rows["floor_bf16"]["metrics"]["quality/latent_rel_mse"] > 0
    assert rows["torchao int4 g64"]["metrics"]["quality/psnr_db"] < rows["floor_bf16"]["metrics"]["quality/psnr_db"]


# -- bytes


def test_bytes_add_up(run):
    rows, found, shell = run
    for row in rows.values():
        m = row["metrics"]
        parts = sum(m[f"memory/{kind}_bytes"] for kind in ("quantized", "scale", "other"))
        assert parts == m["memory/weights_bytes"] == m["memory/transformer/weights_bytes"]
        assert "memory/evaluate/peak_alloc_bytes" not in m, "there is no such number on a CPU"
    reference, bf16 = rows["reference"]["metrics"], rows["floor_bf16"]["metrics"]
    positions = 4 * 64 * 64  # bytes of the model's, which loading in bfloat16 leaves in float32
    assert reference["memory/weights_bytes"] == 2 * bf16["memory/weights_bytes"] - positions
    assert reference["memory/compression"] == 0.5
    assert bf16["memory/compression"] == pytest.approx(1 - positions / 2 / bf16["memory/weights_bytes"])
    assert found["metrics"]["memory/is_simulated"] == 1, "int4 is kept in int8 on a CPU"
    assert found["metrics"]["memory/bits_per_weight_quantized"] > 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheme",
    [
        "backend=quanto dtype=int8 modules_to_not_convert=[norms]",
        "backend=bitsandbytes dtype=nf4",
        "backend=gguf dtype=q4_k",
        "backend=torchao dtype=nf4 quantization.on_mismatch=bfloat16",
        "backend=modelopt dtype=int4",
    ],
)
def test_what_is_saved_is_what_is_counted(shell, scheme):
    rows = shell.rows(*digits_words(*scheme.split(), "evaluation.num_samples=10"))
    m = list(rows.values())[-1]["metrics"]
    assert m["memory/is_simulated"] == 0
    assert m["memory/disk_bytes_model"] == pytest.approx(m["memory/weights_bytes"], rel=0.05)


# -- what is computed once


@pytest.fixture
def calls(monkeypatch):
    """How often the protocol observes and measures."""
    protocol = PROTOCOLS["diffusion"]
    counted = {"observe": 0, "measure": 0}
    for name in counted:
        real = getattr(protocol, name)

        def counting(*args, _name=name, _real=real, **kwargs):
            counted[_name] += 1
            return _real(*args, **kwargs)

        monkeypatch.setattr(protocol, name, counting)
    return counted


def test_a_second_run_finds_reference_and_floors(shell, calls):
    words = digits_words("backend=quanto", "evaluation.num_samples=10")
    first = shell.rows(*words, "dtype=int8")
    assert calls == {"observe": 1, "measure": 4}
    second = shell.rows(*words, "dtype=int4")
    assert calls == {"observe": 1, "measure": 5}
    for name in ("reference", "floor_bf16", "floor_batch"):
        quality = {k: v for k, v in first[name]["metrics"].items() if k.startswith("quality/") and "rel_mse" in k}
        assert quality.items() <= second[name]["metrics"].items()
    assert "quality/floor_bf16/psnr_db" in second["quanto int4"]["metrics"]
    shell.rows(*words, "evaluation.num_bootstrap=60")
    assert calls == {"observe": 1, "measure": 9}, "other intervals are measured anew, on the same reference"


def test_a_sweep_observes_once_and_is_a_parent(shell, calls):
    rows = shell.rows("-m", *digits_words("backend=quanto,torchao", "dtype=int8", "evaluation.num_samples=10"))
    assert list(rows) == ["reference", "floor_bf16", "floor_batch", "quanto int8", "torchao int8"]
    assert calls == {"observe": 1, "measure": 5}
    tracked = shell.tracked()
    parent = tracked.pop("sweep")
    assert {r["tags"]["mlflow.parentRunId"] for r in tracked.values()} == {parent["run_id"]}
    assert set(tracked) == set(rows)
    assert "quantlab.model_artifact" in parent["tags"]
    saved = json_artifact(shell, parent, "rows.json")["rows"]
    assert [r["name"] for r in saved] == list(rows)


@pytest.mark.slow
def test_a_damaged_reference_is_observed_again(shell, calls):
    """One whose bytes were flipped is believed otherwise, and every row is measured against it."""
    words = digits_words("backend=quanto", "dtype=int8", "evaluation.num_samples=10")
    first = shell.rows(*words)
    [stored] = (shell.folder / "outputs" / "cache" / "reference").glob("*.safetensors")
    held = stored.read_bytes()
    flipped = len(held) * 2 // 3
    for floor in stored.parent.glob("*.json"):
        floor.write_text(floor.read_text().replace("0.", "1.", 1))
    stored.write_bytes(held[:flipped] + bytes(b ^ 255 for b in held[flipped : flipped + 256]) + held[flipped + 256 :])
    again = shell.rows(*words)
    assert calls == {"observe": 2, "measure": 8}
    assert again["quanto int8"]["metrics"]["quality/psnr_db"] == first["quanto int8"]["metrics"]["quality/psnr_db"]
    assert stored.with_name(f"{stored.name}.damaged").exists()


# -- failures


def test_a_failing_run_keeps_what_was_measured(shell, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("out of luck")

    protocol, real = PROTOCOLS["diffusion"], PROTOCOLS["diffusion"].measure
    calls = iter([real, real, real, broken])  # the reference and the floors, then the job
    monkeypatch.setattr(protocol, "measure", lambda *args, **more: next(calls)(*args, **more))
    words = digits_words("backend=quanto", "dtype=int8", "evaluation.num_samples=10")
    code, out, err = shell(*words, "-q")
    assert code == 1
    assert err.strip() == (
        "quantlab: quanto int8: failed with RuntimeError: out of luck; the run's failure.txt says where, and "
        "QUANTLAB_TRACEBACK=1 shows it here"
    )
    found = shell.tracked("FAILED")["quanto int8"]
    assert found["tags"]["quantlab.stage"] == "evaluate"
    assert found["tags"]["quantlab.failure"] == "RuntimeError: out of luck"
    assert found["metrics"]["memory/weights_bytes"] > 0
    assert found["metrics"]["quantization/coverage"] > 0.9
    assert json_artifact(shell, found, "layers.json")["data"]
    assert b"in broken" in artifact(shell.store, found["run_id"], "failure.txt")


def test_ctrl_c_ends_the_run_and_keeps_it(shell, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(PROTOCOLS["diffusion"], "measure", interrupted)
    code, _, err = shell("-m", *digits_words("backend=quanto", "dtype=int8,int4", "sweep.floors=false"), "-q")
    assert (code, err) == (130, "quantlab: interrupted; finished jobs are kept\n")
    failed = shell.tracked("FAILED")
    assert set(failed) == {"sweep", "quanto int8"}
    assert failed["quanto int8"]["tags"]["quantlab.stage"] == "evaluate"
    assert failed["sweep"]["tags"]["quantlab.stage"] == "jobs"
    assert failed["quanto int8"]["metrics"]["memory/weights_bytes"] > 0


def test_a_failing_load_names_its_stage(shell):
    for file in (shell.folder / "outputs" / "cache" / "models").glob("*/model.safetensors"):
        file.write_bytes(file.read_bytes()[:-100])
    code, _, err = shell(*digits_words("backend=quanto"), "-q")
    assert code == 2
    assert err.startswith("quantlab: model=digits_dit: ")
    assert "to train the model anew" in err
    assert shell.tracked("FAILED")["quanto int8"]["tags"]["quantlab.stage"] == "load"


def test_a_failing_job_of_a_sweep_is_a_row(shell):
    words = digits_words("backend=torchao", "dtype=int8", "group_size=512,none", "evaluation.num_samples=10")
    code, out, err = shell("-m", *words)
    assert code == 1
    assert "torchao int8 per-row" in out
    assert "FAILED" in out
    assert "failed: torchao int8 g512 at quantize: group_size=512: " in err
    parent, child = shell.tracked()["sweep"], shell.tracked("FAILED")["torchao int8 g512"]
    assert parent["tags"]["quantlab.failed_jobs"] == "torchao int8 g512"
    assert child["tags"]["mlflow.parentRunId"] == parent["run_id"]
    assert child["tags"]["quantlab.stage"] == "quantize"
    assert child["tags"]["quantlab.failure"].startswith("group_size=512: ")
    assert shell.tracked()["torchao int8 per-row"]["metrics"]["quality/psnr_db"] > 20
