"""What tests of the tracking store share: settings, reading an artifact back, processes of their own, a dead store."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from quantlab.errors import TrackingError
from quantlab.tracking import Store, get_artifact, open_store
from quantlab.vocabulary.schema import TrackingConfig

ROOT = Path(__file__).resolve().parents[2]


def tracking_at(uri: str = "sqlite:///outputs/mlflow.db", required: bool = True) -> TrackingConfig:
    return TrackingConfig(uri=uri, required=required)


def artifact(store: Store, run_id: str, name: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return get_artifact(store, run_id, name, Path(folder)).read_bytes()


def python(code: str, *words: str) -> subprocess.Popen[str]:
    """A process of its own that runs ``code`` with the names of this API at hand."""
    begin = (
        "import os, signal, sys, time\nfrom pathlib import Path\nfrom quantlab.vocabulary.schema import TrackingConfig\n"
        "from quantlab.tracking import *\nbase = Path(sys.argv[1])\nruns = base / 'outputs' / 'runs'\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", begin + code, *words], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def await_line(process: subprocess.Popen[str], wanted: str) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    assert line.startswith(wanted), (line, process.communicate()[1])
    return line.removeprefix(wanted).strip()


class Unplugged:
    """A client whose every call fails as MLflow's does when the server is gone; ``calls`` counts them."""

    def __init__(self) -> None:
        self.calls = 0

    def __getattr__(self, name: str) -> object:
        from mlflow.exceptions import MlflowException

        def fail(*_: object, **__: object) -> None:
            self.calls += 1
            raise MlflowException("API request failed: Max retries exceeded")

        return fail


@contextlib.contextmanager
def live_server(port: int, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """An MLflow server that keeps its runs in ``folder`` and answers; dead at the end. May be started there again."""
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--port",
        str(port),
        "--workers",
        "1",
        "--backend-store-uri",
        f"sqlite:///{folder}/server.db",
        "--artifacts-destination",
        str(folder / "kept"),
    ]
    with (folder / "server.log").open("a") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=folder)
    try:
        until = time.monotonic() + 180
        while True:
            with contextlib.suppress(TrackingError):
                open_store(tracking_at(f"http://127.0.0.1:{port}"), folder)
                break
            assert server.poll() is None, (folder / "server.log").read_text()[-2000:]
            assert time.monotonic() < until
            time.sleep(1)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
