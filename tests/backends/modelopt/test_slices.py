"""4-bit integers that are packed and unpacked some rows at a time are the same numbers, bit for bit, and take less memory."""

import pytest
import torch

from quantlab.backends.modelopt import packing
from tests.support.allocated import Allocated


@pytest.fixture(scope="module")
def packed_class():
    from modelopt.torch.quantization.qtensor import INT4QTensor

    packing.in_slices()
    return INT4QTensor


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("as_dtype", [None, "float32"])
@pytest.mark.parametrize(("rows", "columns", "block"), [(7, 64, 16), (5, 128, 128), (1, 64, 32), (6, 96, 64)])
def test_slices_are_the_same_numbers(packed_class, dtype, as_dtype, rows, columns, block, monkeypatch):
    torch.manual_seed(0)
    weight = torch.randn(rows, columns, dtype=getattr(torch, dtype))
    packed, scales = packed_class.quantize(weight, block)
    given = {"scale": scales, "block_sizes": {-1: block}}
    wanted = None if as_dtype is None else getattr(torch, as_dtype)
    expected = packed_class.dequantize.__wrapped__(packed, wanted, **given)
    whole = packed.dequantize(wanted, **given)
    monkeypatch.setattr(packing, "CODES_AT_ONCE", 2 * columns)
    again, factors = packed_class.quantize(weight, block)
    assert torch.equal(again._quantized_data, packed._quantized_data)
    assert again.metadata == packed.metadata
    assert torch.equal(factors, scales)
    sliced = packed.dequantize(wanted, **given)
    assert torch.equal(sliced, expected)
    assert torch.equal(whole, expected)
    assert sliced.dtype == expected.dtype
    assert sliced.shape == expected.shape


def test_no_more_than_some_rows_are_unpacked_at_once(packed_class, monkeypatch):
    packed, scales = packed_class.quantize(torch.randn(64, 128), 32)
    monkeypatch.setattr(packing, "CODES_AT_ONCE", 128)
    with Allocated() as allocated:
        made = packed.dequantize(scale=scales, block_sizes={-1: 32})
    assert allocated.peak_bytes <= made.nbytes + 4 * 128
