"""A reference that is already quantized is recognized by its codes, in whatever granularity, and ordinary weights are
not taken for one."""

import time

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import quantlab
from quantlab.errors import ConfigError
from quantlab.modules.fingerprint import fingerprint_warning, grid_fingerprint, known_grid
from quantlab.vocabulary.axes import QuantizationAxes
from tests.support.tables import BACKENDS, CAPABILITIES, native_config

DTYPES = ("float32", "bfloat16", "float16")
FORMATS = [
    (b, d, g)
    for b, rows in CAPABILITIES.items()
    for d, row in rows.items()
    if b != "none" and "cpu" in row.devices
    for g in ("auto", *(g for g in row.group_sizes if g in (16, 128, "none")))
    if not (d == "int2" and b != "quanto")  # three or four weights: as a ternary model's own
]
WORDS = {
    "int8": "integers of 6 to 8 bits",
    "q8_0": "integers of 6 to 8 bits",
    "float8_e4m3": "8-bit floats (e4m3",
    "float8_e5m2": "8-bit floats (e5m2",
    "mxfp8": "8-bit floats (e4m3",
    "mxfp4": "4-bit floats (e2m1",
    "nvfp4": "4-bit floats (e2m1",
    "nf4": "the codes of nf4",
    "fp4": "the codes of fp4",
    "q4_k": "integers of 2 to 5 bits with a minimum",
}


def normal(num_rows=64, in_features=512, seed=0):
    return torch.randn(num_rows, in_features, generator=torch.Generator().manual_seed(seed)) * 0.02


def dequantized(backend, dtype, group_size="auto"):
    compute = CAPABILITIES[backend][dtype].compute_dtypes[0]
    module = nn.Sequential(nn.Linear(512, 64, bias=False)).requires_grad_(False)
    module[0].weight.data = normal()
    config = native_config(QuantizationAxes(backend=backend, dtype=dtype, group_size=group_size))
    made, _ = quantlab.quantize(module.to(getattr(torch, compute)), config)
    return BACKENDS[backend].read_back(made[0]).dense


def through(weight, dtype):
    return weight.to(getattr(torch, dtype)).float()


@pytest.mark.parametrize(("backend", "dtype", "group"), FORMATS, ids=["-".join(map(str, row)) for row in FORMATS])
def test_what_a_backend_stores_is_recognized(backend, dtype, group):
    """In float32, and as a checkpoint of 16 bits that was made from it."""
    try:
        dense = dequantized(backend, dtype, group)
    except ConfigError:
        pytest.skip("another shape")
    for kept in DTYPES:
        grid = known_grid([through(dense, kept)])
        assert grid is not None
        assert grid.startswith(WORDS.get(dtype, grid))
        assert fingerprint_warning(None, grid).startswith(
            f"the reference looks already quantized: its weights are {grid}"
        )


def rounded_to(kind, scale):
    return (normal() / scale).to(kind).float() * scale


MADE = {
    "float8 in blocks of 128 x 128": lambda: rounded_to(
        torch.float8_e4m3fn,
        (normal().reshape(64, 4, 128).abs().amax((0, 2)) / 448).repeat_interleave(128)[None, :],
    ),
    "float8 with any scale": lambda: rounded_to(torch.float8_e4m3fn, 0.00037),
    "float8 without one": lambda: rounded_to(torch.float8_e4m3fn, 1.0),
    "e5m2 with any scale": lambda: rounded_to(torch.float8_e5m2, 0.00037),
    "int4 with integer zero points": lambda: on_zero_points(normal()),
    "int8 that is clipped": lambda: (normal() / 3e-4).round().clamp(-127, 127) * 3e-4,
    "int8 with a scale a tensor": lambda: (
        (normal() / (normal().abs().max() / 127)).round() * normal().abs().max() / 127
    ),
    "rows rescaled after it": lambda: rounded_to(torch.float8_e4m3fn, 0.00037) * torch.linspace(0.5, 2, 64)[:, None],
}


def on_zero_points(weight):
    groups = weight.reshape(len(weight), -1, 128)
    low, high = groups.amin(2, keepdim=True).clamp_max(0), groups.amax(2, keepdim=True)
    step = (high - low) / 15
    zero = (-low / step).round()
    return (((groups / step).round() + zero).clamp(0, 15).sub(zero) * step).reshape(weight.shape)


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("kept", DTYPES)
def test_grids_of_others_are_recognized(name, kept):
    assert known_grid([through(MADE[name](), kept)]) is not None


ORDINARY = {
    "normal": lambda seed: normal(seed=seed),
    "uniform": lambda seed: torch.rand(64, 512, generator=torch.Generator().manual_seed(seed)) - 0.5,
    "far from zero": lambda seed: torch.rand(64, 512, generator=torch.Generator().manual_seed(seed)) * 0.01 + 1,
    "heavy tails": lambda seed: normal(seed=seed) / normal(seed=seed + 99).abs().sqrt(),
    "tiny weights": lambda seed: normal(seed=seed) * 1e-3,
    "rows of all sizes": lambda seed: normal(seed=seed) * torch.logspace(0, -3, 64)[:, None],
    "a tiny layer": lambda seed: normal(4, 32, seed),
    "an odd layer": lambda seed: normal(48, 100, seed),
    "a narrow layer": lambda seed: normal(64, 8, seed),
    "constant": lambda seed: torch.full((64, 512), 0.3 + seed),
    "zeros": lambda seed: torch.zeros(64, 512),
    "ternary": lambda seed: (normal(seed=seed) / 0.02).round().clamp(-1, 1) * 0.05,
    "one-hot": lambda seed: torch.eye(512)[:64],
    "sparse": lambda seed: normal(seed=seed) * (normal(seed=seed + 7) > 0.03),
}


@pytest.mark.parametrize("name", ORDINARY)
@pytest.mark.parametrize("kept", DTYPES)
def test_ordinary_weights_are_on_no_grid(name, kept):
    for seed in range(5):
        weights = [through(ORDINARY[name](seed), kept)]
        assert known_grid(weights) is None
        assert fingerprint_warning(grid_fingerprint(weights), None) is None


def test_layers_that_tell_nothing_neither_hide_a_grid_nor_make_one():
    """Zero-initialized layers are common; they were counted as perfectly on the grid of int4."""
    nothing, grid = [torch.zeros(64, 512)] * 3, [dequantized("torchao", "float8_e4m3")]
    assert known_grid([*nothing, normal()]) is None
    assert grid_fingerprint([*nothing, normal()]) == pytest.approx(grid_fingerprint([normal()]))
    assert grid_fingerprint(nothing) is None
    assert known_grid([*nothing, *grid]) is not None
    assert known_grid([normal(), *grid]) == "8-bit floats (e4m3, as in mxfp8) (50% of them)"
    assert known_grid([*(normal(seed=seed) for seed in range(10)), *grid]) is None  # less than a tenth


def test_a_mix_of_formats_is_recognized_with_what_each_has():
    """Votes were split between the formats of a GGUF file's mix, and none of them had most of the weights."""
    mix = [dequantized("gguf", dtype) for dtype in ("q8_0", "q5_0", "q5_0", "q4_k", "q6_k")]
    assert known_grid(mix) == (
        "integers of 6 to 8 bits (as in int8 and q8_0) (40% of them) and integers of 4 or 5 bits (40% of them) and "
        "integers of 2 to 5 bits with a minimum of their own (as in q4_1 and q4_k) (20% of them)"
    )
    assert "looks already quantized" in fingerprint_warning(grid_fingerprint(mix), known_grid(mix))


def test_a_large_model_is_looked_at_in_a_second():
    layers = [torch.randn(2048, 2048)] * 100
    began = time.process_time()
    assert known_grid(layers) is None
    assert time.process_time() - began < 5


class Experts(nn.Module):
    """Packed, as transformers has them."""

    def __init__(self, weight, is_transposed):
        super().__init__()
        self.is_transposed = is_transposed
        self.down_proj = nn.Parameter(weight, requires_grad=False)


def conv1d(weight):
    layer = Conv1D(*weight.shape)
    layer.weight.data = weight.T.contiguous()
    return layer


HELD = {
    "Conv1D": conv1d,
    "experts": lambda weight: Experts(torch.stack([weight] * 20), is_transposed=False),
    "transposed experts": lambda weight: Experts(torch.stack([weight.T] * 20), is_transposed=True),
}


@pytest.mark.parametrize("kind", HELD)
def test_whatever_holds_linear_weights_is_looked_at(kind):
    """Nothing but nn.Linear was: of GPT-2 nothing at all, of a mixture of experts a few percent."""
    assert known_grid(HELD[kind](dequantized("gguf", "q8_0"))) == "integers of 6 to 8 bits (as in int8 and q8_0)"
    assert known_grid(HELD[kind](normal())) is None
    assert grid_fingerprint(HELD[kind](normal())) == pytest.approx(grid_fingerprint([normal()]), rel=0.1)


def test_a_layer_counts_by_its_weights():
    few, many = dequantized("gguf", "q8_0"), normal(64 * 20)
    assert known_grid([few, many]) is None
    assert known_grid([few, few, few, many]).endswith("(13% of them)")
