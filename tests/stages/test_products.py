"""A quantized layer multiplies by the weight that it reads back as; one that does something else is an error."""

import gc
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import quantlab
from quantlab import BitsAndBytesConfig, GGUFQuantizationConfig, NotQuantized, NVIDIAModelOptConfig, QuantoConfig
from quantlab.backends.scheme import scheme_of_config
from quantlab.backends.torchao.config import layer_form
from quantlab.errors import ConfigError
from quantlab.stages import products
from quantlab.stages import quantize as stage
from quantlab.stages.products import Product, product, question
from quantlab.stages.select import QuantizationRequest
from quantlab.stages.weight_errors import weight_errors
from quantlab.vocabulary.axes import QuantizationAxes
from quantlab.vocabulary.reports import StoredWeight
from tests.support.schemes import schemes_on_cpu
from tests.support.tables import BACKENDS, CAPABILITIES, native_config

SCHEMES = {str(s): s for s in schemes_on_cpu()}
PLAIN = {name: s for name, s in SCHEMES.items() if not s.native.needs_data}


def answer(layer: nn.Module, stored: StoredWeight, dtype: torch.dtype) -> Product:
    asked = question(stored, dtype)
    assert asked is not None
    return product(layer, asked)


def model_of(compute_dtype="float32"):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(512, 96)).to(getattr(torch, compute_dtype)).eval()


@pytest.mark.parametrize("name", [n if n in PLAIN else pytest.param(n, marks=pytest.mark.slow) for n in SCHEMES])
def test_every_scheme_answers_by_its_weight(name):
    scheme = SCHEMES[name]
    model = model_of(scheme.compute_dtype)
    data = [
        torch.randn(32, 512, generator=torch.Generator().manual_seed(i)).to(model[0].weight.dtype) for i in range(3)
    ]
    made, report = quantlab.quantize(model, scheme.native, calibration=data if scheme.native.needs_data else None)
    row = report.layers[0]
    if row.activation_granularity.endswith("static"):
        assert (row.product_rel_error, row.kernel) == (None, "")
        return
    limit = {"none": 0.01, "mxfp4": 0.25}.get(row.activation_dtype, 0.05)
    assert 0 <= row.product_rel_error < limit
    assert "::" in row.kernel
    stored = BACKENDS[scheme.backend].read_back(made[0])
    stored.dense[:, :256] *= 3.0
    assert not answer(made[0], stored, model[0].weight.dtype).is_explained


@pytest.mark.parametrize(
    "config",
    [QuantoConfig("int8"), BitsAndBytesConfig(load_in_4bit=True), GGUFQuantizationConfig(gguf_type="q8_0"),
     NVIDIAModelOptConfig("INT8", channel_quantize=0)],
    ids=lambda config: config.quant_method,
)  # fmt: skip
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (lambda y: y * 1.2, "0.2 of their size off"),
        (lambda y: y * float("nan"), "NaN or infinite"),
        (lambda y: torch.zeros_like(y), "of their size off"),
        (lambda y: y.roll(1, dims=-1), "of their size off"),
    ],
    ids=["scaled", "not a number", "not launched", "shifted"],
)
def test_another_product_is_an_error(config, fault, told, monkeypatch):
    hand_over = stage._hand_over

    def faulty(scheme, native, module, *rest):
        hand_over(scheme, native, module, *rest)
        module[0].register_forward_hook(lambda layer, args, output: fault(output))

    monkeypatch.setattr(stage, "_hand_over", faulty)
    with pytest.raises(
        NotQuantized, match=r"^dtype=\w+: 0 \[96, 512\] multiplies by something else than the"
    ) as caught:
        quantlab.quantize(model_of(), config)
    assert told in str(caught.value)
    assert "exclude it with modules_to_not_convert" in str(caught.value)


def test_a_layer_that_cannot_be_run_is_an_error_of_its_own(monkeypatch):
    """torchao's mxfp4 of one row is an AssertionError at the first call."""
    hand_over = stage._hand_over

    def faulty(scheme, native, module, *rest):
        hand_over(scheme, native, module, *rest)
        module[0].register_forward_hook(lambda layer, args, output: output.view(-1, 7))

    monkeypatch.setattr(stage, "_hand_over", faulty)
    with pytest.raises(
        NotQuantized, match=r"^dtype=int8: 0 \[96, 512\] cannot be run by quanto \(RuntimeError: .*exclude"
    ):
        quantlab.quantize(model_of(), QuantoConfig("int8"))
    one_row = nn.Sequential(nn.Linear(64, 1)).bfloat16()
    with pytest.raises(NotQuantized, match="out_features 1 is below 2"):
        quantlab.quantize(one_row, native_config(QuantizationAxes(backend="torchao", dtype="mxfp4")))


def test_large_outputs_are_asked_with_smaller_inputs():
    layer = nn.Linear(64, 8, bias=False).half()
    layer.weight.data.fill_(2000.0)
    stored = StoredWeight(dtype="int8", group_size=None, dense=layer.weight.detach().float())
    assert answer(layer, stored, torch.float16).is_explained


def test_weights_of_zeros_are_answered_by_zeros():
    layer = nn.Linear(64, 8)
    layer.weight.data.zero_()
    assert answer(layer, StoredWeight(dtype="int8", group_size=None, dense=layer.weight.detach()), torch.float32) \
        .rel_error == 0  # fmt: skip


@pytest.mark.parametrize(
    "algorithm", [a for a in CAPABILITIES["torchao"]["int4"].algorithms if a in ("awq", "smoothquant")]
)
@pytest.mark.parametrize("packing", ["opaque", "tile_packed_to_4d"])
def test_torchao_scales_inputs_of_packed_int4_only(algorithm, packing):
    """Found on a GPU: a layer that no group size divides was kept unpacked, and its inputs were not divided."""
    config = native_config(
        QuantizationAxes(backend="torchao", dtype="int4", algorithm=algorithm), {"int4_packing_format": packing}
    )
    with pytest.raises(ConfigError, match="in_features 130 divides by none of its group sizes"):
        layer_form(config, 130)
    assert layer_form(config, 192)["_data"]["group_size"] == 64


def test_what_was_recorded_of_a_product_is_gone_with_it():
    """Events know their parents and children, which only a collection would find."""
    layer = nn.Linear(64, 64)
    asked = question(StoredWeight(dtype="int8", group_size=None, dense=layer.weight.detach()), torch.float32)
    gc.collect()
    gc.disable()
    try:
        assert product(layer, asked).is_explained
        left = [o for o in gc.get_objects() if type(o).__name__ == "FunctionEvent"]
    finally:
        gc.enable()
    assert not left


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_held_in_16_bit_is_compared_as_its_wide_copy(dtype, monkeypatch):
    """The same errors and lost rows to the last digit, and the same question, in whatever pieces it is widened."""
    torch.manual_seed(0)
    original = torch.randn(48, 512).to(dtype)
    dense = (original.float() + 0.02 * torch.randn(48, 512)).to(dtype)
    dense[3] = 0
    narrow = StoredWeight(dtype="int8", group_size=None, dense=dense)
    wide = replace(narrow, dense=dense.float())
    assert weight_errors(narrow, original) == weight_errors(wide, original)
    assert weight_errors(narrow, original).lost_rows == (3,)
    (one, whole) = (question(stored, dtype) for stored in (narrow, wide))
    assert torch.equal(one.rows, whole.rows)
    assert torch.equal(one.wanted, whole.wanted)
    monkeypatch.setattr(products, "_WEIGHTS_AT_ONCE", 5 * 512)
    torch.testing.assert_close(question(narrow, dtype).wanted, whole.wanted, atol=1e-4, rtol=1e-5)  # sums of 512


@pytest.mark.parametrize(
    ("dtype", "way"), [("float16", "set compute_dtype=float32 or bfloat16, or choose"), ("bfloat16", "; choose")]
)
def test_an_overflow_is_told_with_the_dtype_to_compute_in(dtype, way):
    request = QuantizationRequest(
        component="model", scheme=scheme_of_config(quantlab.QuantoConfig("int8")), compute_dtype=dtype, device="cpu"
    )
    told = stage._wrong_product(request, "head", (8, 8), Product(rel_error=math.inf, tolerance=0.1))
    assert "its outputs for random inputs are NaN or infinite" in told
    assert way in told
    told = stage._wrong_product(request, "head", (8, 8), Product(rel_error=2.0, tolerance=0.1))
    assert "compute_dtype" not in told, "no overflow"
    lost = stage._lost_message(request, dtype, {"head": "head [8, 8]"})
    assert ("set compute_dtype=" in lost) == (dtype == "float16")
