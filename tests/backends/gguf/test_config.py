"""The GGUF config as a value."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.backends import gguf as backend
from quantlab.backends.gguf import GGUFQuantizationConfig
from quantlab.errors import ConfigError
from quantlab.vocabulary.axes import QuantizationAxes
from tests.support.tables import CAPABILITIES

ROWS = CAPABILITIES["gguf"]


def config_of(dtype, **more):
    return GGUFQuantizationConfig.from_axes(QuantizationAxes(backend="gguf", dtype=dtype, **more))


@settings(deadline=None, max_examples=60)
@given(
    st.builds(
        GGUFQuantizationConfig,
        compute_dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
        modules_to_not_convert=st.none() | st.lists(st.text(min_size=1), max_size=3),
        gguf_type=st.none() | st.sampled_from(list(ROWS)),
    )
)
def test_round_trips(config):
    assert GGUFQuantizationConfig.from_dict(config.to_dict()) == config
    assert GGUFQuantizationConfig.from_dict(config.to_diff_dict()) == config
    assert hash(GGUFQuantizationConfig.from_dict(config.to_dict())) == hash(config)
    resolved = backend.resolve(config, "cpu")
    assert resolved.gguf_type == config.dtype
    if config.modules_to_not_convert:
        resolved.update(modules_to_not_convert=list(dict.fromkeys(config.modules_to_not_convert)))
    elif config.modules_to_not_convert is not None:
        resolved.update(modules_to_not_convert=None)
    assert GGUFQuantizationConfig.from_axes(resolved.axes()) == resolved


def test_diffusers_config_is_read():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.GGUFQuantizationConfig(compute_dtype=torch.bfloat16).to_dict()
    config = GGUFQuantizationConfig.from_dict(theirs)
    assert config == GGUFQuantizationConfig(compute_dtype="bfloat16")
    assert config.to_dict() == {"quant_method": "gguf", "compute_dtype": "bfloat16", "modules_to_not_convert": None}


def test_defaults_and_coercions():
    assert GGUFQuantizationConfig().compute_dtype == "float32"
    assert GGUFQuantizationConfig(compute_dtype=None).compute_dtype == "float32"
    assert GGUFQuantizationConfig(compute_dtype=torch.float16).compute_dtype == "float16"
    assert GGUFQuantizationConfig().dtype == "q8_0"
    assert GGUFQuantizationConfig(gguf_type="Q4_K").gguf_type == "q4_k"
    assert config_of("auto").gguf_type == "q8_0"
    own = config_of("q4_k", modules_to_not_convert={"a": ["x"], "b": ["y", "x"]})
    assert own.modules_to_not_convert == ("x", "y")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GGUFQuantizationConfig(compute_dtype="int8"), "compute_dtype='int8': .* accepts float32"),
        (lambda: GGUFQuantizationConfig(gguf_type="q4_m"), "gguf_type='q4_m': .* did you mean"),
        (lambda: GGUFQuantizationConfig(gguf_typ="q4_k"), "did you mean gguf_type"),
        (lambda: GGUFQuantizationConfig(modules_to_not_convert="a"), "modules_to_not_convert='a'"),
        (lambda: GGUFQuantizationConfig.from_dict({"pre_quantized": False}), "pre_quantized=False"),
        (
            lambda: GGUFQuantizationConfig.from_axes(config_of("q4_k").axes(), {"imatrix": True}),
            "quantization.imatrix: gguf has no",
        ),
        (lambda: config_of("nf4"), "dtype=nf4: gguf offers"),
        (lambda: config_of("q4_k", group_size=16), "group_size=16"),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ConfigError, match=message):
        build()
