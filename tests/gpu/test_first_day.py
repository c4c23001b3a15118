"""The first day on a GPU as tests; on a processor, that its findings are findings."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu import first_day, kernels


def rows(scheme, dtype="float32"):
    return list(kernels.rows_of(scheme.split("-")[0], "cpu", [scheme], [dtype]))


@pytest.mark.parametrize("scheme", ["gguf-q8_0-none-max", "bitsandbytes-int8-int8-max"])
def test_a_right_kernel_is_right_in_every_case(scheme):
    found = rows(scheme)
    assert {row["case"] for row in found} >= {"1 rows", "transposed image", "no rows", "beyond float16"}
    assert {tuple(row["shape"]) for row in found} >= {(96, 512), (64, 4096)}
    assert all(row["ok"] for row in found)


def test_a_kernel_that_reads_views_as_rows_is_found(monkeypatch):
    from optimum.quanto.nn import QLinear

    forward = QLinear.forward

    def careless(self, x):
        rows = x if x.is_contiguous() else x.contiguous().flatten().view(x.shape).flip(-1)
        return forward(self, rows)

    monkeypatch.setattr(QLinear, "forward", careless)
    wrong = {row["case"] for row in rows("quanto-int8-none-max") if not row.get("ok")}
    assert wrong == {"transposed", "transposed image"}


def test_findings_are_told_and_kept(tmp_path):
    out = tmp_path / "findings.json"
    words = [sys.executable, "tests/gpu/first_day.py", "--device", "cpu", "--sections", "machine", "--out", str(out)]
    done = subprocess.run(words, cwd=first_day.ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert "== machine: What is here." in done.stdout
    assert json.loads(out.read_text())[0]["data"]["torch"] == torch.__version__


def test_a_section_that_breaks_off_is_a_finding(tmp_path, monkeypatch):
    def machine(device, folder):
        raise RuntimeError("no driver")

    monkeypatch.setitem(first_day.SECTIONS, "machine", machine)
    ((fine, told, _),) = first_day.in_folder("machine", "cuda", Path(tmp_path / "machine"))
    assert (fine, told) == (False, "machine broke off: RuntimeError: no driver")


@pytest.mark.slow
def test_each_job_of_a_sweep_is_looked_at(tmp_path):
    """On a processor nothing is counted, but what is watched on a GPU must be there to be watched."""
    ((fine, told, held),) = first_day.in_folder("handovers", "cpu", tmp_path / "handovers")
    assert fine, told
    assert {row["model"] for row in held} == {"1.5", "2.5"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("section", [s for s in first_day.SECTIONS if s != "marked"])
def test_the_first_day(section, tmp_path):
    found = first_day.in_folder(section, "cuda", tmp_path / section)
    assert found
    assert [told for fine, told, _ in found if not fine] == []
