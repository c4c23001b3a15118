"""What people run: layers of other classes, weights that a parent reads, experts, on every backend."""

import pytest
import torch
from torch import nn

import quantlab
from tests.support.configs import METHODS, config_of

V = 96
SIZES = {"vocab_size": V, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MOE = {**SIZES, "intermediate_size": 128, "num_key_value_heads": 2}
IDS = {"input_ids": torch.arange(24).reshape(2, 12)}


def causal(name, **config):
    import transformers

    return lambda: getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**config))


def gpt2(**config):
    import transformers

    return lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**config))


def t5():
    from transformers import T5Config, T5EncoderModel

    sizes = {"vocab_size": V, "d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 128, "num_layers": 2}
    return T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu"))


def wan():
    from diffusers import WanTransformer3DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 4, "text_dim": 32}
    return WanTransformer3DModel(**sizes, freq_dim=32, ffn_dim=64, num_layers=2, rope_max_seq_len=32)


def encoder_layers():
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2)


class Attends(nn.Module):
    """An attention of torch with a kdim of its own, which has three matrices."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 4, kdim=32, vdim=32, batch_first=True)
        self.out = nn.Linear(64, 64)

    def forward(self, x):
        return self.out(self.attention(x, x[..., :32], x[..., :32])[0])


class Casts(nn.Module):
    """As Wan's embedder: it casts to the dtype of a layer's weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.second(nn.functional.silu(self.first(x.to(self.first.weight.dtype))).to(self.second.weight.dtype))


FLOATS = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(0))
WAN = {
    "hidden_states": torch.randn(1, 4, 2, 8, 8, generator=torch.Generator().manual_seed(0)),
    "timestep": torch.tensor([500]),
    "encoder_hidden_states": torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(1)),
    "return_dict": False,
}
MODELS = {
    "Wan": (wan, WAN),
    "GPT-2": (gpt2(vocab_size=V, n_embd=64, n_layer=2, n_head=4), IDS),
    "Falcon": (causal("Falcon", **SIZES), IDS),
    "Mamba": (causal("Mamba", vocab_size=V, hidden_size=64, num_hidden_layers=2, state_size=8, time_step_rank=64), IDS),
    "T5": (t5, IDS),
    "nn.TransformerEncoder": (encoder_layers, FLOATS),
    "nn.MultiheadAttention": (Attends, FLOATS),
    "casts to a weight's dtype": (Casts, FLOATS),
}
EXPERTS = {
    "Mixtral": causal("Mixtral", **MOE, num_local_experts=4),
    "Qwen3-MoE": causal("Qwen3Moe", **MOE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, head_dim=16),
    "GraniteMoE": causal("GraniteMoe", **MOE, num_local_experts=4, num_experts_per_tok=2),
    "gpt-oss": causal("GptOss", **MOE, num_local_experts=4, num_experts_per_tok=2, head_dim=16),
}


def built(make):
    torch.manual_seed(0)
    model = make().eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    return model


def evaluated(make, inputs, method, **more):
    config = config_of(method)
    (row,) = [
        r
        for r in quantlab.evaluate(built(make), [config], [inputs], num_bootstrap=10, floors=False, **more)
        if r.name != "reference"
    ]
    return row


EACH = [m if i < 2 else pytest.param(m, marks=pytest.mark.slow) for i, m in enumerate(METHODS)]


@pytest.mark.parametrize("method", EACH)
@pytest.mark.parametrize("name", MODELS)
def test_what_people_run_runs_and_is_quantized(name, method):
    make, inputs = MODELS[name]
    row = evaluated(make, inputs, method)
    rows = {r.name: r for r in row.quantization.layers}
    assert 0 < row.quality["output_rel_error"].value < 0.4
    linear = [r for r in rows.values() if r.kind == "linear"]
    taken = [r for r in linear if r.status == "quantized"]
    assert {r.reason for r in linear if r.status != "quantized"} <= {
        "modules_to_not_convert: lm_head",
        "T5EncoderModel: wo, which its class keeps in float32",
        "WanTransformer3DModel: time_embedder, which its class keeps in float32",
    }
    assert len(taken) >= 2
    assert row.memory["model"].weights_bytes < 4 * row.memory["model"].num_parameters


@pytest.mark.parametrize("method", EACH)
@pytest.mark.parametrize("name", [n if n == "gpt-oss" else pytest.param(n, marks=pytest.mark.slow) for n in EXPERTS])
def test_experts_are_told_and_taken_where_they_are_asked_for(name, method):
    plain = evaluated(EXPERTS[name], IDS, method)
    experts = [r for r in plain.quantization.layers if r.kind == "expert"]
    assert len(experts) == 4
    assert {r.status for r in experts} == {"left"}
    row = evaluated(EXPERTS[name], IDS, method, layer_kinds=["linear", "expert"])
    assert {r.status for r in row.quantization.layers if r.kind == "expert"} == {"quantized"}
    assert row.quantization.coverage > 3 * plain.quantization.coverage
    assert plain.quality["output_rel_error"].value < row.quality["output_rel_error"].value < 0.6
    assert row.memory["model"].weights_bytes < 0.6 * plain.memory["model"].weights_bytes


ROUNDS_INPUTS = {
    "bitsandbytes int8": quantlab.BitsAndBytesConfig(load_in_8bit=True),
    "torchao int8": quantlab.TorchAoConfig("int8dq"),
}


ALL_READ = ("nn.TransformerEncoder", "casts to a weight's dtype")


@pytest.mark.parametrize("method", ROUNDS_INPUTS)
@pytest.mark.parametrize("name", ["GPT-2", "Falcon", "Mamba"])
def test_what_rounds_inputs_takes_the_layers_that_are_called_and_tells_of_the_others(name, method):
    make, inputs = MODELS[name]
    (_, row) = quantlab.evaluate(built(make), [ROUNDS_INPUTS[method]], [inputs], num_bootstrap=10, floors=False)
    assert 0 < row.quality["output_rel_error"].value < 0.4
    left = [r.reason for r in row.quantization.layers if r.kind == "linear" and r.status != "quantized"]
    assert all("rounds the inputs" in why or "lm_head" in why for why in left)
    assert (name == "Mamba") == any("rounds the inputs" in why for why in left)


@pytest.mark.parametrize("method", ROUNDS_INPUTS)
@pytest.mark.parametrize("name", ALL_READ)
def test_where_every_layer_is_read_nothing_that_rounds_inputs_is_run(name, method):
    make, inputs = MODELS[name]
    with pytest.raises(
        quantlab.ConfigError,
        match=r"reads its weight, or runs its forward, instead .*rounds the inputs of layers that are",
    ):
        quantlab.evaluate(built(make), [ROUNDS_INPUTS[method]], [inputs], num_bootstrap=10, floors=False)


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao"])
def test_a_job_finds_by_itself_what_its_model_reads(method, shell):
    """By one forward of the unquantized model: Mamba multiplies by a layer's weight."""
    import transformers

    from tests.support.tiny_text_models import TEXT, byte_tokenizer

    config = transformers.MambaConfig(
        vocab_size=259, hidden_size=64, num_hidden_layers=1, state_size=8, time_step_rank=64, initializer_range=0.3
    )
    folder = shell.folder / "model"
    built(lambda: transformers.MambaForCausalLM(config)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (shell.folder / "text.txt").write_text(TEXT)
    words = [f"model.path={folder}", "dataset=text", "dataset.path=text.txt", "evaluation.num_samples=2"]
    words += ["evaluation.context_length=32", "evaluation.num_bootstrap=20", "device=cpu", "sweep.floors=false"]
    dtype = "nf4" if method == "bitsandbytes" else "int4"
    (row,) = shell.rows("model=auto", *words, f"backend={method}", f"dtype={dtype}").values()
    assert 0 < row["metrics"]["quality/kld_mean"] < 5
