"""A model in another dtype has each tensor as loading it in that dtype would give it: the floor says what that costs."""

import copy

import diffusers
import pytest
import torch
import transformers
from torch import nn

from quantlab.models.outline import cast_as_loaded
from tests.support.exports import candidate_of, job_on, loaded

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
PAIRS = {f"{half}_{what}": 2 for half in ("encoder", "decoder") for what in ("layers", "attention_heads", "ffn_dim")}


def _llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))


def _gemma():
    config = transformers.Gemma3TextConfig(**SMALL, head_dim=16, num_key_value_heads=1)
    return transformers.Gemma3ForCausalLM(config)


def _gptj():
    config = transformers.GPTJConfig(vocab_size=64, n_embd=32, n_layer=1, n_head=2, rotary_dim=8)
    return transformers.GPTJForCausalLM(config)


def _m2m():
    return transformers.M2M100ForConditionalGeneration(transformers.M2M100Config(vocab_size=64, d_model=32, **PAIRS))


def _t5():
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=2)
    return transformers.T5EncoderModel(config)


def _pixart():
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8}
    return diffusers.PixArtTransformer2DModel(**sizes, cross_attention_dim=16, caption_channels=16)


def _wan():
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1, "text_dim": 16, "ffn_dim": 32}
    return diffusers.WanTransformer3DModel(**sizes, freq_dim=16, in_channels=4, out_channels=4)


LIBRARIES = {f.__name__.strip("_"): f for f in (_llama, _gemma, _gptj, _m2m, _t5, _pixart, _wan)}


def _tensors(module):
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


@pytest.fixture(scope="module", params=LIBRARIES)
def saved(request, tmp_path_factory):
    torch.manual_seed(0)
    folder, model = tmp_path_factory.mktemp(request.param), LIBRARIES[request.param]()
    model.save_pretrained(folder)
    return type(model), folder


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cast_is_what_loading_in_that_dtype_gives(saved, dtype):
    kind, folder = saved
    name = "torch_dtype" if issubclass(kind, diffusers.ModelMixin) else "dtype"
    wanted = _tensors(kind.from_pretrained(folder, **{name: getattr(torch, dtype)}))
    found = _tensors(cast_as_loaded(kind.from_pretrained(folder), dtype))
    assert found.keys() == wanted.keys()
    assert {path: tensor.dtype for path, tensor in found.items()} == {p: t.dtype for p, t in wanted.items()}
    assert [path for path, tensor in found.items() if not torch.equal(tensor, wanted[path])] == []


class _Around(nn.Module):
    """A library's model as a part, beside what no library knows; two of its parts are one."""

    def __init__(self):
        super().__init__()
        self.inner, self.out, self.recurrent = _llama(), nn.Linear(64, 4), nn.LSTM(8, 8)
        self.again = self.out
        self.register_buffer("scale", torch.tensor(0.1))
        self.register_buffer("turns", torch.polar(torch.ones(3), torch.arange(3.0)))
        self.register_buffer("counts", torch.arange(3))


def test_a_model_that_is_a_part_of_another_is_cast_as_it_would_be_loaded():
    module = _Around()
    cast = cast_as_loaded(copy.deepcopy(module), "bfloat16")
    assert cast.inner.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(cast.inner.model.rotary_emb.inv_freq, module.inner.model.rotary_emb.inv_freq)
    assert cast.inner.lm_head.weight.dtype == cast.out.weight.dtype == cast.scale.dtype == torch.bfloat16
    assert cast.again is cast.out
    assert torch.equal(cast.turns, module.turns)
    assert cast.counts.dtype == torch.int64
    assert cast.recurrent(torch.zeros(1, 2, 8, dtype=torch.bfloat16))[0].dtype == torch.bfloat16


def test_the_row_of_a_cast_is_measured_on_it(tmp_path):
    found = loaded("llama", tmp_path, tmp_path / "cache")
    candidate = candidate_of(found, job_on(found, "backend=none", "dtype=bfloat16"), tmp_path / "cache")
    (module,), (original,) = candidate.model.components.values(), found.model.components.values()
    assert torch.equal(module.model.rotary_emb.inv_freq, original.model.rotary_emb.inv_freq)
    assert module.model.norm.weight.dtype == torch.bfloat16
