"""What the libraries themselves leave out of a tiny Flux and a tiny Llama, and the two models."""

import copy

import torch
from torch import nn

from quantlab.backends.scheme import scheme_of_config
from quantlab.stages.select import QuantizationRequest
from tests.support.configs import config_of

TABLE = {  # entry -> Linear layers that it excludes from the tiny Flux under each backend's rule in Diffusers
    "proj_out": (2, 2, 2, 2, 2),
    "norm_out.linear": (1, 1, 0, 0, 1),
    "transformer_blocks.0.attn.to_q": (1, 2, 0, 0, 2),
    "transformer_blocks.0": (20, 20, 0, 0, 20),
    "attn": (11, 11, 0, 11, 11),
    "to_out.0": (0, 1, 0, 0, 1),
    "out": (2, 5, 0, 0, 5),
    "0": (20, 20, 1, 20, 20),
    "k": (0, 2, 0, 0, 20),
    "*.to_q": (0, 0, 0, 0, 2),
    "proj_out.weight": (0, 1, 0, 0, 2),
    "ff.net": (2, 2, 0, 0, 2),
    "re:.*to_q": (0, 0, 0, 0, 0),
    "does_not_exist": (0, 0, 0, 0, 0),
    "TO_Q": (0, 0, 0, 0, 0),
    "add_": (0, 0, 0, 0, 4),
    "": (25, 28, 0, 0, 28),
}


def tiny_flux():
    import diffusers

    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=False,
    ).eval()


def tiny_llama(tie=False):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=tie,
        )
    ).eval()


def paths_of(model):
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]


def excluded_by_diffusers(method, model, entries):
    """The Linear layers that the installed Diffusers' own code leaves alone."""
    import diffusers

    before = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    model = copy.deepcopy(model)
    if method == "bitsandbytes":
        from diffusers.quantizers.bitsandbytes.utils import _replace_with_bnb_linear

        _replace_with_bnb_linear(model, entries, quantization_config=diffusers.BitsAndBytesConfig(load_in_8bit=True))
        import bitsandbytes as bnb

        return {n for n in before if not isinstance(model.get_submodule(n), bnb.nn.Linear8bitLt)}
    if method == "torchao":
        from diffusers.quantizers.torchao.torchao_quantizer import TorchAoHfQuantizer

        quantizer = TorchAoHfQuantizer.__new__(TorchAoHfQuantizer)
        quantizer.modules_to_not_convert, quantizer.offload = entries, False
        return {n for n in before if not quantizer.check_if_quantized_param(model, None, f"{n}.weight", {})}
    if method == "quanto":
        from diffusers.quantizers.quanto.utils import _replace_with_quanto_layers
        from optimum.quanto import QLinear

        _replace_with_quanto_layers(model, config_of("quanto").to_diffusers(), entries)
        return {n for n in before if not isinstance(model.get_submodule(n), QLinear)}
    if method == "gguf":
        from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter, _replace_with_gguf_linear

        state = {f"{n}.weight": GGUFParameter(torch.zeros(1, 34, dtype=torch.uint8), quant_type=8) for n in before}
        _replace_with_gguf_linear(model, torch.float32, state, modules_to_not_convert=entries)
        return {n for n in before if not isinstance(model.get_submodule(n), GGUFLinear)}
    from diffusers.quantizers.modelopt.modelopt_quantizer import NVIDIAModelOptQuantizer

    config = config_of("modelopt").to_diffusers()
    config.modules_to_not_convert = list(entries)
    quantizer = NVIDIAModelOptQuantizer.__new__(NVIDIAModelOptQuantizer)
    quantizer.quantization_config, quantizer.pre_quantized = config, False
    quantizer._process_model_before_weight_loading(model, None)
    return {n for n in before if not model.get_submodule(n).weight_quantizer.is_enabled}


def request(config, module, **axes):
    scheme = scheme_of_config(config, **axes)
    return QuantizationRequest(component="model", scheme=scheme, compute_dtype="float32", device="cpu")
