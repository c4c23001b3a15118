"""Faults as they happen: processes that are killed, files that rot, a server that drips or forgets; all of it for real."""

from __future__ import annotations

import http.server
import json
import os
import resource
import signal
import sqlite3
import struct
import subprocess
import sys
import threading
import time

import pytest

from tests.support.shell import digits_words, make_shell
from tests.support.stores import ROOT, live_server

pytestmark = pytest.mark.slow
WORDS = ("-m", *digits_words("evaluation.num_samples=10", "sweep.floors=false"), "backend=quanto,torchao", "dtype=int8")
NAMES = {"quanto int8", "torchao int8"}
LIMIT_S = 240
"""Of a command here; those that must be quick have a limit of their own."""


def quantlab(shell, *words, before="", limit_s=LIMIT_S):
    """``quantlab WORDS`` in a process of its own; ``before`` is run in it first."""
    code = f"{before}\nfrom quantlab.cli import main\nmain({list(words)!r})"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=shell.folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )


def rows_of(done):
    assert done.returncode == 0, done.stderr[-2000:]
    return {row["name"]: row for row in json.loads(done.stdout)}


def numbers(rows):
    return {
        name: {k: v for k, v in row["metrics"].items() if k.startswith(("quality/", "quantization/"))}
        for name, row in rows.items()
    }


# -- a process that is killed

KILL = "import os, signal\ndef die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)\n"
STAGES = {
    "while the reference is written": "import quantlab.modules.kept as kept\nkept.os.replace = die",
    "while a layer is quantized": "from quantlab.backends import quanto\nquanto.quantize = die",
    "while a candidate is evaluated": "import quantlab.running.job as job\njob.evaluate = die",
    "while results are logged": "import quantlab.running.job as job\njob.log_evaluation = die",
    "while a job is ended": "from quantlab.tracking.run import Run\nRun.__exit__ = die",
}


@pytest.fixture(scope="module")
def undisturbed(template, trained, tmp_path_factory):
    """The numbers of a sweep that nothing happened to."""
    shell = make_shell(tmp_path_factory.mktemp("undisturbed") / "work", template, trained)
    return numbers(rows_of(quantlab(shell, *WORDS, "--json")))


@pytest.mark.parametrize("stage", STAGES)
def test_a_sweep_that_was_killed_is_whole_at_the_next_command(shell, stage, undisturbed):
    dead = quantlab(shell, *WORDS, "--json", before=KILL + STAGES[stage])
    assert dead.returncode == -signal.SIGKILL, dead.stderr[-2000:]
    rows = rows_of(quantlab(shell, *WORDS, "--json"))
    assert set(rows) == NAMES
    assert {row["status"] for row in rows.values()} == {"FINISHED"}
    assert shell.tracked("RUNNING") == {}
    assert numbers(rows) == undisturbed


# -- what lies on disk


def test_a_reference_that_rotted_is_computed_again_with_a_word(shell):
    whole = rows_of(quantlab(shell, *WORDS, "--json"))
    (kept,) = (shell.folder / "outputs" / "cache" / "reference").glob("*.safetensors")
    content = bytearray(kept.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 256] = bytes(255 - b for b in content[middle : middle + 256])
    kept.write_bytes(content)
    other = (*WORDS[:-2], "backend=gguf", "dtype=q8_0")
    done = quantlab(shell, *other, "--json")
    assert "it is made again, and what was there is kept as" in done.stderr
    assert rows_of(done)["gguf q8_0"]["status"] == "FINISHED"
    assert kept.is_file()
    again = rows_of(quantlab(shell, *WORDS, "--json"))
    assert numbers(again) == numbers(whole)


def test_a_folder_that_rotted_is_named_and_the_others_work(shell):
    rows_of(quantlab(shell, *WORDS, "--json"))
    events = sorted((shell.folder / "outputs" / "runs").glob("*torchao*/tracking/events.jsonl"))[-1]
    content = events.read_bytes()
    events.write_bytes(content[:40] + b"\0" + content[41:])
    done = quantlab(shell, "compare", "sweep=latest")
    assert done.returncode == 0, done.stderr[-2000:]
    again = quantlab(shell, *WORDS[:-2], "backend=gguf", "dtype=q8_0", "--json")  # which has something to send
    assert again.returncode == 0, again.stderr[-2000:]
    assert events.parts[-3] in again.stderr
    assert "Traceback" not in again.stderr + done.stderr


def test_a_store_that_was_emptied_is_filled_again(shell):
    rows_of(quantlab(shell, *WORDS, "--json"))
    before = set(shell.tracked())
    for file in (shell.folder / "outputs").glob("mlflow.db*"):
        file.unlink()
    rows = rows_of(quantlab(shell, *WORDS, "--json"))
    assert {row["resumed"] for name, row in rows.items() if name in NAMES} == {True}
    assert set(shell.tracked()) >= before


def test_a_server_that_forgot_everything_is_filled_again(shell, closed_port, tmp_path):
    place = tmp_path / "server"
    place.mkdir()
    words = (*WORDS, f"tracking.uri=http://127.0.0.1:{closed_port}", "--json")
    with live_server(closed_port, place):
        rows_of(quantlab(shell, *words))
    for file in place.glob("server.db*"):
        file.unlink()
    with live_server(closed_port, place):
        rows_of(quantlab(shell, *words))
    with sqlite3.connect(place / "server.db") as store:
        names = {name for (name,) in store.execute("select name from runs where status = 'FINISHED'")}
    assert names >= NAMES


# -- files of others


def test_49_bytes_that_claim_gigabytes_are_refused_at_once(shell):
    file = shell.folder / "matrix.gguf"
    name = b"general.x"
    file.write_bytes(
        b"GGUF"
        + struct.pack("<IQQ", 3, 0, 1)
        + struct.pack("<Q", len(name))
        + name
        + struct.pack("<II", 9, 8)
        + struct.pack("<Q", 2**33)[:4]
    )
    limit = f"import resource\nresource.setrlimit(resource.RLIMIT_AS, ({6 * 2**30}, {6 * 2**30}))"
    words = ("backend=gguf", "dtype=q4_k", "algorithm=imatrix", "quantization.imatrix_file=matrix.gguf")
    begun = time.monotonic()
    done = quantlab(shell, *digits_words("evaluation.num_samples=10"), *words, before=limit, limit_s=120)
    assert done.returncode in (1, 2)
    assert "quantization.imatrix_file" in done.stderr or "matrix.gguf" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - begun < 90
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 6 * 2**20


# -- places and servers


@pytest.mark.parametrize("place", ["/proc/quantlab", "/dev/null/outputs", "/dev/full/outputs"])
def test_a_place_that_the_system_refuses_is_named_before_any_work(shell, place):
    done = quantlab(shell, *digits_words("backend=quanto"), f"output_dir={place}", limit_s=60)
    assert done.returncode in (1, 2)
    assert f"output_dir={place}" in done.stderr
    assert "Traceback" not in done.stderr
    assert "evaluat" not in done.stderr


class Drip(http.server.BaseHTTPRequestHandler):
    """One byte a second, without end."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        for _ in range(300):
            try:
                self.wfile.write(b"{")
                self.wfile.flush()
            except OSError:
                return
            time.sleep(1)

    do_POST = do_GET

    def log_message(self, *args):
        """No noise."""


@pytest.fixture
def dripping():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Drip)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_server_that_drips_holds_nobody_for_long(shell, dripping):
    begun = time.monotonic()
    done = quantlab(shell, *digits_words("backend=quanto"), f"tracking.uri={dripping}", limit_s=120)
    assert done.returncode in (1, 2)
    assert dripping in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - begun < 75
