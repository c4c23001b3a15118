"""What hangs on a layer is on the quantized layer too: one rule on every backend."""

import contextlib
import itertools

import pytest
import torch
from torch import nn

from quantlab.errors import ConfigError
from quantlab.vocabulary.axes import QuantizationAxes
from tests.support.configs import dtypes_on_cpu
from tests.support.copies import inputs, net, quantized
from tests.support.tables import BACKENDS, CAPABILITIES, native_config, the_scheme
from tests.support.tiers import covering

EACH = [(b, d) for b in BACKENDS for d in dtypes_on_cpu(b)[:2]]


class Seen:
    """Hooks that write down what they saw; a deep copy has a record of its own."""

    def __init__(self):
        self.calls = []

    def pre(self, module, args):
        self.calls.append(("pre", type(module).__name__ != "", args[0].dtype))

    def pre_with_kwargs(self, module, args, kwargs):
        self.calls.append(("pre_with_kwargs", sorted(kwargs)))
        return (args[0] * 2, *args[1:]), kwargs

    def post(self, module, args, output):
        self.calls.append(("post", output.dtype, tuple(output.shape)))
        return output + 1

    def post_with_kwargs(self, module, args, kwargs, output):
        self.calls.append(("post_with_kwargs", sorted(kwargs)))

    def always(self, module, args, output):
        self.calls.append(("always", output is None))


def hang(layer):
    """Hooks of every kind of forward on a layer; the record, and the handles."""
    seen = Seen()
    return seen, [
        layer.register_forward_pre_hook(seen.pre),
        layer.register_forward_pre_hook(seen.pre_with_kwargs, with_kwargs=True),
        layer.register_forward_hook(seen.post),
        layer.register_forward_hook(seen.post_with_kwargs, with_kwargs=True),
        layer.register_forward_hook(seen.always, always_call=True),
    ]


@pytest.mark.parametrize(("backend", "dtype"), EACH)
def test_hooks_move_and_see_what_they_saw(backend, dtype):
    """The quantized layer with hooks is the quantized layer without, hooks around it; and the records are the same."""
    plain, x = net(), inputs()
    bare, _ = quantized(plain, backend, dtype)
    hooked = net()
    hooked[2].probe = Seen()
    for kind, method in (("pre", "pre"), ("pre", "pre_with_kwargs"), ("post", "post"), ("post", "post_with_kwargs")):
        register = hooked[2].register_forward_pre_hook if kind == "pre" else hooked[2].register_forward_hook
        register(getattr(hooked[2].probe, method), with_kwargs=method.endswith("kwargs"))
    made, _ = quantized(hooked, backend, dtype)
    with torch.no_grad():
        h = bare[1](bare[0](x))
        expected = bare[3](bare[2](h * 2) + 1)
        found = made(x)
        hooked(x)
    assert torch.equal(found, expected)
    assert made[2].probe is not hooked[2].probe
    assert made[2].probe.calls == hooked[2].probe.calls
    assert len(made[2].probe.calls) == 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_handles_go_on_removing_hooks_and_a_failing_call_still_tells(backend):
    """In place: the user's handles are of the layer that is there now."""
    model = net()
    seen, handles = hang(model[2])
    dtype = dtypes_on_cpu(backend)[0]
    scheme = the_scheme(QuantizationAxes(backend=backend, dtype=dtype))
    native = BACKENDS[backend].resolve(scheme.native, "cpu", "float32")
    BACKENDS[backend].quantize(model, ["0", "2"], native, "float32")
    with torch.no_grad():
        model(inputs())
        with pytest.raises((RuntimeError, ValueError, AssertionError)):
            model[2](torch.zeros(3, 7))
        with_hooks = model(inputs())
        assert ("always", True) in seen.calls
        for handle in handles:
            handle.remove()
        seen.calls.clear()
        assert not torch.equal(model(inputs()), with_hooks)
    assert not seen.calls


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_hooks_move(backend):
    model, seen = net(), []
    model[2].register_full_backward_hook(lambda module, given, got: seen.append("after"))
    model[2].register_full_backward_pre_hook(lambda module, got: seen.append("before"))
    made, _ = quantized(model, backend, dtypes_on_cpu(backend)[0])
    assert len(made[2]._backward_hooks) == len(made[2]._backward_pre_hooks) == 1
    assert made[2]._is_full_backward_hook
    with torch.no_grad():
        made(inputs())


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_users_set_on_a_layer_is_on_the_quantized_one(backend):
    """An attribute, a buffer and a submodule that a hook uses."""
    model = net()
    model[2].tag, model[2].gain = "mine", nn.Linear(1, 1)
    model[2].register_buffer("extra", torch.full((256,), 3.0), persistent=False)
    model[2].register_forward_hook(lambda module, args, output: output + module.extra)
    made, _ = quantized(model, backend, dtypes_on_cpu(backend)[0], modules_to_not_convert={"my": ["2.gain"]})
    assert made[2].tag == "mine"
    assert isinstance(made[2].gain, nn.Linear)
    with torch.no_grad():
        bare, _ = quantized(net(), backend, dtypes_on_cpu(backend)[0])
        assert torch.equal(made[:3](inputs()), bare[:3](inputs()) + 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hooks_of_containers_stay(backend):
    model = nn.Sequential(net(), nn.GELU())
    model[0].register_forward_hook(lambda module, args, output: output * 0 + len(module))
    made, _ = quantized(model, backend, dtypes_on_cpu(backend)[0])
    with torch.no_grad():
        assert torch.allclose(made(inputs()), nn.functional.gelu(torch.tensor(4.0)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_hooks_see_the_models_dtype_where_the_layer_computes_in_another(backend):
    """And a layer takes its input by the name that ``nn.Linear`` gives it."""
    model = net()
    model[2].probe = Seen()
    model[2].register_forward_pre_hook(model[2].probe.pre)
    model[2].register_forward_hook(model[2].probe.post)
    made, _ = quantized(model, backend, dtypes_on_cpu(backend)[0], compute_dtype="bfloat16")
    with torch.no_grad():
        made(inputs())
        assert [c[0] for c in made[2].probe.calls] == ["pre", "post"]
        assert made[2].probe.calls[0][-1] == made[2].probe.calls[1][1] == torch.float32
        assert torch.equal(made[0](input=inputs()), made[0](inputs()))


# -- with data


class Scaled(nn.Module):
    """Channels of the input of ``down`` are enlarged, by a module or by a hook."""

    def __init__(self, by_hook):
        super().__init__()
        self.up, self.down = net()[0], net()[2]
        self.by_hook = by_hook
        self.register_buffer("factors", torch.linspace(1, 50, 256))
        if by_hook:
            self.down.register_buffer("factors", self.factors)
            self.down.register_forward_pre_hook(lambda module, args: (args[0] * module.factors,))

    def forward(self, x):
        h = self.up(x)
        return self.down(h if self.by_hook else h * self.factors)


def needing_data():
    """(backend, dtype, algorithm and activations, settings) that calibrate on a CPU, for one dtype of each."""
    found = {}
    for backend, dtype in ((b, d) for b in BACKENDS for d in dtypes_on_cpu(b)):
        row = CAPABILITIES[backend][dtype]
        ways = itertools.product(row.algorithms, row.activation_dtypes, ({}, {"activation_scales": "static"}))
        for algorithm, activations, settings in ways:
            names = {"algorithm": algorithm, "activation_dtype": activations}
            with contextlib.suppress(ConfigError):
                native = native_config(QuantizationAxes(backend=backend, dtype=dtype, **names), settings)
                if native.needs_data and algorithm not in row.cuda_algorithms:
                    found.setdefault((backend, *names.values()), (backend, dtype, names, settings))
    return list(found.values())


@pytest.mark.parametrize(
    ("backend", "dtype", "names", "settings"),
    covering(needing_data(), lambda c: (f"{c[0]} {c[2]['algorithm']}", *c[2].values(), c[3])),
)
def test_calibration_sees_what_the_hooks_make_of_the_input(backend, dtype, names, settings):
    """To the bit as where a module of its own does what the hook does."""
    batches = [torch.randn(128, 256, generator=torch.Generator().manual_seed(i)) for i in (1, 2, 3)]
    outputs = []
    for by_hook in (True, False):
        model = Scaled(by_hook).eval().requires_grad_(False)
        made, _ = quantized(model, backend, dtype, batches, settings, **names)
        with torch.no_grad():
            outputs.append(made(inputs()))
    assert torch.equal(*outputs)
    assert torch.isfinite(outputs[0]).all()
