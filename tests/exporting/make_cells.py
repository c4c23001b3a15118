"""Measure the table of exports: ``python tests/exporting/make_cells.py [MODEL ...]`` writes ``recipes/exports.json``.

A cell is a backend's dtype on a model; those of the models that are not named keep what they had. SmolLM2 needs its
package and 4 GiB. ``python -m quantlab.docs`` then writes the README's table.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from quantlab.exporting import verify  # noqa: E402
from tests.support.exports import MODELS, SCHEMES, cell, checker, loaded  # noqa: E402

FILE = ROOT / "recipes" / "exports.json"
PACKAGES = ("torch", "diffusers", "transformers", "bitsandbytes", "torchao", "optimum-quanto", "nvidia-modelopt")


def main(names: list[str]) -> None:
    """Measure the cells of the named models, or of all; in the order of the names."""
    old: dict[str, Any] = json.loads(FILE.read_text()) if FILE.is_file() else {"cells": {}}
    cells = {f"{backend} {dtype}": old["cells"].get(f"{backend} {dtype}", {}) for backend, dtype in SCHEMES}
    with tempfile.TemporaryDirectory() as place, checker() as one:
        verify._fresh_process = one
        folder, cache = Path(place), ROOT / "outputs" / "cache"
        cache.mkdir(parents=True, exist_ok=True)
        for title in names or MODELS:
            found = loaded(MODELS[title], folder, cache)
            for backend, dtype in SCHEMES:
                cells[f"{backend} {dtype}"][title] = cell(found, folder / title, cache, backend, dtype)
                print(title, backend, dtype, cells[f"{backend} {dtype}"][title], flush=True)
            loaded.cache_clear()
            write(cells)


def write(cells: dict[str, Any]) -> None:
    """The file as far as it is known: a model's cells are kept whatever becomes of the next one's."""
    import torch

    data = {
        "models": list(MODELS),
        "cells": cells,
        "versions": ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES),
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
    }
    FILE.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
