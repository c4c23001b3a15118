"""What every backend saves comes back as it was: each tensor's values, and its strides, on which a kernel's sums depend."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import quantlab
from quantlab.errors import ConfigError
from tests.support.schemes import columns, schemes_on_cpu
from tests.support.tables import BACKENDS
from tests.support.tiers import covering

SCHEMES = list(schemes_on_cpu())
ROW_AFTER_ROW = [s for s in SCHEMES if s.backend == "torchao" and s.dtype in ("nvfp4", "mxfp8", "mxfp4")]
"""The library takes no weight that lies otherwise."""


class Net(nn.Module):
    """Two layers, the weight of the second a transposed view."""

    def __init__(self, is_transposed):
        super().__init__()
        self.first, self.second = nn.Linear(256, 64), nn.Linear(256, 128, bias=False)
        if is_transposed:
            self.second.weight = nn.Parameter(self.second.weight.t().contiguous().t())

    def forward(self, x):
        return torch.cat([self.first(x), self.second(x)], dim=-1)


def make_net(scheme, is_transposed):
    torch.manual_seed(0)
    return Net(is_transposed).to(getattr(torch, scheme.compute_dtype)).eval().requires_grad_(False)


def inputs(scheme):
    """Rows with a few loud channels; gptq needs more of them than there are channels."""
    num = 300 if scheme.algorithm == "gptq" else 16
    x = torch.randn(num, 256, generator=torch.Generator().manual_seed(1))
    x[:, ::64] *= 30
    return x.to(getattr(torch, scheme.compute_dtype))


def held(module):
    """Where it hangs -> (class, dtype, shape, strides) and bytes of every tensor of a module, hidden ones too."""
    found = {}
    for name, part in module.named_modules():
        for key, value in vars(part).items():
            walk(f"{name}.{key}", value, found, set())
    return found


def walk(path, value, found, seen):
    if id(value) in seen or isinstance(value, (str, type, nn.Module)):
        return
    seen.add(id(value))
    inner = dict(getattr(value, "__dict__", {}))
    if isinstance(value, torch.Tensor):
        parts = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else ()
        stored = b"" if parts else bytes_of(value.detach().as_subclass(torch.Tensor))
        found[path] = (type(value).__name__, value.dtype, tuple(value.shape), value.stride()), stored
        inner |= {name: getattr(value, name) for name in parts}
    elif isinstance(value, dict):
        inner = value
    elif isinstance(value, (list, tuple)):
        inner = dict(enumerate(value))
    for key, part in inner.items():
        walk(f"{path}.{key}", part, found, seen)


def bytes_of(tensor):
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy().tobytes()


def run(module, x):
    with torch.no_grad():
        return module(x)


@pytest.mark.parametrize("scheme", covering(SCHEMES, columns), ids=str)
def test_values_and_strides_come_back(scheme, tmp_path):
    backend, original, x = BACKENDS[scheme.backend], make_net(scheme, scheme not in ROW_AFTER_ROW), inputs(scheme)
    module, _ = quantlab.quantize(original, scheme.native, calibration=[x] if scheme.native.needs_data else None)
    before = held(module)
    backend.save(module, tmp_path)
    fresh = copy.deepcopy(original)
    config = backend.resolve(scheme.native, "cpu", scheme.compute_dtype)
    loaded = backend.load(fresh, ["first", "second"], config, tmp_path) or fresh
    after = held(loaded)
    assert {key: kind for key, (kind, _) in after.items()} == {key: kind for key, (kind, _) in before.items()}
    assert not [key for key, (_, stored) in before.items() if stored != after[key][1]]
    assert torch.equal(run(loaded, x), run(module, x))


@pytest.mark.parametrize("scheme", ROW_AFTER_ROW, ids=str)
def test_transposed_weights_that_a_library_cannot_take_are_refused(scheme):
    with pytest.raises(ConfigError, match="torchao cannot quantize first, second"):
        quantlab.quantize(make_net(scheme, True), scheme.native)


def test_words_of_a_weight_are_kept_by_no_code_on_any_python(monkeypatch, tmp_path):
    """Python 3.11.0 to 3.11.3 has the members of an Enum by ``getattr``, which a loader of weights does not run."""
    from torchao.quantization.quantize_.common import KernelPreference

    monkeypatch.setattr(KernelPreference, "__reduce_ex__", lambda self, _: (getattr, (type(self), self.name)))
    of_torchao = [s for s in SCHEMES if s.backend == "torchao" and s.dtype == "float8_e4m3"]
    scheme = next(s for s in of_torchao if s.native.activation_scales == "static")
    test_values_and_strides_come_back(scheme, tmp_path)
