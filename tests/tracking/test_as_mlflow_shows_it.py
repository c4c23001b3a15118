"""A run as MLflow's users look at it: curves with steps, data sets, pictures, parameters that were used; and old runs."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from quantlab.backends.table import own_settings
from quantlab.errors import MetricUndefined
from quantlab.models.table import FAMILIES
from quantlab.report.compare import compare
from quantlab.report.html import page_data
from quantlab.report.reading import open_reader
from quantlab.report.selection import parse_request, select
from quantlab.running.job import described
from quantlab.running.overview import best_rows, row_numbers
from quantlab.tracking import no_store, open_store, push_pending, results
from quantlab.tracking.provenance import MAX_COMMAND_CHARS, who_and_what
from quantlab.tracking.record import Record
from quantlab.tracking.run import Run
from quantlab.tracking.tags import NOTE
from quantlab.tracking.used import OF_PROTOCOLS, used_params
from quantlab.vocabulary.schema import TrackingConfig
from tests.support.comparison_store import SCHEMES, make_sweep, shared_sweep

PICTURE = re.compile(r"images/[^+%]+[+%]step[+%]\d+[+%]timestamp[+%]\d+[+%][\w-]+?([+%]compressed)?\.(png|webp)")
"""The names that MLflow's page takes apart."""


def write_all(run: Run) -> None:
    run.log_curve("quality/step_sqnr_db", [40.0, 30.5, 20.0])
    run.log_input("digits", "sha256:" + "ab" * 32, "evaluation", {"dataset": "digits"}, {"num_samples": 7})
    run.log_input("mine.txt", "cd" * 32, "calibration", {"uri": "/x/mine.txt"}, {"num_samples": 2})
    run.log_image(Image.new("RGB", (600, 200)), "reference-quantized-difference", 3)


def found_in(store, run_id):
    client = store.client
    run = client.get_run(run_id)
    images = client.list_artifacts(run_id, "images")
    return {
        "points": [(m.step, m.value) for m in client.get_metric_history(run_id, "quality/step_sqnr_db")],
        "inputs": {i.tags[0].value: (i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs},
        "images": sorted(i.path for i in images),
        "tag": run.data.tags.get("mlflow.loggedImages"),
    }


@pytest.mark.parametrize("is_away", [False, True])
def test_curves_data_and_pictures_arrive_at_once_or_later(base, is_away):
    config = TrackingConfig()
    store = (no_store if is_away else open_store)(config, base)
    with store.start_run("a", base / "outputs" / "runs" / "a", {}, {}) as run:
        write_all(run)
    if is_away:
        store = open_store(config, base)
        assert push_pending(store, base / "outputs" / "runs") == ["a"]
    again = Record.load(base / "outputs" / "runs" / "a")
    assert again.summary["curves"] == {"quality/step_sqnr_db": [40.0, 30.5, 20.0]}
    found = found_in(store, again.run_id)
    assert found["points"] == [(0, 40.0), (1, 30.5), (2, 20.0)]
    assert found["inputs"] == {
        "evaluation": ("digits", ("ab" * 32)[:36]),
        "calibration": ("mine.txt", ("cd" * 32)[:36]),
    }
    assert len(found["images"]) == 2
    assert all(PICTURE.fullmatch(path) for path in found["images"])
    assert found["tag"] == "True"


def test_a_number_that_is_known_is_no_second_point(base):
    """A stage's seconds are logged at its end, and again with all numbers."""
    store = open_store(TrackingConfig(), base)
    with store.start_run("a", base / "outputs" / "runs" / "a", {}, {}) as run:
        run.log_metrics({"perf/load_s": 1.5})
        run.log_metrics({"perf/load_s": 1.5, "quality/psnr_db": 40.0, "perf/x": 1})
        run.log_metrics({"perf/x": 2})
    points = {
        name: [m.value for m in store.client.get_metric_history(run.run_id, name)] for name in ("perf/load_s", "perf/x")
    }
    assert points == {"perf/load_s": [1.5], "perf/x": [1.0, 2.0]}
    assert run.record.summary["metrics"] == {"perf/load_s": 1.5, "quality/psnr_db": 40.0, "perf/x": 2.0}


def test_a_curve_with_a_hole_is_not_logged(base):
    with open_store(TrackingConfig(), base).start_run("a", base / "outputs" / "runs" / "a", {}, {}) as run:
        with pytest.raises(MetricUndefined, match=r"quality/x, step 1=nan"):
            run.log_curve("quality/x", [1.0, float("nan")])
        assert "curves" not in run.record.summary


# -- parameters

EVERY = {
    **{f"evaluation.{name}": "7" for name in OF_PROTOCOLS},
    **{f"calibration.{name}": "7" for name in OF_PROTOCOLS},
    "evaluation.num_samples": "20",
    "calibration.num_samples": "40",
    "calibration.path": "null",
    "sweep.grid": "{}",
    "sweep.floors": "true",
    "launcher.engine": "serial",
    "tracking.uri": "sqlite:///x",
    "output_dir": "outputs",
    "name": "",
    "num_threads": "1",
    "memory.placement": "auto",
    "quantization.dtype": "int8",
    "quantization.imatrix_file": "null",
}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_job_has_the_parameters_of_its_protocol_alone(family):
    protocol = FAMILIES[family].protocol
    found = used_params({**EVERY, "model.family": family}, needs_data=True)
    read = {name for name, readers in OF_PROTOCOLS.items() if protocol in readers}
    assert {k.removeprefix("evaluation.") for k in found if k.startswith("evaluation.")} == {"num_samples", *read}
    assert not [k for k in found if k.startswith(("sweep", "launcher", "tracking", "output_dir", "memory"))]
    assert "quantization.imatrix_file" not in found
    assert found["num_threads"] == "1"
    assert used_params(found) == found
    plain = used_params({**EVERY, "model.family": family}, needs_data=False)
    assert not [k for k in plain if k.startswith("calibration")]


@pytest.mark.parametrize(
    ("backend", "axes", "own"),
    [
        ("bitsandbytes", {"dtype": "int8"}, {"llm_int8_threshold"}),
        ("bitsandbytes", {"dtype": "nf4"}, {"bnb_4bit_use_double_quant", "bnb_4bit_quant_storage"}),
        ("torchao", {"dtype": "int8", "activation_dtype": "none", "algorithm": "max"}, set()),
        ("torchao", {"dtype": "int4", "activation_dtype": "none", "algorithm": "awq"},
         {"int4_packing_format", "mapping_type", "calibration_layers_at_once"}),
        ("torchao", {"dtype": "int8", "activation_dtype": "int8", "algorithm": "smoothquant"},
         {"activation_scales", "smoothquant_alpha"}),
        ("modelopt", {"dtype": "int4", "activation_dtype": "none"}, {"compress"}),
        ("modelopt", {"dtype": "int8", "activation_dtype": "int8"}, {"compress", "activation_scales"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("node", ["quantization", "components.transformer"])
def test_a_librarys_own_setting_is_a_parameter_where_it_has_an_influence(node, backend, axes, own):
    settings = {name: "x" for name in own_settings(backend)}
    params = {f"{node}.{k}": v for k, v in {"backend": backend, **axes, **settings}.items()}
    found = {k.removeprefix(f"{node}.") for k in used_params(params)} - {"backend", *axes}
    assert found == own | {name for name in ("algorithm_settings",) if name in settings}
    unknown = {**params, f"{node}.dtype": "custom", f"{node}.algorithm": "custom", f"{node}.activation_dtype": "custom"}
    assert used_params(unknown) == unknown


def test_what_a_repetition_must_know_stays():
    assert used_params({"sweep.floors": "false"}) == {"sweep.floors": "false"}
    assert used_params({"evaluation.height": "64", "model.family": "from elsewhere"})["evaluation.height"] == "64"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "quantlab"),
        (["-m", "backend=a,b", "model.path=my folder"], "quantlab -m backend=a,b 'model.path=my folder'"),
        (["tracking.uri=https://me:se@cret@host/x"], "quantlab tracking.uri=https://***@host/x"),
        (
            ["launcher.settings.setup=['export HF_TOKEN=hf_abc','export API_KEY: k']", "a.max_tokens=8"],
            "quantlab \"launcher.settings.setup=['export HF_TOKEN=***','export API_KEY: ***']\" a.max_tokens=8",
        ),
        (
            ["a='Authorization: Bearer ab.c-d_e1234==, authorization: Basic abcdefgh'"],
            "quantlab \"a='Authorization: Bearer ***, authorization: Basic ***'\"",
        ),
        (["a=hf_0123456789abcdefghij", "b=sk-no"], "quantlab a=hf_*** b=sk-no"),
        (["name=basic calibration"], "quantlab 'name=basic calibration'"),
        (["hub.token=a,b c", "x={password: 'a b', n: 1}"], "quantlab hub.token=*** 'x={password: ***, n: 1}'"),
        (["a=x\ny\x1b[0m"], "quantlab 'a=x\\ny\\x1b[0m'"),
    ],
)
def test_the_command_is_as_typed_without_secrets(words, said):
    assert who_and_what(words)["mlflow.source.name"] == said


def test_a_long_command_is_cut_visibly():
    name = who_and_what(["quantization.quantization_config={" + "a: 1, " * 400 + "}"])["mlflow.source.name"]
    assert len(name) == MAX_COMMAND_CHARS
    assert name.endswith(")")
    assert "recipe.yaml" in name


def test_user_and_command_are_named(monkeypatch):
    tags = who_and_what(["recipe=mine"])
    assert tags["mlflow.source.name"] == "quantlab recipe=mine"
    assert tags["mlflow.source.type"] == "LOCAL"

    def nobody():
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.setattr("getpass.getuser", nobody)
    assert "mlflow.user" not in who_and_what([])


def test_a_description_is_text_and_says_why_a_run_failed(base):
    dataset = SimpleNamespace(name="prompts", path="a *mine*|b.txt")
    model = SimpleNamespace(path="tiny <b>flux", family="diffusers")
    job = SimpleNamespace(config=SimpleNamespace(model=model, dataset=dataset, recipe=None))
    store = open_store(TrackingConfig(), base)
    note = described(job, "quanto [int8](x)")
    assert note == "quanto \\[int8](x) of tiny \\<b>flux on a \\*mine\\*\\|b.txt."
    run = store.start_run("a", base / "outputs" / "runs" / "a", {}, {NOTE: note})
    run.describe("35 % of <i>its</i> weights")
    run.finish("FAILED", "no\nlayer [64, 64]", "quantize")
    said = store.client.get_run(run.record.run_id).data.tags[NOTE].split("\n\n")
    assert said[0] == note
    assert said[1] == "35\u00a0% of \\<i>its\\</i> weights"
    assert said[2] == "failed at quantize: no layer \\[64, 64]"


# -- floors and curves, of new runs and of those before


def data_of(sweep, *words):
    request = parse_request(list(words or ["sweep=latest"]))
    reader = open_reader(request.tracking, sweep.folder)
    selection = select(request, reader)
    groups = compare(request, selection, reader)
    return groups, page_data(groups, selection, reader)


def test_in_a_sweep_a_floor_is_a_run_and_no_copy_of_it(template):
    sweep = shared_sweep(template)
    found = sweep.store.client.get_run(sweep.runs["int8 a"]).data.metrics
    assert not [k for k in found if "floor" in k]
    assert "quality/step_sqnr_db" in found
    assert not [k for k in found if k.startswith("quality/step_sqnr_db/")]
    groups, _ = data_of(sweep)
    assert groups[0].floor.name == "floor_bf16"
    alone, _ = data_of(sweep, sweep.runs["int8 a"], sweep.runs["int4 a"])  # the floor's run is not among these
    assert alone[0].floor == groups[0].floor
    assert alone[0].verdicts["int8 a"].text == "inside the floor"


def test_runs_from_before_are_read_as_they_were(template, tmp_path, monkeypatch):
    """Those had the floors' numbers in each job, and a metric for each point of a curve."""
    new_groups, new = data_of(shared_sweep(template))
    monkeypatch.setattr(results, "_is_elsewhere", lambda name, is_in_sweep: False)
    monkeypatch.setattr(Run, "log_curve", lambda self, name, values: None)
    old_sweep = make_sweep(tmp_path / "old work", template)
    stored = old_sweep.store.client.get_run(old_sweep.runs["int8 a"]).data.metrics
    assert {"quality/floor_bf16/latent_rel_mse", "quality/step_sqnr_db/0"} <= set(stored)
    old_groups, old = data_of(old_sweep)
    assert [(g.front, g.floor, {k: v.text for k, v in g.verdicts.items()}) for g in old_groups] == [
        (g.front, g.floor, {k: v.text for k, v in g.verdicts.items()}) for g in new_groups
    ]
    for key in ("steps", "views", "axes"):
        assert old["groups"][0][key] == new["groups"][0][key]
    for run in (old_sweep.folder / "outputs" / "mlartifacts").rglob("steps.json"):
        run.unlink()  # the oldest have the metrics alone
    assert data_of(old_sweep)[1]["groups"][0]["steps"] == new["groups"][0]["steps"]


# -- the sweep's own run


def row(name, error, size, **params):
    metrics = {
        "quality/latent_rel_mse": error,
        "quality/latent_rel_mse/ci_lo": error * 0.9,
        "quality/latent_rel_mse/ci_hi": error * 1.1,
        "quality/latent_rel_mse/n": 20.0,
        "quality/floor_bf16/latent_rel_mse": 1e-5,
        "quality/floor_bf16/latent_rel_mse/ci_lo": 0.9e-5,
        "quality/floor_bf16/latent_rel_mse/ci_hi": 1.1e-5,
        "memory/weights_bytes": size,
        "quantization/coverage": 1.0,
    }
    asked = {"quantization": {"backend": name.split()[0], "dtype": name.split()[1]}, "dataset": {"seed": 0}, **params}
    return {"name": name, "status": "FINISHED", "protocol": "diffusion", "metrics": metrics, "params": asked}


def test_the_best_rows_are_the_closest_and_the_smallest_without_loss():
    rows = [row("quanto int8", 1e-6, 4e6), row("gguf q8_0", 5e-7, 5e6), row("gguf q4_k", 1e-3, 2e6)]
    found = best_rows(rows)
    assert {k: r["name"] for k, r in found.items()} == {"best": "gguf q8_0", "smallest_in_floor": "quanto int8"}
    metrics, params = row_numbers(found["best"])
    assert metrics == {"latent_rel_mse": 5e-7, "weights_bytes": 5e6}
    assert params == {"scheme": "gguf q8_0", "backend": "gguf", "dtype": "q8_0"}
    assert best_rows([rows[0], row("gguf q8_0", 1e-7, 4e6, dataset={"seed": 1})]) == {}, "on other data"
    assert best_rows([]) == {}
    assert np.isfinite(list(metrics.values())).all()
    assert len(SCHEMES) == 5
