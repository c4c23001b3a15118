"""``model.dtype=auto`` off the CPU: what config.json says, or else what the files hold, for what is planned and loaded."""

import json

import pytest
import torch

from quantlab.errors import ConfigError
from quantlab.models import causal_lm, encoder, seq2seq, vision
from quantlab.models.outlines import outline
from quantlab.models.stored_dtype import dtype_on
from quantlab.running.placement import _as_on
from quantlab.vocabulary.schema import ModelConfig
from tests.models.test_auto import processor
from tests.models.test_whole_model import BERT, T5, VISION, saved
from tests.support.tiny_text_models import byte_tokenizer

LLAMA = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
FAMILIES = {
    "causal_lm": (causal_lm.load, "LlamaForCausalLM", "LlamaConfig", LLAMA),
    "encoder": (encoder.load, "BertForMaskedLM", "BertConfig", BERT),
    "seq2seq": (seq2seq.load, "T5ForConditionalGeneration", "T5Config", T5),
    "vision": (vision.load, "ViTForImageClassification", "ViTConfig", VISION),
}


def checkpoint(folder, family, dtype, key=None):
    """A model in ``dtype`` whose configuration says so under ``key``, or nowhere."""
    _, name, config, sizes = FAMILIES[family]
    saved(folder, name, config, **sizes)
    rewritten(folder, lambda tensor: tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor)
    said = json.loads((folder / "config.json").read_text())
    for old in ("dtype", "torch_dtype"):
        said.pop(old, None)
    (folder / "config.json").write_text(json.dumps(said | ({key: dtype} if key else {})))
    if family == "vision":
        processor(folder, name)
    return folder


def rewritten(folder, change):
    from safetensors.torch import load_file, save_file

    for file in folder.glob("*.safetensors"):
        state = load_file(file)
        save_file({name: change(tensor) for name, tensor in state.items()}, file, metadata={"format": "pt"})


ONE_EACH = [("causal_lm", "float16", None), ("encoder", "bfloat16", None), ("seq2seq", "bfloat16", "torch_dtype")]
ONE_EACH += [("vision", "float32", None)]
ALL = [(f, d, k) for f in FAMILIES for d in ("bfloat16", "float16", "float32") for k in (None, "dtype", "torch_dtype")]
MARKED = [pytest.param(*case, marks=() if case in ONE_EACH else pytest.mark.slow) for case in ALL]


@pytest.mark.parametrize(("family", "dtype", "key"), MARKED)
def test_it_is_the_dtype_of_the_checkpoint(family, dtype, key, tmp_path):
    config = ModelConfig(family=family, path=str(checkpoint(tmp_path / "m", family, dtype, key)))
    planned = outline(config, "cuda", lambda _: None)
    placed = _as_on(config, "cuda", family)
    loaded = FAMILIES[family][0](placed, "cpu", tmp_path)
    assert (planned.dtype, placed.dtype, loaded.dtype) == (dtype, dtype, dtype)
    sizes = [sum(p.nbytes for p in part["model"].parameters()) for part in (planned.components, loaded.components)]
    assert sizes[0] == sizes[1]


def test_a_model_that_is_loaded_where_it_runs_has_the_same(tmp_path):
    config = ModelConfig(family="causal_lm", path=str(checkpoint(tmp_path / "m", "causal_lm", "bfloat16")))
    assert causal_lm.load(config, "meta", tmp_path).dtype == "bfloat16"


def test_a_file_of_several_dtypes_has_that_of_most_weights(tmp_path):
    folder = checkpoint(tmp_path / "m", "causal_lm", "bfloat16")
    rewritten(folder, lambda tensor: tensor.float() if 259 in tensor.shape else tensor)
    config = ModelConfig(family="causal_lm", path=str(folder))
    assert dtype_on(config, "cuda", "") == "float32"  # both tables of the vocabulary, more than half
    rewritten(folder, lambda tensor: tensor.float() if tensor.dim() == 1 else tensor.bfloat16())
    assert dtype_on(config, "cuda", "") == "bfloat16"


def test_pickled_weights_say_theirs_too(tmp_path):
    from safetensors.torch import load_file

    folder = checkpoint(tmp_path / "m", "causal_lm", "float16")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert outline(ModelConfig(family="causal_lm", path=str(folder)), "cuda", lambda _: None).dtype == "float16"


def test_on_a_cpu_it_is_float32_and_nothing_else_is_asked(tmp_path):
    config = ModelConfig(family="causal_lm", path=str(tmp_path / "nowhere"))
    assert dtype_on(config, "cpu", "bfloat16") == "float32"


def test_what_was_taken_is_told(tmp_path, capsys):
    folder = checkpoint(tmp_path / "m", "causal_lm", "bfloat16")
    byte_tokenizer().save_pretrained(folder)
    dtype_on(ModelConfig(family="causal_lm", path=str(folder)), "cuda", "")
    assert "names no dtype; bfloat16 is taken" in capsys.readouterr().err
    dtype_on(ModelConfig(family="causal_lm", path=str(folder)), "cuda", "bfloat16")
    assert not capsys.readouterr().err


def test_a_dtype_that_models_do_not_compute_in_is_refused_on_any_device(tmp_path):
    for device in ("cpu", "cuda"):
        with pytest.raises(ConfigError, match="^model.dtype=int8: "):
            dtype_on(ModelConfig(family="causal_lm", path=str(tmp_path), dtype="int8"), device, "")
