"""Pipelines, language models, whole jobs, calibration, pools and repetitions on a GPU; each also runs on a CPU (slow)."""

from __future__ import annotations

import copy
import gc
import json

import pytest
import torch

import quantlab
from quantlab.modules.device import give_back
from quantlab.report.reproduction import IDENTICAL, WITHIN
from quantlab.stages.calibrate import calibrate_component, in_smaller_batches
from quantlab.stages.quantize import quantize_component
from quantlab.stages.select import select_layers
from quantlab.tracking import find_runs
from tests.support.calibrated import calibrated_schemes, data, net, request_of
from tests.support.devices import ON_GPU
from tests.support.engines import hand_overs
from tests.support.shell import digits_words, pipeline_words, text_words
from tests.support.stores import artifact
from tests.support.tiny_pipelines import BUILDERS
from tests.support.tiny_text_models import OTHER, TEXT, save_bert, save_llama

ALL_INT8 = ("backend=torchao,quanto,bitsandbytes,modelopt", "dtype=int8")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    (root / "text.txt").write_text(TEXT)
    (root / "other.txt").write_text(OTHER)
    return {
        **{kind: build(root / kind) for kind, build in BUILDERS.items()},
        "text": root / "text.txt",
        "other": root / "other.txt",
        "causal_lm": save_llama(root / "llama", hidden_size=64, intermediate_size=256),
        "encoder": save_bert(root / "bert", hidden_size=64, intermediate_size=256),
    }


def check_device(row, device):
    """What a row says of its device."""
    metrics = row["metrics"]
    on_gpu = device == "cuda"
    assert metrics["perf/representative"] == on_gpu
    assert ("perf/warm_up_s" in metrics) == on_gpu
    assert ("memory/evaluate/baseline_alloc_bytes" in metrics) == on_gpu
    assert metrics.get("memory/needed_bytes", 1e18) > metrics["memory/weights_bytes"]
    times = [v for k, v in metrics.items() if k.startswith("perf/") and "_ms" in k]
    assert times
    assert min(times) > 0


# -- models


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_pipeline_by_four_backends(kind, device, shell, folders):
    """bfloat16, as pipelines are on a GPU; the UNet of SDXL hands its layers transposed views at batch 1."""
    words = pipeline_words(device, "model=diffusers", f"model.path={folders[kind]}", "model.dtype=bfloat16")
    rows = shell.rows("-m", *ALL_INT8, *words, "evaluation.batch_size=1")
    assert len(rows) == 4
    for name, row in rows.items():
        assert row["status"] == "FINISHED", row["error"]
        assert 0 < row["metrics"]["quality/latent_rel_mse"] < 0.1, name
        check_device(row, device)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "metric"), [("causal_lm", "kld_mean"), ("encoder", "output_rel_error")])
def test_a_model_of_text_by_four_backends(family, metric, dtype, device, shell, folders):
    words = text_words(
        device,
        f"model={family}",
        f"model.path={folders[family]}",
        f"model.dtype={dtype}",
        f"dataset.path={folders['text']}",
    )
    rows = shell.rows("-m", *ALL_INT8, "dataset=text", *words, "sweep.floors=true")
    assert rows["reference"]["metrics"][f"quality/{metric}"] == 0
    for name, row in rows.items():
        assert row["status"] == "FINISHED", row["error"]
        assert row["metrics"][f"quality/{metric}"] < 0.1, name
        check_device(row, device)


CALIBRATED = [
    ("backend=gguf", "dtype=q4_0", "algorithm=imatrix"),
    ("backend=torchao", "dtype=int8", "activation_dtype=int8", "algorithm=smoothquant"),
    ("backend=modelopt", "dtype=int4", "group_size=64", "algorithm=awq_lite"),
    ("backend=quanto", "dtype=int8", "activation_dtype=int8"),
]


@pytest.mark.parametrize("scheme", CALIBRATED, ids=" ".join)
def test_a_calibrated_language_model_leaves_its_evidence(scheme, device, shell, folders):
    words = text_words(device, "model=causal_lm", f"model.path={folders['causal_lm']}", "dataset=text")
    given = (f"dataset.path={folders['text']}", f"calibration.path={folders['other']}", "model.dtype=bfloat16")
    ((name, row),) = shell.rows(*scheme, *words, *given, "quantization.on_mismatch=skip").items()
    assert row["metrics"]["calibration/output_sqnr_db_after_mean"] > 10
    check_device(row, device)
    folder = next((shell.folder / "outputs" / "runs").iterdir())
    assert (folder / "calibration_layers.json").is_file()
    assert bool(list(folder.glob("calibration/*/imatrix.gguf"))) == ("imatrix" in name)


# -- calibrated algorithms, and memory


def allocated(device):
    """Bytes of tensors on the device, without the workspaces that cuBLAS keeps once."""
    if device == "cpu":
        return 0
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


def made(scheme, device, original):
    """A calibrated candidate."""
    request, module = request_of(scheme, device), copy.deepcopy(original)
    selection = select_layers(request, module)
    found = calibrate_component(request, module, selection, data(scheme, device))
    return quantize_component(request, module, original, selection, found)[0]


@pytest.mark.parametrize(
    ("scheme", "device"),
    [
        *(pytest.param(s, "cpu", marks=pytest.mark.slow, id=f"cpu-{s}") for s in calibrated_schemes()),
        *(pytest.param(s, "cuda", marks=ON_GPU, id=f"cuda-{s}") for s in calibrated_schemes("cuda")),
    ],
)
def test_each_calibrated_algorithm_answers_well_and_leaves_nothing(scheme, device):
    original = net(scheme.compute_dtype).to(device)
    x = torch.randn(17, 256, device=device).to(getattr(torch, scheme.compute_dtype))
    held = []
    for _ in range(3):
        module = made(scheme, device, original)
        with torch.no_grad():
            wanted = original(x).float()
            error = float((module(x).float() - wanted).norm() / wanted.norm())
        del module
        give_back(device)
        held.append(allocated(device))
    assert 0 < error < 0.6
    assert held[1] == held[2], "the second job leaves what the first left: what libraries keep once"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("scheme", calibrated_schemes("cuda"), ids=str)
def test_a_first_batch_that_does_not_fit_is_halved_until_it_does(scheme):
    """A batch is 48 MiB of inputs a sample in float32, and there is room for 400."""
    original = net(scheme.compute_dtype).cuda()
    request, told = request_of(scheme, "cuda"), []
    made(scheme, "cuda", original)  # what libraries keep is there before the limit is set
    give_back("cuda")
    room = torch.cuda.memory_reserved() + (400 << 20)
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)

    def attempt(batch_size):
        told.append((batch_size, allocated("cuda")))
        module = copy.deepcopy(original)
        selection = select_layers(request, module)
        feed = data(scheme, "cuda", num=1, rows=batch_size * 3 * 2**14)
        return module, selection, calibrate_component(request, module, selection, feed)

    try:
        module, selection, found = in_smaller_batches(attempt, 16, "cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(told) > 1, "the first attempt fitted"
    assert len({held for _, held in told}) == 1, "each attempt begins with what the first began with"
    quantize_component(request, module, original, selection, found)


def test_python_takes_a_module_where_it_is(device):
    original = net("bfloat16").to(device)
    inputs = [torch.randn(9, 256, device=device).to(torch.bfloat16)]
    configs = [
        quantlab.QuantoConfig("int8"),
        quantlab.GGUFQuantizationConfig(gguf_type="q8_0"),
        quantlab.QuantoConfig("int4"),
    ]
    rows = quantlab.evaluate(original, configs, inputs, num_bootstrap=50)
    assert {row.status for row in rows} == {"FINISHED"}
    assert all(row.quality["output_rel_error"].value < 0.2 for row in rows)
    assert {stage.peak_alloc_bytes is not None for row in rows for stage in row.stages} == {device == "cuda"}


# -- requests


def test_a_job_is_known_again_and_reproduced(device, shell):
    words = digits_words("backend=quanto", "dtype=int8,int4", f"device={device}", "evaluation.num_samples=10")
    rows = shell.rows("-m", *words)
    check_device(rows["quanto int4"], device)
    again = shell.rows("-m", *words)
    assert [again[name]["resumed"] for name in ("quanto int8", "quanto int4")] == [True, True]
    code, out, err = shell("reproduce", shell.tracked()["quanto int4"]["run_id"], "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["verdict"] in (IDENTICAL, WITHIN)
    assert {change["what"].split()[0] for change in found["changes"]} <= {"code"}


def test_two_jobs_of_a_pool_share_a_gpu(device, shell):
    words = digits_words(f"device={device}", "evaluation.num_samples=10", "launcher=pool", "launcher.num_workers=2")
    rows = shell.rows("-m", "backend=quanto,gguf", "dtype=auto", *words)
    runs = shell.tracked()
    names = [name for name in rows if name.startswith(("quanto", "gguf"))]
    assert len(names) == 2
    assert len({runs[name]["tags"]["quantlab.pid"] for name in (*names, "sweep")}) == 3
    for name in names:
        check_device(rows[name], device)
        assert rows[name]["metrics"]["quality/floor_batch/latent_rel_mse"] >= 0, "its floors are those of the sweep"


def test_a_sweep_holds_one_model_and_gives_it_back_before_a_job_runs_apart(device, shell, monkeypatch):
    held = []

    def look(job):
        held.append((allocated(device), torch.cuda.memory_reserved() if device == "cuda" else 0))

    hand_overs(monkeypatch, look)
    gc.collect()
    give_back(device)
    before = allocated(device)
    words = digits_words(f"device={device}", "evaluation.num_samples=10", "evaluation.guidance_scale=1,2", "--json")
    code, _, err = shell("-m", "backend=quanto", "dtype=int8", *words, "sweep.isolation=process")
    assert code == 1, err
    assert [num_bytes <= before for num_bytes, _ in held] == [True, True]
    assert all(reserved <= before + (96 << 20) for _, reserved in held), "the allocator keeps no cache"
    assert len([run for run in find_runs(shell.store, status="FAILED") if run["name"].startswith("quanto")]) == 2


def test_the_store_says_which_device_it_was(device, shell):
    shell.rows(
        *digits_words(
            "backend=gguf", "dtype=q8_0", f"device={device}", "evaluation.num_samples=10", "sweep.floors=false"
        )
    )
    run = shell.tracked()["gguf q8_0"]
    assert run["tags"]["quantlab.device"] == device
    hardware = json.loads(artifact(shell.store, run["run_id"], "environment.json"))["hardware"]
    assert bool(hardware["gpus"]) == torch.cuda.is_available()
