"""Convolutions as well as Linear layers: planned, copied and streamed are one, to the byte and to the bit."""

import copy

import pytest
import torch

from quantlab.models.architectures import read_architecture
from quantlab.models.outline import empty
from quantlab.modules.layers import state_digest
from quantlab.modules.memory import component_memory
from quantlab.modules.source import Source, shards_of
from quantlab.stages.price import price_component
from quantlab.stages.quantize import quantize_component
from quantlab.stages.select import QuantizationRequest, select_streamed
from quantlab.vocabulary.axes import QuantizationAxes
from quantlab.vocabulary.schema import ModelConfig
from tests.support.tables import held_packages, the_scheme
from tests.support.tiers import default_of
from tests.support.tiny_pipelines import BUILDERS

SCHEMES = [("bitsandbytes", "nf4"), ("torchao", "int8"), ("quanto", "int8"), ("gguf", "q8_0"), ("modelopt", "int8")]


@pytest.mark.parametrize(("backend", "dtype"), default_of(SCHEMES, ("bitsandbytes", "nf4"), ("gguf", "q8_0")))
def test_a_unet_with_its_convolutions(tmp_path, backend, dtype):
    from diffusers import UNet2DConditionModel

    folder = BUILDERS["sdxl"](tmp_path / "sdxl")
    whole = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.bfloat16).eval()
    whole.requires_grad_(False)
    part = read_architecture(ModelConfig(family="diffusers", path=str(folder))).parts["unet"]
    source = Source(module=empty("k", part, "bfloat16"), shards=shards_of("k", folder / "unet"), device="cpu")
    axes = QuantizationAxes(backend=backend, dtype=dtype, on_mismatch="skip", layer_kinds=("linear", "conv"))
    request = QuantizationRequest(component="unet", scheme=the_scheme(axes), compute_dtype="bfloat16", device="cpu")
    price = price_component("unet", source.module, request)
    resident, known = quantize_component(request, copy.deepcopy(whole), whole)
    module = copy.deepcopy(source.module)
    made, report = quantize_component(request, module, source.module, select_streamed(request, module), source=source)
    names = [row.name for row in known.layers if row.status in ("quantized", "fallback")]
    assert any(len(row.shape) != 2 or row.kind != "linear" for row in known.layers)
    assert price.memory == component_memory(resident, names, whole, held_packages())
    assert report == known
    assert state_digest(made.state_dict()) == state_digest(resident.state_dict())
