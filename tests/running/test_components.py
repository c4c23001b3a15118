"""A job with two components, each by its own library: from words to tracked numbers, comparison and repetition."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.shell import Shell, digits_words
from tests.support.stores import artifact
from tests.support.tiny_pipelines import build_tiny_flux, build_tiny_sd3

WORDS = [
    "model=diffusers",
    "device=cpu",
    "evaluation.num_samples=2",
    "evaluation.batch_size=2",
    "evaluation.num_inference_steps=2",
    "evaluation.num_teacher_forced=1",
    "evaluation.num_bootstrap=20",
    "evaluation.height=16",
    "evaluation.width=16",
]
NF4 = "components.transformer={backend: bitsandbytes, dtype: nf4}"
T5 = "components.text_encoder_3={backend: quanto, dtype: int8}"
NAME = "transformer: bitsandbytes nf4 + text_encoder_3: quanto int8"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pipeline, which nobody writes into."""
    return build_tiny_sd3(tmp_path_factory.mktemp("weights") / "sd3")


@pytest.fixture
def sd3(shell: Shell, weights: Path) -> Shell:
    shutil.copytree(weights, shell.folder / "sd3")
    return shell


def test_each_component_is_read_back_priced_and_counted_by_its_own_scheme(sd3):
    words = [*WORDS, "model.path=sd3", NF4, T5]
    rows = sd3.rows(*words)
    assert [row["status"] for row in rows.values()] == ["FINISHED"] * len(rows)
    run = sd3.tracked()[NAME]
    params, metrics = run["params"], run["metrics"]
    assert params["components.transformer.dtype"] == "nf4"
    assert params["components.text_encoder_3.backend"] == "quanto"
    assert params["quantization.backend"] == "none"
    layers = json.loads(artifact(sd3.store, run["run_id"], "layers.json"))
    at = {name: layers["columns"].index(name) for name in ("component", "dtype", "status")}
    stored = {(row[at["component"]], row[at["dtype"]]) for row in layers["data"] if row[at["status"]] == "quantized"}
    assert stored == {("transformer", "nf4"), ("text_encoder_3", "int8")}
    parts = [metrics[f"memory/{name}/weights_bytes"] for name in ("transformer", "text_encoder_3")]
    assert metrics["memory/weights_bytes"] == sum(parts)
    assert [metrics[f"memory/{name}/unexplained_bytes"] for name in ("transformer", "text_encoder_3")] == [0, 0]

    code, out, _ = sd3("plan", *words, "--json")
    (price,) = json.loads(out)
    planned = {c["name"]: (c["backend"], c["dtype"], c["bytes"]) for c in price["components"] if c["scheme"]}
    assert code == 0
    assert planned == {
        "transformer": ("bitsandbytes", "nf4", parts[0]),
        "text_encoder_3": ("quanto", "int8", parts[1]),
    }
    reference = rows["reference"]["metrics"]
    assert set(k for k in reference if k.endswith("/weights_bytes")) == {
        "memory/weights_bytes", "memory/transformer/weights_bytes", "memory/text_encoder_3/weights_bytes"
    }  # fmt: skip

    code, out, _ = sd3("compare", run["run_id"], "--json")
    assert code == 0
    (row,) = json.loads(out)["groups"][0]["rows"]
    assert (row["name"], row["backend"]) == (NAME, "bitsandbytes + quanto")
    code, out, err = sd3("reproduce", run["run_id"], "--json")
    assert (code, json.loads(out)["verdict"]) == (0, "identical"), err


@pytest.mark.slow
def test_a_sweep_resumes_by_what_each_component_is_stored_as(sd3):
    words = ["-m", *WORDS, "model.path=sd3", "sweep.floors=false", T5, "components.transformer={backend: bitsandbytes}"]
    rows = sd3.rows(*words, "components.transformer.dtype=nf4,fp4")
    assert list(rows) == [NAME, NAME.replace("nf4", "fp4")]
    again = sd3.rows(*words, "components.transformer.dtype=nf4,fp4,int8")
    assert [row["resumed"] for row in again.values()] == [True, True, False]


@pytest.mark.slow
def test_one_is_calibrated_on_the_reference_while_another_needs_no_data(sd3):
    calibrated = "components.transformer={backend: gguf, dtype: q4_0, algorithm: imatrix}"
    words = [*WORDS, "model.path=sd3", "sweep.floors=false", calibrated, T5]
    rows = sd3.rows(*words, "calibration.num_samples=2", "calibration.batch_size=2", "calibration.num_evidence_calls=2")
    (row,) = rows.values()
    assert (row["status"], row["metrics"]["calibration/num_samples"]) == ("FINISHED", 2)


@pytest.mark.slow
def test_each_alone_and_then_together_paired(sd3):
    """What a component costs alone is what a job of it alone measures, and what the others add is of the same samples."""
    words = [*WORDS, "model.path=sd3", "sweep.floors=false"]
    code, out, _ = sd3(*words, NF4, T5, "evaluation.attribute=true")
    assert code == 0
    assert "which component costs what" in out
    both = sd3.tracked()[NAME]
    sd3.rows(*words, NF4)
    alone = sd3.tracked()["transformer: bitsandbytes nf4"]["metrics"]
    found = both["metrics"]
    metric = "latent_rel_mse"
    assert found[f"quality/alone/transformer/{metric}"] == alone[f"quality/{metric}"]
    columns = json.loads(artifact(sd3.store, both["run_id"], "samples.json"))
    assert len(set(columns["seeds"])) == len(columns["sample_id"])  # by which Diffusers makes each again
    together = columns[metric]
    apart = json.loads(artifact(sd3.store, both["run_id"], "attribution_samples.json"))
    for name in ("transformer", "text_encoder_3"):
        added = [a - b for a, b in zip(together, apart[name][metric], strict=True)]
        assert found[f"quality/on_top/{name}/{metric}"] == pytest.approx(sum(added) / len(added))
        assert found[f"memory/{name}/saved_bytes"] > 0
    assert found["quality/alone/text_encoder_3/latent_rel_mse"] < found["quality/alone/transformer/latent_rel_mse"]
    table = json.loads(artifact(sd3.store, both["run_id"], "attribution.json"))
    assert {row[table["columns"].index("component")] for row in table["data"]} == {"transformer", "text_encoder_3"}
    code, out, _ = sd3("compare", both["run_id"], "--json")
    costs = json.loads(out)["groups"][0]["costs"]
    assert {c["component"]: c["alone"]["value"] for c in costs}["transformer"] == alone[f"quality/{metric}"], out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["components.text_encoder_4={backend: quanto}"], "components.text_encoder_4: StableDiffusion3Pipeline has"),
        ([NF4, "backend=quanto", "model.components=[]"], "backend=quanto: is for transformer, and components.transformer"),
        (["components.scheduler={backend: quanto}"], "components.scheduler: StableDiffusion3Pipeline has"),
        (["components.tokenizer={backend: quanto}"], "components.tokenizer: StableDiffusion3Pipeline has"),
        (["components.transformer={backend: torchao, dtype: int4, group_size: 256}"],
         "components.transformer.group_size=256: "),
        (["components.transformer={backend: quanto, layer_kinds: [expert]}"],
         "components.transformer: it has no expert layer"),
        (["components.transformer={backend: quanto, modules_to_not_convert: ['nowhere.*']}"],
         "components.transformer.modules_to_not_convert=nowhere.*: "),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_message_that_begins_with_the_key(sd3, words, message):
    code, _, err = sd3(*WORDS, "model.path=sd3", "sweep.floors=false", *words)
    told = err.strip().splitlines()[-1]
    assert code in (1, 2)
    assert message in told, told


def test_a_component_that_a_family_has_not(shell):
    code, _, err = shell(*digits_words(), "components.text_encoder={backend: quanto}")
    assert code == 2
    assert "components.text_encoder: a model of family digits_dit has transformer" in err


@pytest.mark.slow
def test_flux_with_its_t5(shell):
    build_tiny_flux(shell.folder / "flux")
    words = [*WORDS, "model.path=flux", NF4, "components.text_encoder_2={backend: torchao, dtype: int8}"]
    rows = shell.rows(*words)
    assert [row["status"] for row in rows.values()] == ["FINISHED"] * len(rows)
