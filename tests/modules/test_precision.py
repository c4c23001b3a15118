"""torch's switches are set for everyone alike, put back, and part of what a reference is known by."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import quantlab
from quantlab.modules.precision import exact_arithmetic, own_modes, precision
from quantlab.tracking import find_runs
from quantlab.tracking.provenance import arithmetic
from tests.support.shell import digits_words
from tests.support.tiers import default_of


@pytest.fixture
def loose():
    """A user's own switches: fast and not exact."""
    before = precision()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    yield precision()
    torch.set_float32_matmul_precision(before["float32_matmul_precision"])
    torch.backends.cuda.matmul.allow_tf32 = before["matmul_allow_tf32"]
    torch.backends.cudnn.allow_tf32 = before["cudnn_allow_tf32"]
    torch.backends.cudnn.benchmark = before["cudnn_benchmark"]


def test_float32_is_float32_while_it_counts_and_the_user_s_switches_come_back(loose):
    with contextlib.suppress(RuntimeError), exact_arithmetic():
        inside = precision()
        raise RuntimeError("stop")
    assert not inside["matmul_allow_tf32"]
    assert not inside["cudnn_allow_tf32"]
    assert inside["cudnn_deterministic"]
    assert not inside["cudnn_benchmark"]
    assert precision() == loose
    with exact_arithmetic(deterministic=False):
        assert precision()["cudnn_benchmark"]
        assert not precision()["cudnn_allow_tf32"]


class Looking(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(32, 32), []

    def forward(self, x):
        SEEN.append(precision())
        return self.layer(x)


SEEN: list = []


def test_python_s_evaluation_runs_so_and_puts_back(loose):
    SEEN.clear()
    quantlab.evaluate(torch.nn.Sequential(Looking()), [quantlab.QuantoConfig("int8")], [torch.randn(8, 32)])
    assert len(SEEN) >= 3, "reference, floor and candidate"
    assert all(not s["cudnn_allow_tf32"] and s["cudnn_deterministic"] for s in SEEN)
    assert precision() == loose


def test_a_command_runs_so(shell, loose, monkeypatch):
    from quantlab.protocols.table import PROTOCOLS

    seen, real = [], PROTOCOLS["diffusion"].measure

    def measure(*args, **more):
        seen.append(precision())
        return real(*args, **more)

    monkeypatch.setattr(PROTOCOLS["diffusion"], "measure", measure)
    shell.rows(*digits_words("backend=quanto", "dtype=int8", "evaluation.num_samples=10"))
    assert len(seen) == 4
    assert not any(s["cudnn_allow_tf32"] for s in seen)
    assert precision() == loose


class Card:
    def __init__(self, name, major=9):
        self.name, self.major, self.minor, self.total_memory = name, major, 0, 2**36


def test_what_is_visible_is_no_part_of_the_arithmetic(monkeypatch):
    """A sweep's process sees four cards, a worker of its pool one: both compute the same."""
    cards = [Card("H100"), Card("H100"), Card("A100", 8)]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: cards[torch.device(device).index or 0])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    seen = arithmetic("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert arithmetic("cuda") == seen == arithmetic("cuda:1")
    assert arithmetic("cuda:2") != seen
    with exact_arithmetic():
        exact = arithmetic("cuda")
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    assert arithmetic("cuda") != seen
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    assert exact != seen, "the switches are part of it"


def test_what_makes_cublas_take_tf32_is_part_of_the_arithmetic(monkeypatch):
    """NVIDIA's own variable outweighs torch's switches."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card("H100"))
    seen = arithmetic("cuda")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    assert arithmetic("cuda") != seen


def kernels():
    backends = torch.backends
    return [
        backends.mkldnn.enabled,
        backends.cuda.flash_sdp_enabled(),
        backends.cuda.mem_efficient_sdp_enabled(),
        backends.cuda.math_sdp_enabled(),
        backends.cuda.matmul.allow_fp16_accumulation,
        backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
    ]


def test_the_kernels_that_a_caller_chose_are_set_aside():
    """On a CPU, too, plain attention and products without oneDNN have other last digits."""
    usual, matmul = kernels(), torch.backends.cuda.matmul
    try:
        torch.backends.mkldnn.enabled = False
        matmul.allow_fp16_accumulation = True
        matmul.allow_fp16_reduced_precision_reduction = matmul.allow_bf16_reduced_precision_reduction = False
        with sdpa_kernel(SDPBackend.MATH):
            chosen = kernels()
            assert chosen != usual
            with own_modes():
                assert kernels() == usual
            assert kernels() == chosen
    finally:
        torch.backends.mkldnn.enabled = True
        matmul.allow_fp16_accumulation = False
        matmul.allow_fp16_reduced_precision_reduction = matmul.allow_bf16_reduced_precision_reduction = True
    assert kernels() == usual


def test_threads_and_kernels_of_a_run_end_with_it(shell):
    """The next run of the process would be computed by the threads of the one before, under another key."""
    torch.backends.mha.set_fastpath_enabled(True)
    before = torch.get_num_threads()
    words = digits_words("backend=quanto", "dtype=int8", "evaluation.num_samples=10", "sweep.floors=false")
    first = shell.rows(*words, f"num_threads={before + 1}")
    assert torch.get_num_threads() == before
    assert torch.backends.mha.get_fastpath_enabled()
    again = shell.rows(*words)
    assert first["quanto int8"]["run_id"] != again["quanto int8"]["run_id"]
    assert len({run["tags"]["quantlab.reference_key"] for run in find_runs(shell.store)}) == 2


def test_a_layer_s_own_fast_path_is_of_no_row():
    """It reads weights, not layers: a reference on it has other kernels than its candidates."""
    torch.backends.mha.set_fastpath_enabled(True)
    with own_modes():
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_cpu_is_known_by_its_threads_and_instructions(monkeypatch):
    found = arithmetic("cpu")
    assert set(found) == {"threads", "cpu_capability", "processor", "mkl_cbwr"}
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "AVX2")
            assert arithmetic("cpu") != found
    there = {**torch.cpu.get_capabilities(), "amx_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {**there, "num_logical_cores": 96})
    other = arithmetic("cpu")
    assert other != found, "another processor, of the same AVX512"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: there)
    assert arithmetic("cpu") == other, "more cores of it are not"


def test_float32_products_do_not_depend_on_where_their_operands_begin():
    """MKL's do on some processors: a model that is read from its file's pages then answers otherwise than a copy."""
    code = """
import os
os.environ.pop("MKL_CBWR", None)
import quantlab, torch
from torch.nn.functional import linear
torch.manual_seed(0)
for rows, ins, outs in ((16, 32, 8), (1, 32, 96), (7, 64, 64)):
    x, weight = torch.randn(rows, ins), torch.randn(outs, ins)
    for begin in range(16):
        moved = torch.empty(weight.numel() + 16)[begin:][: weight.numel()].view_as(weight).copy_(weight)
        shifted = torch.empty(x.numel() + 16)[begin:][: x.numel()].view_as(x).copy_(x)
        assert torch.equal(linear(x, moved), linear(x, weight)), (rows, ins, outs, begin)
        assert torch.equal(linear(shifted, weight), linear(x, weight)), (rows, ins, outs, begin)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


STATES = """
import sys
import torch
from quantlab.modules.precision import exact_arithmetic, precision
LEAVES = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn]
LEAVES += [torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv, torch.backends.mkldnn.rnn]
where = eval(sys.argv[1])
where.fp32_precision = sys.argv[2]
said = [leaf.fp32_precision for leaf in LEAVES]
for _ in range(2):
    with exact_arithmetic():
        inside = precision()
        assert {leaf.fp32_precision for leaf in LEAVES} == {"ieee"}, [leaf.fp32_precision for leaf in LEAVES]
        assert not inside["cudnn_allow_tf32"] and not inside["matmul_allow_tf32"]
    assert [leaf.fp32_precision for leaf in LEAVES] == said
"""


SWITCHES = [".mkldnn.matmul"]
MORE_SWITCHES = [
    pytest.param(w, marks=pytest.mark.slow) for w in ("", ".cuda.matmul", ".cudnn", ".cudnn.conv", ".mkldnn.conv")
]


@pytest.mark.parametrize("where", [*SWITCHES, *MORE_SWITCHES])
def test_switches_in_torch_s_newer_words_are_no_hindrance(where):
    """Once they were set so, torch refuses to tell the older ones."""
    value = "bf16" if "mkldnn" in where else "tf32"
    words = [sys.executable, "-c", STATES, f"torch.backends{where}", value]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


@contextlib.contextmanager
def autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield


@contextlib.contextmanager
def wide():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("mode", [autocast, wide])
def test_a_reference_is_kept_of_no_mode_of_the_caller_s(shell, mode):
    """Its outputs are everybody's: a later run without the mode compares with them."""
    words = digits_words("backend=quanto", "dtype=int8", "evaluation.num_samples=10")
    with mode():
        first = shell.rows(*words)
    plain = shell.rows(*words)

    def numbers(rows):
        return {(name, k): v for name, row in rows.items() for k, v in row["metrics"].items() if "/step_" not in k}

    now, same = numbers(plain), ("quality/", "memory/weights", "quantization/")
    assert {k: v for k, v in numbers(first).items() if k[1].startswith(same) and now[k] != v} == {}
    assert plain["reference"]["metrics"]["quality/latent_rel_mse"] == 0


@contextlib.contextmanager
def elsewhere():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("mode", default_of([autocast, wide, torch.inference_mode, elsewhere], wide))
@pytest.mark.parametrize(
    "config",
    [
        quantlab.QuantoConfig("int8"),
        pytest.param(quantlab.TorchAoConfig("int4wo", group_size=32), marks=pytest.mark.slow),
    ],
)
def test_python_s_numbers_are_of_no_mode_of_the_caller_s(mode, config):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 32))
    batches = [torch.randn(8, 64)]

    def numbers():
        rows = quantlab.evaluate(module, [config], batches)
        assert {row.status for row in rows} == {"FINISHED"}
        made, report = quantlab.quantize(module, config)
        return [row.quality for row in rows], made, [row.weight_rel_error for row in report.layers]

    plain, _, errors = numbers()
    with mode():
        found, made, now = numbers()
        default, device = torch.get_default_dtype(), torch.get_default_device()
    assert (found, now) == (plain, errors)
    assert (default, device.type) == (
        torch.float64 if mode is wide else torch.float32,
        "meta" if mode is elsewhere else "cpu",
    )
    assert not any(p.is_inference() for p in made.parameters())
