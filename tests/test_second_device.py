"""A module on ``cuda:1`` keeps its device wherever something is asked of a GPU; fake tensors and patched answers."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch._subclasses import FakeTensorMode

import quantlab
from quantlab.errors import ConfigError
from quantlab.stages import own_module
from quantlab.stages.select import check_device
from quantlab.vocabulary.axes import QuantizationAxes
from tests.support.tables import BACKENDS, CAPABILITIES, the_scheme

NEEDING = [(b, d) for b, rows in CAPABILITIES.items() for d, row in rows.items() if row.min_compute_capability]


@pytest.mark.parametrize("device", ["cpu", "cuda:0", "cuda:1"])
def test_python_takes_a_modules_own_device(device):
    with FakeTensorMode():
        net = torch.nn.Sequential(torch.nn.Linear(8, 8, device="meta"))
        net[0].weight = torch.nn.Parameter(torch.empty(8, 8, device=device))
    assert own_module._dtype_and_device(net) == ("float32", device)


@pytest.fixture
def asked(monkeypatch):
    """Devices whose capability was asked for."""
    found = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: found.append(str(device)) or (7, 0))
    return found


@pytest.mark.parametrize(("backend", "dtype"), NEEDING)
def test_the_capability_is_that_of_the_modules_device(backend, dtype, asked):
    row = CAPABILITIES[backend][dtype]
    scheme = the_scheme(QuantizationAxes(backend=backend, dtype=dtype))
    if row.min_compute_capability <= (7, 0):
        pytest.skip("met by the oldest")
    with pytest.raises(ConfigError, match="needs CUDA compute capability"):
        check_device(scheme.format, "cuda:1", row.compute_dtypes[0])
    assert asked == ["cuda:1"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_runs_on_a_gpu_runs_on_the_second_one(backend, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr("quantlab.stages.select.missing_compiler", lambda: "")
    for dtype, row in CAPABILITIES[backend].items():
        scheme = the_scheme(QuantizationAxes(backend=backend, dtype=dtype))
        for device in ("cuda", "cuda:1", "cpu"):
            is_offered = device.partition(":")[0] in row.devices
            with (
                contextlib.nullcontext() if is_offered else pytest.raises(ConfigError, match=f"this run is on {device}")
            ):
                check_device(scheme.format, device, row.compute_dtypes[0])


def test_libraries_that_name_no_device_mean_the_modules(monkeypatch):
    seen = []

    @contextlib.contextmanager
    def current(device):
        seen.append(device)
        yield

    monkeypatch.setattr(own_module, "current", current)
    net = torch.nn.Sequential(torch.nn.Linear(32, 32))
    quantlab.quantize(net, quantlab.QuantoConfig("int8"))
    assert seen == ["cpu"]
    quantlab.evaluate(net, [quantlab.QuantoConfig("int8")], [torch.randn(4, 32)], num_bootstrap=50)
    assert seen == ["cpu"] * 3


def test_one_candidate_of_python_goes_before_the_next(monkeypatch):
    import weakref

    refs = []
    real = own_module._quantized

    def quantize(*args, **kwargs):
        assert not any(ref() is not None for ref in refs)
        made, report = real(*args, **kwargs)
        refs.append(weakref.ref(made))
        return made, report

    monkeypatch.setattr(own_module, "_quantized", quantize)
    net = torch.nn.Sequential(torch.nn.Linear(32, 32))
    configs = [quantlab.QuantoConfig("int8"), quantlab.QuantoConfig("int4"), quantlab.QuantoConfig("int8")]
    quantlab.evaluate(net, configs, [torch.randn(4, 32)], num_bootstrap=50)
    assert len(refs) == 3


@pytest.mark.parametrize(("error", "kind"), [(torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError)])
def test_lack_of_memory_is_no_fault_of_the_module(error, kind, monkeypatch):
    def scarce(*_):
        raise error

    monkeypatch.setattr(own_module, "copied", scarce)
    with pytest.raises(kind):
        quantlab.quantize(torch.nn.Sequential(torch.nn.Linear(32, 32)), quantlab.QuantoConfig("int8"))
