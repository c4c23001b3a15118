"""The capability table is true in both directions: what it promises works, what it refuses is refused by quantlab."""

import json
import subprocess
import sys

import pytest
import torch

import quantlab
from quantlab.backends.scheme import Format
from quantlab.backends.table import offers
from quantlab.errors import ConfigError, MissingPackage
from quantlab.planning.listing import combinations
from quantlab.stages.select import check_device
from quantlab.vocabulary.axes import QuantizationAxes, resolve_axes
from quantlab.vocabulary.dtypes import DTYPES
from tests.contract.test_backends import ON_CPU, ROWS, net, quantized, run, sample
from tests.support.tables import BACKENDS, CAPABILITIES, native_config

REFUSED = [(b, d) for b in CAPABILITIES for d in DTYPES if d not in CAPABILITIES[b]]
IDS = [f"{b}-{d}" for b, d, _ in ON_CPU]


def test_every_dtype_of_every_backend_has_a_row():
    rows = combinations()
    assert {(r["backend"], r["dtype"]) for r in rows} == {(b, d) for b in CAPABILITIES for d in DTYPES}
    assert len(rows) == len(CAPABILITIES) * len(DTYPES)
    for row in rows:
        assert row["offered"] == (row["dtype"] in CAPABILITIES[row["backend"]])
        assert row["offered"] == (row["reason"] == "") == (row["layer_kinds"] is not None)
    assert json.loads(json.dumps(rows))


def test_the_command_prints_the_same_rows():
    done = subprocess.run(
        [sys.executable, "-m", "quantlab", "list", "combinations", "--json"], capture_output=True, text=True
    )
    printed = json.loads(done.stdout)
    assert [(r["backend"], r["dtype"], r["offered"], r["reason"]) for r in printed] == [
        (r["backend"], r["dtype"], r["offered"], r["reason"]) for r in combinations()
    ]


@pytest.mark.parametrize(("backend", "dtype"), REFUSED, ids=[f"{b}-{d}" for b, d in REFUSED])
def test_what_is_refused_says_why_and_who_has_it(backend, dtype):
    with pytest.raises(ConfigError) as caught:
        native_config(QuantizationAxes(backend=backend, dtype=dtype))
    message = str(caught.value)
    assert message.startswith(f"dtype={dtype}: {backend} offers ")
    assert offers()[backend].refusal(dtype)
    assert offers()[backend].refusal(dtype) in message
    others = [b for b, rows in CAPABILITIES.items() if dtype in rows]
    assert all(b in message.partition(" is offered by ")[2] for b in others)


def test_refusals_come_before_torch_and_before_the_library():
    code = f"""
import sys
from quantlab.vocabulary.axes import QuantizationAxes
from quantlab.backends.scheme import scheme_of
from quantlab.errors import ConfigError
for backend, dtype in {REFUSED!r}:
    try:
        scheme_of(QuantizationAxes(backend=backend, dtype=dtype))
    except ConfigError:
        continue
    raise SystemExit(f"{{backend}} {{dtype}} was accepted")
assert not {{"torch", "torchao", "bitsandbytes", "optimum", "gguf", "modelopt"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_unknown_dtype_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"^dtype=int44: quanto offers .*; did you mean int4\?"):
        native_config(QuantizationAxes(backend="quanto", dtype="int44"))


@pytest.mark.parametrize(("backend", "dtype", "row"), ROWS, ids=[f"{b}-{d}" for b, d, _ in ROWS])
def test_values_outside_the_row_are_refused(backend, dtype, row):
    wrong = {"group_size": 48, "activation_dtype": "int5", "algorithm": "best", "compute_dtype": "float64"}
    for key, value in wrong.items():
        with pytest.raises(ConfigError, match=rf"^{key}={value}: {backend} (chooses its own|{dtype} offers )"):
            resolve_axes(QuantizationAxes(backend=backend, dtype=dtype, **{key: value}), offers())
    for compute_dtype in {"float32", "bfloat16", "float16"} - set(row.compute_dtypes):
        axes = resolve_axes(QuantizationAxes(backend=backend, dtype=dtype), offers())
        with pytest.raises(ConfigError, match=rf"{backend} computes it in .* only; .* in {compute_dtype}: "):
            check_device(Format(axes=axes, row=row), row.devices[0], compute_dtype)


@pytest.mark.parametrize(("backend", "dtype", "row"), ON_CPU, ids=IDS)
def test_trainable_means_that_gradients_reach_the_input(backend, dtype, row):
    original, module, _, compute = quantized(backend, dtype)
    x = sample(compute).requires_grad_(True)

    def gradient(model):
        out = model(x)
        out = out.dequantize() if hasattr(out, "qtype") else out
        return torch.autograd.grad(out.float().square().mean(), x)[0].float().flatten()

    if not row.is_trainable:
        with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
            gradient(module)
        return
    cosine = torch.nn.functional.cosine_similarity(gradient(module), gradient(original), dim=0)
    assert float(cosine) > (0.8 if "2" in dtype.removeprefix("float8_e5m") else 0.95)


@pytest.mark.parametrize(
    ("backend", "dtype", "row"), [r for r in ROWS if r[2].packages], ids=[f"{b}-{d}" for b, d, r in ROWS if r.packages]
)
def test_an_extra_package_that_is_missing_is_named(backend, dtype, row, monkeypatch):
    real = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda n, *a: None if n in row.packages else real(n, *a))
    with pytest.raises(MissingPackage, match=rf"^backend={backend}: the package {row.packages[0]} is not installed"):
        native_config(QuantizationAxes(backend=backend, dtype=dtype))


@pytest.mark.parametrize(("backend", "dtype", "row"), [r for r in ROWS if r[2].min_compute_capability])
def test_an_older_device_is_refused(backend, dtype, row, monkeypatch):
    axes = resolve_axes(QuantizationAxes(backend=backend, dtype=dtype), offers())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    need = ".".join(map(str, row.min_compute_capability))
    with pytest.raises(ConfigError, match=f"needs CUDA compute capability {need}; this device has 7.5"):
        check_device(Format(axes=axes, row=row), "cuda", row.compute_dtypes[0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: row.min_compute_capability)
    check_device(Format(axes=axes, row=row), "cuda", row.compute_dtypes[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("backend", "dtype", "row"), [r for r in ROWS if "cuda" in r[2].devices])
def test_promises_on_a_gpu(backend, dtype, row):
    if row.min_compute_capability and torch.cuda.get_device_capability() < row.min_compute_capability:
        pytest.skip("an older device")
    original = net(row.compute_dtypes[-1]).cuda()
    module, report = quantlab.quantize(original, native_config(QuantizationAxes(backend=backend, dtype=dtype)))
    assert {r.dtype for r in report.layers} == {dtype}
    assert torch.isfinite(run(module, sample(row.compute_dtypes[-1]).cuda())).all()


def test_gguf_types_by_pattern():
    """``tensor_types`` gives layers another format than the others; each is read back as what it was given."""
    config = quantlab.GGUFQuantizationConfig(gguf_type="q4_0", tensor_types={"head": "Q8_0", "re:blocks\\.2": "q6_k"})
    module, report = quantlab.quantize(net(), config)
    assert {r.name: r.dtype for r in report.layers} == {"blocks.0": "q4_0", "blocks.2": "q6_k", "head": "q8_0"}
    assert torch.isfinite(run(module, sample())).all()
    with pytest.raises(ConfigError, match="^tensor_types=haed: matches none of the 3 layers.*near are head"):
        quantlab.quantize(net(), quantlab.GGUFQuantizationConfig(tensor_types={"haed": "q8_0"}))
    axes = QuantizationAxes(backend="gguf", dtype="q4_0")
    assert BACKENDS["gguf"].Config.from_axes(axes, {"tensor_types": {"head": "q8_0"}}).tensor_types == {"head": "q8_0"}
    job = quantlab.compose(["backend=gguf", "dtype=q4_0", "quantization.tensor_types={head: q8_0}"]).jobs[0]
    assert job.schemes[""].native.tensor_types == {"head": "q8_0"}
