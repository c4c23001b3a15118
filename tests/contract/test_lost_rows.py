"""Rows and blocks that a library loses, on every backend: kept, or an error that names them, never an average."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import quantlab
from quantlab import BitsAndBytesConfig, NotQuantized, NVIDIAModelOptConfig, QuantoConfig, TorchAoConfig
from quantlab.backends.bitsandbytes.layers import dense_4bit
from quantlab.stages.quantize import quantize_component
from quantlab.stages.select import QuantizationRequest
from quantlab.stages.weight_errors import weight_errors
from quantlab.vocabulary.axes import QuantizationAxes
from quantlab.vocabulary.reports import StoredWeight
from tests.support.tables import BACKENDS, CAPABILITIES, native_config, the_scheme
from tests.support.tiers import covering

ON_CPU = [
    (b, d, c)
    for b, rows in CAPABILITIES.items()
    for d, row in rows.items()
    for c in row.compute_dtypes
    if b != "none" and "cpu" in row.devices
]


def weights(num_rows=64, in_features=512, seed=0):
    return torch.randn(num_rows, in_features, generator=torch.Generator().manual_seed(seed)) * 0.02


def one_layer(weight, dtype="float32"):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    return nn.Sequential(layer).to(getattr(torch, dtype)).requires_grad_(False)


def quantized(backend, dtype, module, compute, **axes):
    scheme = the_scheme(QuantizationAxes(backend=backend, dtype=dtype, **axes))
    request = QuantizationRequest(component="model", scheme=scheme, compute_dtype=compute, device="cpu")
    return quantize_component(request, copy.deepcopy(module), module)


@pytest.mark.parametrize(
    ("backend", "dtype", "compute", "largest"),
    covering(((*row, size) for row in ON_CPU for size in (1e-3, 1e-4, 1e-5)), lambda c: (c[0] + c[1], *c[2:])),
)
def test_small_rows_are_kept_or_named(backend, dtype, compute, largest):
    """Four rows far below the others: each is about as good as they are, or the layer is refused by their names;
    where the format itself ends above them, the report says how many became zeros."""
    weight = weights()
    small = slice(8, 12)
    weight[small] *= largest / weight[small].abs().max()
    module = one_layer(weight, compute)
    original = module[0].weight.float()
    try:
        made, report = quantized(backend, dtype, module, compute)
    except NotQuantized as error:
        assert "8, 9, 10, 11" in str(error) or "of 64 rows" in str(error)  # noqa: PT017
        assert str(error).startswith(f"dtype={dtype}: {backend} loses weights")  # noqa: PT017
        assert ("compute_dtype=float32" in str(error)) == (compute == "float16")  # noqa: PT017
        assert compute == "float16" or largest < 1e-5, "a layer in a wider dtype has no such rows"  # noqa: PT017
        return
    (row,) = report.layers
    dense = BACKENDS[backend].read_back(made[0]).dense
    errors = (dense - original).norm(dim=1) / original.norm(dim=1)
    assert row.worst_row_rel_error == pytest.approx(float(errors.max()))
    zeroed = (dense == 0).all(1)
    assert ("stored as zeros" in row.reason) == bool(zeroed.any())
    if backend != "gguf" and dtype != "nf4" and (backend, dtype) != ("bitsandbytes", "int8"):
        assert float(errors[small].max()) < 6 * float(errors.median()), "formats whose scales have float16's range less"


FIRST = list({(b, d): c for b, d, c in reversed(ON_CPU)}.items())


@pytest.mark.parametrize(("which", "compute"), FIRST, ids=["-".join(which) for which, _ in FIRST])
def test_a_planted_loss_is_seen(which, compute, monkeypatch):
    """A row or block that decodes to zeros, one that is twice as large, NaN: exactly that row is named; also where a
    large weight is looked at in parts."""
    backend, dtype = which
    module = one_layer(weights(), compute)
    made, _ = quantized(backend, dtype, module, compute)
    stored, original = BACKENDS[backend].read_back(made[0]), module[0].weight.float()
    assert weight_errors(stored, original).lost_rows == ()
    block = stored.group_size or 512
    for fault in ("row", "block", "twice", "nan"):
        dense = stored.dense.clone()
        if fault == "row":
            dense[5] = 0
        elif fault == "block":
            dense[5, -block:] = 0
        else:
            dense[5] *= {"twice": 4, "nan": float("nan")}[fault]
        found = weight_errors(replace(stored, dense=dense), original)
        assert found.lost_rows == (5,), fault
        assert found.lost_absmax == pytest.approx(float(original[5].abs().max()))
        assert found.worst_row > 0.1 or fault == "nan"
        with monkeypatch.context() as small:
            small.setattr("quantlab.stages.weight_errors._WEIGHTS_AT_ONCE", 1)
            assert fault == "nan" or weight_errors(replace(stored, dense=dense), original) == found


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1.0, 1e15])
def test_weights_of_any_size_are_compared(size):
    weight = weights() * size
    dense = weight * 1.001
    dense[5] = 0
    found = weight_errors(StoredWeight(dtype="int8", group_size=None, dense=dense), weight)
    assert found.lost_rows == (5,)
    assert found.worst_row == pytest.approx(1)
    assert found.layer == pytest.approx(float(weight[5].double().norm() / weight.double().norm()), rel=0.01)
    nothing = weight_errors(StoredWeight(dtype="int8", group_size=None, dense=weight * 0), weight * 0)
    assert (nothing.layer, nothing.worst_row, nothing.lost_rows) == (0, None, ())


KEPT_WIDER = {
    "torchao float8_e5m2": TorchAoConfig("float8wo_e5m2"),
    "torchao float8_e4m3": TorchAoConfig("float8wo_e4m3"),
    "modelopt int4": NVIDIAModelOptConfig("INT4", channel_quantize=0),
    "modelopt int4 g32": NVIDIAModelOptConfig("INT4", channel_quantize=-1, block_quantize=32),
    "modelopt int4 mse": NVIDIAModelOptConfig("INT4", channel_quantize=0, algorithm="mse"),
}


@pytest.mark.parametrize("name", KEPT_WIDER)
def test_scales_too_small_for_float16_are_kept_wider(name, tmp_path):
    config = KEPT_WIDER[name]
    weight = weights()
    weight[8:12] *= 1e-3
    weight[20] = 0
    module = one_layer(weight, "float16")
    made, report = quantlab.quantize(module, config)
    plain = quantlab.quantize(one_layer(weight), config)[1]
    assert report.layers[0].worst_row_rel_error < 1.2 * plain.layers[0].worst_row_rel_error
    x = torch.randn(4, 512).half()
    out = made(x)
    assert out.dtype == torch.float16
    expected = module(x).float()
    assert float((out.float() - expected)[:, 8:12].norm() / expected[:, 8:12].norm()) < 0.3
    backend = BACKENDS[config.quant_method.value]
    backend.save(made, tmp_path)
    fresh = copy.deepcopy(module)
    backend.load(fresh, ["0"], backend.resolve(config, "cpu", "float16"), tmp_path)
    assert torch.equal(fresh(x), out)


HIDDEN = {
    "bitsandbytes nf4 double": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "bitsandbytes fp4 double": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True
    ),
    "torchao nf4": native_config(QuantizationAxes(backend="torchao", dtype="nf4")),
    "modelopt float8 a tensor": NVIDIAModelOptConfig("FP8"),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_one_huge_weight_does_not_hide_the_others(name):
    weight = weights()
    weight[3, 5] = 1e6 if "float8" in name else 1e4
    with pytest.raises(
        NotQuantized, match=r"loses weights .* in 0 \[64, 512\]: \d+ of 64 rows \(0, 1, 2, 4 and \d+ more;"
    ):
        quantlab.quantize(one_layer(weight), HIDDEN[name])
    module, _ = quantlab.quantize(one_layer(weight), QuantoConfig("int8"))  # a scale a row: the others are as before
    errors = (BACKENDS["quanto"].read_back(module[0]).dense - weight).norm(dim=1) / weight.norm(dim=1)
    assert float(errors.max()) < 0.02


ORDINARY = {
    "heavy tails": lambda: torch.distributions.StudentT(2.5).sample((64, 512)) * 0.02,
    "outlier channels": lambda: weights() * torch.where(torch.arange(512) % 64 == 0, 100.0, 1.0),
    "rows of all sizes": lambda: weights() * torch.logspace(0, -1.5, 64)[:, None],
    "dead rows": lambda: weights() * torch.tensor([0, 1e-10, 1e-7] + [1] * 61)[:, None],
    "far from zero": lambda: torch.rand(64, 512) * 0.01 + 0.5,
    "tiny": lambda: weights() * 1e-1,
}


@pytest.mark.parametrize(
    ("backend", "dtype", "kind"),
    covering(((b, d, kind) for (b, d), _ in FIRST for kind in ORDINARY), lambda c: (c[0] + c[1], c[2])),
)
def test_ordinary_weights_raise_no_alarm(backend, dtype, kind):
    compute = CAPABILITIES[backend][dtype].compute_dtypes[0]
    torch.manual_seed(0)
    module = one_layer(ORDINARY[kind](), compute)
    try:
        quantized(backend, dtype, module, compute)
    except NotQuantized as error:
        assert "no weight changed" in str(error)  # noqa: PT017


@pytest.mark.parametrize("in_features", [48, 96, 320, 512])
@pytest.mark.parametrize("block", [32, 64, 128, 1024])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_blocks_over_the_ends_of_rows_have_their_own_scales(kind, block, in_features):
    """The library's CPU kernel takes other blocks' scales there."""
    weight = weights(64, in_features) * torch.logspace(0, -1.5, 64)[:, None]
    config = native_config(QuantizationAxes(backend="bitsandbytes", dtype=kind, group_size=block))
    module, _ = quantlab.quantize(one_layer(weight), config)
    dense = dense_4bit(module[0].weight, torch.float32)
    largest = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % block)).reshape(-1, block).abs().amax(1)
    bound = largest.repeat_interleave(block)[: weight.numel()].reshape(weight.shape) / 5.9
    assert bool(((dense - weight).abs() <= bound).all())
    x = torch.randn(3, in_features)
    assert torch.allclose(module(x), x @ dense.T, rtol=1e-4, atol=1e-5)


SEARCHED = {
    "gguf q5_1 imatrix": QuantizationAxes(backend="gguf", dtype="q5_1", algorithm="imatrix"),
    "modelopt int8 awq_clip": QuantizationAxes(backend="modelopt", dtype="int8", algorithm="awq_clip"),
    "modelopt int8 local_hessian": QuantizationAxes(backend="modelopt", dtype="int8", algorithm="local_hessian"),
    "torchao int4 awq": QuantizationAxes(backend="torchao", dtype="int4", algorithm="awq"),
    "torchao int4 smoothquant": QuantizationAxes(backend="torchao", dtype="int4", algorithm="smoothquant"),
}


@pytest.mark.parametrize("name", SEARCHED)
def test_an_algorithm_may_give_up_weights_that_hardly_count(name):
    """A few channels a thousand times as loud as the others: the error that counts is that of the outputs."""
    module = one_layer(torch.distributions.StudentT(4.0).sample((64, 512)) * 0.02)
    x = torch.randn(128, 512, generator=torch.Generator().manual_seed(1))
    x[:, ::100] *= 1000
    axes = SEARCHED[name]
    made, report = quantlab.quantize(module, native_config(axes), calibration=[x])
    assert [r.status for r in report.layers] == ["quantized"]
    assert float((made(x) - module(x)).norm() / module(x).norm()) < 0.02
