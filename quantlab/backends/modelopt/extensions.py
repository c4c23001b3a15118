"""The CUDA code that ModelOpt compiles on the machine itself: left out where torch computes the same, else built once.

Only the MX formats have no other way. The build takes minutes; it happens before the stage that needs it, in a process
with a timeout, under a lock that a dead process loses. (torch's own lock is a file that stays when its process is
killed, and is then waited for without an end.)
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from quantlab.errors import ConfigError
from quantlab.modules.compiler import missing_compiler
from quantlab.progress import say

_WITH_TORCH = ("get_cuda_ext", "get_cuda_ext_fp8")
"""Kernels for integers and FP8. They round otherwise than torch (half away from zero, after 8 was added in 16 bits),
launch no thread for blocks above 2,048 weights and do not say so, and are there only where a compiler is: with them one
scheme would have two sets of numbers."""
_MX = "modelopt_cuda_ext_mx"
_BUILD = "from modelopt.torch.quantization.extensions import get_cuda_ext_mx as g; g(raise_if_failed=True)"
BUILD_TIMEOUT_S = 900.0


def leave_out() -> ModuleType:
    """Keep the library from its kernels for integers and FP8; returns the module that knows the extensions."""
    extensions = importlib.import_module("modelopt.torch.quantization.extensions")
    for name in _WITH_TORCH:
        getattr(extensions, name).extension = None
    return extensions


def build_mx(quant_type: str, timeout_s: float = BUILD_TIMEOUT_S) -> None:
    """Have the extension of the MX formats in this process; built where it is not yet.

    Raises ConfigError where there is no compiler, where it fails, and where it takes longer than ``timeout_s``.
    """
    extensions = leave_out()
    if getattr(extensions.get_cuda_ext_mx, "extension", None) is not None:
        return
    if missing := missing_compiler():
        raise ConfigError(
            f"quant_type={quant_type}: ModelOpt compiles CUDA code for it, and {missing} is not here; install the CUDA "
            "toolkit and ninja, or choose nvfp4, float8_e4m3 or int8"
        )
    from filelock import FileLock, Timeout
    from torch.utils import cpp_extension

    folder = Path(cpp_extension._get_build_directory(_MX, verbose=False))
    try:
        with FileLock(folder.parent / f"{_MX}.quantlab.lock", timeout=timeout_s):
            if not list(folder.glob("*.so")):
                (folder / "lock").unlink(missing_ok=True)  # of a process that is gone: the living hold ours
                say(f"{quant_type}: ModelOpt compiles its CUDA code, once on this machine; it takes minutes")
                _run_build(quant_type, timeout_s)
            extensions.get_cuda_ext_mx(raise_if_failed=True)
    except Timeout as error:
        raise ConfigError(
            f"quant_type={quant_type}: another process has been compiling ModelOpt's CUDA code for {timeout_s:.0f} s; "
            "wait for it, or end it, and try again"
        ) from error


def _run_build(quant_type: str, timeout_s: float) -> None:
    try:
        done = subprocess.run([sys.executable, "-P", "-c", _BUILD], capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"quant_type={quant_type}: ModelOpt's CUDA code was not compiled in {timeout_s:.0f} s; try again on a "
            "machine with more free processors, or choose another dtype"
        ) from error
    if done.returncode:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no reason given")
        raise ConfigError(
            f"quant_type={quant_type}: ModelOpt's CUDA code does not compile here ({last[:300]}); choose another dtype"
        )
