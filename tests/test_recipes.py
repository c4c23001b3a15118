"""Shipped recipes and exclusion groups on tiny random models of the families they are written for."""

from __future__ import annotations

import copy
import json
from fnmatch import fnmatch

import pytest

from quantlab.models.digits_training import build_transformer
from quantlab.planning.plan import plan
from quantlab.stages.quantize import quantize_component
from quantlab.stages.select import QuantizationRequest
from tests.support.shell import Shell
from tests.support.stores import artifact
from tests.support.tiny_pipelines import BUILDERS
from tests.support.tiny_text_models import TEXT, save_bert, save_llama

SMALL = [
    "device=cpu",
    "model.dtype=float32",
    "evaluation.num_samples=4",
    "evaluation.num_inference_steps=2",
    "evaluation.num_teacher_forced=1",
    "evaluation.num_bootstrap=50",
    "evaluation.height=32",
    "evaluation.width=32",
]
SMALL_TEXT = [
    "device=cpu",
    "evaluation.num_samples=6",
    "evaluation.batch_size=2",
    "evaluation.floor_batch_size=3",
    "evaluation.context_length=32",
    "evaluation.num_bootstrap=50",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    (root / "text.txt").write_text(TEXT)
    return {
        **{kind: build(root / kind) for kind, build in BUILDERS.items()},
        "text": root / "text.txt",
        "llama": save_llama(root / "llama"),
        "bert": save_bert(root / "bert"),
    }


def layers_of(shell: Shell, name: str) -> dict[str, dict]:
    found = shell.tracked()[name]
    table = json.loads(artifact(shell.store, found["run_id"], "layers.json"))
    rows = (dict(zip(table["columns"], row, strict=True)) for row in table["data"])
    return {row["name"]: row for row in rows}


# -- recipes for real models


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "kind", "too_narrow"),
    [
        ("flux_dev_nf4", "flux", []),
        pytest.param("sdxl_int8", "sdxl", [], marks=pytest.mark.slow),
        pytest.param("sd35_medium_int4", "sd3", ["torchao int4 g128"], marks=pytest.mark.slow),
        pytest.param("flux_dev_svdquant", "flux", [], marks=pytest.mark.slow),
        pytest.param("sdxl_w8a8_smoothquant", "sdxl", [], marks=pytest.mark.slow),
    ],
)
def test_a_recipe_for_a_large_pipeline_runs_on_a_tiny_one(shell, folders, recipe, kind, too_narrow):
    """``too_narrow``: rows whose groups of 128 do not fit into all of the tiny model's layers."""
    skip = ["quantization.on_mismatch=skip"] if too_narrow else []
    words = [f"recipe={recipe}", f"model.path={folders[kind]}", *SMALL, *skip]
    rows = shell.rows(*words)
    jobs = plan(words).jobs
    assert list(rows) == ["reference", "floor_bf16", "floor_batch", *(job.name for job in jobs)]
    assert {row["status"] for row in rows.values()} == {"FINISHED"}
    assert rows["reference"]["metrics"]["quality/psnr_db"] == 100
    for job in jobs:
        metrics = rows[job.name]["metrics"]
        assert metrics["quality/latent_rel_mse"] > 0
        assert "quality/ssim" in metrics
        assert metrics["quantization/num_excluded"] > 0, "the family's own exclusions"
        assert metrics["quantization/num_layers"] > 0
        assert (metrics["quantization/num_skipped"] > 0) == (job.name in too_narrow)


@pytest.mark.slow
def test_smollm2_backends_runs_on_a_tiny_llama(shell, folders):
    words = [
        "recipe=smollm2_backends",
        "model=causal_lm",
        f"model.path={folders['llama']}",
        "dataset=text",
        f"dataset.path={folders['text']}",
        *SMALL_TEXT,
        "quantization.on_mismatch=skip",
    ]
    rows = shell.rows(*words)
    assert len(rows) == 3 + len(plan(words).jobs)
    assert rows["reference"]["metrics"]["quality/kld_mean"] == 0
    assert all(row["metrics"]["quality/kld_mean"] > 0 for row in list(rows.values())[3:])


def test_an_encoder_by_one_command(shell, folders):
    words = ["model=encoder", f"model.path={folders['bert']}", "dataset=text", f"dataset.path={folders['text']}"]
    rows = shell.rows(*words, "backend=quanto", "dtype=int8", *SMALL_TEXT)
    assert rows["reference"]["metrics"]["quality/output_cosine"] == pytest.approx(1)
    assert 0.9 < rows["quanto int8"]["metrics"]["quality/output_cosine"] < 1


# -- layers that do not fit

MISFITS = ["model=diffusers", "backend=torchao", "dtype=int4", "group_size=128", *SMALL]


def test_layers_that_do_not_fit_are_an_error_by_default(shell, folders):
    code, _, err = shell(*MISFITS, f"model.path={folders['flux']}", "-q")
    assert code == 2
    assert err.startswith("quantlab: group_size=128: ")
    assert "does not divide by group_size 128" in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("on_mismatch", "counted", "status"),
    [
        ("skip", "num_skipped", "skipped"),
        ("bfloat16", "num_fallback", "fallback"),
        pytest.param("int8", "num_fallback", "fallback", marks=pytest.mark.slow),
    ],
)
def test_layers_that_do_not_fit_are_counted(shell, folders, on_mismatch, counted, status):
    words = [*MISFITS, f"model.path={folders['flux']}", f"quantization.on_mismatch={on_mismatch}"]
    name, row = list(shell.rows(*words).items())[-1]
    layers = layers_of(shell, name)
    metrics = row["metrics"]
    others = {n for n, r in layers.items() if r["status"] == status}
    assert metrics[f"quantization/{counted}"] == len(others) > 0
    assert all(layers[n]["shape"][1] % 128 for n in others)
    assert all("group_size 128" in layers[n]["reason"] for n in others)
    assert {layers[n]["dtype"] for n in others} == {"float32" if on_mismatch == "skip" else on_mismatch}
    done = {n for n, r in layers.items() if r["status"] == "quantized"}
    assert done
    stored = [r for r in layers.values() if r["dtype"] in ("int4", "int8")]
    num_weights = sum(r["shape"][0] * r["shape"][1] for r in stored)
    num_bytes = sum(r["weight_bytes"] + r["scale_bytes"] for r in stored)
    assert metrics["memory/bits_per_weight_quantized"] == 8 * num_bytes / num_weights
    assert metrics["memory/quantized_bytes"] == sum(r["weight_bytes"] for r in stored)
    assert metrics["quantization/group_size_min"] == metrics["quantization/group_size_max"] == 128
    listed = json.loads(artifact(shell.store, row["run_id"], "exclusions.json"))
    assert set(listed[status]) == others


# -- the shipped exclusion groups

GROUPS = {
    "digits": {
        "norms": ["transformer_blocks.*.norm1.linear", "transformer_blocks.*.norm1.emb.*"],
        "embeddings": ["transformer_blocks.*.norm1.emb.timestep_embedder.linear_*"],
        "output": ["proj_out_1", "proj_out_2"],
        "norms,output": ["transformer_blocks.*.norm1.*", "proj_out_1", "proj_out_2"],
    },
    "flux": {
        "norms": [
            "transformer_blocks.*.norm1.linear",
            "transformer_blocks.*.norm1_context.linear",
            "single_transformer_blocks.*.norm.linear",
            "norm_out.linear",
        ],
        "embeddings": ["x_embedder", "context_embedder", "time_text_embed.*"],
        "output": ["proj_out", "norm_out.linear"],
        "norms,output": [
            "transformer_blocks.*.norm1*.linear",
            "single_transformer_blocks.*.norm.linear",
            "norm_out.linear",
            "proj_out",
        ],
    },
}


@pytest.fixture(scope="module")
def networks(folders):
    from diffusers import FluxTransformer2DModel

    return {
        "digits": build_transformer(num_layers=1, num_heads=2),
        "flux": FluxTransformer2DModel.from_pretrained(folders["flux"] / "transformer"),
    }


@pytest.mark.parametrize(("kind", "chosen"), [(kind, chosen) for kind, rows in GROUPS.items() for chosen in rows])
def test_a_shipped_group_excludes_what_its_name_says(networks, kind, chosen):
    [job] = plan(["backend=quanto", "dtype=int8", f"modules_to_not_convert=[{chosen}]"]).jobs
    request = QuantizationRequest(
        component="transformer", scheme=job.schemes[""], compute_dtype="float32", device="cpu"
    )
    _, report = quantize_component(request, copy.deepcopy(networks[kind]), networks[kind])
    layers = {row.name: row for row in report.layers if row.kind == "linear"}
    excluded = {n for n, row in layers.items() if row.status == "excluded"}
    patterns = GROUPS[kind][chosen]
    assert excluded == {n for n in layers if any(fnmatch(n, p) for p in patterns)}
    assert all(any(fnmatch(n, p) for n in layers) for p in patterns)
    assert len(excluded) < len(layers)
    assert all(layers[n].reason.startswith("modules_to_not_convert: re:") for n in excluded)


def test_a_shipped_group_may_match_nothing_but_an_own_entry_may_not(shell, folders):
    words = [
        "model=causal_lm",
        f"model.path={folders['llama']}",
        "dataset=text",
        f"dataset.path={folders['text']}",
        *SMALL_TEXT,
        "backend=quanto",
        "dtype=int8",
    ]
    code, out, err = shell(*words, "modules_to_not_convert=[norms]")
    assert code == 0, err
    told = "modules_to_not_convert=norms: matches no layer of this model; nothing is excluded by it"
    assert told in " ".join(err.split())
    code, _, err = shell(*words, "quantization.modules_to_not_convert.own=[norms]", "-q")
    assert code == 2
    assert err.startswith("quantlab: modules_to_not_convert.own=norms: matches none of the ")
