"""What is known of a workbench from files alone: the same keys as with its weights in memory, or nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from quantlab.planning.plan import plan
from quantlab.running import known
from quantlab.running.known import recall, remember, request_digest
from quantlab.running.resume import content_key
from quantlab.tracking.tags import JOB_KEY, REFERENCE_KEY
from tests.support.shell import digits_words
from tests.support.stores import ROOT

WORDS = digits_words("backend=quanto", "dtype=int8,int4", "evaluation.num_samples=10", "tracking.save_checkpoint=false")


@pytest.fixture
def cache(shell, monkeypatch):
    monkeypatch.chdir(shell.folder)
    return shell.folder / "outputs" / "cache"


def jobs(*more):
    return plan([*WORDS, *more], multirun=True).jobs


@pytest.mark.slow
def test_keys_are_those_of_the_run_without_its_weights(shell, cache):
    assert recall(jobs()[0].config, cache) is None
    shell.rows("-m", *WORDS)
    runs, found = shell.tracked(), recall(jobs()[0].config, cache)
    assert found is not None
    every = {job.name: job for job in [*found.floor_jobs(jobs()[0].config), *jobs()]}
    assert set(every) == {"reference", "floor_bf16", "floor_batch", "quanto int8", "quanto int4"}
    for name, job in every.items():
        assert content_key(found, job, cache) == runs[name]["tags"][JOB_KEY]
        assert found.reference_key == runs[name]["tags"][REFERENCE_KEY]
    _without_torch(shell, found)
    _other_requests(cache)
    _other_files(cache)


def _without_torch(shell, found):
    """Another process, which imports no torch."""
    code = f"""
import json, sys
from pathlib import Path
from quantlab.planning.plan import plan
from quantlab.running.known import recall
found = recall(plan({WORDS!r}, multirun=True).jobs[0].config, Path("outputs/cache"))
print(json.dumps([found and found.reference_key, "torch" in sys.modules]))
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=shell.folder, env=env, capture_output=True, text=True, check=True, timeout=120
    )
    assert json.loads(done.stdout) == [found.reference_key, False]


def _other_requests(cache):
    """Each key that the reference depends on, and what computes."""
    first = jobs()[0].config
    for word in ("dataset.seed=1", "evaluation.num_inference_steps=3", "model.dtype=bfloat16", "num_threads=7"):
        assert recall(jobs(word)[0].config, cache) is None, word
    assert recall(jobs("evaluation.num_inference_steps=2")[0].config, cache) == recall(first, cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATEN_CPU_CAPABILITY", "default")
        assert recall(first, cache) is None
    with pytest.MonkeyPatch.context() as patch:  # what is set to quiet a library
        patch.setenv("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "0")
        assert recall(first, cache) is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(known, "code_digest", lambda: "another version")
        assert recall(first, cache) is None
    for engine in ("slurm", "submitit_local"):
        assert recall(jobs(f"launcher={engine}")[0].config, cache) is None, "a node may be another machine"


def _other_files(cache):
    """Weights that were changed where they lie, also with the times of those before; a note that was changed."""
    first = jobs()[0].config
    (note,) = (cache / "known").glob("*.json")
    kept = note.read_text()
    note.write_text(kept.replace("diffusion", "language"))
    assert recall(first, cache) is None
    note.write_text(kept)
    assert recall(first, cache) is not None
    (weights,) = [file for file in (cache / "models").rglob("model.safetensors") if request_digest(first, cache)][:1]
    before, content = weights.stat(), weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert recall(first, cache) is None
    shutil.rmtree(cache / "models")
    assert request_digest(first, cache) is None, "not trained yet"


def test_threads_that_somebody_set_are_no_note(shell, cache):
    shell.rows("-m", *WORDS, "sweep.floors=false")
    config = jobs()[0].config
    found = recall(config, cache)
    made = {**found.made, "arithmetic": {**found.made["arithmetic"], "threads": 63}}
    shutil.rmtree(cache / "known")
    remember(config, cache, replace(found, made=made))
    assert recall(config, cache) is None


def test_threads_that_were_set_by_hand_are_seen(shell, cache):
    """In Python: the rows of one thread are not those of two, though the same words ask for both."""
    import torch

    before = torch.get_num_threads()
    words = (*WORDS, "sweep.floors=false")
    first = shell.rows("-m", *words)
    assert all(row["resumed"] for row in shell.rows("-m", *words).values())
    try:
        torch.set_num_threads(before + 1)
        assert recall(jobs()[0].config, cache) is None
        again = shell.rows("-m", *words)
    finally:
        torch.set_num_threads(before)
    assert not any(row["resumed"] for row in again.values())
    assert {row["run_id"] for row in again.values()}.isdisjoint(row["run_id"] for row in first.values())
    assert recall(jobs()[0].config, cache) is not None


def test_a_hub_id_that_may_have_moved_on_is_not_known(cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    (job,) = plan(["model=causal_lm", "model.path=owner/name", "dataset=text", f"dataset.path={__file__}"]).jobs
    assert request_digest(job.config, cache) is None
