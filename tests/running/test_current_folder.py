"""Modules that lie in the current folder, as in one that was downloaded: no process that quantlab begins imports them.

Its own command does not either; Python does, unless it is told not to, for ``-c`` and ``-m``.
"""

import contextlib
import subprocess
import sys

import pytest

from quantlab.backends.gguf.kernels import logits_of
from quantlab.backends.modelopt import extensions
from quantlab.errors import ModelError
from quantlab.running import node
from quantlab.running.attempts import has_ended
from quantlab.running.engines import forking
from quantlab.running.engines.slurm import parameters
from quantlab.running.engines.submitted import Submitted
from quantlab.running.scheduler import Scheduler
from quantlab.vocabulary.launching import SlurmSettings, SubmititSettings
from tests.support.engines import make_job, stand_in

TEXT = """
import importlib, sys
open({mark!r}, "w").close()
sys.path[:] = [place for place in sys.path if place not in ("", {here!r})]
del sys.modules[__name__]
sys.modules[__name__] = importlib.import_module(__name__)
"""
"""A module that does what it wants, and then is the one that was asked for."""
NAMES = ("json", "filelock", "submitit")
CODE = "import json; json.dumps(1)"


@pytest.fixture
def was_run(tmp_path, monkeypatch):
    """A file that is there once a module of the current folder was imported."""
    here, mark = tmp_path / "downloaded", tmp_path / "was_run"
    here.mkdir()
    for name in NAMES:
        (here / f"{name}.py").write_text(TEXT.format(mark=str(mark), here=str(here)))
    monkeypatch.chdir(here)
    return mark


def test_of_the_process_that_is_forked(monkeypatch, was_run):
    monkeypatch.setattr(forking, "_SERVER", CODE)
    server = forking.Forking()
    server.begin("job", was_run.parent, [], {})
    assert list(server.heard(30.0)) == [{}], "it is over"
    assert not was_run.exists()


def test_of_a_jobs_process(tmp_path, monkeypatch, was_run):
    monkeypatch.setattr(node, "_CODE", CODE)
    node.run(make_job(tmp_path / "runs", "job"), None, None, None)
    assert not was_run.exists()


@pytest.mark.slow
def test_of_submitits_process(tmp_path, monkeypatch, was_run):
    pytest.importorskip("submitit")
    stand_in(tmp_path / "site", monkeypatch)
    engine, job = Submitted(SubmititSettings(), tmp_path / "submitit", 1), make_job(tmp_path / "runs", "job")
    scheduler = Scheduler(engine, 1, lambda folder: None)
    scheduler.add([job])
    scheduler.run()
    assert has_ended(job) == "FINISHED"
    assert not was_run.exists()


def test_of_llama_cpps_process(tmp_path, was_run):
    with contextlib.suppress(ModelError):  # there is no such file
        list(logits_of(tmp_path / "no.gguf", [[1, 2]], 1))
    assert not was_run.exists()


def test_of_the_process_that_compiles(monkeypatch, was_run):
    monkeypatch.setattr(extensions, "_BUILD", CODE)
    extensions._run_build("MXFP8", 60)
    assert not was_run.exists()


def test_of_a_job_of_slurms(was_run):
    told = "\n".join(parameters(SlurmSettings())["slurm_setup"])
    subprocess.run(["bash", "-c", f"{told}\n{sys.executable} -c '{CODE}; import quantlab'"], check=True)
    assert not was_run.exists()
