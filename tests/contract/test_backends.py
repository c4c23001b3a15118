"""What every backend promises for every row of the capability table, on a CPU. New rows are tested without new code."""

import copy
import re
import sys

import pytest
import torch
from torch import nn

from quantlab.backends.table import backends
from quantlab.errors import ConfigError, MissingPackage, NotQuantized
from quantlab.modules.feed import feed_of_batches
from quantlab.stages.calibrate import calibrate_component
from quantlab.stages.quantize import quantize_component
from quantlab.stages.select import QuantizationRequest, select_layers
from quantlab.vocabulary.axes import QuantizationAxes
from tests.support.configs import dtypes_on_cpu
from tests.support.tables import BACKENDS, CAPABILITIES, native_config, storages, the_scheme
from tests.support.tiers import covering

ROWS = [(b, d, row) for b, rows in CAPABILITIES.items() if b != "none" for d, row in rows.items()]
ON_CPU = [(b, d, row) for b, d, row in ROWS if "cpu" in row.devices]
GROUPS = [(b, d, g) for b, d, row in ON_CPU for g in row.group_sizes if g == "none" or int(g) <= 512]
LARGEST_ERROR = {8: 0.06, 6: 0.05, 5: 0.09, 4: 0.25, 3: 0.35, 2: 0.75}
NAMES = ["blocks.0", "blocks.2", "head"]


class Net(nn.Module):
    """Two blocks and a head; rows of 512 fit every block size of the table."""

    def __init__(self, dtype):
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 512, bias=False))
        self.norm = nn.LayerNorm(512)
        self.head = nn.Linear(512, 64)
        self.to(dtype)

    def forward(self, x):
        return self.head(self.norm(x + self.blocks(x)))


def net(dtype="float32"):
    torch.manual_seed(0)
    return Net(getattr(torch, dtype)).eval().requires_grad_(False)


def sample(dtype="float32"):
    torch.manual_seed(1)
    return torch.randn(4, 7, 512).to(getattr(torch, dtype))


def quantized(backend, dtype, group_size="auto", compute_dtype=None, settings=None, **kwargs):
    compute = compute_dtype or CAPABILITIES[backend][dtype].compute_dtypes[0]
    axes = QuantizationAxes(backend=backend, dtype=dtype, group_size=group_size, **kwargs)
    scheme = the_scheme(axes, settings)
    native = scheme.native
    request = QuantizationRequest(component="model", scheme=scheme, compute_dtype=compute, device="cpu")
    original = net(compute)
    if axes.algorithm != "auto":  # normal weights have a few large ones, which algorithms are for; uniform have none
        for layer in (m for m in original.modules() if isinstance(m, nn.Linear)):
            nn.init.normal_(layer.weight, std=0.04)
    module = copy.deepcopy(original)
    selection = select_layers(request, module)
    calibrated = None
    if native.needs_data:
        num = 60 if axes.algorithm == "gptq" else 4  # whose Hessian needs more tokens than channels
        feed = feed_of_batches([outliers(compute, seed, num) for seed in (2, 3)], dtype=compute)
        calibrated = calibrate_component(request, module, selection, feed)
    module, report = quantize_component(request, module, original, selection, calibrated)
    return original, module, report, compute


def outliers(dtype, seed, num=4):
    """Inputs with a few channels that are thirty times as large as the others."""
    x = torch.randn(num, 7, 512, generator=torch.Generator().manual_seed(seed))
    x[..., ::64] *= 30
    return x.to(getattr(torch, dtype))


def ways(backend, dtype, algorithm):
    """Activations and their scales with which the backend takes the algorithm for the dtype, simplest first."""
    row, found = CAPABILITIES[backend][dtype], []
    for activation_dtype in row.activation_dtypes:
        for settings in ({}, {"activation_scales": "static"}):
            axes = QuantizationAxes(
                backend=backend, dtype=dtype, algorithm=algorithm, activation_dtype=activation_dtype
            )
            try:
                native_config(axes, settings)
            except ConfigError:
                continue
            found.append((activation_dtype, settings))
    return found


def payload_bits(dtype):
    """The number in a dtype's name: 4 for ``nvfp4``, ``q4_k`` and ``int4``."""
    return int(next(c for c in dtype.removeprefix("float").removeprefix("mxfp").removeprefix("nvfp") if c.isdigit()))


def run(module, x):
    with torch.no_grad():
        out = module(x)
    return out.dequantize() if hasattr(out, "qtype") else out


@pytest.mark.parametrize(("backend", "dtype", "row"), ON_CPU, ids=[f"{b}-{d}" for b, d, _ in ON_CPU])
def test_promise(backend, dtype, row, tmp_path):
    """Shape, read-back = request, bounded error, real bytes, nothing changed by a forward, save -> load bit-equal."""
    original, module, report, compute = quantized(backend, dtype)
    x = sample(compute)
    out, reference = run(module, x), run(original, x)
    assert out.shape == reference.shape
    assert torch.isfinite(out).all()
    rows = report.layers
    assert [r.name for r in rows] == NAMES
    assert {r.status for r in rows} == {"quantized"}
    assert {r.dtype for r in rows} == {dtype}
    bits = payload_bits(dtype)
    for r in rows:
        assert 0 < r.weight_rel_error < LARGEST_ERROR[bits]
        assert r.activation_dtype == row.activation_dtypes[0]
        floor = 8 if r.is_simulated else bits
        assert floor <= r.bits_per_weight < floor + 2.2
        assert r.is_simulated == ("cpu" in row.is_simulated_on)
    assert report.coverage > 0.99
    error = float((out.float() - reference.float()).norm() / reference.float().norm())
    assert 0 < error < 2 * LARGEST_ERROR[bits]

    module.state_dict()
    assert torch.equal(run(module, x), out), "a forward changed what the next one computes"
    before = sum(storages(module).values())

    BACKENDS[backend].save(module, tmp_path)
    axes = QuantizationAxes(backend=backend, dtype=dtype)
    config = BACKENDS[backend].resolve(native_config(axes), "cpu")
    fresh = copy.deepcopy(original)
    loaded = BACKENDS[backend].load(fresh, NAMES, config, tmp_path) or fresh
    assert torch.equal(run(loaded, x), out)
    assert sum(storages(loaded).values()) == pytest.approx(before, rel=0.02)


@pytest.mark.parametrize(
    ("backend", "dtype", "group_size"),
    covering(GROUPS, lambda c: (c[0] + c[1], c[2])),
    ids=[f"{b}-{d}-{g}" for b, d, g in GROUPS],
)
def test_group_size_is_met_exactly(backend, dtype, group_size):
    _, _, report, _ = quantized(backend, dtype, group_size)
    wanted = (None, 512) if group_size in ("none", 512) else (group_size,)  # a row has 512: one group is one scale
    assert {r.group_size for r in report.layers} <= set(wanted)


@pytest.mark.parametrize(("backend", "dtype", "row"), ON_CPU, ids=[f"{b}-{d}" for b, d, _ in ON_CPU])
def test_bfloat16_models_too(backend, dtype, row):
    original, module, report, _ = quantized(backend, dtype, compute_dtype="bfloat16")
    out = run(module, sample("bfloat16"))
    assert out.dtype == torch.bfloat16
    assert torch.isfinite(out).all()
    assert report.coverage > 0.99


ACTIVATIONS = [(b, d, a) for b, d, row in ON_CPU for a in row.activation_dtypes[1:] if not a.startswith("float8")]


@pytest.mark.parametrize(("backend", "dtype", "activation_dtype"), ACTIVATIONS)
def test_activation_dtype_is_read_back(backend, dtype, activation_dtype):
    _, module, report, compute = quantized(backend, dtype, activation_dtype=activation_dtype)
    assert {r.activation_dtype for r in report.layers} == {activation_dtype}
    assert torch.isfinite(run(module, sample(compute))).all()


ALGORITHMS = [(b, d, a) for b, d, row in ON_CPU for a in row.algorithms[1:] if a not in row.cuda_algorithms]
STATIC = [(b, d, a, s) for b, d, row in ON_CPU for a, s in ways(b, d, row.algorithms[0]) if s]


@pytest.mark.parametrize(("backend", "dtype", "algorithm"), covering(ALGORITHMS, lambda c: (c[0] + c[2], c[1])))
def test_another_algorithm_gives_other_weights(backend, dtype, algorithm, tmp_path):
    """And all that it found survives a forward and a save -> load."""
    activation_dtype, settings = ways(backend, dtype, algorithm)[0]
    given = {"activation_dtype": activation_dtype, "settings": settings}
    original, module, report, compute = quantized(backend, dtype, algorithm=algorithm, **given)
    _, plain, _, _ = quantized(backend, dtype, algorithm=CAPABILITIES[backend][dtype].algorithms[0], **given)
    x = sample(compute)
    out = run(module, x)
    assert not torch.equal(out, run(plain, x))
    assert torch.equal(run(module, x), out), "a forward changed what the next one computes"
    assert {r.dtype for r in report.layers} == {dtype}
    check_loading(backend, original, module, tmp_path, dtype=dtype, algorithm=algorithm, **given)


@pytest.mark.parametrize(("backend", "dtype", "activation_dtype", "settings"), covering(STATIC))
def test_static_scales_are_kept(backend, dtype, activation_dtype, settings, tmp_path):
    given = {"dtype": dtype, "activation_dtype": activation_dtype, "settings": settings}
    original, module, report, _ = quantized(backend, **given)
    assert {r.activation_dtype for r in report.layers} == {activation_dtype}
    check_loading(backend, original, module, tmp_path, **given)


def check_loading(backend, original, module, folder, settings, **axes):
    """What ``save`` writes, ``load`` puts into a fresh copy, which gives the same outputs bit for bit."""
    x = sample(str(next(original.parameters()).dtype).removeprefix("torch."))
    BACKENDS[backend].save(module, folder)
    native = native_config(QuantizationAxes(backend=backend, **axes), settings)
    fresh = copy.deepcopy(original)
    loaded = BACKENDS[backend].load(fresh, NAMES, BACKENDS[backend].resolve(native, "cpu"), folder) or fresh
    assert torch.equal(run(loaded, x), run(module, x))


@pytest.mark.parametrize(("backend", "dtype", "row"), ON_CPU, ids=[f"{b}-{d}" for b, d, _ in ON_CPU])
def test_a_layer_that_does_not_fit_is_named(backend, dtype, row):
    if row.in_features_multiple == row.out_features_multiple == row.numel_multiple == 1:
        pytest.skip("takes every shape")
    compute = row.compute_dtypes[0]
    odd = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 40), nn.Linear(40, 512)).to(getattr(torch, compute))

    def quantize(on_mismatch):
        scheme = the_scheme(QuantizationAxes(backend=backend, dtype=dtype, on_mismatch=on_mismatch))
        request = QuantizationRequest(component="model", scheme=scheme, compute_dtype=compute, device="cpu")
        return quantize_component(request, copy.deepcopy(odd), odd)

    with pytest.raises(
        NotQuantized, match=r"dtype=\w+: [12] layers? of model cannot .*: .*2 \[512, 40\]|1 \[40, 512\]"
    ):
        quantize("error")
    module, report = quantize("skip")
    skipped = [r for r in report.layers if r.status == "skipped"]
    assert skipped
    assert all(r.reason and r.bits_per_weight is None for r in skipped)
    assert report.coverage < 0.99
    module, report = quantize("bfloat16")
    assert {r.status for r in report.layers} == {"quantized", "fallback"}
    assert torch.isfinite(run(module, sample(compute))).all()


GPU_ONLY = [(b, d) for b, d, row in ROWS if "cpu" not in row.devices]


@pytest.mark.parametrize(("backend", "dtype"), GPU_ONLY)
def test_what_needs_a_gpu_is_refused_on_a_cpu(backend, dtype):
    with pytest.raises(ConfigError, match=rf"^dtype={dtype}: {backend} runs it on cuda only"):
        quantized(backend, dtype)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_a_missing_library_is_named_with_its_extra(backend, monkeypatch):
    real = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda n, *a: None if n == backends()[backend].imports[0] else real(n, *a)
    )
    with pytest.raises(
        MissingPackage, match=rf"^backend={backend}: .* pip install '{re.escape(backends()[backend].install)}'"
    ):
        native_config(QuantizationAxes(backend=backend))


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_a_planted_fault_shows(backend):
    """Bytes that change after quantizing, codes or scales, are seen by the read-back of exactly that layer."""
    _, module, _, _ = quantized(backend, dtypes_on_cpu(backend)[0])
    read_back = BACKENDS[backend].read_back
    layer, other = module.get_submodule("blocks.2"), module.get_submodule("blocks.0")
    before, untouched = read_back(layer).dense.clone(), read_back(other).dense.clone()
    shown = []
    for held in tensors_of(layer):
        kept = held.clone()
        with torch.no_grad():
            held.copy_(held.roll(1))
        shown.append(not torch.equal(read_back(layer).dense, before))
        held.copy_(kept)
        assert torch.equal(read_back(layer).dense, before)
    assert shown[0], "the codes"
    assert len(shown) == 1 or any(shown[1:]), "the scales, where they are tensors of their own"
    assert torch.equal(read_back(other).dense, untouched)


def tensors_of(layer):
    """The plain tensors that a layer holds anywhere, the largest first, its bias not among them."""
    found, seen = [], set()

    def walk(value, depth=0):
        if id(value) in seen or depth > 8 or isinstance(value, (str, int, float, type, nn.Module)):
            return
        seen.add(id(value))
        if isinstance(value, torch.Tensor) and not hasattr(value, "__tensor_flatten__"):
            found.append(value.data)
        elif isinstance(value, torch.Tensor):
            for name in value.__tensor_flatten__()[0]:
                walk(getattr(value, name), depth + 1)
        elif isinstance(value, dict):
            for inner in value.values():
                walk(inner, depth + 1)
        for inner in getattr(value, "__dict__", {}).values():
            walk(inner, depth + 1)

    for part in layer.modules():
        for value in vars(part).values():
            walk(value)
    bias = {layer.bias.data_ptr()} if layer.bias is not None else set()
    own = {t.data_ptr(): t for t in found if t.numel() > 1 and t.data_ptr() not in bias}
    return sorted(own.values(), key=lambda t: -t.numel() * t.element_size())


def test_backends_share_one_process():
    """Importing all five leaves each one's results as they were (quanto overrides two global operators)."""
    first = run(quantized("torchao", "int8")[1], sample())
    for backend in BACKENDS:
        quantized(backend, next(iter(CAPABILITIES[backend])))
    assert torch.equal(run(quantized("torchao", "int8")[1], sample()), first)
    assert "torchvision" not in sys.modules
