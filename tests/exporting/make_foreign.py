"""Score checkpoints of others beside ours: ``python tests/exporting/make_foreign.py`` writes ``recipes/foreign.json``.

The checkpoints are made by their libraries, of a tiny Llama (``tests/support/foreign.py``); a run of quantlab scores
them and quantlab's own schemes together. ``python -m quantlab.docs`` then writes the README's table.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from quantlab.docs import FOREIGN_METRICS  # noqa: E402
from quantlab.report.compare import compare  # noqa: E402
from quantlab.report.comparison_table import pair_text  # noqa: E402
from quantlab.report.reading import open_reader  # noqa: E402
from quantlab.report.selection import ComparisonRequest, select  # noqa: E402
from quantlab.vocabulary.schema import TrackingConfig  # noqa: E402
from tests.support.foreign import LANGUAGE, make_apart, make_here  # noqa: E402
from tests.support.shell import text_words  # noqa: E402
from tests.support.tiny_text_models import TEXT  # noqa: E402

FILE = ROOT / "recipes" / "foreign.json"
OURS = (("bitsandbytes", "nf4"), ("bitsandbytes", "int8"), ("torchao", "int8"), ("modelopt", "int8"), ("gguf", "q8_0"))
"""The same formats, quantized by quantlab."""


def main() -> None:
    """Make the checkpoints, run the sweep, and write the file."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_here(folder)
        make_apart(folder, folder)
        (folder / "text.txt").write_text(TEXT)
        listed = [f"{{checkpoint:{name}}}" for name in LANGUAGE]
        listed += [f"{{backend:{backend},dtype:{dtype}}}" for backend, dtype in OURS]
        words = [w for w in text_words("cpu") if not w.startswith(("calibration", "sweep.floors"))]
        sweep = f"sweep.candidates=[{','.join(listed)}]"
        model = ["model=causal_lm", "model.path=llama", "dataset=text", "dataset.path=text.txt"]
        command = [sys.executable, "-m", "quantlab", "-m", *model, *words, sweep, "--json"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        rows = json.loads(done.stdout)
        FILE.write_text(
            json.dumps({**summary(rows, folder), **compared(rows, folder)}, indent=1, sort_keys=True) + "\n"
        )


def compared(rows: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """What ``quantlab compare`` says of each checkpoint and quantlab's own row of its format, named one by one."""
    ids = {row["name"]: row["run_id"] for row in rows}
    verdicts: dict[str, str] = {}
    pairs = []
    with contextlib.chdir(folder):
        reader = open_reader(TrackingConfig(), folder)
        for theirs, (backend, dtype) in zip(LANGUAGE, OURS, strict=True):
            request = ComparisonRequest(run_ids=(ids[theirs], ids[f"{backend} {dtype}"]))
            (group,) = compare(request, select(request, reader), reader)
            verdicts |= {name: found.text for name, found in group.verdicts.items()}
            pairs += [pair_text(pair, group.metric) for pair in group.pairs]
    return {"verdicts": verdicts, "pairs": pairs}


def summary(rows: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """What the table shows of a run's rows, in their order; layers are what was read back."""
    (results,) = (folder / "outputs" / "runs").glob("**/rows.json")
    environment = json.loads(results.read_text())["environment"]
    shown = [
        {
            "name": row["name"],
            "by": "its library" if row["name"] in LANGUAGE else "quantlab",
            "metrics": {k: v for k, v in row["metrics"].items() if k.startswith(FOREIGN_METRICS)},
        }
        for row in rows
        if "quantization/coverage" in row["metrics"]
    ]
    versions = ("torch", "transformers", "bitsandbytes", "torchao", "gguf", "nvidia-modelopt")
    return {
        "rows": shown,
        "versions": ", ".join(f"{name} {environment['versions'][name]}" for name in versions),
        "machine": f"CPU ({environment['hardware']['cpu_capability']})",
    }


if __name__ == "__main__":
    main()
