"""What an export takes beside the candidate that it writes: files and digests are made tensor by tensor.

``pytest -m slow -s tests/exporting/test_memory_of_export.py`` prints the figures.
"""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from quantlab.backends.part import Part
from quantlab.exporting import check
from quantlab.exporting.checkpoint import write_part
from quantlab.vocabulary.axes import QuantizationAxes
from tests.benchmarks.bench_memory import MIB, Peak, anonymous
from tests.support.copies import quantized
from tests.support.tables import native_config


def big_llama(num_layers=3, width=1024):
    """28 MiB of codes a layer in 8 bits, almost all of it in Linear layers."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": width, "intermediate_size": 8 * width, "num_hidden_layers": num_layers}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8)).eval().requires_grad_(False)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "share"), [("torchao", 0.3), ("bitsandbytes", 0.1), ("modelopt", 0.1)])
def test_writing_and_digests_hold_little_beside_the_model(tmp_path, backend, share):
    """Of what is stored: torchao's flattening clones a tensor at a time, of which the heap keeps some."""
    module = big_llama()
    made, report = quantized(module, backend, "int8")
    part = Part(
        name="model",
        module=made,
        original=module,
        library="transformers",
        config=native_config(QuantizationAxes(backend=backend, dtype="int8")),
        layers=report.layers,
        dtype="float32",
        compute_dtype="float32",
    )
    (tmp_path / "small").mkdir()
    with torch.no_grad():  # the libraries' own imports are no part of it
        write_part(part, tmp_path / "small")
    stored = check.state_bytes(made)
    (tmp_path / "out").mkdir()
    before = anonymous()
    with Peak() as writing:
        write_part(part, tmp_path / "out", "16MB")
    with Peak() as digesting:
        check.digests(made)
    more = {"writing": writing.value - before, "digests": digesting.value - before}
    print(
        f"\n{backend}: {stored / MIB:.0f} MiB stored; beside it "
        + ", ".join(f"{k} {v / MIB:.1f} MiB" for k, v in more.items())
    )
    assert stored > 80 * MIB
    assert max(more.values()) < share * stored
