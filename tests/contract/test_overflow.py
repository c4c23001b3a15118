"""Half precision: outputs that the unquantized layer holds, a quantized one holds too, or its row says otherwise."""

import pytest
import torch
from torch import nn

import quantlab
from quantlab import TorchAoConfig
from quantlab.errors import NotFinite
from tests.support.schemes import columns, schemes_on_cpu
from tests.support.tables import CAPABILITIES
from tests.support.tiers import covering

IN_FLOAT16 = {str(s): s for s in schemes_on_cpu() if "float16" in CAPABILITIES[s.backend][s.dtype].compute_dtypes}
SAID = [(b, d) for b, rows in CAPABILITIES.items() for d, row in rows.items() if "float16" in row.overflows_in]


def layer():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 64)).eval().requires_grad_(False)


def inputs(largest, seed=1):
    """Whose largest output is ``largest``, in float16."""
    x = torch.randn(32, 256, generator=torch.Generator().manual_seed(seed))
    return (x * largest / layer()(x).abs().max()).half()


@pytest.mark.parametrize("name", covering(IN_FLOAT16, lambda name: columns(IN_FLOAT16[name])))
def test_what_float16_holds_is_no_infinity(name):
    scheme, largest = IN_FLOAT16[name], 10_000.0
    if (scheme.backend, scheme.dtype) in SAID:
        largest = 20.0  # below 516 times the largest weight, 1 / 16
    module, x = layer().half(), inputs(largest)
    made, _ = quantlab.quantize(module, scheme.native, calibration=[x] if scheme.native.needs_data else None)
    found = made(x)
    assert bool(found.isfinite().all())
    error = float((found.float() - module(x).float()).norm() / module(x).float().norm())
    assert error < {"int2": 1, "q2_k": 0.7, "q3_k": 0.4, "int3": 0.5}.get(scheme.dtype, 0.3)


INT8 = {"a row": TorchAoConfig("int8wo"), "and activations": TorchAoConfig("int8dq")}


@pytest.mark.parametrize("name", INT8)
def test_torchaos_int8_a_row_overflows_and_is_named(name):
    """The sums of inputs and codes overflow before the scale, the largest weight / 127, is applied."""
    module = layer().half()
    made, _ = quantlab.quantize(module, INT8[name])
    x = inputs(40.0)
    assert bool(module(x).isfinite().all())
    assert not bool(made(x).isfinite().all())
    limit = 516 * float(module[0].weight.abs().amax(1).max())
    lost = module(x)[~made(x).isfinite()].abs()
    assert float(lost.max()) > limit / 1.05
    with pytest.raises(NotFinite) as caught:
        quantlab.evaluate(module, [INT8[name]], [x])
    message = str(caught.value)
    assert message.startswith("dtype=int8: the output of batch 0 by torchao int8 is NaN or infinite where the ref")
    assert "torchao int8 is known to overflow in float16 (in float16 with one scale a row" in message
    assert "set compute_dtype=float32 or bfloat16, or choose another" in message
    assert "weights and inputs" not in message
    wide = quantlab.evaluate(module.float(), [INT8[name]], [x.float()])
    assert wide[-1].status == "FINISHED"


def test_group_scales_do_not_overflow():
    config = TorchAoConfig("int8wo", group_size=64)
    module, x = layer().half(), inputs(10_000.0)
    made, _ = quantlab.quantize(module, config)
    assert bool(made(x).isfinite().all())


def test_the_table_says_which():
    assert SAID == [("torchao", "int8")]
    assert "516" in CAPABILITIES["torchao"]["int8"].note
