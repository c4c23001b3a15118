"""What calibration data leave out does no harm later, on every backend and algorithm: channels and blocks that were
silent, experts without tokens; and a layer that saw nothing is named."""

import pytest
import torch
from torch import nn

import quantlab
from quantlab import ConfigError
from quantlab.vocabulary.axes import QuantizationAxes
from tests.support.schemes import columns, schemes_on_cpu
from tests.support.tables import native_config
from tests.support.tiers import covering

SCHEMES = {str(s): s for s in schemes_on_cpu()}
WITH_DATA = {name: s for name, s in SCHEMES.items() if s.native.needs_data}
CLIPPED = {
    f"{algorithm} {scales}": native_config(
        QuantizationAxes(backend="modelopt", dtype="int4", activation_dtype="int8", algorithm=algorithm),
        {"activation_scales": scales},
    )
    for algorithm in ("awq_clip", "awq_full")
    for scales in ("static", "dynamic")
}
IN = 256


def named(schemes):
    """Their names."""
    return covering(schemes, lambda name: columns(schemes[name]))


def dtype_of(scheme):
    return getattr(torch, scheme.compute_dtype)


def layer(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, 64)).to(dtype).eval().requires_grad_(False)


def inputs(seed, silent=(), num=64):
    """Four channels are 30 times as loud as the others; ``silent`` ones are 0."""
    x = torch.randn(num, IN, generator=torch.Generator().manual_seed(seed))
    x[:, :128:32] *= 30
    x[:, list(silent)] = 0
    return x


def error_where_all_speak(scheme, silent):
    dtype, module = dtype_of(scheme), layer(dtype_of(scheme))
    settings = {"calibration": [inputs(seed, silent).to(dtype) for seed in (1, 2)]}
    made, _ = quantlab.quantize(module, scheme.native, **settings)
    x = inputs(3).to(dtype)
    expected = module(x).float()
    return float((made(x).float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", named(WITH_DATA))
def test_silent_channels_may_speak_later(name):
    """Three channels among others, and a whole block of the format."""
    scheme = WITH_DATA[name]
    nothing = error_where_all_speak(scheme, ())
    factor = {"imatrix": 2, "svdquant": 5}.get(scheme.algorithm, 1.35)  # both keep what was heard better than the rest
    for silent in ((5, 70, 130), range(128, 256)):
        assert error_where_all_speak(scheme, silent) < factor * nothing + 0.001


@pytest.mark.parametrize("name", named(WITH_DATA))
def test_a_layer_that_saw_only_zeros_is_named(name):
    scheme = WITH_DATA[name]
    data = [torch.zeros(8, IN, dtype=dtype_of(scheme)) for _ in range(2)]
    with pytest.raises(ConfigError, match=r"^calibration: 0 got nothing but zeros on the calibration data; exclude it"):
        quantlab.quantize(layer(dtype_of(scheme)), scheme.native, calibration=data)


@pytest.mark.parametrize("name", named(WITH_DATA))
def test_a_column_of_zero_weights_stays_one(name):
    scheme = WITH_DATA[name]
    dtype, module = dtype_of(scheme), layer(dtype_of(scheme))
    module[0].weight[:, 17] = 0
    data = [inputs(seed).to(dtype) for seed in (1, 2)]
    made, report = quantlab.quantize(module, scheme.native, calibration=data)
    assert [r.status for r in report.layers] == ["quantized"]
    x = inputs(3).to(dtype)
    expected, found = module(x).float(), made(x).float()
    assert float((found - expected).norm() / expected.norm()) < (0.6 if scheme.dtype in ("int2", "q2_k") else 0.25)


class Turned(nn.Module):
    """Hands on what is not contiguous, and by its name where it is asked to."""

    def __init__(self, is_named):
        super().__init__()
        self.is_named, self.layer = is_named, layer(torch.float32)[0]

    def forward(self, x):
        return self.layer(input=x.mT.contiguous().mT) if self.is_named else self.layer(x)


@pytest.mark.parametrize("name", named(WITH_DATA) + [pytest.param(name, id=f"{name} static") for name in CLIPPED])
def test_how_a_layer_is_given_its_inputs_says_nothing(name):
    native = CLIPPED[name] if name in CLIPPED else WITH_DATA[name].native
    dtype = torch.float32 if name in CLIPPED else dtype_of(WITH_DATA[name])
    x, data = inputs(3).to(dtype)[None], [inputs(seed).to(dtype)[None].expand(2, -1, -1) for seed in (1, 2)]
    found = [quantlab.quantize(Turned(way).to(dtype), native, calibration=data)[0] for way in (False, True)]
    with torch.no_grad():
        placed, turned = (module(x).float() for module in found)
    assert float((turned - placed).norm()) <= 1e-5 * float(placed.norm())


class Routed(nn.Module):
    """Two experts: the sign of a token's first channel says which."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(IN, IN), nn.Linear(IN, IN), nn.Linear(IN, 64)

    def forward(self, x):
        chosen, out = x[:, 0] > 0, torch.zeros_like(x)
        out[chosen], out[~chosen] = self.first(x[chosen]).to(x.dtype), self.second(x[~chosen]).to(x.dtype)
        return self.head(out)


def tokens(seed, sign, dtype):
    x = torch.randn(24, IN, generator=torch.Generator().manual_seed(seed))
    if sign:
        x[:, 0] = sign * x[:, 0].abs()
    return x.to(dtype)


def check_empty_batches(native, dtype, limit):
    module = Routed().to(dtype).eval().requires_grad_(False)
    data = [tokens(seed, sign, dtype) for seed, sign in ((1, 0), (2, 1), (3, -1))]  # the last is empty for the first
    made, _ = quantlab.quantize(module, native, calibration=data if native.needs_data else None)
    for sign in (1, -1, 0):
        x = tokens(7, sign, dtype)
        with torch.no_grad():
            expected, found = module(x).float(), made(x).float()
        assert float((found - expected).norm() / expected.norm()) < limit
    with torch.no_grad():
        assert made.first(torch.zeros(2, 0, IN, dtype=dtype)).shape == (2, 0, IN)


@pytest.mark.parametrize("name", named(SCHEMES))
def test_experts_without_tokens(name):
    scheme = SCHEMES[name]
    check_empty_batches(scheme.native, dtype_of(scheme), 0.9 if scheme.dtype in ("int2", "q2_k") else 0.5)


@pytest.mark.parametrize("name", CLIPPED)
def test_experts_without_tokens_and_static_activations_beside_clipping(name):
    check_empty_batches(CLIPPED[name], torch.float32, 0.35)
