"""While a model is streamed, a large tensor has pages of its own, which the system has back when it is freed."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import ctypes
import torch
from quantlab.modules.source import _MMAP_THRESHOLD, _heap, freed_at_once

MIB = 2**20
ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 32 * MIB)
large, small = [], []
for _ in range(8):  # blocks in the heap, and what stays between them
    large.append(torch.empty(8 * MIB, dtype=torch.uint8))
    small.append(torch.empty(4096, dtype=torch.uint8))
made_holes = sum(tensor.data_ptr() in _heap() for tensor in large)
large.clear()


def in_the_heap():
    tensors = [torch.empty(size * MIB, dtype=torch.uint8) for size in (1, 2, 4, 7, 7)]
    return sum(tensor.data_ptr() in _heap() for tensor in tensors)


before = in_the_heap()
with freed_at_once():
    inside = in_the_heap()
    with freed_at_once():  # as a part that comes and goes does
        pass
print(made_holes, before, inside, in_the_heap())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc's heap")
def test_no_large_tensor_takes_a_hole_between_small_ones():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True
    )
    made_holes, before, inside, after = map(int, done.stdout.split())
    assert made_holes == 8
    assert before == 5
    assert inside == 0
    assert after == 5, "the holes are free again"
