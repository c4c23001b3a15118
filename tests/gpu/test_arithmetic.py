"""On a GPU float32 is float32 while it counts, whatever the caller's switches say; and they come back."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.devices import ON_GPU

MEASURE = """
import json, sys
import torch
from quantlab.modules.precision import exact_arithmetic

exec(sys.argv[1])
torch.manual_seed(0)
a, b = torch.randn(256, 1024, device="cuda"), torch.randn(1024, 256, device="cuda")
x, w = torch.randn(4, 64, 32, 32, device="cuda"), torch.randn(64, 64, 3, 3, device="cuda")

def errors():
    def of(found, wanted):
        return float((found.double() - wanted).norm() / wanted.norm())
    conv = torch.nn.functional.conv2d
    return of(a @ b, a.double() @ b.double()), of(conv(x, w), conv(x.double(), w.double()))

before = errors()
with exact_arithmetic():
    inside = errors()
print(json.dumps({"before": before, "inside": inside, "after": errors()}))
"""
ROUNDING, TF32 = 3e-6, 1e-4
"""What sums of 1024 products leave in float32 at most, and in 10 bits of mantissa at least."""


@pytest.mark.parametrize(
    ("said", "loose"),
    [
        ("", (False, True)),
        ("torch.backends.cuda.matmul.allow_tf32 = True", (True, True)),
        ("torch.set_float32_matmul_precision('medium')", (True, True)),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", (True, True)),
        ("torch.backends.cudnn.conv.fp32_precision = 'tf32'", (False, True)),
        ("torch.backends.cudnn.fp32_precision = 'tf32'", (True, True)),
        ("torch.backends.fp32_precision = 'tf32'", (True, True)),
    ],
)
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)])
def test_float32_is_float32_while_it_counts(said, loose, device):
    done = subprocess.run([sys.executable, "-c", MEASURE, said], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    found = json.loads(done.stdout)
    assert max(found["inside"]) < ROUNDING, found
    assert found["before"] == found["after"]
    assert tuple(error > TF32 for error in found["before"]) == loose, found
