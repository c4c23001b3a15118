"""While a model is quantized from its files, what is allocated is the quantized model and about one layer, never more.

Counted at torch's own allocator, so that it is the same at every run; slices are made as small beside these layers as they
are beside a real model's.
"""

import copy
import gc
import importlib

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from quantlab.modules.source import Source, shards_of
from quantlab.stages.quantize import quantize_component
from quantlab.stages.select import QuantizationRequest, select_streamed
from quantlab.vocabulary.axes import QuantizationAxes
from tests.support.allocated import Allocated
from tests.support.tables import CAPABILITIES, storages, the_scheme
from tests.support.tiers import covering

NUM_LAYERS, ROWS, COLUMNS = 5, 1024, 512
LAYER_BYTES = 4 * ROWS * COLUMNS
"""In float32."""
SLICES = {
    "quantlab.stages.products": "_WEIGHTS_AT_ONCE",
    "quantlab.stages.weight_errors": "_WEIGHTS_AT_ONCE",
    "quantlab.backends.bitsandbytes.layers": "WEIGHTS_AT_ONCE",
    "quantlab.backends.bitsandbytes.quantize": "ENCODED_AT_ONCE",
    "quantlab.backends.gguf.blocks": "_WEIGHTS_AT_ONCE",
    "quantlab.backends.modelopt.packing": "CODES_AT_ONCE",
    "quantlab.backends.quanto.operators": "WEIGHTS_AT_ONCE",
    "torchao.quantization.quantize_.workflows.nf4.nf4_tensor": "CHUNK_SIZE",
}
MOST = 1.5
"""Layers in float32 that may be held above the quantized model, its own weight in 16 bit among them."""
WIDER = {
    ("bitsandbytes", "int8"): 2.8,
    ("torchao", "int8"): 2.5,
    ("torchao", "float8_e4m3"): 3.5,
    ("torchao", "float8_e5m2"): 3.5,
    ("torchao", "nf4"): 3.6,
    ("torchao", "mxfp8"): 3.4,
    ("torchao", "nvfp4"): 8.0,
    ("torchao", "mxfp4"): 7.7,
    ("modelopt", "int3"): 3.3,
    ("modelopt", "int2"): 3.3,
    ("modelopt", "float8_e4m3"): 2.0,
}
"""Those whose library has a layer whole in float32, or as codes of 32 bits, more than once."""
EVERY = [
    (b, d)
    for b, rows in CAPABILITIES.items()
    if b != "none"
    for d, row in rows.items()
    if "cpu" in row.devices and "bfloat16" in row.compute_dtypes
]


@pytest.fixture
def source(tmp_path, monkeypatch):
    for place, name in SLICES.items():
        monkeypatch.setattr(importlib.import_module(place), name, 2**14)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(COLUMNS, ROWS, bias=False, dtype=torch.bfloat16) for _ in range(NUM_LAYERS)))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    return Source(module=model.to("meta"), shards=shards_of("k", tmp_path), device="cpu")


@pytest.mark.parametrize(("backend", "dtype"), covering(EVERY, lambda c: (c[0],)), ids=["-".join(c) for c in EVERY])
def test_no_more_than_the_quantized_model_and_a_layer(source, backend, dtype):
    scheme = the_scheme(QuantizationAxes(backend=backend, dtype=dtype))
    request = QuantizationRequest(component="model", scheme=scheme, compute_dtype="bfloat16", device="cpu")
    small = nn.Sequential(nn.Linear(256, 256, dtype=torch.bfloat16))
    quantize_component(request, copy.deepcopy(small), small)  # what a library makes at its first use
    module = copy.deepcopy(source.module)
    gc.collect()
    with Allocated() as allocated:
        quantize_component(request, module, source.module, select_streamed(request, module), source=source)
    held = sum(storages(module).values())
    left_by_others = LAYER_BYTES // 100  # small tensors of other tests that are freed meanwhile
    assert allocated.end_bytes == pytest.approx(held, abs=left_by_others)
    assert allocated.peak_bytes - allocated.end_bytes <= WIDER.get((backend, dtype), MOST) * LAYER_BYTES


def test_the_plan_counts_no_less():
    assert [c for c in EVERY if CAPABILITIES[c[0]][c[1]].layers_at_once < WIDER.get(c, MOST)] == []
