"""bitsandbytes: the promises of its capability rows, run on real layers."""

from __future__ import annotations

import copy
import importlib
import logging
import math
import pickle

import pytest
import torch
from torch import nn

from quantlab.backends import bitsandbytes as backend
from quantlab.backends.bitsandbytes import BitsAndBytesConfig
from quantlab.errors import ConfigError, ModelError, NotQuantized
from quantlab.vocabulary.axes import QuantizationAxes
from tests.support.tables import CAPABILITIES

pytest.importorskip("bitsandbytes")

ROWS = CAPABILITIES["bitsandbytes"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHAPES = [(64, 48), (100, 50), (33, 7), (1, 3), (130, 65)]
BOUND = {"int8": 0.01, "nf4": 0.12, "fp4": 0.15}
REQUESTS = [
    *((dtype, "auto", {}) for dtype in ROWS),
    *(("nf4", group, {}) for group in ROWS["nf4"].group_sizes),
    ("fp4", 32, {"bnb_4bit_use_double_quant": True}),
    ("nf4", "auto", {"bnb_4bit_use_double_quant": True}),
    ("int8", "none", {"llm_int8_threshold": 0.0}),
]


def model_of(in_features, out_features, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    first, last = nn.Linear(in_features, out_features), nn.Linear(out_features, in_features, bias=False)
    return nn.Sequential(first, nn.LayerNorm(out_features), last).to(dtype).eval()


def axes(dtype, group_size="auto", **more):
    return QuantizationAxes(backend="bitsandbytes", dtype=dtype, group_size=group_size, **more)


def quantized(model, config, layers=("0", "2"), compute_dtype=None):
    made = copy.deepcopy(model)
    backend.quantize(made, layers, config, compute_dtype or next(model.parameters()).dtype)
    return made


def rel_error(got, want):
    return float((got.detach().float() - want.detach().float()).norm() / want.detach().float().norm())


def stored_bytes(layer):
    """Bytes of all storages that the layer holds beside its bias, each once."""
    found = {}

    def walk(value):
        if isinstance(value, torch.Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            walk(getattr(value, "__dict__", {}))
        elif isinstance(value, dict):
            for inner in value.values():
                walk(inner)
        elif type(value).__module__.startswith("bitsandbytes.") and not isinstance(value, nn.Module):
            walk(vars(value))

    walk({k: v for k, v in vars(layer).items() if k != "_modules"})
    return sum(found.values()) - (0 if layer.bias is None else layer.bias.nbytes)


# -- the promises of the table


@pytest.mark.parametrize("dtype_name", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "group_size", "own"), REQUESTS)
def test_quantizes_reads_back_saves_and_loads(dtype, group_size, own, shape, dtype_name, tmp_path):
    model = model_of(*shape, DTYPES[dtype_name])
    config = BitsAndBytesConfig.from_axes(axes(dtype, group_size), own)
    made = quantized(model, config)

    x = torch.randn(5, shape[0], dtype=DTYPES[dtype_name])
    out = made(x)
    assert out.dtype == x.dtype
    assert torch.isfinite(out).all()
    for name in ("0", "2"):
        stored = backend.read_back(made.get_submodule(name))
        assert stored.dtype == dtype
        assert stored.group_size == {"auto": None if dtype == "int8" else 64, "none": None}.get(group_size, group_size)
        assert stored.activation_dtype == ("int8" if dtype == "int8" else "none")
        assert stored.dense.dtype == torch.float32
        weight = model.get_submodule(name).weight
        assert stored.dense.shape == weight.shape
        assert rel_error(stored.dense, weight) < BOUND[dtype]
    if math.prod(shape) > 64:
        assert rel_error(backend.read_back(made[0]).dense, model[0].weight) > 0

    before = {k: v.clone() for k, v in made.state_dict().items()}
    assert torch.equal(made(x), out)
    assert all(torch.equal(v, before[k]) for k, v in made.state_dict().items())

    backend.save(made, tmp_path)
    fresh = model_of(*shape, DTYPES[dtype_name], seed=1)
    backend.load(fresh, ("0", "2"), config, tmp_path)
    assert torch.equal(fresh(x), out)
    assert backend.read_back(fresh[0]).dtype == dtype


@pytest.mark.parametrize(("dtype", "group_size", "own"), REQUESTS)
def test_stored_bytes_follow_the_formula(dtype, group_size, own):
    rows, columns = 80, 130
    model = model_of(columns, rows)
    made = quantized(model, BitsAndBytesConfig.from_axes(axes(dtype, group_size), own))
    num = rows * columns
    blocks = math.ceil(num / (group_size if isinstance(group_size, int) else 64))
    if dtype == "int8":
        want = num + 4 * rows
    elif own:
        want = num // 2 + blocks + 4 * math.ceil(blocks / 256) + 64 + 1024 + 4
    else:
        want = num // 2 + 4 * blocks + 64
    assert stored_bytes(made[0]) == want
    made(torch.randn(2, columns))
    assert stored_bytes(made[0]) == want
    assert stored_bytes(copy.deepcopy(made)[0]) == want


@pytest.mark.parametrize("dtype", ROWS)
@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 3, 4), (2, 1, 2, 2)], ids=str)
def test_inputs_of_any_rank(dtype, lead):
    made = quantized(model_of(64, 48), BitsAndBytesConfig.from_axes(axes(dtype)))
    x = torch.randn(*lead, 64)
    out = made(x)
    assert out.shape == (*lead, 64)
    assert torch.allclose(out.reshape(-1, 64), torch.cat([made(row[None]) for row in x.reshape(-1, 64)]), atol=0.05)


@pytest.mark.parametrize("dtype", ROWS)
def test_mode_copies_and_gradients(dtype):
    model = model_of(64, 48)
    made = quantized(model, BitsAndBytesConfig.from_axes(axes(dtype)))
    x = torch.randn(4, 64)
    out = made(x)
    assert torch.equal(copy.deepcopy(made)(x), out)
    assert torch.equal(pickle.loads(pickle.dumps(made))(x), out)
    assert torch.equal(copy.deepcopy(made).to("cpu")(x), out)
    assert torch.equal(made.train()(x), out), "train mode must measure what eval mode measures"
    x.requires_grad_()
    made(x).sum().backward()
    assert rel_error(x.grad, torch.autograd.grad(model(x).sum(), x)[0]) < 0.5


def test_a_copy_does_not_hold_the_original():
    made = quantized(model_of(64, 48), BitsAndBytesConfig.from_axes(axes("nf4")))
    copied = copy.deepcopy(made)
    assert copied[0].weight.quant_state.absmax.data_ptr() != made[0].weight.quant_state.absmax.data_ptr()
    assert copied[0].weight.module is None


@pytest.mark.parametrize("own_dtype", ["bfloat16", "float16", "float32", "int8", "float64"])
def test_storage_dtypes_survive_a_round_trip(own_dtype, tmp_path):
    model = model_of(64, 48)
    config = BitsAndBytesConfig.from_axes(axes("nf4"), {"bnb_4bit_quant_storage": own_dtype})
    made = quantized(model, config)
    assert made[0].weight.dtype == getattr(torch, own_dtype)
    x = torch.randn(3, 64)
    assert torch.equal(made(x), quantized(model, BitsAndBytesConfig.from_axes(axes("nf4")))(x))
    backend.save(made, tmp_path)
    fresh = model_of(64, 48, seed=1)
    backend.load(fresh, ("0", "2"), config, tmp_path)
    assert fresh[0].weight.dtype == made[0].weight.dtype
    assert torch.equal(fresh(x), made(x))


def test_the_bias_stays_as_it_was():
    model = model_of(64, 48)
    for dtype in ROWS:
        made = quantized(model, BitsAndBytesConfig.from_axes(axes(dtype)), compute_dtype="bfloat16")
        made[0](torch.randn(2, 64, dtype=torch.bfloat16))
        assert torch.equal(made[0].bias, model[0].bias)
        assert made[0].bias.dtype == torch.float32


def test_the_compute_dtype_is_used_and_saved(tmp_path):
    model, x = model_of(64, 48), torch.randn(4, 64)
    config = BitsAndBytesConfig.from_axes(axes("nf4", compute_dtype="bfloat16"))
    exact, rounded = quantized(model, config, compute_dtype="float32"), copy.deepcopy(model)
    backend.quantize(rounded, ("0", "2"), config)
    assert 1e-4 < rel_error(rounded(x), exact(x)) < 0.05
    backend.save(rounded, tmp_path)
    fresh = model_of(64, 48, seed=1)
    backend.load(fresh, ("0", "2"), config, tmp_path)
    assert torch.equal(fresh(x), rounded(x))


def test_odd_rows_are_dequantized_as_the_library_does():
    import bitsandbytes as bnb

    weight = torch.randn(30, 33)
    for block in (32, 64):
        codes, state = bnb.functional.quantize_4bit(weight, blocksize=block, quant_type="nf4")
        dequantize = torch.ops.bitsandbytes.dequantize_4bit.default
        flat = dequantize(codes, state.absmax, block, "nf4", (1, 990), torch.float32)
        config = BitsAndBytesConfig.from_axes(axes("nf4", block))
        layer = nn.Sequential(nn.Linear(33, 30))
        layer[0].weight.data = weight
        assert torch.equal(backend.read_back(quantized(layer, config, ["0"])[0]).dense, flat.reshape(30, 33))


@pytest.mark.parametrize(
    ("threshold", "note"),
    [
        (6.0, "at each call, input columns with a value of 6 or more are multiplied unrounded"),
        (2.5, "at each call, input columns with a value of 2.5 or more are multiplied unrounded"),
        (0.0, ""),
    ],
)
def test_the_threshold_reads_back_as_a_rule_of_each_call(threshold, note):
    config = BitsAndBytesConfig.from_axes(axes("int8"), {"llm_int8_threshold": threshold})
    assert not config.needs_data
    assert backend.read_back(quantized(model_of(64, 48), config)[0]).note == note


def test_outliers_are_kept_by_the_threshold():
    model, x = model_of(64, 48), torch.randn(16, 64)
    x[:, 3] *= 100
    errors = [
        rel_error(
            quantized(model, BitsAndBytesConfig.from_axes(axes("int8"), {"llm_int8_threshold": t}))[0](x), model[0](x)
        )
        for t in (0.0, 6.0)
    ]
    assert errors[1] < errors[0] / 3


def test_a_tied_weight_is_saved_once_and_loaded(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mid, self.head = nn.Embedding(40, 64), nn.Linear(64, 64), nn.Linear(64, 40, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.mid(self.embed(ids)))

    ids = torch.arange(40)
    for layers in (["mid"], ["mid", "head"]):
        torch.manual_seed(0)
        model = Tied()
        config = BitsAndBytesConfig.from_axes(axes("nf4"))
        made = quantized(model, config, layers)
        backend.save(made, tmp_path)
        fresh = Tied()
        backend.load(fresh, layers, config, tmp_path)
        assert torch.equal(fresh(ids), made(ids))


def test_the_library_does_not_log_at_every_forward(caplog):
    made = quantized(model_of(64, 48), BitsAndBytesConfig.from_axes(axes("int8")))
    with caplog.at_level(logging.WARNING):
        made(torch.randn(2, 64))
    assert "will be cast" not in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", ROWS)
def test_cuda_agrees_with_the_cpu(dtype, tmp_path):
    model, x = model_of(64, 48), torch.randn(4, 64)
    config = BitsAndBytesConfig.from_axes(axes(dtype))
    made = quantized(copy.deepcopy(model).cuda(), config)
    on_cpu = backend.read_back(quantized(model, config)[0]).dense
    assert rel_error(backend.read_back(made[0]).dense.cpu(), on_cpu) < 1e-3
    backend.save(made, tmp_path)
    fresh = model_of(64, 48, seed=1).cuda()
    backend.load(fresh, ("0", "2"), config, tmp_path)
    assert torch.equal(fresh(x.cuda()), made(x.cuda()))


# -- refusals when quantizing and loading


def test_weights_beyond_float16_are_refused_for_int8_only():
    model = model_of(64, 48)
    model[2].weight.data[3, 4] = 1e5
    with pytest.raises(ModelError, match=r"2\.weight: holds weights beyond 65504.*modules_to_not_convert"):
        quantized(model, BitsAndBytesConfig.from_axes(axes("int8")))
    assert torch.isfinite(backend.read_back(quantized(model, BitsAndBytesConfig.from_axes(axes("nf4")))[2]).dense).all()


@pytest.mark.parametrize("dtype", ROWS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(dtype, value):
    model = model_of(64, 48)
    model[0].weight.data[0, 0] = value
    with pytest.raises(ModelError, match=r"0\.weight: holds NaN or infinities"):
        quantized(model, BitsAndBytesConfig.from_axes(axes(dtype)))


def test_a_storage_that_does_not_fit_is_refused():
    config = BitsAndBytesConfig.from_axes(axes("nf4"), {"bnb_4bit_quant_storage": "float32"})
    message = r"bnb_4bit_quant_storage=float64: 0 of shape \(7, 33\) takes 116 bytes"
    with pytest.raises(ConfigError, match=message) as caught:
        quantized(model_of(33, 7), BitsAndBytesConfig.from_axes(axes("nf4"), {"bnb_4bit_quant_storage": "float64"}))
    assert str(caught.value).endswith("use uint8")
    assert quantized(model_of(64, 48), config)[0].weight.dtype == torch.float32


def test_weights_left_in_float16_are_refused():
    with pytest.raises(ConfigError, match="llm_int8_has_fp16_weight=True"):
        quantized(model_of(64, 48), BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True))


def test_unquantized_and_damaged_layers_do_not_read_back():
    with pytest.raises(NotQuantized, match="Linear holds no bitsandbytes weight"):
        backend.read_back(nn.Linear(4, 4))
    made = quantized(model_of(64, 48), BitsAndBytesConfig.from_axes(axes("nf4")))
    made[0].weight.quant_state.absmax = made[0].weight.quant_state.absmax[:-1]
    with pytest.raises(NotQuantized, match="needs 48 scales and holds 47"):
        backend.read_back(made[0])


def test_loading_says_what_differs(tmp_path):
    config = BitsAndBytesConfig.from_axes(axes("nf4"))
    with pytest.raises(ModelError, match="there is no such file"):
        backend.load(model_of(64, 48), ["0"], config, tmp_path)
    backend.save(quantized(model_of(64, 48), config, ["0"]), tmp_path)
    with pytest.raises(ModelError, match="2 is not quantized in this file"):
        backend.load(model_of(64, 48), ["0", "2"], config, tmp_path)
    with pytest.raises(ModelError, match=r"size mismatch|has shape"):
        backend.load(model_of(64, 32), ["0"], config, tmp_path)
    with pytest.raises(ModelError, match=r"the file has no 3\.weight"):
        backend.load(nn.Sequential(*model_of(64, 48), nn.Linear(2, 2)), ["0"], config, tmp_path)
    with pytest.raises(ModelError, match="the model has no"):
        backend.load(model_of(64, 48)[:2], ["0"], config, tmp_path)


@pytest.mark.parametrize("shape", [(96, 1000), (33, 777), (64, 256)], ids=str)
@pytest.mark.parametrize(("dtype", "group_size", "own"), [r for r in REQUESTS if r[0] != "int8"])
def test_pieces_of_a_weight_are_what_the_library_makes_of_it_whole(dtype, group_size, own, shape, monkeypatch):
    model = model_of(*shape, torch.bfloat16)
    config = BitsAndBytesConfig.from_axes(axes(dtype, group_size), own)
    whole = quantized(model, config)
    dense = [backend.read_back(whole[i]).dense for i in (0, 2)]
    for module, name in (("quantize", "ENCODED_AT_ONCE"), ("layers", "WEIGHTS_AT_ONCE")):
        monkeypatch.setattr(importlib.import_module(f"{backend.__name__}.{module}"), name, 4096)
    made = quantized(model, config)
    known = whole.state_dict()
    assert all(torch.equal(v, known[k]) for k, v in made.state_dict().items())
    assert set(made.state_dict()) == set(known)
    assert all(torch.equal(backend.read_back(made[i]).dense, was) for i, was in zip((0, 2), dense, strict=True))
