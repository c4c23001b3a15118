"""The five schemes that are compared, as Diffusers and transformers spell them, and as quantlab does."""

WORDS = {
    "bitsandbytes nf4": {"backend": "bitsandbytes", "dtype": "nf4"},
    "bitsandbytes nf4 double": {"backend": "bitsandbytes", "dtype": "nf4", "bnb_4bit_use_double_quant": True},
    "bitsandbytes fp4": {"backend": "bitsandbytes", "dtype": "fp4"},
    "torchao int8": {"backend": "torchao", "dtype": "int8"},
    "quanto int8": {"backend": "quanto", "dtype": "int8"},
}


def config(library, scheme):
    """What ``from_pretrained`` of ``library`` (diffusers or transformers) is given."""
    import torch

    backend, dtype, *double = scheme.split()
    if backend == "bitsandbytes":
        return library.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=dtype,
            bnb_4bit_use_double_quant=bool(double),
            bnb_4bit_compute_dtype=torch.float32,
        )
    if backend == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return library.TorchAoConfig(Int8WeightOnlyConfig(version=2))
    return library.QuantoConfig(**{"weights_dtype" if library.__name__ == "diffusers" else "weights": dtype})


def load(model_class, library, folder, scheme):
    """The model in float32 on the CPU, quantized unless ``scheme`` is none."""
    import torch

    more = {} if scheme == "none" else {"quantization_config": config(library, scheme), "device_map": "cpu"}
    return model_class.from_pretrained(folder, torch_dtype=torch.float32, **more).eval()
