"""What the libraries print at import and on first use, filtered by logger: it is about parts that quantlab never uses.

Missing prebuilt kernels, renamed classes, a cast that is asked for. Errors still come through, and
``QUANTLAB_VERBOSE=1`` shows everything.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

LOGGERS = (
    "torch.utils._pytree",
    "diffusers",
    "transformers",
    "alembic",
    "mlflow",
    "torch.distributed.elastic",
    "torch._dynamo",
    "torch._inductor",
    "kernels",
)
WARNINGS = (
    r".*modules? .* should be kept in float32.*",
    r".*transformers .*is not tested with.*",
    r".*lr_scheduler\.step\(\).*",
    r"RealQuantLinear: No real-quant GEMM found.*",  # the weight is decoded instead, which read-back measures
    r".*does not implement _stable_hash_for_caching.*",
    r"IProgress not found.*",  # no widgets in this notebook: progress here is lines of text
)


def quiet_libraries(loggers: Iterable[str]) -> None:
    """Raise the level of the chatty loggers to ERROR; call it before the libraries are imported.

    ``loggers`` are those of the backends (:func:`quantlab.backends.table.loggers`), beside those that all runs have.
    """
    if os.environ.get("QUANTLAB_VERBOSE") == "1":
        return
    os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for name in (*LOGGERS, *loggers):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", category=FutureWarning)


@contextlib.contextmanager
def warnings_kept(kept: Path) -> Iterator[None]:
    """While open, what Python's libraries warn of is added to ``kept`` and not shown; our own warnings are said."""
    if os.environ.get("QUANTLAB_VERBOSE") == "1":
        yield
        return

    def keep(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        with contextlib.suppress(OSError), kept.open("a", encoding="utf-8", errors="backslashreplace") as log:
            log.write(warnings.formatwarning(message, category, filename, lineno, line))

    before, warnings.showwarning = warnings.showwarning, keep
    try:
        yield
    finally:
        warnings.showwarning = before
