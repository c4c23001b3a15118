"""Quantized checkpoints as their libraries make them, without quantlab: of a tiny Llama and a tiny Flux.

Those of ModelOpt are made in a process of their own (``python -m tests.support.foreign BASE FOLDER``), as its way of
saving changes how every model of a process is saved.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

LANGUAGE = ("bnb_nf4", "bnb_int8", "torchao_int8", "modelopt_int8", "q8_0.gguf")
"""Checkpoints of ``llama``."""
TRANSFORMERS = ("flux_torchao", "flux_quanto", "flux_modelopt")
"""Of the transformer of ``flux``."""


def make_here(folder: Path) -> None:
    """The models ``llama`` and ``flux``, and beside them the checkpoints but for those of ModelOpt."""
    _language(folder)
    _transformers(folder)


def make_apart(base: Path, folder: Path) -> None:
    """ModelOpt's checkpoints of the models in ``base``, in a process that imports for ten seconds."""
    command = [sys.executable, "-m", "tests.support.foreign", str(base), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]


def _language(folder: Path) -> None:
    import torch
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TorchAoConfig

    from tests.support.llama_cpp import save_gguf
    from tests.support.tiny_text_models import save_llama

    base = save_llama(folder / "llama", adds_bos=True, hidden_size=64, intermediate_size=128)
    configs = {
        "bnb_nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "bnb_int8": BitsAndBytesConfig(load_in_8bit=True),
        "torchao_int8": TorchAoConfig(Int8WeightOnlyConfig()),
    }
    for name, config in configs.items():
        made = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
        made.save_pretrained(folder / name)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    save_gguf(plain, AutoTokenizer.from_pretrained(base), folder / "q8_0.gguf", add_bos=True, kind="Q8_0")


def _transformers(folder: Path) -> None:
    import torch
    from diffusers import FluxTransformer2DModel, QuantoConfig, TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    from tests.support.tiny_pipelines import build_tiny_flux

    base = build_tiny_flux(folder / "flux") / "transformer"
    for name, config in {
        "flux_torchao": TorchAoConfig(Int8WeightOnlyConfig()),
        "flux_quanto": QuantoConfig(weights_dtype="int8"),
    }.items():
        made = FluxTransformer2DModel.from_pretrained(base, quantization_config=config, dtype=torch.float32)
        made.save_pretrained(folder / name)


def _modelopt(base: Path, folder: Path) -> None:
    import modelopt.torch.opt as mto
    import modelopt.torch.quantization as mtq
    import torch
    from diffusers import FluxTransformer2DModel
    from transformers import AutoModelForCausalLM

    mto.enable_huggingface_checkpointing()
    llama = AutoModelForCausalLM.from_pretrained(base / "llama", dtype=torch.float32)
    flux = FluxTransformer2DModel.from_pretrained(base / "flux" / "transformer")
    for name, plain in (("modelopt_int8", llama), ("flux_modelopt", flux)):
        mtq.quantize(plain, mtq.INT8_WEIGHT_ONLY_CFG, None).save_pretrained(folder / name)


if __name__ == "__main__":
    _modelopt(*map(Path, sys.argv[1:]))
