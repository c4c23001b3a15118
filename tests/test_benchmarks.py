"""What the benchmarks say of quantlab's own places: they are there."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path

import pytest

SAMPLED = runpy.run_path(str(Path(__file__).parent / "benchmarks" / "peers" / "sampled.py"))


@pytest.mark.parametrize("part", SAMPLED["PARTS"])
def test_the_places_of_a_part_are_there(part):
    for file, function in SAMPLED["places"](SAMPLED["PARTS"][part]):
        assert Path(file).exists()
        if function:
            tree = ast.parse(Path(file).read_text(encoding="utf-8"))
            assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_a_look_counts_for_the_first_part_that_has_a_place_in_the_stack():
    wanted = {part: SAMPLED["places"](names) for part, names in SAMPLED["PARTS"].items()}
    ((quantize, _),) = wanted["quantizing"]
    ((folder, _), *_) = wanted["tracking"]
    imported, library = "<frozen importlib._bootstrap>", "/somewhere/torch/nn.py"
    cases = {
        SAMPLED["OTHER"]: [("run.py", "main"), (library, "forward")],
        "quantizing": [(quantize, "_quantized"), (quantize, "_hand_over"), (library, "quantize")],
        "reading back": [(quantize, "_read_row"), (library, "mul")],
        "tracking": [("run.py", "main"), (f"{folder}run.py", "log_params")],
        "other imports": [(f"{folder}run.py", "log_params"), (imported, "_load"), (library, "<module>")],
        SAMPLED["IMPORTS"]: [(imported, "_load"), (f"{folder}run.py", "<module>"), (imported, "_load")],
    }
    for part, frames in cases.items():
        assert SAMPLED["part_of"](frames, wanted) == part
