"""16-bit products in float32: what native arithmetic means, and nothing else is touched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quantlab.modules import emulated
from quantlab.modules.emulated import emulated_products, lacking

DTYPES = (torch.bfloat16, torch.float16)
NETS = {
    "linear": lambda: (nn.Linear(64, 48), torch.randn(8, 64)),
    "linear without bias": lambda: (nn.Linear(64, 48, bias=False), torch.randn(3, 5, 64)),
    "one row": lambda: (nn.Linear(64, 48, bias=False), torch.randn(64)),
    "conv": lambda: (nn.Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, 9, 9)),
    "transposed conv": lambda: (nn.ConvTranspose2d(4, 6, 3, stride=2), torch.randn(2, 4, 9, 9)),
    "attention": lambda: (nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval(), torch.randn(2, 7, 32)),
    "gru": lambda: (Last(nn.GRU(16, 16)), torch.randn(5, 2, 16)),
}


class Last(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)[0]


def exact_products(net, x):
    """A product of 16-bit numbers in double precision, rounded once: what both are near to."""
    return nn.functional.linear(x.double(), net.weight.double(), None if net.bias is None else net.bias.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["linear", "linear without bias", "one row"])
@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
def test_a_product_is_the_exact_one_rounded(dtype, name, inference):
    torch.manual_seed(0)
    net, x = NETS[name]()
    net, x = net.to(dtype), x.to(dtype)
    before = emulated.num_emulated
    with inference(), emulated_products(DTYPES):
        found = net(x)
    assert emulated.num_emulated > before
    assert found.dtype == dtype
    wanted = exact_products(net, x)
    step = torch.finfo(dtype).eps
    assert ((found.double() - wanted).abs() <= 0.51 * step * wanted.abs() + 1e-6).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NETS)
def test_whole_layers_are_as_near_to_float32_as_native_ones(dtype, name):
    torch.manual_seed(0)
    net, x = NETS[name]()
    with torch.no_grad():
        wanted = net(x)
        net = net.to(dtype)
        native = net(x.to(dtype)).float()
        with emulated_products(DTYPES):
            found = net(x.to(dtype)).float()
    error, native_error = ((y - wanted).norm() / wanted.norm() for y in (found, native))
    assert error <= 1.5 * native_error + 1e-6


def test_nothing_else_is_touched():
    torch.manual_seed(0)
    net, x = nn.Linear(64, 48), torch.randn(8, 64)
    before = emulated.num_emulated
    with torch.no_grad(), emulated_products(DTYPES):
        assert torch.equal(net(x), nn.functional.linear(x, net.weight, net.bias))
        with torch.no_grad(), emulated_products(()):
            pass
    assert emulated.num_emulated == before
    with torch.no_grad(), emulated_products((torch.float16,)):
        net.to(torch.bfloat16)(x.bfloat16())
    assert emulated.num_emulated == before


def test_gradients_go_through():
    net = nn.Linear(8, 8).to(torch.bfloat16)
    with emulated_products(DTYPES):
        net(torch.randn(2, 8, dtype=torch.bfloat16)).sum().backward()
    assert net.weight.grad.dtype == torch.bfloat16


def test_a_gpu_lacks_nothing_and_a_processor_says_what_it_lacks():
    assert lacking("cuda") == ()
    assert set(lacking("cpu")) <= set(DTYPES)


def test_what_is_compiled_is_compiled_below_it():
    """torch.compile leaves a model alone where a mode of a user's is open: on such a processor no model was compiled."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    net, x = nn.Linear(8, 4).bfloat16(), torch.randn(3, 8).bfloat16()
    torch._dynamo.reset()
    with torch.no_grad(), emulated_products(DTYPES):
        found = torch.compile(net, backend=keep)(x)
        before = emulated.num_emulated
        plain = net(x)
    assert len(graphs) == 1
    assert emulated.num_emulated == before + 1  # what is not compiled is computed as before
    torch.testing.assert_close(found, plain, atol=0.02, rtol=0.02)
    torch._dynamo.reset()


def test_operators_that_take_functions_go_through():
    """flex_attention and its kin: torch refuses to run them below a mode that does not say that it lets them pass."""
    from torch.nn.attention.flex_attention import flex_attention

    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 16, 8)
    with torch.no_grad():
        wanted = flex_attention(q, k, v)
        with emulated_products(DTYPES):
            assert torch.equal(flex_attention(q, k, v), wanted)
            found = flex_attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found.float() - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("dtypes", [DTYPES, (torch.float16,)])
@pytest.mark.parametrize("is_open", [True, False])
def test_a_librarys_operator_stays_in_the_autocast_that_it_is_called_in(dtypes, is_open):
    """quanto's and bitsandbytes' products of 8 bits: torch switches a model's own autocast off below a mode."""
    library = torch.library.Library("quantlab_test", "FRAGMENT")
    library.define("product(Tensor a, Tensor b) -> Tensor")
    library.impl("product", lambda a, b: torch.matmul(a, b).float(), "CPU")
    torch.manual_seed(0)
    a, b = torch.randn(2, 16, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=is_open):
        wanted = torch.ops.quantlab_test.product(a, b)
        with emulated_products(dtypes):
            found = torch.ops.quantlab_test.product(a, b)
            assert torch.is_autocast_enabled("cpu") == is_open
    assert torch.equal(found, wanted)
    assert torch.equal(wanted, a @ b) != is_open
    library._destroy()
