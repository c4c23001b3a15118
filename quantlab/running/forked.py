"""A process that has imported the libraries and nothing else, from which each local job is forked: imports cost once.

Before a fork there is one thread, no CUDA context and no open store; where that does not hold the fork begins Python
anew. It reads a JSON line a job from its standard input and writes one a start and an end; at the end of its input it
ends its jobs, and so does its own end, however it comes about: each job holds the other side of a pipe of its.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import selectors
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantlab.modules.device import collect_rarely
from quantlab.running.attempts import LOG
from quantlab.running.worker import main

PRELOADED = (
    "scipy.linalg",
    "scipy.stats",
    "torch",
    "torch.nn.attention",
    "safetensors.torch",
    "sklearn.datasets",
    "sklearn.neural_network",
    "diffusers",
    "diffusers.models.transformers.dit_transformer_2d",
    "transformers",
    "matplotlib.figure",
    "PIL.Image",
    "psutil",
    "yaml",
)
"""What most jobs import. Not the backends' libraries: some look for a device when they are imported."""
_GRACE_S = 10.0
_FRESH = "import sys; from quantlab.running.worker import main; sys.exit(main(sys.argv[1:]))"


def preload() -> bool:
    """Import what jobs need; may this process be forked then?

    OpenBLAS begins its threads when numpy is imported, and ends and begins them again around a fork by itself.
    """
    threads = 1
    collect_rarely()
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
        if name.startswith("scipy"):
            threads = _num_threads()
    gc.collect()
    gc.freeze()  # a collection in a job would copy the pages of all libraries
    return _num_threads() <= threads and _cuda_is_untouched()


def _num_threads() -> int:
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return 2**31  # nobody knows: no fork


def _cuda_is_untouched() -> bool:
    """Has CUDA's driver not been initialised in this process?"""
    try:
        if "libcuda.so" not in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace"):
            return True
        count = ctypes.c_int()
        not_initialized = 3
        return int(ctypes.CDLL("libcuda.so.1").cuDeviceGetCount(ctypes.byref(count))) == not_initialized
    except OSError:
        return False


@contextlib.contextmanager
def _nothing_printed() -> Iterator[None]:
    """What libraries print while they are imported is of no job."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


class _Server:
    """The jobs under way, by pid."""

    def __init__(self, out: int) -> None:
        self._out = out
        self._alive, self._held = os.pipe()  # nobody writes: a job sees its end when this process is gone
        self._ids: dict[int, str] = {}
        with _nothing_printed():
            self._may_fork = preload()

    def begin(self, asked: dict[str, Any]) -> None:
        folder = Path(asked["folder"])
        log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = self._become_job(asked, log)
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else 1
            except BaseException:  # noqa: BLE001  its log has it; a fork never goes back into the server
                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
        os.close(log)
        self._ids[pid] = asked["id"]
        self._say(id=asked["id"], pid=pid)

    def _become_job(self, asked: dict[str, Any], log: int) -> int:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.setsid()
        os.dup2(self._alive, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.closerange(3, 256)
        os.environ.update(asked["env"])
        if not self._may_fork:
            os.execv(sys.executable, [sys.executable, "-X", "faulthandler", "-c", _FRESH, *asked["words"]])
        faulthandler.enable()
        return main(asked["words"])

    def kill(self, job_id: str, number: int) -> None:
        for pid, one in self._ids.items():
            if one == job_id:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, number)

    def reap(self) -> None:
        for pid in list(self._ids):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)  # what the job has begun ends with it
                self._say(id=self._ids.pop(pid), code=os.waitstatus_to_exitcode(status))

    def end_all(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            for job_id in self._ids.values():
                self.kill(job_id, number)
            until = time.monotonic() + _GRACE_S
            while self._ids and time.monotonic() < until:
                self.reap()
                time.sleep(0.02)

    def _say(self, **event: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(self._out, json.dumps(event).encode() + b"\n")


def serve() -> None:
    """The server's process: standard input and output are the other's ends."""
    out = os.dup(1)
    os.set_inheritable(out, False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # of the terminal's group: the end of the input is what counts
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(woken)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    server = _Server(out)
    server._say(ready=server._may_fork)
    waiting = b""
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        selector.register(wake, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fd == wake:
                    with contextlib.suppress(BlockingIOError):
                        os.read(wake, 4096)
                    server.reap()
                    continue
                read = os.read(0, 65536)
                if not read:
                    server.end_all()
                    return
                *lines, waiting = (waiting + read).split(b"\n")
                for line in lines:
                    asked = json.loads(line)
                    if "kill" in asked:
                        server.kill(asked["kill"], asked["signal"])
                    else:
                        server.begin(asked)
