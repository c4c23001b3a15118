"""On a GPU: rows do not depend on where weights lie, streaming keeps to its peak, and what runs apart, is exported or
compiled there gives its numbers again. Each also runs on a CPU (slow) but for the peaks."""

from __future__ import annotations

import copy

import pytest
import torch

from quantlab.modules.groups import Groups
from quantlab.modules.precision import exact_arithmetic
from tests.benchmarks import bench_memory
from tests.contract.test_architectures import MOE, causal
from tests.support.devices import ON_GPU
from tests.support.shell import digits_words, pipeline_words, text_words
from tests.support.tiny_pipelines import BUILDERS
from tests.support.tiny_text_models import TEXT, byte_tokenizer, save_bert, save_llama

SCHEMES = [
    ("backend=bitsandbytes", "dtype=nf4"),
    ("backend=torchao", "dtype=int8"),
    ("backend=quanto", "dtype=int4"),
    ("backend=gguf", "dtype=q4_k"),
    ("backend=modelopt", "dtype=int4"),
]
DTYPE = "model.dtype=bfloat16"
SIZES = {**MOE, "vocab_size": 259, "num_experts_per_tok": 2}
EXPERTS = {
    "Mixtral": causal("Mixtral", **SIZES, num_local_experts=4),
    "Qwen3-MoE": causal("Qwen3Moe", **SIZES, num_experts=4, moe_intermediate_size=64, head_dim=16),
    "gpt-oss": causal("GptOss", **SIZES, num_local_experts=4, head_dim=16),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("placed")
    (root / "text.txt").write_text(TEXT)
    (root / "prompts.txt").write_text("a red fox\nthe blue cat\ntwo of a kind\n")
    llama = save_llama(root / "llama", hidden_size=256, intermediate_size=512)
    return {"text": llama, "flux": BUILDERS["flux"](root / "flux"), "root": root}


def words_of(kind, device, folders):
    root = folders["root"]
    if kind == "text":
        data = (f"model.path={folders['text']}", "dataset=text", f"dataset.path={root / 'text.txt'}")
        return [w for w in text_words(device, "model=causal_lm", *data, DTYPE) if not w.startswith("calibration")]
    data = (f"model.path={folders['flux']}", f"dataset.path={root / 'prompts.txt'}", "evaluation.batch_size=1")
    words = pipeline_words(device, "model=diffusers", *data, DTYPE, "evaluation.num_samples=3")
    return [w for w in words if not w.startswith("calibration")]


def numbers(row):
    """What does not depend on time or place."""
    kept = ("quality/", "memory/weights_bytes", "memory/bits", "memory/transformer", "memory/model", "quantization/")
    return {k: v for k, v in row["metrics"].items() if k.startswith(kept)}


@pytest.mark.parametrize("scheme", SCHEMES, ids=" ".join)
@pytest.mark.parametrize("kind", ["text", "flux"])
def test_rows_do_not_depend_on_where_weights_lie(kind, scheme, device, shell, folders):
    words = [*scheme, *words_of(kind, device, folders), "sweep.force=true", "quantization.on_mismatch=skip"]
    ((name, resident),) = shell.rows(*words, "output_dir=resident").items()
    assert resident["metrics"]["quantization/coverage"] > 0.1
    for placement in ("streamed", "group_offload"):
        row = shell.rows(*words, f"memory.placement={placement}", f"output_dir={placement}")[name]
        assert numbers(row) == numbers(resident), placement


def test_parts_that_come_one_after_the_other_make_the_same(device, shell, folders):
    """A budget that holds nothing whole: encoders leave before the denoiser comes, and it before images are decoded."""
    words = [*SCHEMES[0], *words_of("flux", device, folders), "sweep.force=true"]
    ((name, resident),) = shell.rows(*words, "output_dir=resident").items()
    row = shell.rows(*words, "memory.device_gib=0.0006", "output_dir=alone")[name]
    assert numbers(row) == numbers(resident)


def test_jobs_apart_give_the_rows_of_one_process(device, shell):
    """A process of its own for each job, begun by one that has no CUDA context."""
    words = digits_words(f"device={device}", "evaluation.num_samples=10", "sweep.floors=false", "sweep.force=true")
    asked = ("-m", "backend=quanto,bitsandbytes", "dtype=int8")
    one = shell.rows(*asked, *words)
    apart = shell.rows(*asked, *words, "sweep.isolation=process")
    assert list(apart) == list(one)
    for name, row in apart.items():
        assert row["status"] == "FINISHED", row["error"]
        assert numbers(row) == numbers(one[name])
    runs = shell.tracked()
    assert len({runs[name]["tags"]["quantlab.pid"] for name in apart}) == len(apart)


def test_each_component_by_its_own_scheme_says_what_it_costs(device, shell, folders):
    schemes = (
        "components.transformer={backend: bitsandbytes, dtype: nf4}",
        "components.text_encoder_2={backend: quanto, dtype: int8}",
    )
    words = [*schemes, *words_of("flux", device, folders), "evaluation.attribute=true"]
    ((_, row),) = shell.rows(*words).items()
    assert row["status"] == "FINISHED", row["error"]
    for name in ("transformer", "text_encoder_2"):
        assert row["metrics"][f"quality/alone/{name}/latent_rel_mse"] > 0


@pytest.mark.parametrize("make", [save_bert, save_llama], ids=["BERT", "Llama"])
def test_weights_of_a_group_are_there_before_it_computes(make, device, tmp_path):
    """Wide layers take longer to come than a small input takes to be multiplied."""
    from transformers import AutoModel

    folder = make(tmp_path / "model", hidden_size=1024, intermediate_size=4096)
    module = AutoModel.from_pretrained(folder).eval()
    ids = torch.arange(24).reshape(2, 12)
    whole = copy.deepcopy(module).to(device)
    with torch.no_grad(), exact_arithmetic():
        expected = whole(input_ids=ids.to(device))[0]
        Groups(source=lambda *_: None, device=device).place("model", module)
        for _ in range(3):
            assert torch.equal(module(input_ids=ids.to(device))[0], expected)


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize(
    "scheme", [SCHEMES[0], ("backend=quanto", "dtype=int8"), ("backend=gguf", "dtype=q8_0")], ids=str
)
def test_packed_experts(kind, scheme, device, shell, tmp_path, folders):
    torch.manual_seed(0)
    EXPERTS[kind]().save_pretrained(tmp_path / "experts")
    byte_tokenizer().save_pretrained(tmp_path / "experts")
    words = [w for w in words_of("text", device, folders) if not w.startswith("model.path")]
    words += [f"model.path={tmp_path / 'experts'}", "quantization.on_mismatch=skip"]
    ((_, alone),) = shell.rows(*scheme, *words, "output_dir=linear").items()
    ((_, row),) = shell.rows(*scheme, *words, "quantization.layer_kinds=[linear,expert]").items()
    assert row["status"] == "FINISHED", row["error"]
    covered = row["metrics"]["quantization/coverage"]
    assert covered > alone["metrics"]["quantization/coverage"] + 0.1, "the experts are what is stored"
    assert row["metrics"]["quality/kld_mean"] < 0.5


def test_an_export_gives_the_numbers_of_its_run(device, shell, folders):
    words = words_of("text", device, folders)
    rows = shell.rows("-m", "backend=torchao,bitsandbytes", "dtype=int8", *words)
    runs = shell.tracked()
    for name, row in rows.items():
        target = name.replace(" ", "_")
        code, _, err = shell("export", runs[name]["run_id"], target)
        assert code == 0, err
        ((_, again),) = shell.rows(*words, f"checkpoint={target}").items()
        quality = {k: v for k, v in numbers(row).items() if k.startswith("quality/")}
        assert {k: v for k, v in numbers(again).items() if k.startswith("quality/")} == quality


@pytest.mark.parametrize("compiled", ["false", "true"])
def test_speed_where_a_user_decides_by_it(compiled, device, shell, folders):
    words = [*words_of("text", device, folders), "evaluation.speed=true", f"evaluation.compile={compiled}"]
    rows = shell.rows("-m", "backend=torchao,quanto", "dtype=int8", *words)
    for name, row in rows.items():
        assert row["status"] == "FINISHED", (name, row["error"])
        assert row["metrics"]["perf/decode_tokens_per_s"] > 0, name


@pytest.mark.parametrize("backend", [pytest.param(name, marks=ON_GPU) for name in bench_memory.SCHEMES])
def test_streaming_takes_what_is_planned(backend, tmp_path_factory):
    """What is quantized, and beside it for one layer three times float32."""
    folder = tmp_path_factory.getbasetemp() / "half_a_billion"
    if not folder.exists():
        bench_memory.write_model(folder, 5e8)
        torch.set_default_dtype(torch.float32)
    found = bench_memory.apart(folder, backend, "streamed", "--device", "cuda")
    assert found["peak_mib"] <= found["quantized_mib"] + 3 * 2048 * 8192 * 4 / bench_memory.MIB, found
