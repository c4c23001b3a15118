"""A GGUF file as llama.cpp runs it, where the wheel ``xllamacpp`` is installed: its kernels round activations, too.

It is called over its C interface, in a process of its own, which an error in it may end:
``python -m quantlab.backends.gguf.kernels MODEL.gguf LENGTH NUM_THREADS`` reads token ids from stdin, a JSON list a
line, and writes to stdout the number of words of the vocabulary (int32), then each window's logits (float32, LENGTH
times as many).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.errors import ModelError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PACKAGE = "xllamacpp"
_AT_LEAST = 512


def library() -> str | None:
    """The shared object in the wheel, found without importing it; None where it is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        return None
    return next((str(path) for path in Path(found.origin).parent.glob(f"{PACKAGE}*.so")), None)


def own_kernels() -> str:
    """The program that runs such files by kernels of its own, as it is installed; "" where it is not."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return f"llama.cpp ({PACKAGE} {metadata.version(PACKAGE)})" if library() else ""
    return ""


def logits_of(file: Path, windows: Sequence[Sequence[int]], num_threads: int) -> Iterator[NDArray[np.float32]]:
    """Logits (tokens, vocabulary) of each window, all of one length, by llama.cpp's kernels on the CPU.

    ModelError with its last words where it ends before it has answered.
    """
    import numpy as np

    place = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with (
        tempfile.TemporaryFile() as asked,
        tempfile.TemporaryFile() as said,
    ):  # no pipe that fills while another is read
        asked.write("".join(f"{json.dumps([*map(int, window)])}\n" for window in windows).encode())
        asked.seek(0)
        words = [sys.executable, "-P", "-m", __name__, str(file), str(len(windows[0])), str(num_threads)]
        with subprocess.Popen(words, stdin=asked, stdout=subprocess.PIPE, stderr=said, env=place) as process:
            answers: Any = process.stdout
            try:
                size = int.from_bytes(answers.read(4), sys.byteorder)
                for window in windows:
                    found = answers.read(4 * size * len(window))
                    if not size or len(found) < 4 * size * len(window):
                        process.wait()
                        said.seek(0)
                        lines = said.read().decode(errors="replace").strip().splitlines() or [""]
                        last = [line for line in lines if "error" in line and "ModelError" not in line] or lines
                        raise ModelError(f"{PACKAGE}: llama.cpp ended before it had answered ({last[-1]})")
                    yield np.frombuffer(found, np.float32).reshape(len(window), size)
            finally:
                process.kill()


class _Settings(ctypes.Structure):
    """A struct of settings of which the first four are set and the rest passed on: larger than any version of it."""

    _fields_ = (("numbers", ctypes.c_uint32 * 256),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


class Llama:
    """A file as llama.cpp runs it, on ``num_threads``, or on as many as it likes; ``length``: tokens at most."""

    def __init__(self, model_file: str, num_threads: int = 0, length: int = _AT_LEAST) -> None:
        path = library()
        if path is None:
            raise ModelError(f"{PACKAGE}: it is not installed; pip install --no-deps {PACKAGE}")
        self.lib = lib = ctypes.CDLL(path)
        pointers = ("llama_model_load_from_file", "llama_init_from_model", "llama_model_get_vocab", "llama_get_memory")
        for name in pointers:
            getattr(lib, name).restype = ctypes.c_void_p
        lib.llama_model_default_params.restype = lib.llama_context_default_params.restype = _Settings
        lib.llama_get_logits_ith.restype = ctypes.POINTER(ctypes.c_float)
        lib.llama_batch_init.restype = _Batch
        lib.llama_vocab_get_add_bos.restype = ctypes.c_bool
        lib.llama_backend_init()
        loaded = lib.llama_model_load_from_file(os.fsencode(model_file), lib.llama_model_default_params())
        if not loaded:
            raise ModelError(f"{PACKAGE}: llama.cpp cannot load {Path(model_file).name}")
        model, settings = ctypes.c_void_p(loaded), lib.llama_context_default_params()
        if list(settings.numbers[:4]) != [512, 2048, 512, 1]:
            raise ModelError(f"{PACKAGE}: n_ctx, n_batch, n_ubatch, n_seq_max are not its first settings here")
        size = max(length, _AT_LEAST)
        settings.numbers[:3] = [size, max(size, settings.numbers[1]), size]
        self.context = ctypes.c_void_p(lib.llama_init_from_model(model, settings))
        if num_threads:
            lib.llama_set_n_threads(self.context, num_threads, num_threads)
        self.vocab = ctypes.c_void_p(lib.llama_model_get_vocab(model))
        self.vocab_size = int(lib.llama_vocab_n_tokens(self.vocab))
        self.batch = lib.llama_batch_init(size, 0, 1)

    def logits(self, window: Sequence[int], first: int = 0) -> NDArray[np.float32]:
        """Array (tokens from ``first`` on, vocabulary): what stands at those positions of a window."""
        import numpy as np

        self.lib.llama_memory_clear(ctypes.c_void_p(self.lib.llama_get_memory(self.context)), ctypes.c_bool(True))
        self.batch.n_tokens = len(window)
        for k, token in enumerate(window):
            self.batch.token[k], self.batch.pos[k], self.batch.n_seq_id[k] = token, k, 1
            self.batch.logits[k] = k >= first
            self.batch.seq_id[k][0] = 0
        if self.lib.llama_decode(self.context, self.batch):
            raise ModelError(f"{PACKAGE}: llama_decode failed")
        rows = (self.lib.llama_get_logits_ith(self.context, k) for k in range(first, len(window)))
        return np.stack([np.ctypeslib.as_array(row, (self.vocab_size,)) for row in rows])


def main(file: str, length: str, num_threads: str) -> None:
    """See the module."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else is said goes to stderr
    llama: Any = Llama(file, int(num_threads), int(length))
    answers.write(llama.vocab_size.to_bytes(4, sys.byteorder))
    for line in sys.stdin:
        answers.write(llama.logits(json.loads(line)).tobytes())
        answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
