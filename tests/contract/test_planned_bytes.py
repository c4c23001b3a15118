"""What ``layer_bytes`` says before there are tensors is what the tensors occupy, on every row of the table, to the byte."""

import copy

import pytest
import torch
from torch import nn

from quantlab.modules.feed import feed_of_batches
from quantlab.stages.calibrate import calibrate_component
from quantlab.stages.quantize import QuantizationRequest, quantize_component, select_layers
from quantlab.vocabulary.axes import QuantizationAxes
from quantlab.vocabulary.dtypes import dtype_name
from quantlab.vocabulary.sizes import DenseLayer
from tests.contract.test_backends import GROUPS, ON_CPU, ROWS, ways
from tests.support.tables import BACKENDS, CAPABILITIES, the_scheme
from tests.support.tiers import covering

SHAPES = ((64, 1024), (96, 512))
ODD = ((7, 96), (33, 160), (5, 17), (1, 64))
"""Rows and columns that no packing or block likes; each scheme is asked for those that fit it."""


class Net(nn.Module):
    """Layers in a row, each called on an input of its own."""

    def __init__(self, shapes, dtype):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(k, n, bias=i % 2 == 0) for i, (n, k) in enumerate(shapes))
        self.to(getattr(torch, dtype))

    def forward(self, x):
        return [layer(x[..., : layer.in_features]) for layer in self.layers]


def compared(backend, dtype, shapes, model_dtype, compute_dtype="auto", settings=None, device="cpu", **axes):
    """[(shape, planned, measured)] of (bytes of codes, of scales, of the bias; is it simulated)."""
    torch.manual_seed(0)
    original = Net(shapes, model_dtype).eval().requires_grad_(False).to(device)
    scheme = the_scheme(
        QuantizationAxes(backend=backend, dtype=dtype, on_mismatch="skip", compute_dtype=compute_dtype, **axes),
        settings,
    )
    compute = model_dtype if compute_dtype == "auto" else compute_dtype
    request = QuantizationRequest(component="model", scheme=scheme, compute_dtype=compute, device=device)
    module = copy.deepcopy(original)
    chosen = select_layers(request, module)
    calibrated = None
    if scheme.native.needs_data:
        columns = max(k for _, k in shapes)
        feed = feed_of_batches([torch.randn(64, columns, generator=torch.Generator().manual_seed(s)) for s in (1, 2)])
        calibrated = calibrate_component(request, module, chosen, feed)
    module, report = quantize_component(request, module, original, chosen, calibrated)
    found = []
    for row in report.layers:
        if row.status != "quantized":
            continue
        layer, bias = original.get_submodule(row.name), module.get_submodule(row.name).bias
        dense = DenseLayer(
            shape=tuple(layer.weight.shape),
            dtype=dtype_name(layer.weight.dtype),
            bias_dtype="" if layer.bias is None else dtype_name(layer.bias.dtype),
        )
        planned = BACKENDS[backend].layer_bytes(chosen.native, dense, dtype, chosen.compute_dtypes[row.name], device)
        kept = "" if bias is None else dtype_name(bias.dtype)
        found.append(
            (
                row.shape,
                (planned.codes, planned.scales, planned.bias_dtype, planned.is_simulated),
                (row.weight_bytes, row.scale_bytes, kept, row.is_simulated),
            )
        )
    return found


def check(found):
    assert found
    assert [planned for _, planned, _ in found] == [measured for _, _, measured in found], found


CASES = [(b, d, c) for b, d, row in ON_CPU for c in row.compute_dtypes]


@pytest.mark.parametrize(
    ("backend", "dtype", "compute_dtype"),
    covering(CASES, lambda c: (c[0] + c[1], c[0] + c[2])),
    ids=["-".join(c) for c in CASES],
)
def test_each_row_in_each_dtype_of_the_model(backend, dtype, compute_dtype):
    flat = ((64, 256),) if CAPABILITIES[backend][dtype].numel_multiple > 1 else ()
    check(compared(backend, dtype, (*SHAPES, *flat, *ODD), compute_dtype))


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "dtype", "group_size"), GROUPS, ids=["-".join(map(str, g)) for g in GROUPS])
def test_each_group_size(backend, dtype, group_size):
    model = CAPABILITIES[backend][dtype].compute_dtypes[-1]
    check(compared(backend, dtype, ((32, 1024), (4, 16384)), model, group_size=group_size))


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "dtype", "row"), ON_CPU, ids=[f"{b}-{d}" for b, d, _ in ON_CPU])
def test_a_compute_dtype_of_its_own(backend, dtype, row):
    for compute in row.compute_dtypes:
        check(compared(backend, dtype, SHAPES, "float32", compute))


SETTINGS = [
    ("bitsandbytes", "nf4", {"bnb_4bit_use_double_quant": True}),
    ("bitsandbytes", "fp4", {"bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "bfloat16"}),
    ("torchao", "int4", {"int4_packing_format": "opaque"}),
    ("torchao", "int4", {"mapping_type": "ASYMMETRIC"}),
    ("modelopt", "int8", {"compress": False}),
    ("modelopt", "int4", {"compress": False}),
]


@pytest.mark.parametrize(("backend", "dtype", "settings"), SETTINGS, ids=lambda v: str(v))
@pytest.mark.parametrize("model", ["float32", "bfloat16"])
def test_settings_that_change_what_is_stored(backend, dtype, settings, model):
    check(compared(backend, dtype, ((64, 1024), (48, 512)), model, settings=settings))


def calibrated_ways():
    for backend, dtype, row in ON_CPU:
        for algorithm in row.algorithms:
            if algorithm in row.cuda_algorithms:
                continue
            for activation, settings in ways(backend, dtype, algorithm):
                if activation == "float8_e4m3" and backend == "torchao" and not settings:
                    continue
                if algorithm != row.algorithms[0] or activation != row.activation_dtypes[0] or settings:
                    yield backend, dtype, algorithm, activation, settings


WAYS = list(calibrated_ways())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "dtype", "algorithm", "activation", "settings"),
    WAYS,
    ids=["-".join([*w[:4], "static" if w[4] else ""]) for w in WAYS],
)
def test_what_calibration_leaves_in_a_layer(backend, dtype, algorithm, activation, settings):
    model = CAPABILITIES[backend][dtype].compute_dtypes[0]
    check(
        compared(
            backend,
            dtype,
            ((64, 256), (48, 256)),
            model,
            settings=settings,
            algorithm=algorithm,
            activation_dtype=activation,
        )
    )


ON_CUDA = [(b, d, row) for b, d, row in ROWS if "cuda" in row.devices]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("backend", "dtype", "row"), ON_CUDA, ids=[f"{b}-{d}" for b, d, _ in ON_CUDA])
def test_each_row_on_a_gpu(backend, dtype, row):
    """Formats that only a GPU packs: tile-packed int4, nvfp4, the MX formats of ModelOpt."""
    if row.min_compute_capability and torch.cuda.get_device_capability() < row.min_compute_capability:
        pytest.skip(f"compute capability {torch.cuda.get_device_capability()}")
    compute = "bfloat16" if "bfloat16" in row.compute_dtypes else row.compute_dtypes[0]
    check(compared(backend, dtype, (*SHAPES, (64, 256)), compute, device="cuda"))
