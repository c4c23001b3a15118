"""A Ray cluster of two nodes on this machine, for tests with the real daemons."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile

import psutil

OURS = "QUANTLAB_TEST_RAY"
"""In the environment of a test's own cluster: its address."""
ALONE = ["unshare", "--mount", *(["--map-root-user"] if os.getuid() else [])]
"""A process that mounts what it likes, seen by nobody else."""


@contextlib.contextmanager
def two_nodes(folder, monkeypatch):
    """Its address. The nodes see an empty folder where ``folder/here`` is (if this user may mount), and end with the context."""
    import ray

    (folder / "here").mkdir()
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_TMPDIR", tempfile.gettempdir())  # its sockets want a short path
    monkeypatch.setenv("RAY_health_check_period_ms", "1000")
    monkeypatch.setenv("RAY_health_check_initial_delay_ms", "1000")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([os.environ.get("PYTHONPATH", ""), os.path.dirname(ray.__path__[0])])
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    words = f"{sys.executable} -m ray.scripts.scripts start --num-cpus=1 --disable-usage-stats"
    memory = "--object-store-memory=100000000"
    monkeypatch.setenv(OURS, address)
    hidden = f"mount -t tmpfs none {folder / 'here'}"
    may_hide = not subprocess.run([*ALONE, "sh", "-c", hidden], capture_output=True, check=False).returncode
    try:
        for name, more in {
            "a": f"--head --port={address.split(':')[1]} --include-dashboard=false",
            "b": f"--address={address}",
        }.items():
            (folder / name).mkdir()
            start = f"exec {words} {memory} {more}"
            command = [*ALONE, "sh", "-c", f"{hidden} && {start}"] if may_hide else ["sh", "-c", start]
            env = {**os.environ, "TMPDIR": str(folder / name)}
            subprocess.run(command, check=True, capture_output=True, timeout=180, env=env)
        yield address
    finally:
        with contextlib.suppress(Exception):
            ray.shutdown()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(OURS) == address and process.pid != os.getpid():
                    process.kill()
