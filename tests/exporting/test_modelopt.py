"""ModelOpt's own restore format: single layers that were converted, restored as a whole model by the library."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import quantlab
from quantlab.backends.modelopt.checkpointing import ENABLE
from quantlab.backends.modelopt.restore import STATE
from quantlab.errors import ConfigError
from quantlab.exporting import check, verify
from quantlab.exporting.checkpoint import write_part
from quantlab.exporting.folder import MANIFEST
from quantlab.exporting.whole import parts_of
from quantlab.stages.foreign import load_candidate
from tests.support.exports import candidate_of, checker, exported, job_on, loaded


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with checker() as one, pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "_fresh_process", one)
        yield tmp_path_factory.mktemp("modelopt")


def test_a_state_of_single_layers_restores_a_whole_model(tmp_path):
    found = loaded("llama", tmp_path, tmp_path / "cache")
    job = job_on(found, "backend=modelopt", "dtype=int4")
    made = candidate_of(found, job, tmp_path / "cache")
    (part,) = parts_of(job, found.model, made.model, made.quantization).values()
    written = write_part(part, tmp_path)
    assert written.before == ENABLE
    assert (tmp_path / STATE).is_file()
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    module = quantlab.load(tmp_path)
    assert check.digests(module) == check.digests(part.module)
    kept = [name for name in part.original.state_dict() if "embed" in name or "norm" in name]
    assert all(module.state_dict()[name].equal(part.original.state_dict()[name]) for name in kept)


@pytest.fixture(scope="module")
def packed(place):
    """A tiny Llama in int4, exported."""
    found = loaded("llama", place, place / "cache")
    return found, *exported(found, place / "packed", place / "cache", "backend=modelopt", "dtype=int4")


@pytest.mark.slow
def test_what_was_packed_is_restored_by_the_library_bit_for_bit(packed, place):
    _, done, _, _ = packed
    assert done.verified.loads_with == (
        "transformers LlamaForCausalLM.from_pretrained after enable_huggingface_checkpointing()"
    )
    assert done.verified.outputs_identical, done.verified.reason
    assert {STATE, "model.safetensors", "config.json", MANIFEST, "README.md"} <= {f.name for f in done.folder.iterdir()}
    assert "quantization_config" not in json.loads((done.folder / "config.json").read_text())


@pytest.mark.slow
def test_load_gives_it_back_and_leaves_other_models_loading_alone(packed):
    from transformers import PreTrainedModel

    _, done, _, made = packed
    before = PreTrainedModel.from_pretrained.__func__
    module = quantlab.load(done.folder)
    assert PreTrainedModel.from_pretrained.__func__ is before
    assert check.digests(module) == check.digests(made.model.components["model"])
    (done.folder / MANIFEST).rename(done.folder / "aside")
    try:  # as a checkpoint that quantlab did not write
        assert check.digests(quantlab.load(done.folder)) == check.digests(module)
    finally:
        (done.folder / "aside").rename(done.folder / MANIFEST)


@pytest.mark.slow
def test_it_is_scored_as_a_checkpoint(packed, place):
    found, done, _, made = packed
    read = load_candidate(str(done.folder), found.model, ["model"], {}, place / "cache").quantization
    rows = {r.name: (r.dtype, r.group_size, r.weight_bytes, r.weight_rel_error) for r in made.quantization.layers}
    assert {r.name: (r.dtype, r.group_size, r.weight_bytes, r.weight_rel_error) for r in read.layers} == rows


@pytest.mark.slow
def test_a_manifest_that_names_another_call_is_refused(packed, tmp_path):
    data = json.loads((packed[1].folder / MANIFEST).read_text())
    data["parts"]["model"]["before"] = "os:getcwd"
    (tmp_path / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="is no loader"):
        quantlab.load(tmp_path)


def test_no_loader_reads_the_other_form():
    """Why nothing is written by ``export_hf_checkpoint``."""
    from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as OF_DIFFUSERS
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as OF_TRANSFORMERS

    assert "modelopt" not in OF_TRANSFORMERS
    assert "modelopt" in OF_DIFFUSERS  # which restores from its own state, and reads no scales of other names
    import inspect

    from diffusers.quantizers.modelopt import modelopt_quantizer

    assert "weight_scale" not in inspect.getsource(modelopt_quantizer)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "dtype=int8",
        "dtype=int3",
        "dtype=float8_e4m3",
        "dtype=int4 algorithm=awq_full",
        "dtype=int4 group_size=32 algorithm=mse",
        "dtype=int8 algorithm=smoothquant quantization.activation_dtype=int8",
        "dtype=int8 quantization.activation_dtype=int8 quantization.activation_scales=static",
        "dtype=int8 quantization.compress=false",
    ],
)
def test_each_kind_of_state_is_restored(packed, place, words):
    """Scales of inputs, factors of channels, simulated weights, codes of fewer bits."""
    target = place / words.replace(" ", "_").replace("=", "-")
    done, _, _ = exported(packed[0], target, place / "cache", "backend=modelopt", *words.split())
    assert done.verified.outputs_identical, done.verified.reason


@pytest.mark.slow
def test_a_whole_pipeline_and_the_cards_lines(place):
    found = loaded("flux", place, place / "cache")
    words = ("backend=modelopt", "dtype=float8_e4m3")
    done, _, made = exported(found, place / "pipeline", place / "cache", *words)
    assert done.verified.outputs_identical, done.verified.reason
    wanted = check.digests(made.model.components["transformer"])
    assert check.digests(quantlab.load(done.folder).transformer) == wanted
    code = (done.folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "enable_huggingface_checkpointing()" in code
    code += "\nprint(type(pipe.transformer.transformer_blocks[0].attn.to_q.weight).__name__)"
    ran = subprocess.run([sys.executable, "-I", "-c", code], cwd=done.folder, capture_output=True, text=True)
    assert ran.stdout.split()[-1:] == ["QTensorWrapper"], ran.stderr[-2000:]


@pytest.mark.slow
def test_a_class_that_diffusers_keeps_parts_of_in_float32(place):
    """Its loader has one way, which takes no packed weights: dense ones that are rounded at each use go."""
    found = loaded("wan_2_1", place, place / "cache")
    with pytest.raises(ConfigError, match=r"keeps parts of a WanTransformer3DModel in float32 .*compress=false"):
        exported(found, place / "wan", place / "cache", "backend=modelopt", "dtype=int8")
    words = ("backend=modelopt", "dtype=int8", "quantization.compress=false")
    done, _, _ = exported(found, place / "wan", place / "cache", *words)
    assert done.verified.outputs_identical, done.verified.reason
