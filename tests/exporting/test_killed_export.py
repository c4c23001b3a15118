"""``quantlab export`` killed on its way: what was in its place stays as it was, and the next one clears up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.shell import digits_words

ROOT = Path(__file__).parents[2]
WORDS = digits_words("evaluation.num_samples=10", "device=cpu", "sweep.floors=false")


def killed(folder: Path, is_time) -> None:
    """``quantlab export latest out`` until ``is_time(what is written beside)``, then SIGKILL for it and its children."""
    command = [sys.executable, "-m", "quantlab", "export", "latest", "out", "-q"]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while process.poll() is None:
            written = [f for part in folder.glob(".out.*.part") for f in part.rglob("*")]
            if list(folder.glob(".out.*.part")) and is_time(written):
                os.killpg(process.pid, signal.SIGKILL)
                break
            time.sleep(0.002)
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def contents(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.slow
def test_a_killed_command_leaves_the_old_folder_or_none(shell):
    shell.rows(*WORDS, "backend=quanto", "dtype=int8")
    killed(shell.folder, lambda written: True)
    assert not (shell.folder / "out").exists()
    assert len(list(shell.folder.glob(".out.*.part"))) == 1
    code, _, err = shell("export", "latest", "out", "-q")
    assert code == 0, err
    assert not list(shell.folder.glob(".out.*"))
    before = contents(shell.folder / "out")
    killed(shell.folder, lambda written: any(f.suffix == ".safetensors" for f in written))  # while it is checked
    assert contents(shell.folder / "out") == before
    code, _, err = shell("export", "latest", "out", "-q")
    assert code == 0, err
    assert not list(shell.folder.glob(".out.*"))
    weights = "diffusion_pytorch_model.safetensors"
    assert (shell.folder / "out" / weights).read_bytes() == before[weights]
