"""The ten acceptance checks of the configuration layer; ``ACCEPTANCE`` says where each of them is."""

import copy

import pytest
import torch

import quantlab
from quantlab import ConfigError, GGUFQuantizationConfig, NVIDIAModelOptConfig, QuantoConfig, TorchAoConfig
from quantlab.modules.layers import linear_layers
from quantlab.vocabulary.axes import QuantizationAxes
from tests.support.configs import config_of, second_of
from tests.support.nets import inputs, net, run
from tests.support.tables import BACKENDS, native_config

ACCEPTANCE = {
    1: "test_config.py::test_json_and_back, contract/test_config_values.py::test_unknown_keys_name_the_nearest_field",
    2: "test_02_every_historical_shorthand_resolves_or_names_its_replacement",
    3: "contract/test_exclusion_rules.py::test_one_matcher_on_every_backend, ::test_every_backend_leaves_the_...",
    4: "test_faults.py::test_b17_..., test_config.py::test_assignment_is_refused",
    5: "test_05_quantize_save_reload_is_bit_identical",
    6: "test_faults.py::test_b24_...",
    7: "test_07_what_this_machine_cannot_run_is_refused_in_one_sentence",
    8: "test_interop.py::test_there_and_back, contract/test_stored_configs.py",
    9: "test_09_what_needs_data_is_calibrated_or_refused, test_calibration.py",
    10: "test_faults.py::test_b26_..., test_10_configs_hold_data_only",
}


def test_02_every_historical_shorthand_resolves_or_names_its_replacement():
    from quantlab.backends.torchao.quantize import build_ao_config
    from quantlab.backends.torchao.shorthands import _get_torchao_quant_type_to_method

    table = _get_torchao_quant_type_to_method()
    assert len(table) == 51
    for name in table:
        try:
            config = TorchAoConfig(name)
        except ConfigError as error:
            assert any(word in str(error) for word in ("dtype=", "float8dq", "float8wo_e4m3")), error  # noqa: PT017
            continue
        assert type(build_ao_config(config)).__name__ == config.quant_type["_type"]
    assert build_ao_config(TorchAoConfig("float8wo")).weight_dtype is torch.float8_e5m2
    assert build_ao_config(TorchAoConfig("float8_weight_only")).weight_dtype is torch.float8_e4m3fn


SCHEMES = [
    ("torchao int8wo", TorchAoConfig("int8wo")),
    ("torchao int8dq", TorchAoConfig("int8dq")),
    ("torchao float8wo", TorchAoConfig("float8wo")),
    ("torchao int4dq", TorchAoConfig("int4dq")),
    *[(f"quanto {w}", QuantoConfig(w)) for w in ("float8", "int8", "int4", "int2")],
    *[(f"gguf {t}", GGUFQuantizationConfig(gguf_type=t)) for t in ("q8_0", "q4_0", "q4_k")],
    ("bitsandbytes nf4", config_of("bitsandbytes")),
    ("modelopt int4", second_of("modelopt")),
]


@pytest.mark.parametrize("config", [c for _, c in SCHEMES], ids=[n for n, _ in SCHEMES])
def test_05_quantize_save_reload_is_bit_identical(config, tmp_path):
    backend = BACKENDS[config.quant_method.value]
    original = net(256, 256, 64)
    module, report = quantlab.quantize(original, config)
    assert {r.status for r in report.layers} == {"quantized"}
    first = run(module, inputs())
    backend.save(module, tmp_path)
    fresh = copy.deepcopy(original)
    backend.load(fresh, list(linear_layers(original)), backend.resolve(config, "cpu", "float32"), tmp_path)
    assert torch.equal(run(fresh, inputs()), first)
    for name in ("0", "1"):
        stored, loaded = (backend.read_back(m.get_submodule(name)) for m in (module, fresh))
        assert torch.equal(stored.dense, loaded.dense)


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        (TorchAoConfig("int4wo", int4_packing_format="tile_packed_to_4d"), (256, 64), "needs CUDA and bfloat16"),
        (TorchAoConfig("float8dq"), (256, 64), "torchao needs CUDA with compute capability 8.9"),
        (NVIDIAModelOptConfig("NVFP4"), (256, 64), "modelopt runs it on cuda only"),
        (NVIDIAModelOptConfig("MXFP4"), (256, 64), "modelopt runs it on cuda only"),
    ],
)
def test_07_what_this_machine_cannot_run_is_refused_in_one_sentence(config, shape, message):
    with pytest.raises(ConfigError, match=message):
        quantlab.quantize(net(*shape), config)


@pytest.mark.parametrize("config", [config_of("bitsandbytes"), QuantoConfig("int8")], ids=["nf4", "quanto int8"])
def test_07_shapes_that_crash_the_libraries_work(config):
    """bitsandbytes' 4 bits want multiples of 64 and 32 on this CPU; quanto's int8 in bfloat16 reads out of bounds."""
    original = net(100, 36).bfloat16()
    module, _ = quantlab.quantize(original, config)
    out, reference = (run(m, inputs(100, torch.bfloat16)).float() for m in (module, original))
    assert float((out - reference).norm() / reference.norm()) < 0.2


NEED_DATA = {
    "torchao": {"dtype": "int8", "algorithm": "smoothquant"},
    "quanto": {"dtype": "int8", "activation_dtype": "int8"},
    "gguf": {"dtype": "q4_0", "algorithm": "imatrix"},
    "modelopt": {"dtype": "int4", "algorithm": "awq_lite"},
}


@pytest.mark.parametrize("backend", NEED_DATA)
def test_09_what_needs_data_is_calibrated_or_refused(backend):
    """Never quantized in silence with scales of 1, or by another algorithm."""
    axes = QuantizationAxes(backend=backend, **NEED_DATA[backend])
    config, original, data = native_config(axes), net(64, 64), torch.randn(8, 64)
    assert config.needs_data
    with pytest.raises(ConfigError, match=r"^calibration: .* needs data; pass calibration="):
        quantlab.quantize(original, config)
    with pytest.raises(ConfigError):
        BACKENDS[backend].quantize(net(64, 64), ["0"], config, "float32")
    module, report = quantlab.quantize(original, config, calibration=[data])
    assert {r.status for r in report.layers} == {"quantized"}
    out, reference = run(module, data), run(original, data)
    assert 0 < float((out - reference).norm() / reference.norm()) < 0.2


@pytest.mark.parametrize("value", [torch.zeros(1), print, object()])
def test_10_configs_hold_data_only(value):
    with pytest.raises(ConfigError):
        NVIDIAModelOptConfig("INT8", modelopt_config={"quant_cfg": [{"quantizer_name": "*", "cfg": {"axis": value}}]})
    with pytest.raises(ConfigError):
        TorchAoConfig({"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {"granularity": value}})
