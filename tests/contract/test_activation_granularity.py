"""Which activations share a scale: what a config says, what its layers show, and what a neighbour in the batch changes."""

from __future__ import annotations

import pytest
import torch

import quantlab
from quantlab.backends.scheme import Scheme
from quantlab.backends.table import own_settings
from quantlab.planning.plan import plan
from quantlab.report.verdicts import with_other_batch
from quantlab.vocabulary.axes import QuantizationAxes
from quantlab.vocabulary.reports import MetricValue
from tests.support.shell import digits_words
from tests.support.tables import CAPABILITIES, the_scheme

ON_CUDA = {("torchao", "float8_e4m3")}


def schemes():
    for backend, rows in CAPABILITIES.items():
        for dtype, row in rows.items():
            for activation in row.activation_dtypes:
                kinds = ["dynamic", "static"] if "activation_scales" in own_settings(backend) else ["dynamic"]
                if activation != "none" and "cpu" in row.devices and (backend, dtype) not in ON_CUDA:
                    yield from ((backend, dtype, activation, kind) for kind in kinds if _has(backend, dtype, kind))


def _has(backend, dtype, kind):
    return kind == "dynamic" or backend == "modelopt" or dtype == "int8"


def made(backend, dtype, activation, kind) -> Scheme:
    axes = QuantizationAxes(backend=backend, dtype=dtype, activation_dtype=activation)
    return the_scheme(axes, {"activation_scales": kind} if kind == "static" else None)


@pytest.mark.parametrize(("backend", "dtype", "activation", "kind"), [*schemes()])
def test_what_is_said_is_what_the_layers_show_and_what_a_neighbour_changes(backend, dtype, activation, kind):
    scheme = made(backend, dtype, activation, kind)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.Linear(128, 128))
    net = net.to(getattr(torch, scheme.row.compute_dtypes[0]))
    x = torch.randn(4, 128, dtype=net[0].weight.dtype)
    quantized, report = quantlab.quantize(net, scheme.native, calibration=[x] if scheme.native.needs_data else None)
    said = scheme.native.activation_granularity
    assert said
    assert {r.activation_granularity for r in report.layers} == {said}
    assert report.resolved["activation_granularity"] == said
    crowd = x.clone()
    crowd[1] *= 50
    crowd[2, 5] = 500
    with torch.no_grad():
        alone, beside = quantized(x[:1]).float(), quantized(crowd)[:1].float()
    change = float((alone - beside).norm() / alone.norm())
    assert (change > 1e-3) == scheme.native.depends_on_neighbours, change


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_alone_share_nothing(dtype):
    for backend, rows in CAPABILITIES.items():
        for name, row in rows.items():
            if backend != "none" and row.activation_dtypes[0] == "none":
                scheme = the_scheme(QuantizationAxes(backend=backend, dtype=name))
                assert scheme.native.activation_granularity == ""
                assert not scheme.native.depends_on_neighbours


def test_names_tell_the_kinds_apart():
    words = ["backend=modelopt", "dtype=int8", "activation_dtype=int8"]
    (dynamic,) = plan(words).jobs
    (static,) = plan([*words, "quantization.activation_scales=static"]).jobs
    (token,) = plan(["backend=torchao", *words[1:]]).jobs
    assert dynamic.name == "modelopt int8 a-int8 per-tensor"
    assert static.name == "modelopt int8 a-int8 per-tensor static"
    assert token.name == "torchao int8 a-int8 per-token"


def test_a_sample_that_its_neighbours_change_is_evaluated_alone():
    sizes = {
        words: plan(words.split()).jobs[0].batch_size
        for words in (
            "backend=modelopt dtype=int8 activation_dtype=int8",
            "backend=bitsandbytes dtype=int8",
            "backend=bitsandbytes dtype=int8 quantization.llm_int8_threshold=0",
            "backend=modelopt dtype=int8 activation_dtype=int8 quantization.activation_scales=static",
            "backend=torchao dtype=int8 activation_dtype=int8",
            "backend=quanto dtype=int8",
        )
    }
    assert list(sizes.values()) == [1, None, None, None, None, None]


def test_python_rows_tell_apart_what_their_settings_tell_apart():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    configs = [
        quantlab.BitsAndBytesConfig(load_in_4bit=True),
        quantlab.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True),
        quantlab.NVIDIAModelOptConfig("INT8_INT8", channel_quantize=0, weight_only=False),
        quantlab.NVIDIAModelOptConfig("INT8_INT8", channel_quantize=0, weight_only=False, activation_scales="static"),
        quantlab.NVIDIAModelOptConfig(
            "INT8", channel_quantize=0, algorithm="svdquant", algorithm_settings={"lowrank": 8}
        ),
        quantlab.NVIDIAModelOptConfig(
            "INT8", channel_quantize=0, algorithm="svdquant", algorithm_settings={"lowrank": 16}
        ),
    ]
    rows = quantlab.evaluate(net, configs, [torch.randn(8, 64)], calibration=[torch.randn(8, 64)])
    names = [r.name for r in rows]
    assert len(set(names)) == len(names), names


def test_a_rule_that_looks_at_all_of_a_call_is_seen_at_another_batch_size_too(shell):
    words = digits_words("backend=bitsandbytes", "dtype=int8", "evaluation.num_samples=10", "sweep.floors=false")
    metrics = shell.rows(*words)["bitsandbytes int8"]["metrics"]
    assert metrics["quality/other_batch/latent_rel_mse"] > 0
    assert metrics["quality/other_batch/psnr_db"] == pytest.approx(metrics["quality/psnr_db"], abs=5)
    more = shell.rows(*words, "quantization.llm_int8_threshold=0.0")
    (row,) = more.values()
    assert not [k for k in row["metrics"] if k.startswith("quality/other_batch")]


def test_bounds_hold_the_number_at_the_other_batch_size():
    value = MetricValue(value=1.0, n=20, ci_lo=0.8, ci_hi=1.2)
    wide = with_other_batch(value, {"quality/other_batch/kld_mean": 2.0}, "kld_mean")
    assert (wide.ci_lo, wide.ci_hi) == (0.8, 2.0)
    assert with_other_batch(value, {}, "kld_mean") == value
