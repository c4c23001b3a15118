"""What a run was made with."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from quantlab.errors import ConfigError
from quantlab.tracking import provenance


def test_git_state(tmp_path: Path) -> None:
    assert provenance.git_state(tmp_path) is None
    assert provenance.git_state(tmp_path / "absent") is None

    def git(*words: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    git("init")
    (tmp_path / "unknown").mkdir()
    assert provenance.git_state(tmp_path) is None  # no commit yet
    (tmp_path / "a").write_text("1\n")
    git("add", "a")
    git("commit", "-m", "one")
    clean = provenance.git_state(tmp_path)
    assert clean is not None
    assert (len(clean["sha"]), clean["dirty"], clean["diff_sha256"]) == (40, False, None)
    assert provenance.git_state(tmp_path / "unknown") is None  # in the checkout's folder, and not of it
    digests = set()
    for text in ("2\n", "3\n", "2\n"):
        (tmp_path / "a").write_text(text)
        state = provenance.git_state(tmp_path)
        assert state is not None
        assert (state["sha"], state["dirty"]) == (clean["sha"], True)
        digests.add(state["diff_sha256"])
    assert len(digests) == 2
    (tmp_path / "a").write_text("1\n")
    (tmp_path / "new").write_text("")
    assert (provenance.git_state(tmp_path) or {})["dirty"] is True


def test_a_checkout_that_is_asked_runs_nothing(tmp_path: Path) -> None:
    """An environment in a downloaded project is below that project's .git, whose settings name programs."""
    mark, program = tmp_path / "was_run", tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch {mark}\n")
    program.chmod(0o755)
    (tmp_path / "hooks").mkdir()
    shutil.copy(program, tmp_path / "hooks" / "post-index-change")
    inside = tmp_path / "project" / ".venv" / "package"
    inside.mkdir(parents=True)
    (inside / "a.txt").write_text("1")
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]

    def git(*words: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path / "project"), *identity, *words], check=True, capture_output=True)

    git("init")
    git("commit", "--allow-empty", "-m", "one")
    for name, value in (("fsmonitor", program), ("hooksPath", tmp_path / "hooks")):
        git("config", f"core.{name}", str(value))
    git("config", "diff.external", str(program))
    assert provenance.git_state(inside) is None
    git("add", ".")
    git("commit", "-m", "two")
    mark.unlink(missing_ok=True)
    (inside / "a.txt").write_text("2")
    assert (provenance.git_state(inside) or {})["dirty"] is True
    assert not mark.exists()


def test_environment_is_plain_and_names_no_host(tmp_path: Path) -> None:
    import mlflow
    import torch

    environment = provenance.environment(tmp_path)
    assert set(environment) == {"versions", "git", "hardware"}
    assert environment["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert environment["versions"]["mlflow"] == mlflow.__version__
    assert environment["hardware"]["torch_threads"] == torch.get_num_threads()
    assert len(environment["hardware"]["gpus"]) == torch.cuda.device_count()
    assert socket.gethostname() not in json.dumps(environment)


def test_what_chooses_kernels_is_part_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """By it a repetition tells of another processor, or of arithmetic that its user chose."""
    before = provenance.environment()["hardware"]
    assert before["processor"] == provenance.arithmetic("cpu")["processor"]
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    assert {k: v for k, v in provenance.hardware().items() if v != before.get(k)}.keys() == {"variables"}


def test_what_loads_checkpoints_of_others_is_part_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    real = provenance.metadata.version
    monkeypatch.setattr(provenance.metadata, "version", lambda name: "7.0" if name == "gptqmodel" else real(name))
    provenance._READ.clear()
    try:
        assert provenance.versions()["gptqmodel"] == "7.0"
    finally:
        provenance._READ.clear()


def test_a_package_that_is_installed_meanwhile_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook's kernel outlives what is installed beside it."""

    def install(version: str) -> None:
        for old in tmp_path.glob("*.dist-info"):
            shutil.rmtree(old)
        folder = tmp_path / f"quantlab_of_a_test-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: quantlab-of-a-test\nVersion: {version}\n")
        (folder / "RECORD").write_text("quantlab_of_a_test/part/__init__.py,,\n")
        os.utime(tmp_path, (0, next(seconds)))  # a kernel's clock may not tick between two of these

    part = tmp_path / "quantlab_of_a_test" / "part"
    part.mkdir(parents=True)
    (part / "__init__.py").touch()
    seconds = itertools.count()
    monkeypatch.setattr(provenance, "_READ", {})
    monkeypatch.setattr(provenance, "_PACKAGES", ("quantlab-of-a-test",))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "quantlab-of-a-test" not in provenance.versions()
    for version in ("1.0", "1.1"):
        install(version)
        assert provenance.versions()["quantlab-of-a-test"] == version
    monkeypatch.setitem(sys.modules, "quantlab_of_a_test.part", sys)
    assert provenance.versions()["quantlab-of-a-test"] == "1.1"
    install("1.2")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"^quantlab-of-a-test: 1\.1 is loaded, and 1\.2 .*; restart Python"):
            provenance.versions()
