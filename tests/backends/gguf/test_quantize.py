"""GGUF: the promises of its capability rows, run on real layers, and the file."""

from __future__ import annotations

import copy
import hashlib
import importlib
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from quantlab.backends import gguf as backend
from quantlab.backends.gguf import GGUFQuantizationConfig
from quantlab.errors import ConfigError, ModelError, NotQuantized
from quantlab.vocabulary.axes import QuantizationAxes
from tests.support.tables import CAPABILITIES

gguf = pytest.importorskip("gguf")
libgguf = pytest.importorskip("libgguf")

ROWS = CAPABILITIES["gguf"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BLOCKS = {  # (weights, bytes) of a block, from ggml's block structs
    "q8_0": (32, 34),
    "q5_0": (32, 22),
    "q5_1": (32, 24),
    "q4_0": (32, 18),
    "q4_1": (32, 20),
    "iq4_nl": (32, 18),
    "q6_k": (256, 210),
    "q5_k": (256, 176),
    "q4_k": (256, 144),
    "q3_k": (256, 110),
    "q2_k": (256, 84),
    "iq4_xs": (256, 136),
}
BOUND = {"q8_0": 0.01, "q6_k": 0.03, "q5_0": 0.06, "q5_1": 0.06, "q5_k": 0.06, "q3_k": 0.2, "q2_k": 0.4}


def model_of(in_features, out_features, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(in_features, out_features), nn.LayerNorm(out_features)).to(dtype).eval()


def axes(dtype, **more):
    return QuantizationAxes(backend="gguf", dtype=dtype, **more)


def config_of(dtype, **more):
    return GGUFQuantizationConfig.from_axes(axes(dtype, **more))


def quantized(model, config, layers=("0",), compute_dtype=None):
    made = copy.deepcopy(model)
    backend.quantize(made, layers, config, compute_dtype or next(model.parameters()).dtype)
    return made


def rel_error(got, want):
    return float((got.detach().float() - want.detach().float()).norm() / want.detach().float().norm())


# -- the promises of the table


@pytest.mark.parametrize("dtype_name", DTYPES)
@pytest.mark.parametrize("shape", [(1, 48), (1, 1), (3, 7)], ids=str)
@pytest.mark.parametrize("dtype", ROWS)
def test_quantizes_reads_back_saves_and_loads(dtype, shape, dtype_name, tmp_path):
    block, num_bytes = BLOCKS[dtype]
    assert ROWS[dtype].in_features_multiple == block
    columns, rows = shape[0] * block, shape[1]
    model = model_of(columns, rows, DTYPES[dtype_name])
    made = quantized(model, config_of(dtype))
    x = torch.randn(5, columns, dtype=DTYPES[dtype_name])
    out = made(x)
    assert out.dtype == x.dtype
    assert torch.isfinite(out).all()

    stored = backend.read_back(made[0])
    assert (stored.dtype, stored.group_size) == (dtype, ROWS[dtype].group_sizes[0])
    assert stored.dense.dtype == torch.float32
    assert 0 < rel_error(stored.dense, model[0].weight) < BOUND.get(dtype, 0.13)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in made[0].buffers()}
    assert sum(held.values()) == rows * shape[0] * num_bytes

    before = {k: v.clone() for k, v in made.state_dict().items()}
    assert torch.equal(made(x), out)
    assert all(torch.equal(v, before[k]) for k, v in made.state_dict().items())
    assert torch.equal(copy.deepcopy(made)(x), out)
    assert torch.equal(pickle.loads(pickle.dumps(made))(x), out)
    other = quantized(model_of(columns, rows, DTYPES[dtype_name], seed=1), config_of(dtype))
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(x), out)

    backend.save(made, tmp_path)
    fresh = model_of(columns, rows, DTYPES[dtype_name], seed=1)
    backend.load(fresh, ["0"], config_of(dtype), tmp_path)
    assert torch.equal(fresh(x), out)
    assert backend.read_back(fresh[0]).dtype == dtype


@pytest.mark.parametrize("dtype", ROWS)
def test_groups_share_a_scale(dtype):
    """A group's values lie on one grid of 2^bits levels; of the coarse types, those of two groups do not."""
    group = ROWS[dtype].group_sizes[0]
    magnitudes = torch.logspace(0, 0.3, BLOCKS[dtype][0] * 2 // group).repeat_interleave(group)
    layer = nn.Sequential(nn.Linear(len(magnitudes), 4, bias=False))
    torch.manual_seed(0)
    layer[0].weight.data = torch.randn(4, len(magnitudes)) * magnitudes
    dense = backend.read_back(quantized(layer, config_of(dtype))[0]).dense.reshape(-1, group)
    bits = {"q2_k": 2, "q3_k": 3, "q5_0": 5, "q5_1": 5, "q5_k": 5, "q6_k": 6, "q8_0": 8}.get(dtype, 4)
    assert max(len(row.unique()) for row in dense) <= 2**bits
    if bits <= 3:  # few enough levels to see that twice the group is not on one grid
        assert max(len(row.unique()) for row in dense.reshape(-1, 2 * group)) > 2**bits


@pytest.mark.parametrize("dtype", ROWS)
def test_dequantization_is_ggufs_own_and_the_same_on_every_device(dtype):
    import libgguf.libgguf_torch as on_device

    made = quantized(model_of(BLOCKS[dtype][0] * 2, 5), config_of(dtype))
    kind = gguf.GGMLQuantizationType[dtype.upper()]
    dense = made[0].dequantize()
    assert torch.equal(dense, torch.from_numpy(gguf.quants.dequantize(made[0].qweight.numpy(), kind)))
    kind = on_device.GGMLQuantizationType[kind.name]
    assert torch.equal(dense, on_device.dequantize(made[0].qweight, kind, dense.shape, torch.float32))


@pytest.mark.parametrize(
    ("dtype", "sha256"),
    [
        ("q8_0", "fa7f9b0f90e878eb4321603fdba3f4729c56577695a2ff71d45de2c00bb3fb13"),
        ("q4_k", "e3ff2ea6a75d4dab3404904abe140ede953b0d2c72c1c3ad142764500fdaed86"),
    ],
)
def test_the_bytes_are_pinned(dtype, sha256):
    weight = np.random.default_rng(0).standard_normal((16, 512)).astype(np.float32)
    layer = nn.Sequential(nn.Linear(512, 16))
    layer[0].weight.data = torch.from_numpy(weight)
    made = quantized(layer, config_of(dtype))
    assert hashlib.sha256(made[0].qweight.numpy().tobytes()).hexdigest() == sha256


@pytest.mark.parametrize("num_threads", [1, 3])
def test_the_bytes_do_not_depend_on_the_number_of_threads(num_threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    model = model_of(256, 7)
    made = quantized(model, config_of("q5_k"))
    whole = libgguf.quantize_rows(model[0].weight.detach().numpy(), libgguf.GGMLQuantizationType.Q5_K)
    assert np.array_equal(made[0].qweight.numpy(), whole)


@pytest.mark.parametrize("lead", [(), (1,), (2, 3, 4), (0,)], ids=str)
def test_inputs_of_any_rank_and_gradients(lead):
    made = quantized(model_of(64, 48), config_of("q4_0"))
    x = torch.randn(*lead, 64, requires_grad=True)
    out = made[0](x)
    assert out.shape == (*lead, 48)
    out.sum().backward()
    assert torch.allclose(x.grad, made[0].dequantize().sum(0).expand_as(x), atol=1e-4)


def test_casting_the_model_leaves_the_codes():
    made = quantized(model_of(64, 48), config_of("q8_0"))
    codes = made[0].qweight.clone()
    made.to(torch.bfloat16)
    assert torch.equal(made[0].qweight, codes)
    assert made(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", ROWS)
def test_cuda_agrees_with_the_cpu(dtype):
    model = model_of(BLOCKS[dtype][0], 48)
    made = quantized(copy.deepcopy(model).cuda(), config_of(dtype))
    assert made[0].qweight.is_cuda
    assert torch.equal(made[0].dequantize().cpu(), quantized(model, config_of(dtype))[0].dequantize())


# -- the file


class Parts(nn.Module):
    """Every kind of tensor that a component may hold beside its quantized layers."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.mid, self.head = nn.Embedding(40, 64), nn.Linear(64, 64), nn.Linear(64, 40, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.LayerNorm(64).to(torch.bfloat16)
        self.video = nn.Conv3d(2, 3, 2).half()
        self.register_buffer("scalar", torch.tensor(seed + 0.5, dtype=torch.bfloat16))
        self.register_buffer("flags", torch.randn(3, 5) > 0)
        self.register_buffer("bytes", torch.randint(0, 255, (2, 3), dtype=torch.uint8))
        self.register_buffer("ids", torch.randint(0, 2**40, (4,)))
        self.register_buffer("wide", torch.randn(3, dtype=torch.float64))
        self.register_buffer("eight", torch.randn(8).to(torch.float8_e4m3fn))

    def forward(self, ids):
        return self.head(self.norm(self.mid(self.embed(ids)).bfloat16()).float())


@pytest.mark.parametrize("layers", [["mid"], ["mid", "head"]], ids=str)
def test_all_other_tensors_come_back(layers, tmp_path):
    made, fresh = quantized(Parts(0), config_of("q4_0"), layers), Parts(1)
    backend.save(made, tmp_path)
    backend.load(fresh, layers, config_of("q4_0"), tmp_path)
    ids = torch.arange(40)
    assert torch.equal(fresh(ids), made(ids))
    want = made.state_dict()
    for name, value in fresh.state_dict().items():
        assert value.dtype == want[name].dtype
        assert torch.equal(value.float(), want[name].float()), name
    names = [t.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors]
    assert ("head.weight" in names) == ("head" in layers), "a tied tensor is written once"


def test_any_reader_reads_the_file(tmp_path):
    made = quantized(model_of(512, 16), config_of("q4_k"))
    backend.save(made, tmp_path)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert reader.get_field("general.architecture").contents() == "quantlab"
    tensors = {t.name: t for t in reader.tensors}
    assert set(tensors) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    weight = tensors["0.weight"]
    assert weight.tensor_type == gguf.GGMLQuantizationType.Q4_K
    assert [int(n) for n in weight.shape] == [512, 16]
    dense = gguf.quants.dequantize(np.array(weight.data), weight.tensor_type)
    assert np.array_equal(dense, made[0].dequantize().numpy())
    assert np.array_equal(tensors["0.bias"].data, made[0].bias.detach().numpy())


def test_diffusers_reads_the_file(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    ).eval()
    model.save_config(tmp_path / "config")
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.in_features % 32 == 0]
    made = quantized(model, config_of("q8_0"), layers)
    backend.save(made, tmp_path)
    theirs = diffusers.FluxTransformer2DModel.from_single_file(
        str(tmp_path / "model.gguf"),
        config=str(tmp_path / "config"),
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    inputs = {
        "hidden_states": torch.randn(1, 4, 4),
        "encoder_hidden_states": torch.randn(1, 3, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
    }
    with torch.no_grad():
        assert rel_error(theirs(**inputs).sample, made(**inputs).sample) < 1e-3


def test_the_compute_dtype_is_used_and_saved(tmp_path):
    model, x = model_of(64, 48), torch.randn(4, 64)
    config = config_of("q8_0", compute_dtype="bfloat16")
    exact, rounded = quantized(model, config, compute_dtype="float32"), copy.deepcopy(model)
    backend.quantize(rounded, ["0"], config)
    assert 1e-4 < rel_error(rounded(x), exact(x)) < 0.05
    backend.save(rounded, tmp_path)
    fresh = model_of(64, 48, seed=1)
    backend.load(fresh, ["0"], config, tmp_path)
    assert torch.equal(fresh(x), rounded(x))


def test_loading_says_what_differs(tmp_path):
    config = config_of("q4_0")
    with pytest.raises(ModelError, match="there is no such file"):
        backend.load(model_of(64, 48), ["0"], config, tmp_path)
    backend.save(quantized(model_of(64, 48), config), tmp_path)
    with pytest.raises(ModelError, match="1 is not quantized in this file"):
        backend.load(model_of(64, 48), ["0", "1"], config, tmp_path)
    with pytest.raises(ModelError, match=r"0 is q4_0 of shape \(48, 64\) in the file, and the model's has shape"):
        backend.load(model_of(32, 48), ["0"], config, tmp_path)
    with pytest.raises(ModelError, match=r"the file has no 2\.weight"):
        backend.load(nn.Sequential(*model_of(64, 48), nn.Linear(2, 2)), ["0"], config, tmp_path)
    with pytest.raises(ModelError, match=r"the model has no 1\.weight"):
        backend.load(model_of(64, 48)[:1], ["0"], config, tmp_path)
    whole = (tmp_path / "model.gguf").read_bytes()
    for damaged in (b"", b"not a file", whole[:40], whole[:-200]):
        (tmp_path / "model.gguf").write_bytes(damaged)
        with pytest.raises(ModelError, match="not a readable GGUF file"):
            backend.load(model_of(64, 48), ["0"], config, tmp_path)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("a", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="was not written by quantlab"):
        backend.load(model_of(64, 48), ["0"], config, tmp_path)


# -- refusals when quantizing


@pytest.mark.parametrize(("dtype", "columns"), [("q8_0", 100), ("q4_k", 32)])
def test_rows_that_do_not_divide_are_refused(dtype, columns):
    block = BLOCKS[dtype][0]
    with pytest.raises(ConfigError, match=rf"dtype={dtype}: 0 of shape \(8, {columns}\): .* divide by {block}"):
        quantized(model_of(columns, 8), config_of(dtype))


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_weights_that_the_format_cannot_hold_are_refused(value):
    model = model_of(256, 8)
    model[0].weight.data[3, 4] = value
    for dtype in ("q8_0", "q4_k"):
        with pytest.raises(ModelError, match=r"0\.weight: holds (NaN|weights too large).*modules_to_not_convert"):
            quantized(model, config_of(dtype))


def test_unquantized_and_damaged_layers_do_not_read_back():
    with pytest.raises(NotQuantized, match="Linear holds no GGUF weight"):
        backend.read_back(nn.Linear(32, 4))
    made = quantized(model_of(64, 48), config_of("q8_0"))
    made[0].gguf_type = "q4_0"
    with pytest.raises(NotQuantized, match="48 rows of 68 bytes are not 48 x 64 weights of q4_0"):
        backend.read_back(made[0])


@pytest.mark.parametrize("dtype", ROWS)
def test_pieces_of_a_weight_are_what_the_library_makes_of_it_whole(dtype, monkeypatch):
    model = model_of(512, 70, torch.bfloat16)
    monkeypatch.setattr(importlib.import_module(f"{backend.__name__}.blocks"), "_WEIGHTS_AT_ONCE", 4096)
    layer = quantized(model, config_of(dtype))[0]
    kind = libgguf.GGMLQuantizationType[dtype.upper()]
    codes = libgguf.quantize_rows(model[0].weight.detach().float().numpy(), kind, None)
    assert np.array_equal(layer.qweight.numpy(), codes)
    dense = torch.from_numpy(libgguf.dequantize_rows(codes, kind))
    assert torch.equal(layer.dequantize(), dense)
    assert torch.equal(layer.weight, dense.bfloat16())
    assert torch.equal(backend.read_back(layer).dense, dense.bfloat16().float())
