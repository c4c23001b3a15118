"""Bytes against closed formulas for dense and quantized models, and the peak of a stage against what was allocated."""

from __future__ import annotations

import math
import sys
import time

import psutil
import pytest
import torch
from torch import nn

from quantlab.backends import quanto
from quantlab.modules import memory
from quantlab.modules.memory import logical_size, measure_stage
from tests.support.tables import component_memory, layer_memory, storages

N, K = 64, 512
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MB = 2**20


def total(obj: object) -> int:
    return sum(storages(obj).values())


def linear(dtype: torch.dtype, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(K, N, bias=bias), nn.LayerNorm(N)).to(dtype).eval()


class TestDense:
    def test_parameters_and_buffers(self):
        model = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5))
        # weight, bias; weight, bias, running mean, running variance; a counter of 8 bytes
        assert total(model) == 4 * (35 + 5 + 4 * 5) + 8
        assert logical_size(model) == (35 + 5 + 10, 35 + 5 + 20, 8)

    def test_tied_weights_count_once(self):
        model = nn.ModuleDict({"embed": nn.Embedding(11, 8), "head": nn.Linear(8, 11, bias=False)})
        model["head"].weight = model["embed"].weight
        assert total(model) == 4 * 88
        assert logical_size(model) == (88, 88, 0)
        model["head"].weight = nn.Parameter(model["embed"].weight.data)  # another object, the same storage
        assert total(model) == 4 * 88
        assert logical_size(model) == (88, 88, 0)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_what_a_part_keeps_beside_its_parameters_counts_on_both_sides(self, dtype):
        model = linear(DTYPES[dtype])
        model[0].turned = model[0].weight.t()  # a view: no bytes of its own
        model[0].cache = {"cos": torch.ones(3, 50, dtype=DTYPES[dtype]), "steps": [torch.arange(4)]}
        model[0].cache["part"] = model[0].cache["cos"][:1]
        report = component_memory(model, (), model)
        parameters, values, index_bytes = logical_size(model)
        assert (parameters, values, index_bytes) == (N * K + 3 * N, N * K + 3 * N + 150, 32)
        assert report.bits_per_weight == {"fp32": 32, "bf16": 16}[dtype]

    @pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
    def test_a_weight_that_is_computed_of_others_is_as_wide_as_they_are(self, norm):
        model = nn.Sequential(getattr(nn.utils, norm)(nn.Linear(8, 8)))
        assert component_memory(model, (), model).bits_per_weight == 32

    def test_a_complex_number_is_two(self):
        model = nn.Sequential(nn.Linear(8, 8))
        model.spectrum = nn.Parameter(torch.ones(4, 4, dtype=torch.complex64))
        model.register_buffer("phases", torch.ones(4, dtype=torch.complex64))
        assert logical_size(model) == (72 + 16, 72 + 32 + 8, 0)
        assert component_memory(model, (), model).bits_per_weight == 32

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_masks_and_positions_are_of_no_weight(self, dtype):
        model = linear(DTYPES[dtype])
        without = component_memory(model, (), model)
        model.register_buffer("mask", torch.ones(1, 1, 64, 64, dtype=torch.bool), persistent=False)
        model.register_buffer("positions", torch.arange(100).expand(3, 100))
        model.register_buffer("same_mask", model.mask[:, :, :32])
        report = component_memory(model, (), model)
        assert report.index_bytes == 64 * 64 + 800
        assert report.weights_bytes == without.weights_bytes + report.index_bytes
        assert report.bits_per_weight == without.bits_per_weight == {"fp32": 32, "bf16": 16}[dtype]
        assert report.bytes_at_16_bit == without.bytes_at_16_bit + report.index_bytes

    def test_an_expanded_buffer_is_as_small_as_its_storage_and_a_view_as_large(self):
        model = nn.Module()
        model.register_buffer("expanded", torch.zeros(1, 8).expand(1000, 8))
        assert total(model) == 32
        assert logical_size(model) == (0, 8000, 0)
        model.register_buffer("view", torch.zeros(100, 8)[:1])
        assert total(model) == 32 + 3200

    def test_meta_tensors_count_from_their_shape_and_ties_once(self):
        with torch.device("meta"):
            model = nn.ModuleDict({"a": nn.Linear(7, 5), "b": nn.Linear(7, 5)})
        assert total(model) == 2 * 4 * 40
        model["b"].weight = model["a"].weight
        assert total(model) == 4 * (35 + 5 + 5)
        assert logical_size(model) == (45, 45, 0)

    def test_attributes_lists_and_cycles(self):
        model = nn.Linear(2, 2, bias=False)
        model.cache = {"k": [torch.zeros(3), (torch.zeros(5),)], "text": "abc"}
        model.cache["loop"] = model.cache
        model.weight.state = {"absmax": torch.zeros(7)}
        assert total(model) == 4 * (4 + 3 + 5 + 7)

    def test_an_attribute_that_is_a_module_is_not_entered(self):
        model, other = nn.Linear(2, 2, bias=False), nn.Linear(100, 100)
        object.__setattr__(model, "friend", other)
        model.friends = {"friend": other}
        assert total(model) == 16

    def test_layer_memory_leaves_the_bias_out(self):
        assert layer_memory(nn.Linear(7, 5)) == (4 * 35, 0)


@pytest.mark.parametrize("dtype", DTYPES)
class TestQuantized:
    """Formulas: n weights, o rows, scales of s bytes (4 or 2)."""

    @pytest.mark.parametrize("weights", ["int8", "float8", "float8_e5m2", "int4", "int2"])
    @pytest.mark.parametrize("k", [512, 160, 96])
    def test_quanto(self, dtype, weights, k):
        model = nn.Sequential(nn.Linear(k, N)).to(DTYPES[dtype])
        quanto.quantize(model, ["0"], quanto.QuantoConfig(weights_dtype=weights))
        s, group = DTYPES[dtype].itemsize, {512: 128, 160: 32, 96: 96}[k]
        bits = {"int4": 4, "int2": 2}.get(weights, 8)
        per_scale = 2 * s if bits < 8 else s  # scale and shift
        num_scales = N * k // group if bits < 8 else N
        assert layer_memory(model[0]) == (N * k * bits // 8, num_scales * per_scale + 2 * s)  # input and output scale

    @pytest.mark.parametrize("double", [False, True])
    def test_bitsandbytes_nf4(self, dtype, double):
        bnb = pytest.importorskip("bitsandbytes")
        model = linear(DTYPES[dtype])
        layer = bnb.nn.Linear4bit(K, N, True, quant_type="nf4", device="meta")
        layer.weight = bnb.nn.Params4bit(
            model[0].weight.data, requires_grad=False, compress_statistics=double, quant_type="nf4", module=layer
        )
        layer.bias = model[0].bias
        layer.to("cpu")
        blocks = math.ceil(N * K / 64)
        absmax = 4 * blocks if not double else blocks + 4 * math.ceil(blocks / 256) + 4 * 256 + 4
        assert layer_memory(layer) == (N * K // 2, absmax + 4 * 16)

    def test_bitsandbytes_int8_before_and_after_a_forward(self, dtype):
        bnb = pytest.importorskip("bitsandbytes")
        layer = bnb.nn.Linear8bitLt(K, N, False, has_fp16_weights=False, device="meta")
        layer.weight = bnb.nn.Int8Params(
            linear(DTYPES[dtype])[0].weight.data, requires_grad=False, has_fp16_weights=False
        )
        layer.to("cpu").eval()
        assert layer_memory(layer) == (N * K, 4 * N)
        with torch.no_grad():
            layer(torch.randn(2, K, dtype=DTYPES[dtype]))
        assert layer_memory(layer) == (N * K, 4 * N)

    def test_torchao_int8(self, dtype):
        ao = pytest.importorskip("torchao.quantization")
        model = linear(DTYPES[dtype])
        ao.quantize_(model, ao.Int8WeightOnlyConfig(set_inductor_config=False))
        codes, scales = layer_memory(model[0])
        assert codes == N * K
        assert scales == 5 * N  # a row: a scale, float32 whatever the model's dtype, and an int8 zero point

    def test_the_ledger_adds_up(self, dtype):
        original = linear(DTYPES[dtype])
        model = linear(DTYPES[dtype])
        quanto.quantize(model, ["0"], quanto.QuantoConfig(weights_dtype="int4"))
        report = component_memory(model, ["0"], original)
        s = DTYPES[dtype].itemsize
        assert report.quantized_bytes == N * K // 2
        assert report.scale_bytes == (2 * N * K // 128 + 2) * s
        assert report.other_bytes == 3 * N * s  # bias and the norm
        assert report.weights_bytes == report.quantized_bytes + report.scale_bytes + report.other_bytes
        assert report.num_parameters == N * K + 3 * N
        assert report.bytes_at_16_bit == 2 * report.num_parameters
        dense = component_memory(original, [], original)
        assert dense.weights_bytes == dense.other_bytes == s * dense.num_parameters
        assert dense.bits_per_weight == 8 * s


def allocate(num_bytes: int) -> torch.Tensor:
    return torch.ones(num_bytes, dtype=torch.uint8)


class TestStage:
    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak can be reset on Linux only")
    def test_the_peak_is_that_of_the_block(self):
        allocate(600 * MB)  # an earlier, higher peak must not be seen
        before = psutil.Process().memory_info().rss
        with measure_stage("quantize") as stage:
            allocate(300 * MB)
        assert stage.report.peak_rss_bytes - before == pytest.approx(300 * MB, rel=0.1)

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux says which pages are of no file")
    def test_the_pages_of_files_are_no_anonymous_memory(self, tmp_path):
        (tmp_path / "weights").write_bytes(bytes(200 * MB))
        before = memory._anonymous()
        with measure_stage("quantize") as stage:
            mapped = torch.from_file(str(tmp_path / "weights"), size=200 * MB, dtype=torch.uint8)
            assert int(mapped.max()) == 0
            kept = allocate(100 * MB)
            time.sleep(0.1)
            del kept, mapped
        assert stage.report.peak_anon_bytes - before == pytest.approx(100 * MB, rel=0.15)
        assert stage.report.peak_rss_bytes - before > 250 * MB

    def test_sampling_takes_over(self, monkeypatch, tmp_path):
        monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "absent" / "clear_refs")
        before = psutil.Process().memory_info().rss
        with measure_stage("quantize") as stage:
            kept = allocate(300 * MB)
            time.sleep(0.1)
            del kept
        assert stage.report.peak_rss_bytes - before == pytest.approx(300 * MB, rel=0.1)

    def test_what_cannot_be_measured_is_none(self, monkeypatch, tmp_path):
        monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "absent" / "clear_refs")
        monkeypatch.setitem(sys.modules, "psutil", None)
        with measure_stage("load") as stage:
            time.sleep(0.02)
        report = stage.report
        assert (report.name, report.peak_rss_bytes) == ("load", None)
        assert (report.peak_alloc_bytes, report.peak_requested_bytes, report.peak_reserved_bytes) == (None, None, None)
        assert 0.02 <= report.seconds < 1

    def test_a_failing_block_is_measured_too(self):
        with pytest.raises(KeyError), measure_stage("evaluate") as stage:
            raise KeyError
        assert stage.report.seconds >= 0
        assert stage.report.name == "evaluate"

    @pytest.mark.gpu
    def test_cuda_peaks(self):
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        before = torch.cuda.memory_allocated()
        with measure_stage("evaluate", "cuda") as stage:
            torch.ones(100 * MB, dtype=torch.uint8, device="cuda")
        assert stage.report.peak_requested_bytes - before == pytest.approx(100 * MB, rel=0.01)
        assert stage.report.peak_reserved_bytes >= stage.report.peak_alloc_bytes >= 100 * MB
