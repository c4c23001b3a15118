"""Whether this process would compute on a GPU, for those who plan: known without torch, whose import takes seconds."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import sys
from pathlib import Path

NO_CUDA = "device=cuda: this torch sees no CUDA device; pass device=cpu, or install a CUDA build of torch"
"""What is said where ``device=cuda`` was asked for."""


def sees_gpu() -> bool:
    """What ``torch.cuda.is_available()`` says, or would say.

    A build of torch without CUDA says so in its ``version.py``, and one with CUDA asks the driver, as this does. Only a
    build for other GPUs is imported.
    """
    if "torch" not in sys.modules:
        built = _built_for()
        if built == "":
            return False
        if built == "cuda" and sys.platform == "linux":
            return _driver_has_device()
    import torch

    return torch.cuda.is_available()


def _built_for() -> str:
    """``cuda`` or ``hip``; "" for a torch that knows no GPU, and ``?`` where its file does not tell."""
    found = importlib.util.find_spec("torch")
    file = Path(found.origin).with_name("version.py") if found is not None and found.origin else None
    if file is None or not file.is_file():
        return "?"
    said = {name: value for name, value in re.findall(r"^(cuda|hip)\b[^=\n]*=\s*(\S+)", file.read_text(), re.MULTILINE)}
    if not said:
        return "?"
    return next((name for name, value in said.items() if value != "None"), "")


def _driver_has_device() -> bool:
    """Whether the driver has a device for this process (it reads ``CUDA_VISIBLE_DEVICES``)."""
    num = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(num)) == 0 and num.value > 0
    except (OSError, AttributeError):
        return False
