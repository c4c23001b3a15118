"""torchao's GPTQ: refused on a CPU by name, gated to CUDA; its arithmetic is also run on a CPU without that gate."""

import inspect

import pytest
import torch

import quantlab
from quantlab.backends import torchao as backend
from quantlab.errors import ConfigError
from quantlab.modules.feed import feed_of_batches
from tests.support.torchao_net import batches, config_of, net


def error(module, original, x):
    with torch.no_grad():
        out, reference = module.first(x).float(), original.first(x).float()
    return float((out - reference).norm() / reference.norm())


def alike(seed):
    """Tokens whose channels hang together, so that one channel's rounding can make up for another's."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(64, 512, generator=torch.Generator().manual_seed(9))
    return torch.randn(32, 32, 64, generator=generator) @ mixed + 0.5 * torch.randn(32, 32, 512, generator=generator)


def quantized(device, algorithm):
    original, module = net().to(device), net().to(device)
    config = config_of(algorithm=algorithm)
    calibrated = None
    if config.needs_data:
        feed = feed_of_batches([alike(1)], device=device)  # more tokens than channels
        calibrated = backend.calibrate(module, ["first", "second"], config, "float32", feed)
    backend.quantize(module, ["first", "second"], config, "float32", calibrated)
    return original, module, config


def check(device, folder):
    x = alike(5).to(device)
    original, module, config = quantized(device, "gptq")
    _, plain, _ = quantized(device, "max")
    assert error(module, original, x) < 0.8 * error(plain, original, x)
    row = backend.read_back(module.first)
    assert (row.dtype, row.group_size) == ("int8", None)
    with torch.no_grad():
        out = module(x)
    backend.save(module, folder)
    fresh = net().to(device)
    backend.load(fresh, ["first", "second"], config, folder)
    with torch.no_grad():
        assert torch.equal(fresh(x), out)


def test_it_is_refused_on_a_cpu_with_who_has_it_there():
    config = config_of(algorithm="gptq")
    with pytest.raises(
        ConfigError,
        match=r"^algorithm=gptq: torchao runs it on CUDA only, and this run is on cpu; pass "
        r"device=cuda, or backend=modelopt$",
    ):
        quantlab.quantize(net(), config, calibration=batches())


def test_its_arithmetic_without_the_gate(tmp_path, monkeypatch):
    """The library's own function with its assertion left out: the Hessians and what becomes of them are ours."""
    from torchao.prototype.gptq import api

    source = inspect.getsource(api.gptq_quantize)
    gate = 'assert device.type == "cuda", "GPTQ only supports CUDA currently"'
    assert gate in source, "the gate is still there; else offer it on a CPU"
    scope = dict(vars(api))
    exec(source.replace(gate, "pass"), scope)
    monkeypatch.setattr(api, "gptq_quantize", scope["gptq_quantize"])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    check("cpu", tmp_path)


def test_a_layer_that_never_ran_is_named():
    model, config = net(), config_of(algorithm="gptq")
    model.spare = torch.nn.Linear(512, 8)
    with pytest.raises(ConfigError, match=r"^calibration: spare never ran on the calibration data; exclude it"):
        backend.calibrate(model, ["first", "spare"], config, "float32", feed_of_batches(batches()))


@pytest.mark.gpu
def test_it_runs_on_cuda(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    check("cuda", tmp_path)
