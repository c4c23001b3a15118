"""Whether CUDA code can be compiled on this machine."""

from __future__ import annotations

import shutil
from pathlib import Path


def missing_compiler() -> str:
    """What torch needs to compile CUDA code and is not on this machine: ``nvcc`` or ``ninja``; "" where all is."""
    from torch.utils import cpp_extension

    home = cpp_extension.CUDA_HOME
    if home is None or not (Path(home) / "bin" / "nvcc").exists():
        return "nvcc"
    return "" if shutil.which("ninja") else "ninja"
