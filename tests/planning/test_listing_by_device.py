"""What runs on a device, on a machine without one: ``quantlab list combinations device=cuda``."""

import json

import pytest

from quantlab.backends.scheme import scheme_of
from quantlab.errors import ConfigError
from quantlab.stages import select
from quantlab.vocabulary.axes import QuantizationAxes
from tests.support.tables import CAPABILITIES


def rows(shell, *words):
    code, out, _ = shell("list", "combinations", *words, "--json")
    assert code == 0
    return {(row["backend"], row["dtype"]): row for row in json.loads(out)}


def test_each_row_says_what_it_needs(shell):
    there = rows(shell, "device=cuda")
    assert {key for key, row in there.items() if row["offered"]} == {
        (b, d) for b, of in CAPABILITIES.items() for d, row in of.items() if "cuda" in row.devices
    }
    assert there["modelopt", "nvfp4"]["needs"] == "in_features % 16; CUDA 8.9"
    assert "nvcc and ninja" in there["modelopt", "mxfp8"]["needs"]
    assert "activations float8_e4m3: CUDA 8.9" in there["torchao", "float8_e4m3"]["needs"]
    assert "weights % 16384" in there["torchao", "nf4"]["needs"]
    here = rows(shell, "device=cpu")
    assert not here["modelopt", "nvfp4"]["offered"]
    assert here["modelopt", "nvfp4"]["reason"] == "runs on cuda only"
    assert "CUDA" not in here["torchao", "float8_e4m3"]["needs"]


def test_the_table_shows_it(shell):
    code, out, _ = shell("list", "combinations", "device=cuda")
    assert code == 0
    assert "needs" in out
    assert "nvcc" in out


@pytest.mark.parametrize("words", [["device=tpu"], ["device=cuda", "x"], ["gguf"], ["backend=gguf"]])
def test_other_words_are_refused(shell, words):
    code, _, err = shell("list", "combinations", *words)
    assert code == 2
    assert "list combinations takes device=cpu or device=cuda" in err
    code, _, err = shell("list", "backends", *words)
    assert code == 2
    assert "list backends takes no further word" in err


@pytest.mark.parametrize("dtype", [d for d, row in CAPABILITIES["modelopt"].items() if row.needs_nvcc])
def test_what_must_be_compiled_is_refused_before_work(dtype, monkeypatch):
    scheme = scheme_of(QuantizationAxes(backend="modelopt", dtype=dtype))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(select, "missing_compiler", lambda: "nvcc")
    with pytest.raises(ConfigError, match=f"^dtype={dtype}: modelopt compiles CUDA code for it, and nvcc is not on"):
        select.check_device(scheme.format, "cuda", "bfloat16")
    monkeypatch.setattr(select, "missing_compiler", lambda: "")
    select.check_device(scheme.format, "cuda", "bfloat16")


def test_the_kinds_fit_a_terminal(shell, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = shell("list", "kinds")
    assert code == 0
    assert all(name in out for name in CAPABILITIES if name != "none")
    assert max(map(len, out.splitlines())) <= 80
