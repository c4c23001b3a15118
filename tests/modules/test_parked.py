"""What waits in the host's memory comes back with the same bits, whatever library made it."""

import copy

import pytest
import torch
from torch import nn

from quantlab.modules.layers import state_digest
from quantlab.modules.memory import held_storages
from quantlab.modules.parked import LEAST_BYTES, Parked
from quantlab.stages.quantize import quantize_component
from quantlab.stages.select import QuantizationRequest
from quantlab.vocabulary.axes import QuantizationAxes
from tests.support.tables import CAPABILITIES, held_packages, storages, the_scheme

EVERY = [
    (b, d, next(c for c in ("bfloat16", "float32") if c in row.compute_dtypes))
    for b, rows in CAPABILITIES.items()
    if b != "none"
    for d, row in rows.items()
    if "cpu" in row.devices
]


def net(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 128)).to(getattr(torch, dtype)).eval()


def quantized(backend, dtype, compute):
    request = QuantizationRequest(
        component="model",
        scheme=the_scheme(QuantizationAxes(backend=backend, dtype=dtype)),
        compute_dtype=compute,
        device="cpu",
        default_exclusions=(),
    )
    original = net(compute).requires_grad_(False)
    return quantize_component(request, copy.deepcopy(original), original)[0]


FIRST = {b: d for b, d, _ in reversed(EVERY)}


@pytest.mark.parametrize(
    ("backend", "dtype", "compute"),
    [pytest.param(*c, marks=[] if FIRST[c[0]] == c[1] else pytest.mark.slow, id="-".join(c[:2])) for c in EVERY],
)
def test_every_format_comes_back(backend, dtype, compute):
    module = quantized(backend, dtype, compute)
    inputs = torch.randn(4, 256, dtype=getattr(torch, compute))
    twin = quantized(backend, dtype, compute)  # a digest reads by numpy, whose storages on a CPU cannot be emptied
    digest, before = state_digest(twin.state_dict()), storages(twin)
    with torch.no_grad():
        expected = module(inputs)
        guest = Parked(module, held_packages())
        for _ in range(2):
            guest.leave()
            guest.leave()
            left = held_storages(module, held_packages()).values()
            full = [s for s in left if s.nbytes() >= LEAST_BYTES]
            assert not full or (
                backend in ("bitsandbytes", "gguf", "modelopt") and not any(s.resizable() for s in full)
            )
            guest.come_back()
            guest.come_back()
            assert sorted(storages(module).values()) == sorted(before.values())
            assert torch.equal(module(inputs), expected)
    assert backend == "bitsandbytes" or state_digest(module.state_dict()) == digest  # repacked by its first product


def test_shared_and_viewed_storages_go_once():
    module = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)})
    module["b"].weight = module["a"].weight
    module["a"].register_buffer("top_rows", module["a"].weight.detach()[:32])
    expected = module["a"].weight.detach().clone()
    guest = Parked(module, ())
    guest.leave()
    assert guest.is_away
    assert module["b"].weight.untyped_storage().nbytes() == 0
    guest.come_back()
    assert not guest.is_away
    assert torch.equal(module["b"].weight, expected)
    assert torch.equal(module["a"].top_rows, expected[:32])


def test_what_cannot_be_emptied_stays():
    import numpy as np

    module = nn.Linear(64, 64)
    module.weight = nn.Parameter(torch.from_numpy(np.ones((64, 64), np.float32)))
    guest = Parked(module, ())
    guest.leave()
    assert module.weight.sum() == 4096
    guest.come_back()
    assert module.weight.sum() == 4096
