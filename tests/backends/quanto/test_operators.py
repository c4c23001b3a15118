"""Operators that replace the library's give its numbers, bit for bit, and hold less at once."""

import pytest
import torch
from optimum.quanto.library import quantize as library_file  # noqa: F401  (defines the operators)
from optimum.quanto.tensor.packed import pack_weights

from quantlab.backends.quanto import operators
from tests.support.allocated import Allocated

library_quantize = torch.ops.quanto.quantize_affine.default


def by_the_library(*given):
    """What the library's own kernel answers, beside the one that replaces it."""
    return library_quantize._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *given)


@pytest.fixture(scope="module", autouse=True)
def replaced():
    operators.override_operators()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shift_dtype", [None, torch.float32, torch.int8])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("axis", "group_size"), [(0, None), (0, 16), (-1, None), (-1, 5)])
def test_codes_that_are_made_in_pieces_are_the_librarys(dtype, shift_dtype, bits, axis, group_size, monkeypatch):
    monkeypatch.setattr(operators, "WEIGHTS_AT_ONCE", 48)
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(10, 32, generator=draw).to(dtype)
    groups = {(0, None): (10, 1), (0, 16): (20, 1), (-1, None): (1, 32), (-1, 5): (1, 64)}[axis, group_size]
    scale = (torch.rand(groups, generator=draw) + 0.1).to(dtype)
    shift = torch.rand(groups, generator=draw) if shift_dtype != torch.int8 else torch.randint(0, 4, groups)
    given = (weight, bits, axis, group_size, scale, shift.to(shift_dtype or dtype))
    found, expected = library_quantize(*given), by_the_library(*given)
    assert found.dtype == torch.uint8
    assert torch.equal(found, expected)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("rows", [1, 3, 8, 9])
def test_what_was_packed_is_unpacked(bits, rows):
    codes = torch.randint(0, 2**bits, (rows, 6), dtype=torch.uint8)
    packed = pack_weights(codes, bits)
    assert torch.equal(torch.ops.quanto.unpack(packed, bits)[:rows], codes)


def test_a_layer_is_rounded_and_unpacked_without_copies_of_it(monkeypatch):
    monkeypatch.setattr(operators, "WEIGHTS_AT_ONCE", 1024)
    weight = torch.randn(512, 128, dtype=torch.bfloat16)
    scale, shift = torch.ones(512, 1, dtype=torch.bfloat16), torch.zeros(512, 1, dtype=torch.bfloat16)
    with Allocated() as rounding:
        codes = library_quantize(weight, 4, 0, None, scale, shift)
    packed = pack_weights(codes, 4)
    with Allocated() as unpacking:
        unpacked = torch.ops.quanto.unpack(packed, 4)
    assert rounding.peak_bytes <= codes.nbytes + 3 * 1024 * weight.itemsize
    assert unpacking.peak_bytes <= unpacked.nbytes + 1024
