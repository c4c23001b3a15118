"""A config or two of each backend."""

from quantlab import BitsAndBytesConfig, GGUFQuantizationConfig, NVIDIAModelOptConfig, QuantoConfig, TorchAoConfig
from quantlab.backends.table import BACKENDS

ONE_OF_EACH = [
    BitsAndBytesConfig(load_in_4bit=True),
    TorchAoConfig("int8wo"),
    QuantoConfig(),
    GGUFQuantizationConfig(),
    NVIDIAModelOptConfig("INT8", channel_quantize=0),
]


METHODS = ("bitsandbytes", "torchao", "quanto", "gguf", "modelopt")


def config_of(method, names=None, **more):
    made = {
        "bitsandbytes": {"load_in_8bit": True},
        "torchao": {"quant_type": "int8wo"},
        "quanto": {"weights_dtype": "int8"},
        "gguf": {},
        "modelopt": {"quant_type": "INT8", "channel_quantize": 0},
    }[method]
    return BACKENDS[method].Config(**made, modules_to_not_convert=names, **more)


SECOND = {
    "bitsandbytes": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "quanto": QuantoConfig("int4"),
    "torchao": TorchAoConfig("int4dq"),
    "gguf": GGUFQuantizationConfig(gguf_type="q4_0"),
    "modelopt": NVIDIAModelOptConfig("INT4", channel_quantize=-1, block_quantize=32),
}
"""Another config of each backend than ``config_of`` gives."""
