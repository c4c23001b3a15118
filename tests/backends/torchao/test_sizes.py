"""Bytes of what only a GPU computes with: the tensors themselves are made anywhere."""

import pytest
import torch

from quantlab.backends.torchao.sizes import layer_bytes
from quantlab.planning.plan import plan
from quantlab.vocabulary.sizes import DenseLayer

FLOAT8 = ["backend=torchao", "dtype=float8_e4m3", "activation_dtype=float8_e4m3"]


@pytest.mark.parametrize("group_size", ["auto", "none"])
def test_float8_with_inputs_rounded_at_each_call(group_size):
    from torchao.quantization import Float8Tensor, PerRow, PerTensor

    [job] = plan([*FLOAT8, f"group_size={group_size}"]).jobs
    made = Float8Tensor.from_hp(torch.ones(32, 64), granularity=PerTensor() if group_size == "auto" else PerRow())
    dense = DenseLayer(shape=(32, 64), dtype="float32", bias_dtype="")
    planned = layer_bytes(job.schemes[""].native, dense, "float8_e4m3", "float32", "cuda")
    assert (planned.codes, planned.scales) == (made.qdata.nbytes, made.scale.nbytes)
