"""Quantized checkpoints as their libraries make them, without quantlab: ``python -m tests.support.foreign FOLDER``.

In a process of its own, as ModelOpt's way of saving changes how every model of a process is saved. The folder gets the
models (``llama``, ``flux``) and beside them the checkpoints.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

LANGUAGE = ("bnb_nf4", "bnb_int8", "torchao_int8", "modelopt_int8", "q8_0.gguf")
"""Checkpoints of ``llama``."""
TRANSFORMERS = ("flux_torchao", "flux_quanto", "flux_modelopt")
"""Of the transformer of ``flux``."""


def make_all(folder: Path) -> None:
    """Make every checkpoint, in another process."""
    command = [sys.executable, "-m", "tests.support.foreign", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]


def _language(folder: Path) -> None:
    import modelopt.torch.opt as mto
    import modelopt.torch.quantization as mtq
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
    mto.enable_huggingface_checkpointing()
    mtq.quantize(plain, mtq.INT8_WEIGHT_ONLY_CFG, None).save_pretrained(folder / "modelopt_int8")


def _transformers(folder: Path) -> None:
    import modelopt.torch.quantization as mtq
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
    plain = FluxTransformer2DModel.from_pretrained(base)
    mtq.quantize(plain, mtq.INT8_WEIGHT_ONLY_CFG, None).save_pretrained(folder / "flux_modelopt")


if __name__ == "__main__":
    _language(Path(sys.argv[1]))
    _transformers(Path(sys.argv[1]))
