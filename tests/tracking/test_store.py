"""The tracking store as users meet it: what is written is what is read, and how a run ends."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from quantlab.errors import MetricUndefined, TrackingError
from quantlab.tracking import (
    Store,
    close_orphans,
    find_records,
    find_runs,
    get_artifact,
    get_run,
    push_pending,
)
from quantlab.tracking.values import flatten
from tests.support.stores import artifact, await_line, python

# -- what is written is what is read


def test_everything_comes_back(store: Store, runs: Path, base: Path) -> None:
    parent = store.start_run("sweep", runs / "sweep", {}, {"quantlab.kind": "sweep"})
    params = {"quantization": {"backend": "torchao", "group_size": 64, "layers": ["a", "b"]}, "seed": 0, "path": None}
    with store.start_run("int4", runs / "int4", params, {"quantlab.key": "k1"}, parent.run_id) as run:
        run.stage = "evaluate"
        run.log_metrics({"quality/kld_mean": np.float32(0.25), "quality/kld_mean/n": 10, "memory/absent": None})
        run.log_json({"a": [1, {"b": "ü"}]}, "recipe.json")
        run.log_table({"name": ["x", "y"], "bits": [4.5, 16.0]}, "layers.json")
        run.log_image_grid(np.arange(2 * 3 * 8 * 8, dtype=np.uint8).reshape(2, 3, 8, 8, 1), "images/samples.png")
        (base / "notes.txt").write_text("from outside")
        run.log_artifact(base / "notes.txt", "texts")
    parent.finish("FINISHED")

    found = get_run(store, run.run_id)
    assert found["name"] == "int4"
    assert found["status"] == "FINISHED"
    assert found["params"] == {
        "quantization.backend": "torchao",
        "quantization.group_size": "64",
        "seed": "0",
        "quantization.layers": '["a", "b"]',
        "path": "null",
    }
    assert found["metrics"] == {"quality/kld_mean": 0.25, "quality/kld_mean/n": 10.0}
    assert found["tags"]["mlflow.parentRunId"] == parent.run_id
    assert found["tags"]["quantlab.stage"] == "done"
    assert get_run(store, parent.run_id)["tags"]["quantlab.stage"] == "done"
    assert json.loads(found["tags"]["mlflow.loggedArtifacts"]) == [{"path": "layers.json", "type": "table"}]
    assert json.loads(artifact(store, run.run_id, "recipe.json")) == {"a": [1, {"b": "ü"}]}
    assert json.loads(artifact(store, run.run_id, "layers.json")) == {
        "columns": ["name", "bits"],
        "data": [["x", 4.5], ["y", 16.0]],
    }
    assert artifact(store, run.run_id, "texts/notes.txt") == b"from outside"
    kept = base / "outputs" / "mlartifacts" / run.run_id / "artifacts"
    assert {p.relative_to(kept).as_posix() for p in kept.rglob("*.*")} == {
        "recipe.json",
        "layers.json",
        "images/samples.png",
        "texts/notes.txt",
    }
    with pytest.raises(TrackingError, match=r"^absent\.json: run .* has no such artifact"):
        get_artifact(store, run.run_id, "absent.json", base)
    assert [r["run_id"] for r in find_runs(store, {"mlflow.parentRunId": parent.run_id})] == [run.run_id]

    record = json.loads((runs / "int4" / "run.json").read_text())
    assert record["status"] == "FINISHED"
    assert record["params"] == found["params"]
    assert record["metrics"] == {"quality/kld_mean": 0.25, "quality/kld_mean/n": 10.0}
    assert record["artifacts"] == ["recipe.json", "layers.json", "images/samples.png", "texts/notes.txt"]


def test_what_is_logged_together_is_sent_once_and_kept_at_once(store: Store, runs: Path, monkeypatch) -> None:
    """A file rewritten for each of a job's forty events makes the job wait for the disk, and says nothing new."""
    events, told = runs / "r" / "tracking" / "events.jsonl", runs / "r" / "run.json"
    with store.start_run("r", runs / "r", {}, {}) as run:
        sent, real = [], store.sync
        monkeypatch.setattr(store, "sync", lambda record: sent.append(1) or real(record))
        with contextlib.suppress(ZeroDivisionError), run.together():
            run.log_metrics({"a": 1})
            run.log_json({}, "b.json")
            with run.together():
                run.set_tags({"c": "d"})
            assert '"c":' in events.read_text().splitlines()[-1]
            assert json.loads(told.read_text())["metrics"] == {}
            assert not sent
            raise ZeroDivisionError
        assert len(sent) == 1
        assert json.loads(told.read_text())["tags"]["c"] == "d"
        assert get_run(store, run.run_id)["metrics"] == {"a": 1.0}
        run.log_metrics({"e": 2})
        assert len(sent) == 2
    assert len(sent) == 3, "how it ended, and that it ended"


def test_image_grid_keeps_every_pixel(store: Store, runs: Path) -> None:
    from PIL import Image

    images = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 16, 3), dtype=np.uint8)
    with store.start_run("images", runs / "images", {}, {}) as run:
        run.log_image_grid(images, "images/samples.png")
        with pytest.raises(TrackingError, match=r"uint8 of shape \(rows"):
            run.log_image_grid(images.astype(np.float32), "other.png")
    picture = np.asarray(Image.open(io.BytesIO(artifact(store, run.run_id, "images/samples.png"))))
    assert picture.shape == (2 * (64 + 2), 3 * (128 + 2), 3)
    tile = picture[66 + 1 : 66 + 65, 2 * 130 + 1 : 2 * 130 + 129]
    assert np.array_equal(tile[::8, ::8], images[1, 2])


def test_only_finished_runs_with_the_key_are_found(store: Store, runs: Path) -> None:
    ids = {}
    for number, (key, status) in enumerate([("k", "FINISHED"), ("k", "FAILED"), ("other", "FINISHED"), ("k", None)]):
        run = store.start_run(f"r{number}", runs / f"r{number}", {}, {"quantlab.key": key})
        ids[number] = run.run_id
        if status:
            run.finish(status)
    assert [r["run_id"] for r in find_runs(store, {"quantlab.key": "k"})] == [ids[0]]
    assert {r["run_id"] for r in find_runs(store, {"quantlab.key": "k"}, status=None)} == {ids[0], ids[1], ids[3]}
    assert [r["name"] for r in find_records(runs, {"quantlab.key": "k"})] == ["r0"]
    with pytest.raises(TrackingError, match="quote"):
        find_runs(store, {"quantlab.key": "' or 1 = 1"})


def test_unknown_run(store: Store, runs: Path) -> None:
    for run_id in ("0" * 32, "no such/id"):
        assert get_run(store, run_id) is None
        with pytest.raises(TrackingError, match=rf"^layers\.json: run {run_id} has no such artifact"):
            get_artifact(store, run_id, "layers.json", runs)


def test_flatten() -> None:
    nested = {"a": {"b": {"c": 1, "d": {}}, "e": [1, {"f": True}]}, "g": None, "h": True, "i": "text", "j": 1e-5}
    assert flatten(nested) == {
        "a.b.c": "1",
        "a.b.d": "{}",
        "a.e": '[1, {"f": true}]',
        "g": "null",
        "h": "true",
        "i": "text",
        "j": "1e-05",
    }


# -- what cannot be written


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -np.inf, np.float32("nan")])
def test_undefined_metric_is_named_and_nothing_is_logged(store: Store, runs: Path, bad: float) -> None:
    run = store.start_run("r", runs / "r", {}, {})
    with pytest.raises(MetricUndefined, match="^quality/kld_mean="):
        run.log_metrics({"quality/psnr_db": 1.0, "quality/kld_mean": bad})
    run.finish("FAILED")
    assert get_run(store, run.run_id)["metrics"] == {}


@pytest.mark.parametrize("key", ["a b*", "a[0]", "k=v", "a//b", "../x", "/x", "x/", "", ".", "ü", "k" * 251])
def test_names_the_store_would_refuse(store: Store, runs: Path, key: str) -> None:
    run = store.start_run("r", runs / "r", {}, {})
    with pytest.raises(TrackingError, match="^metric "):
        run.log_metrics({key: 1.0})
    with pytest.raises(TrackingError, match="^parameter "):
        run.log_params({key: 1})
    with pytest.raises(TrackingError, match="^tag "):
        run.set_tags({key: "x"})
    with pytest.raises(TrackingError, match="^tag "):
        store.start_run("s", runs / "s", {}, {key: "x"})
    run.finish("FINISHED")
    assert get_run(store, run.run_id)["metrics"] == {}


def test_large_batches_and_long_values(store: Store, runs: Path) -> None:
    text = "x" * 6001
    with store.start_run("r", runs / "r", {f"p{i}": i for i in range(250)}, {f"t{i}": i for i in range(150)}) as run:
        run.log_params({"long": text, "exact": "y" * 6000})
        run.log_metrics({f"m{i}": i for i in range(2001)})
        run.set_tags({"long": "z" * 9000})
    found = get_run(store, run.run_id)
    assert len(found["params"]) == 252
    assert len(found["metrics"]) == 2001
    assert found["params"]["exact"] == "y" * 6000
    assert found["params"]["long"].endswith("x ... (6001 characters; whole in params/long.txt)")
    assert len(found["params"]["long"]) == 6000
    assert artifact(store, run.run_id, "params/long.txt").decode() == text
    assert len(found["tags"]["long"]) == 5000
    assert found["tags"]["t149"] == "149"


def test_misuse_is_told(store: Store, runs: Path) -> None:
    run = store.start_run("r", runs / "r", {"a": 1}, {})
    run.log_params({"a": 1})
    with pytest.raises(TrackingError, match=r"^parameter 'a': is '1' already, not '2'"):
        run.log_params({"a": 2})
    with pytest.raises(TrackingError, match="different lengths"):
        run.log_table({"a": [1], "b": []}, "t.json")
    with pytest.raises(TrackingError, match="name it t.txt.json"):
        run.log_table({"a": [1]}, "t.txt")
    with pytest.raises(TrackingError, match="taken by the run's own record"):
        run.log_json({}, "run.json")
    with pytest.raises(TrackingError, match="is not a number"):
        run.log_metrics({"m": "fast"})
    with pytest.raises(TrackingError, match="no such file"):
        run.log_artifact(runs / "absent.bin")
    with pytest.raises(TrackingError, match="give each run a folder of its own$"):
        store.start_run("again", runs / "r", {}, {})
    with pytest.raises(TrackingError, match="^status=DONE"):
        run.finish("DONE")
    run.finish("FINISHED")
    with pytest.raises(TrackingError, match="has ended"):
        run.log_metrics({"m": 1})


# -- how a run ends


def test_exception_fails_the_run_with_its_stage(store: Store, runs: Path) -> None:
    run = store.start_run("r", runs / "r", {}, {})

    def job() -> None:
        with run:
            run.stage = "quantize"
            raise ValueError("boom " * 2000)

    with pytest.raises(ValueError, match="boom"):
        job()
    found = get_run(store, run.run_id)
    assert found["status"] == "FAILED"
    assert found["tags"]["quantlab.stage"] == "quantize"
    assert found["tags"]["quantlab.failure"].startswith("ValueError: boom")
    assert len(found["tags"]["quantlab.failure"]) == 5000
    assert "raise ValueError(" in artifact(store, run.run_id, "failure.txt").decode()
    record = json.loads((runs / "r" / "run.json").read_text())
    assert (record["status"], record["stage"], record["error"][:10]) == ("FAILED", "quantize", "ValueError")


def test_sigterm_fails_parent_and_child(store: Store, runs: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    parent = store.start_run("p", runs / "p", {}, {})
    child = store.start_run("c", runs / "c", {}, {}, parent.run_id)

    def job() -> None:
        with parent, child:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)  # the signal arrives here

    with pytest.raises(SystemExit) as ended:
        job()
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert get_run(store, child.run_id)["status"] == get_run(store, parent.run_id)["status"] == "FAILED"
    assert get_run(store, parent.run_id)["tags"]["quantlab.failure"].startswith("SIGTERM")


def test_a_thread_may_run_a_job(store: Store, runs: Path) -> None:
    ids = []

    def job() -> None:
        with store.start_run("r", runs / "r", {}, {}) as run:
            ids.append(run.run_id)

    thread = threading.Thread(target=job)
    thread.start()
    thread.join()
    assert get_run(store, ids[0])["status"] == "FINISHED"


@pytest.mark.slow
def test_killed_and_live_processes(store: Store, runs: Path, base: Path) -> None:
    """SIGKILL leaves RUNNING; the next start closes that run, and neither a live process's nor another host's."""
    code = (
        "run = open_store(TrackingConfig(), base).start_run('job', runs / sys.argv[2], {}, {})\n"
        "run.stage = 'load'\nprint('run', run.run_id, flush=True)\ntime.sleep(60)\n"
    )
    dead, live = python(code, str(base), "dead"), python(code, str(base), "live")
    dead_id, live_id = await_line(dead, "run"), await_line(live, "run")
    mine = store.start_run("mine", runs / "mine", {}, {})
    lost = store.start_run("lost", runs / "lost", {}, {})
    far = store.start_run("far", runs / "far", {}, {})
    lost_id, far_id = lost.run_id, far.run_id
    store.client.set_tag(lost_id, "quantlab.pid_started", "1.0")  # the pid was given to another process since
    store.client.set_tag(far_id, "quantlab.host", "elsewhere")
    store.client.set_tag(far_id, "quantlab.pid_started", "1.0")
    shutil.rmtree(runs / "lost")
    shutil.rmtree(runs / "far")
    dead.kill()
    dead.communicate()

    assert sorted(close_orphans(store, runs)) == ["job", "lost"]
    try:
        found = get_run(store, dead_id)
        assert found["status"] == get_run(store, lost_id)["status"] == "KILLED"
        assert found["tags"]["quantlab.failure"].startswith("the process ended")
        assert found["end_ms"] is not None
        for run_id in (live_id, mine.run_id, far_id):
            assert get_run(store, run_id)["status"] == "RUNNING"
        record = json.loads((runs / "dead" / "run.json").read_text())
        assert (record["status"], record["stage"]) == ("KILLED", "load")
        assert close_orphans(store, runs) == []
        assert push_pending(store, runs) == []
    finally:
        live.kill()
        live.communicate()


def test_a_torn_last_line_is_survived(store: Store, runs: Path) -> None:
    process = python(
        "run = Store('sqlite:///nowhere', None, '').start_run('r', runs / 'r', {'a': 1}, {})\n"
        "run.log_metrics({'m': 1})\n",
        str(runs.parents[1]),
    )
    assert process.wait() == 0, process.communicate()
    events = runs / "r" / "tracking" / "events.jsonl"
    with events.open("ab") as file:
        file.write(b'{"op": "metrics", "val')
    assert close_orphans(store, runs) == ["r"]
    found = find_runs(store, status="KILLED")
    assert [(r["name"], r["params"], r["metrics"]) for r in found] == [("r", {"a": "1"}, {"m": 1.0})]
    assert push_pending(store, runs) == []
