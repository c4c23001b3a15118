"""A checkpoint that ModelOpt itself restores: ``modelopt_state.pth`` beside what ``save_pretrained`` wrote.

The library restores whole models: it converts every module that it knows, and then gives each quantizer its settings.
Here single layers were converted. So an outline of the model is converted as the library does it, without values and
with every quantizer off, the measured layers are put into it, and what the library asks of its quantizers is the state.

The library's other form, ``export_hf_checkpoint``, is for vLLM, SGLang and TensorRT-LLM: neither Diffusers nor
transformers has a loader for it, so that nothing would give back what was measured, and it is not written.
"""

from __future__ import annotations

import copy
import glob
import importlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from quantlab.backends.modelopt.config import NVIDIAModelOptConfig
from quantlab.backends.modelopt.library import layers_at, quiet_library, shape_of
from quantlab.backends.modelopt.quantize import packed_class
from quantlab.backends.modelopt.quantizers import build_quant_cfg
from quantlab.backends.modelopt.restore import FOR_DIFFUSERS, STATE
from quantlab.backends.part import Beside, Part
from quantlab.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from quantlab.backends.modelopt.library_types import QuantLinear

ENABLE = "modelopt.torch.opt:enable_huggingface_checkpointing"
"""After this call ``from_pretrained`` of either library restores a model that has a state beside it."""
_QUANTIZATION = "modelopt.torch.quantization"


def beside(part: Part) -> Beside:
    """The state of a measured component, for :func:`enable_huggingface_checkpointing` of the library.

    Raises ConfigError for what the library does not restore as it was measured.
    """
    part.require_own_compute_dtype()
    config = cast(NVIDIAModelOptConfig, part.config)
    if config.algorithm == "svdquant":
        raise ConfigError(
            "algorithm=svdquant: packed layers that ModelOpt restores have no low-rank branch beside their weight; "
            "choose algorithm=awq_full, or keep to quantlab"
        )
    is_packed = any(packed_class(layer) for layer in layers_at(part.module, part.quantized).values())
    if part.library != "diffusers" or not is_packed:
        return Beside(write=partial(_write, part, config), before=ENABLE, arguments={})
    if getattr(part.original, "_keep_in_fp32_modules", None) is not None:
        raise ConfigError(
            f"backend=modelopt: Diffusers keeps parts of a {type(part.original).__name__} in float32 and so loads it "
            "with low_cpu_mem_usage alone, by which no packed weight of ModelOpt is loaded; set "
            "quantization.compress=false, which keeps weights at their full bytes, or choose another backend"
        )
    return Beside(write=partial(_write, part, config), before=ENABLE, arguments=FOR_DIFFUSERS)


def _write(part: Part, config: NVIDIAModelOptConfig, folder: Path) -> None:
    import torch

    with quiet_library():
        torch.save(_state(part, config), folder / STATE)


def _state(part: Part, config: NVIDIAModelOptConfig) -> dict[str, Any]:
    """What ``modelopt.torch.opt.modelopt_state`` would say of the component, had it been converted whole."""
    opt = importlib.import_module("modelopt.torch.opt")
    conversion = importlib.import_module(f"{_QUANTIZATION}.conversion")
    measured = layers_at(part.module, part.quantized)
    outline = _outline(part.original)
    shapes = {name: shape_of(cast("nn.Linear", part.original.get_submodule(name))) for name in measured}
    told = {**build_quant_cfg(config, shapes), "algorithm": "max"}
    opt.apply_mode(outline, [("quantize", told)])
    for name, layer in measured.items():
        owner, _, own = name.rpartition(".")
        outline.get_submodule(owner)._modules[own] = layer
    modes = opt.ModeloptStateManager(outline).state_dict()
    quantizers = conversion.quantizer_state(outline)
    modes[0][1]["metadata"]["quantizer_state"] = {name: _before_packing(state) for name, state in quantizers.items()}
    if packed := [name for name, layer in measured.items() if packed_class(layer)]:
        modes.append(("real_quantize", _packing(outline, measured, packed)))
    return {"modelopt_state_dict": modes, "modelopt_version": importlib.import_module("modelopt").__version__}


def _outline(module: nn.Module) -> nn.Module:
    """A copy with each tensor on the meta device."""
    import torch

    tensors = [*module.parameters(), *module.buffers()]
    empty = {id(t): torch.empty_like(t, device="meta") for t in tensors}
    for tensor in module.parameters():
        empty[id(tensor)] = torch.nn.Parameter(empty[id(tensor)], requires_grad=False)
    return copy.deepcopy(module, empty)


def _before_packing(state: Mapping[str, Any]) -> dict[str, Any]:
    """What a packed weight's quantizer says once it is inserted, when the weight is dense."""
    if not state.get("_dequantize"):
        return dict(state)
    metadata = state["_pytorch_state_metadata"]
    buffers = {name: shape for name, shape in metadata["buffers"].items() if name != "_scale"}
    return {
        **state,
        "_dequantize": False,
        "_fake_quant": True,
        "_pytorch_state_metadata": {**metadata, "buffers": buffers},
    }


def _packing(outline: nn.Module, measured: Mapping[str, QuantLinear], packed: list[str]) -> dict[str, Any]:
    """The second mode: which weights are packed, in what, and what their quantizers then say."""
    compress = importlib.import_module(f"{_QUANTIZATION}.compress")
    made = importlib.import_module(f"{_QUANTIZATION}.config").CompressConfig
    on_cpu = measured[packed[0]].weight.device.type == "cpu"
    chosen = {"default": False, **{f"{glob.escape(name)}.weight_quantizer": True for name in packed}}
    config = made(compress=chosen, quant_gemm=not on_cpu)
    metadata: dict[str, Any] = {}
    compress.update_compress_metadata(outline, config, metadata)
    return {"config": config.model_dump(), "metadata": metadata}
