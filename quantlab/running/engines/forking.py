"""The other end of :mod:`quantlab.running.forked`: begin a process with the imports behind it, hear of its end."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_SERVER = "from quantlab.running.forked import serve; serve()"
_GRACE_S = 12.0
_NO_THREADS = {
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # pyarrow's allocator, which pandas brings
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # whoever asks whether there is a GPU leaves CUDA as it is
}
"""What keeps libraries from beginning anything when they are imported."""


class Forking:
    """Processes by a name that the caller gives; they end when this process does, or the server."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[bytes] | None = None
        self._text = b""

    def begin(self, name: str, folder: Path, words: list[str], env: Mapping[str, str]) -> None:
        """Begin ``worker.main(words)`` in a process group of its own; what it prints goes to the folder's log."""
        self._tell(id=name, folder=str(folder), words=words, env=dict(env))

    def kill(self, name: str, number: int) -> None:
        """Send a signal to the process group."""
        self._tell(kill=name, signal=number)

    def heard(self, seconds: float = 0.0) -> Iterator[dict[str, Any]]:
        """What happened: ``{"id", "pid"}`` for a start, ``{"id", "code"}`` for an end, ``{}`` where all are gone.

        It waits up to ``seconds`` for the first of them.
        """
        if self._server is None:
            return
        assert self._server.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._server.stdout, selectors.EVENT_READ)
            while selector.select(seconds):
                read = os.read(self._server.stdout.fileno(), 65536)
                if not read:
                    self._forget()
                    yield {}
                    return
                *lines, self._text = (self._text + read).split(b"\n")
                yield from (said for line in lines if "id" in (said := json.loads(line)))
                seconds = 0.0

    def close(self) -> None:
        """End all processes, with a moment for each to close its run."""
        if self._server is not None:
            assert self._server.stdin is not None
            with contextlib.suppress(OSError):
                self._server.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._server.wait(_GRACE_S)
            self._server.kill()
            self._forget()

    def _tell(self, **asked: object) -> None:
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-c", _SERVER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, **_NO_THREADS, **python_environment()},
                bufsize=0,
                start_new_session=True,
            )
        assert self._server.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its death is heard of
            self._server.stdin.write(json.dumps(asked).encode() + b"\n")

    def _forget(self) -> None:
        assert self._server is not None
        self._server.wait()
        for stream in (self._server.stdin, self._server.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()
        self._server, self._text = None, b""


def python_environment() -> dict[str, str]:
    """What another Python is told: where it finds this quantlab, also in a checkout that is not installed, and to
    import nothing from the current folder, which may be one that was downloaded."""
    places = filter(None, [str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH")])
    return {"PYTHONPATH": os.pathsep.join(dict.fromkeys(places)), "PYTHONSAFEPATH": "1"}
