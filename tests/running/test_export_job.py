"""What a sweep on an engine exports: a job makes it, and the process that submits loads no model."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from quantlab import tracking
from quantlab.errors import NotQuantized, QuantlabError
from quantlab.exporting.folder import MANIFEST
from quantlab.planning.plan import plan
from quantlab.running import export_job
from quantlab.running.apart import Handed
from quantlab.running.attempts import read
from quantlab.running.workbench import Session
from quantlab.tracking.provenance import environment
from quantlab.vocabulary.reports import RunReport
from quantlab.vocabulary.schema import TrackingConfig
from tests.support.shell import digits_words

ROOT = Path(__file__).parents[2]

WORDS = ("-m", *digits_words("evaluation.num_samples=10", "device=cpu", "sweep.floors=false", "backend=torchao"))
EXPORTS = ("dtype=int8,int4", "export.path=out", "export.pick='latent_rel_mse<1000'")


@pytest.fixture
def session(tmp_path):
    store = tracking.no_store(TrackingConfig(), tmp_path)
    return Session(store=store, device="cpu", output_dir=tmp_path, advance=print, environment=environment())


@pytest.fixture
def request_(tmp_path):
    return plan([*WORDS[1:], *EXPORTS], multirun=True)


ASKED = {"target": "/t", "row": {"name": "a"}, "planned": {"w": 4}, "recorded": {"columns": []}, "picture": None}


def test_on_the_node_the_row_is_exported_with_what_its_run_recorded(session, request_, tmp_path, monkeypatch):
    seen = []

    def export_row(session, job, target, row, planned, recorded, picture):
        seen.append((job.name, target, row, planned, recorded, picture and picture.read_bytes()))
        return SimpleNamespace(metrics={"export/bytes": 3.0}, tags={"a": "b"}, lines=lambda: ["exported: /t"])

    monkeypatch.setattr(export_job, "export_row", export_row)
    asked = {**ASKED, "picture": base64.b64encode(b"png").decode()}
    assert export_job.export_here(session, request_.jobs[0], tmp_path, asked) == 0
    assert seen == [("a", "/t", {"name": "a"}, {"w": 4}, {"columns": []}, b"png")]
    assert read(tmp_path, "run.json")["status"] == "FINISHED"
    told = read(tmp_path, export_job.RESULT)
    assert (told["metrics"], told["tags"], told["lines"]) == ({"export/bytes": 3.0}, {"a": "b"}, ["exported: /t"])


def test_an_export_that_fails_on_the_node_says_why(session, request_, tmp_path, monkeypatch):
    def export_row(*_):
        raise NotQuantized("export: a layer has dtype int4 now")

    monkeypatch.setattr(export_job, "export_row", export_row)
    assert export_job.export_here(session, request_.jobs[0], tmp_path, ASKED) == 1
    assert not (tmp_path / export_job.RESULT).exists()
    told = read(tmp_path, "run.json")
    assert (told["status"], told["error"]) == ("FAILED", "export: a layer has dtype int4 now")


@pytest.mark.parametrize(("target", "where"), [("here", ""), ("away", "(on n7: it is not seen from here)")])
def test_who_submits_says_what_was_exported_and_where(session, request_, tmp_path, monkeypatch, capsys, target, where):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    row = RunReport(name=request_.jobs[0].name, status="FINISHED", protocol="diffusion")
    one = Handed(job=request_.jobs[0], key="", protocol="diffusion", folder=tmp_path / "job", is_no_row=True)
    one.folder.mkdir()
    given = []
    monkeypatch.setattr(export_job, "chosen", lambda *_: (request_.jobs[0], row))
    monkeypatch.setattr(export_job, "recorded_of", lambda *_: ({}, None))
    monkeypatch.setattr(export_job, "handed", lambda *_, **more: given.append(more["export"]) or one)
    told = {"metrics": {}, "tags": {}, "lines": [f"exported: {target}"], "host": "n7"}
    (one.folder / export_job.RESULT).write_text(json.dumps(told))
    monkeypatch.setattr(export_job, "run_handed", lambda *_: [row])
    request_.export.path = target
    export_job.export_far(session, request_, [row])
    assert given[0]["target"] == str(tmp_path / target)
    said = capsys.readouterr().err
    assert f"exported: {target}" in said
    assert where in said
    assert ("not seen from here" in said) == bool(where)
    (one.folder / export_job.RESULT).unlink()
    monkeypatch.setattr(export_job, "run_handed", lambda *_: [RunReport(name="export", status="FAILED", error="full")])
    with pytest.raises(QuantlabError, match=rf"^export.path=.*{target}: .* is not exported: full; its log is "):
        export_job.export_far(session, request_, [row])


@pytest.mark.slow
def test_a_sweep_on_an_engine_exports_without_a_model_where_it_was_given(shell):
    if importlib.util.find_spec("submitit") is None:
        pytest.skip("submitit is not installed")
    code = f"""
import sys
from quantlab.cli import main
try:
    main({[*WORDS, *EXPORTS, "launcher=submitit_local"]!r})
except SystemExit as ended:
    print("exit code", ended.code, "torch" in sys.modules)
else:
    print("exit code 0", "torch" in sys.modules)
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=shell.folder, env=env, capture_output=True, text=True, check=True, timeout=280
    )
    assert "exit code 0 False" in done.stdout, done.stderr
    name = json.loads((shell.folder / "out" / MANIFEST).read_text())["name"]
    assert f"{name}: exported: " in done.stderr
    assert shell.tracked()[name]["tags"]["export/outputs_identical"] == "yes"
    assert "export" not in shell.tracked()
