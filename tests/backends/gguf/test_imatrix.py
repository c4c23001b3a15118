"""The importance matrix: what is measured, what it is worth for each type, and llama.cpp's files of it."""

from __future__ import annotations

import copy
import struct

import numpy as np
import pytest
import torch
from torch import nn

from quantlab.backends import gguf as backend
from quantlab.backends.gguf import GGUFQuantizationConfig, InputSquares, read_imatrix, write_imatrix
from quantlab.errors import ConfigError
from quantlab.modules.feed import feed_of_batches
from quantlab.vocabulary.axes import QuantizationAxes
from tests.support.tables import CAPABILITIES

gguf = pytest.importorskip("gguf")
libgguf = pytest.importorskip("libgguf")

ROWS = CAPABILITIES["gguf"]
TAKING = [d for d, row in ROWS.items() if "imatrix" in row.algorithms]
GAIN = {
    "q6_k": 1.8,
    "q5_k": 1.8,
    "q5_1": 2.5,
    "q5_0": 1.6,
    "q4_1": 2.5,
    "q4_0": 1.6,
    "q4_k": 2,
    "iq4_nl": 1.8,
    "iq4_xs": 1.8,
    "q3_k": 1.6,
    "q2_k": 2.2,
}
"""Least factor by which an importance matrix lowers the output's error where 8 of 512 channels are 30 times larger."""


def outliers(num=256, k=512, seed=1):
    rng = torch.Generator().manual_seed(seed)
    scale = torch.ones(k)
    scale[torch.randperm(k, generator=torch.Generator().manual_seed(7))[:8]] = 30
    return torch.randn(num, k, generator=rng) * scale


def net(k=512, hidden=256, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(k, hidden), nn.GELU(), nn.Linear(hidden, 16)).to(dtype).eval()


def config_of(dtype="q4_k", **settings):
    return GGUFQuantizationConfig.from_axes(
        QuantizationAxes(backend="gguf", dtype=dtype, algorithm="imatrix"), settings
    )


def calibrated(model, config, batches, layers=("0",)):
    feed = feed_of_batches(batches)
    return backend.calibrate(model, layers, config, "float32", feed), feed


def error(made, model, x):
    with torch.no_grad():
        got, want = made(x), model(x)
    return float((got - want).norm() / want.norm())


# -- what it measures


def test_it_is_the_mean_of_the_squared_inputs():
    model, batches = net(), [outliers(64).reshape(4, 16, 512), outliers(9, seed=2)]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found, _ = calibrated(model, config_of(), batches, ("0", "2"))
    rows = torch.cat([b.reshape(-1, 512) for b in batches])
    with torch.no_grad():
        hidden = model[1](model[0](rows))
    for name, inputs in (("0", rows), ("2", hidden)):
        want = inputs.double().square().mean(0).float().numpy()
        assert found[name].sums.dtype == np.float32
        assert found[name].counts.tolist() == [73]
        np.testing.assert_allclose(found[name].mean()[0], want, rtol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model[0]._forward_pre_hooks, "the observers are gone"


def test_many_small_batches_lose_no_precision():
    model = net(32, 32)
    found, _ = calibrated(model, config_of("q4_0"), [torch.full((1, 32), 1e-4), *[torch.full((500, 32), 3.0)] * 20])
    assert float(found["0"].sums[0, 0]) == pytest.approx(90000, rel=1e-7)
    one = feed_of_batches([torch.full((1, 32), 0.1)])
    many = type(one)(calls=one.calls * 3000, num_samples=3000, batch_size=1)
    found = backend.calibrate(model, ["0"], config_of("q4_0"), "float32", many)
    assert float(found["0"].sums[0, 0]) == pytest.approx(3000 * float(np.float32(0.1) ** 2), rel=1e-6)


def test_a_large_batch_is_squared_in_parts():
    """Found on a GPU: the copies of one sample in 16 bits took several times its room."""
    model, batches = net(), [outliers(64).reshape(4, 16, 512).bfloat16().float()]
    copied = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            if func._overloadpacket is torch.ops.aten.pow:
                copied.append(found.numel())
            return found

    whole, _ = calibrated(model, config_of(), batches, ("0", "2"))
    with pytest.MonkeyPatch.context() as patch, Watch():
        patch.setattr("quantlab.backends.gguf.imatrix._NUMBERS_AT_ONCE", 5 * 512)
        parts, _ = calibrated(model, config_of(), batches, ("0", "2"))
    assert copied
    assert max(copied) <= 5 * 512
    for name in ("0", "2"):
        np.testing.assert_allclose(parts[name].sums, whole[name].sums, rtol=1e-6)
        assert parts[name].counts.tolist() == whole[name].counts.tolist()


def test_half_precision_inputs_do_not_overflow():
    model = net(32, 32, torch.float16)
    found, _ = calibrated(model, config_of("q4_0"), [torch.full((4, 32), 6e4, dtype=torch.float16)])
    assert found["0"].mean().max() == pytest.approx(6e4**2, rel=1e-2)


def test_a_layer_that_never_ran_is_named():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(ConfigError, match=r"^calibration: idle never ran .* exclude it with modules_to_not_convert"):
        calibrated(Half(), config_of("q4_0"), [torch.randn(2, 32)], ["used", "idle"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e20])
def test_the_first_layer_with_bad_inputs_is_named(value):
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last, self.middle = (nn.Linear(32, 32) for _ in range(3))

        def forward(self, x):
            return self.last(self.middle(self.first(x) + value))

    model = Breaks()
    with pytest.raises(ConfigError, match="^calibration: middle got NaN, infinities, or values too large"):
        calibrated(model, config_of("q4_0"), [torch.randn(2, 32)], ["first", "last", "middle"])
    assert not any(m._forward_pre_hooks for m in model.modules())


# -- what it does


@pytest.mark.parametrize("dtype", TAKING)
def test_the_error_on_outliers_falls(dtype):
    model, config = net(), config_of(dtype)
    assert config.needs_data
    statistics, _ = calibrated(model, config, [outliers()])
    with_matrix, without = copy.deepcopy(model), copy.deepcopy(model)
    backend.quantize(with_matrix, ["0"], config, "float32", statistics)
    backend.quantize(without, ["0"], config.without_data(), "float32")
    x = outliers(seed=3)
    gain = error(without[0], model[0], x) / error(with_matrix[0], model[0], x)
    assert GAIN[dtype] < gain < 6
    assert backend.read_back(with_matrix[0]).dtype == dtype
    plain = libgguf.quantize_rows(
        model[0].weight.detach().numpy(), libgguf.GGMLQuantizationType[dtype.upper()], statistics["0"].mean()[0]
    )
    assert np.array_equal(with_matrix[0].qweight.numpy(), plain), "the bytes are ggml's for this vector"


@pytest.mark.parametrize("dtype", ROWS)
def test_the_table_says_which_types_take_one(dtype):
    weight = np.random.default_rng(0).standard_normal((8, 512)).astype(np.float32)
    importance = np.random.default_rng(1).uniform(0.01, 100, 512).astype(np.float32)
    kind = libgguf.GGMLQuantizationType[dtype.upper()]
    same = np.array_equal(libgguf.quantize_rows(weight, kind), libgguf.quantize_rows(weight, kind, importance))
    assert same == (dtype not in TAKING)


@pytest.mark.parametrize("scale", [1e-15, 1e18])
@pytest.mark.parametrize("dtype", TAKING)
def test_dead_channels_and_extreme_inputs_keep_the_weights(dtype, scale):
    """ggml alone would store zeros for a block of channels without importance, NaN for sums beyond float32."""
    model = net()
    batch = torch.randn(64, 512, generator=torch.Generator().manual_seed(2)) * scale
    batch[:, :256] = 0
    statistics, _ = calibrated(model, config_of(dtype), [batch])
    made = copy.deepcopy(model)
    backend.quantize(made, ["0"], config_of(dtype), "float32", statistics)
    dense, weight = backend.read_back(made[0]).dense, model[0].weight.detach()
    for half in (slice(0, 256), slice(256, 512)):
        assert float((dense - weight)[:, half].norm() / weight[:, half].norm()) < (0.4 if dtype == "q2_k" else 0.2)


def test_types_that_take_none_are_left_alone_among_others():
    model = net()
    config = config_of("q4_k", tensor_types={"2": "q8_0"})
    statistics, _ = calibrated(model, config, [outliers()], ["0", "2"])
    assert set(statistics) == {"0"}
    made = copy.deepcopy(model)
    backend.quantize(made, ["0", "2"], config, "float32", statistics)
    assert [made[i].gguf_type for i in (0, 2)] == ["q4_k", "q8_0"]


# -- the files


def statistics_of(**entries):
    return {
        name: InputSquares(sums=np.asarray(sums, np.float32)[None], counts=np.array([count], np.float32))
        for name, (sums, count) in entries.items()
    }


def legacy(entries, trailer=b""):
    data = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values))
        data += np.asarray(values, "<f4").tobytes()
    return data + trailer


def test_the_file_is_llama_cpps_and_reads_back(tmp_path):
    model, config = net(), config_of()
    found, feed = calibrated(model, config, [outliers(64), outliers(64, seed=2)], ("0", "2"))
    path = backend.write_calibration(found, tmp_path / "run", feed)
    assert path == tmp_path / "run" / "imatrix.gguf"

    reader = gguf.GGUFReader(path)
    fields = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert fields == {
        "general.type": "imatrix",
        "imatrix.datasets": [f"sha256:{feed.sha256}"],
        "imatrix.chunk_count": 2,
        "imatrix.chunk_size": 64,
    }
    tensors = {t.name: t for t in reader.tensors}
    assert list(tensors) == ["0.weight.in_sum2", "0.weight.counts", "2.weight.in_sum2", "2.weight.counts"]
    assert {t.tensor_type for t in tensors.values()} == {gguf.GGMLQuantizationType.F32}
    assert tensors["0.weight.in_sum2"].shape.tolist() == [512, 1]
    assert tensors["2.weight.counts"].shape.tolist() == [1, 1]
    assert tensors["2.weight.counts"].data.item() == 128

    theirs, again = libgguf.load_imatrix(path), read_imatrix(path)
    assert set(theirs) == {"0.weight", "2.weight"}
    for name, squares in found.items():
        assert np.array_equal(again[name].sums, squares.sums)
        assert np.array_equal(again[name].counts, squares.counts)
        assert np.array_equal(theirs[f"{name}.weight"], squares.mean()[0])


def test_a_file_takes_the_place_of_data(tmp_path):
    model, config = net(), config_of()
    found, feed = calibrated(model, config, [outliers()], ("0", "2"))
    from_file = config_of(imatrix_file=str(backend.write_calibration(found, tmp_path, feed)))
    assert not from_file.needs_data
    assert from_file.without_data() == config.without_data()
    measured, read = copy.deepcopy(model), copy.deepcopy(model)
    backend.quantize(measured, ["0", "2"], config, "float32", found)
    backend.quantize(read, ["0", "2"], from_file, "float32")
    assert all(torch.equal(measured[i].qweight, read[i].qweight) for i in (0, 2))


def test_a_language_models_is_under_llama_cpps_names_and_a_file_of_its_tools_is_read(tmp_path):
    from torch import nn

    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList([nn.Module(), nn.Module()])
    for layer in model.model.layers:
        layer.mlp = nn.Module()
        layer.mlp.down_proj = nn.Linear(256, 8)
    names = [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    found = statistics_of(**{name: (np.arange(1, 257) * (i + 1), 4) for i, name in enumerate(names)})
    path = backend.write_calibration(found, tmp_path, feed_of_batches([torch.zeros(1, 256)]))
    assert set(read_imatrix(path)) == {"blk.0.ffn_down", "blk.1.ffn_down"}
    measured, read, own = (copy.deepcopy(model) for _ in range(3))
    backend.quantize(measured, names, config_of(), "float32", found)
    backend.quantize(read, names[:1], config_of(imatrix_file=str(path)), "float32")
    backend.quantize(read, names[1:], config_of(imatrix_file=str(path)), "float32")
    backend.quantize(own, names, config_of(imatrix_file=str(write_imatrix(tmp_path / "own.gguf", found))), "float32")
    for name in names:
        wanted = measured.get_submodule(name).qweight
        assert torch.equal(read.get_submodule(name).qweight, wanted)
        assert torch.equal(own.get_submodule(name).qweight, wanted)


def test_the_older_binary_form_is_read(tmp_path):
    path = tmp_path / "imatrix.dat"
    values = np.random.default_rng(0).uniform(0, 9, 512).astype(np.float32)
    for trailer in (b"", struct.pack("<ii", 12, 8) + b"wiki.txt"):
        path.write_bytes(legacy({"0.weight": (12, values), "output.weight": (0, values[:3])}, trailer))
        found, theirs = read_imatrix(path), libgguf.load_imatrix(path)
        assert set(found) == {"0", "output"}
        assert np.array_equal(found["0"].mean()[0], theirs["0.weight"])
        assert np.array_equal(found["output"].mean()[0], values[:3])
    made = net()
    backend.quantize(made, ["0"], config_of(imatrix_file=str(path)), "float32")
    assert backend.read_back(made[0]).dtype == "q4_k"


def test_experts_are_read_and_never_taken_for_a_layer(tmp_path):
    squares = InputSquares(sums=np.arange(8, dtype=np.float32).reshape(2, 4), counts=np.array([2, 0], np.float32))
    write_imatrix(tmp_path / "i.gguf", {"0": squares})
    found = read_imatrix(tmp_path / "i.gguf")["0"]
    assert found.mean().tolist() == [[0, 0.5, 1, 1.5], [1, 1, 1, 1]]
    assert np.array_equal(found.mean().ravel(), libgguf.load_imatrix(tmp_path / "i.gguf")["0.weight"])
    with pytest.raises(ConfigError, match=r"imatrix_file=.*0\.weight has 8 values in 2 matrices.* 512 inputs; give"):
        backend.quantize(net(), ["0"], config_of(imatrix_file=str(tmp_path / "i.gguf")), "float32")


def test_unusable_files_are_refused(tmp_path):
    good = tmp_path / "good.gguf"
    write_imatrix(good, statistics_of(**{"0": (np.ones(512), 4), "2": (np.ones(256), 4)}))
    whole, old = good.read_bytes(), legacy({"0.weight": (1, np.ones(512))})
    damaged = [
        b"",
        b"GGUF",
        whole[:60],
        whole[:-100],
        b"no importance matrix",
        old[:-4],
        old[:30],
        struct.pack("<i", 0),
        struct.pack("<i", -1),
        legacy({"0.weight": (1, [float("nan")])}),
        legacy({"0.weight": (1, [-1.0])}),
        legacy({"0.weight": (-1, [1.0])}),
        legacy({"0.weight": (1, [])}),
        struct.pack("<ii", 1, 2**31 - 1),
    ]
    for data in damaged:
        (tmp_path / "bad").write_bytes(data)
        with pytest.raises(
            ConfigError,
            match=r"^quantization\.imatrix_file=.*bad: (not a readable|holds no|0\.weight "
            r"holds values that are neg).*; (record|give)",
        ):
            read_imatrix(tmp_path / "bad")
    model = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    model.add_tensor("a.weight", np.zeros(4, np.float32))
    for part in (model.write_header_to_file, model.write_kv_data_to_file, model.write_tensors_to_file, model.close):
        part()
    with pytest.raises(ConfigError, match=r"imatrix_file=.*holds no weight's importance; give a file"):
        read_imatrix(tmp_path / "model.gguf")
    for absent in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match=r"^quantization\.imatrix_file=.*: there is no such file; leave"):
            read_imatrix(absent)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"1": (np.ones(512), 4)}, r"holds no 0\.weight \(it holds 1\.weight\); give one recorded on this model"),
        ({"0": (np.ones(256), 4)}, r"0\.weight has 256 values in 1 matrices, and the layer has 512 inputs"),
        ({"0": (np.ones(512), 0)}, r"0\.weight was never used when it was recorded; give"),
    ],
)
def test_a_file_of_another_model_is_refused(entries, message, tmp_path):
    path = write_imatrix(tmp_path / "i.gguf", statistics_of(**entries))
    with pytest.raises(ConfigError, match=rf"^quantization\.imatrix_file=.*{message}"):
        backend.quantize(net(), ["0"], config_of(imatrix_file=str(path)), "float32")


# -- the config


def test_without_data_it_is_refused_with_the_ways_out():
    with pytest.raises(
        ConfigError, match=r"^algorithm=imatrix: .*quantization\.imatrix_file, or leave algorithm at max$"
    ):
        backend.quantize(net(), ["0"], config_of(), "float32")
    with pytest.raises(ConfigError, match="^calibration: 0 never ran"):
        backend.quantize(net(), ["0"], config_of(), "float32", {})


def test_the_type_that_ignores_it_is_refused_by_name():
    with pytest.raises(ConfigError, match="^algorithm=imatrix: gguf q8_0 offers auto, max"):
        config_of("q8_0")
    for kind in ("q8_0", None):
        with pytest.raises(
            ConfigError, match="^algorithm=imatrix: ggml writes q8_0 without .* choose q5_0, q5_1.*max$"
        ):
            GGUFQuantizationConfig(gguf_type=kind, algorithm="imatrix")
    with pytest.raises(ConfigError, match="^imatrix_file=a: only algorithm=imatrix reads it; set"):
        GGUFQuantizationConfig(gguf_type="q4_k", imatrix_file="a")


@pytest.mark.parametrize("file", [None, "some/imatrix.gguf"])
def test_the_config_round_trips(file):
    config = config_of("q5_k", imatrix_file=file, tensor_types={"a": "q8_0"})
    assert GGUFQuantizationConfig.from_dict(config.to_dict()) == config
    assert GGUFQuantizationConfig.from_dict(config.to_diff_dict()) == config
    assert backend.resolve(config, "cpu") == config
    assert config.axes().algorithm == "imatrix"
    own = {"imatrix_file": config.imatrix_file, "tensor_types": config.tensor_types}
    assert GGUFQuantizationConfig.from_axes(config.axes(), own) == config
    plain = config.without_data()
    assert (plain.algorithm, plain.imatrix_file, plain.gguf_type) == ("max", None, "q5_k")
    assert plain.tensor_types == config.tensor_types
    assert not plain.needs_data
    assert plain.without_data() is None


def test_diffusers_needs_not_know(tmp_path):
    pytest.importorskip("diffusers")
    with pytest.raises(ConfigError) as caught:
        config_of("q4_k").to_diffusers()
    assert str(caught.value).startswith("gguf_type='q4_k': Diffusers only loads GGUF files")
    assert "imatrix" not in str(caught.value)
