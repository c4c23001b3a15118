"""Checkpoints whose own settings are not the model's: told where they compute otherwise, refused where they divide
weights otherwise."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, RwkvConfig, RwkvForCausalLM

from quantlab.errors import ModelError
from quantlab.models.foreign import check_class
from quantlab.stages.foreign import load_candidate, told_by_files
from tests.support.foreign import LANGUAGE
from tests.support.llama_cpp import save_gguf
from tests.support.tiny_text_models import byte_tokenizer, load_llama


@pytest.fixture
def llama(foreign, tmp_path):
    return load_llama(foreign / "llama", tmp_path / "cache")


def saved(foreign, file, **settings):
    """A GGUF file of the model's own tensors whose keys say ``settings``."""
    plain = AutoModelForCausalLM.from_pretrained(foreign / "llama", dtype="float32")
    for name, value in settings.items():
        setattr(plain.config, name, value)
    return save_gguf(plain, AutoTokenizer.from_pretrained(foreign / "llama"), file, add_bos=True, kind="Q8_0")


def test_keys_by_which_llama_cpp_computes_a_file_otherwise_are_told(foreign, llama, tmp_path):
    rope = {"rope_theta": 500.0, "rope_type": "default"}
    file = saved(foreign, tmp_path / "other.gguf", rope_parameters=rope, rms_norm_eps=0.25, max_position_embeddings=64)
    found = load_candidate(str(file), llama, ["model"], {}, tmp_path)
    [told] = [line for line in found.quantization.unquantized if "file says" in line]
    assert told == (
        "model: its file says llama.attention.layer_norm_rms_epsilon=0.25 (the model's: 1e-06), llama.rope.freq_base=500 "
        "(the model's: 10000): it is measured by the model's settings, and whoever runs the file by its own; name the "
        "model that it was made from (model.path=...)"
    )
    assert told_by_files(str(file), llama.components, ["model"]) == [f"checkpoint={file}: {told}"], "of a dry run"
    found = load_candidate(str(foreign / "q8_0.gguf"), llama, ["model"], {}, tmp_path)
    assert not [line for line in found.quantization.unquantized if "file says" in line]


def test_settings_of_a_folder_are_told_before_it_is_loaded_as_afterwards(foreign, llama, tmp_path):
    rope = {"rope_theta": 500.0, "rope_type": "default"}
    shutil.copytree(foreign / "bnb_nf4", tmp_path / "other")
    file = tmp_path / "other" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rope_parameters": rope, "rms_norm_eps": 0.25}))
    [before] = told_by_files(str(file.parent), llama.components, ["model"])
    found = load_candidate(str(file.parent), llama, ["model"], {}, tmp_path)
    [told] = [line for line in found.quantization.unquantized if "config.json says" in line]
    assert before == f"checkpoint={file.parent}: {told}"
    assert "rms_norm_eps=0.25 (the model's: 1e-06)" in told


@pytest.mark.parametrize("name", [name for name in LANGUAGE if "modelopt" not in name])
def test_nothing_is_told_of_settings_that_are_the_models(foreign, llama, name):
    assert told_by_files(str(foreign / name), llama.components, ["model"]) == []


def test_a_file_of_other_heads_is_another_models(foreign, llama, tmp_path):
    """Its shapes are the model's; rows would be turned by the wrong heads, and numbers come out."""
    file = saved(foreign, tmp_path / "other.gguf", num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    wanted = (
        f"^{re.escape(f'checkpoint={file}')}: it says llama.attention.head_count=8 .the model's: 4.; name the model"
    )
    with pytest.raises(ModelError, match=wanted):
        load_candidate(str(file), llama, ["model"], {}, tmp_path)
    with pytest.raises(ModelError, match=wanted):
        check_class(str(file), llama.components, ["model"])


@pytest.mark.parametrize("name", ["bnb_nf4", "torchao_int8"])
@pytest.mark.parametrize(("key", "value"), [("num_key_value_heads", 1), ("num_attention_heads", 8), ("head_dim", 8)])
def test_a_folder_of_other_heads_is_another_models(foreign, llama, tmp_path, name, key, value):
    shutil.copytree(foreign / name, tmp_path / "other")
    file = tmp_path / "other" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    wanted = rf"^checkpoint=\S+other: its config.json says {key}={value} \(the model's: \d+\); name the model"
    with pytest.raises(ModelError, match=wanted):
        load_candidate(str(tmp_path / "other"), llama, ["model"], {}, tmp_path)
    with pytest.raises(ModelError, match=wanted):
        check_class(str(tmp_path / "other"), llama.components, ["model"])


def test_a_class_that_rounds_anew_as_it_first_runs_is_told(tmp_path):
    """transformers' RWKV makes 4-bit layers of bitsandbytes fp4, whatever they were: that is what is measured."""
    torch.manual_seed(0)
    config = RwkvConfig(vocab_size=259, hidden_size=64, num_hidden_layers=2, context_length=64)
    RwkvForCausalLM(config).save_pretrained(tmp_path / "rwkv")
    byte_tokenizer().save_pretrained(tmp_path / "rwkv")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "rwkv", quantization_config=nf4, dtype=torch.float32)
    made.save_pretrained(tmp_path / "nf4")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", dtype=torch.float32).eval()
    for layer in theirs.modules():
        layer.support_avx512bf16_for_cpu = False  # the library would compute in bfloat16 there
    model = load_llama(tmp_path / "rwkv", tmp_path / "cache")
    found = load_candidate(str(tmp_path / "nf4"), model, ["model"], {}, tmp_path)
    ours, ids = found.model.components["model"], torch.arange(32)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)
    assert ours.rwkv.blocks[0].attention.output.weight.quant_state.quant_type == "fp4"
    assert {row.dtype for row in found.quantization.layers if row.status == "quantized"} == {"nf4"}
    [told] = [line for line in found.quantization.unquantized if "as it first runs" in line]
    assert told.startswith("model: RwkvModel._rescale_layers changes weights as it first runs")
