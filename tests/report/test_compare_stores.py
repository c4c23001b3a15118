"""quantlab compare on what other protocols, a live server, and interrupted sweeps have left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from quantlab.protocols.table import PROTOCOLS
from quantlab.report.reading import DatabaseReader, ServerReader
from quantlab.report.selection import children
from quantlab.tracking import adopt, get_run, open_store
from quantlab.tracking.tags import FORMER_PARENTS
from tests.support.comparison_store import add_run, errors, make_sweep
from tests.support.shell import Shell, digits_words
from tests.support.stores import ROOT, artifact, live_server, tracking_at
from tests.support.tiny_text_models import TEXT, save_bert, save_llama

WORDS = ("-m", *digits_words("evaluation.num_samples=10", "sweep.floors=false"))


def compared(shell, *words):
    code, out, err = shell("compare", *words, "--json")
    assert code == 0, err
    return json.loads(out)["groups"]


# -- other protocols


@pytest.fixture(scope="module")
def text_models(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    (root / "text.txt").write_text(TEXT)
    save = {"causal_lm": save_llama, "encoder": save_bert}
    return root / "text.txt", {family: save[family](root / family) for family in save}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "protocol"), [("causal_lm", "language"), ("encoder", "encoder")])
def test_text_models_are_compared_on_their_own_metrics(shell, text_models, family, protocol):
    file, folders = text_models
    words = [
        "-m",
        f"model={family}",
        f"model.path={folders[family]}",
        "dataset=text",
        f"dataset.path={file}",
        "evaluation.num_samples=12",
        "evaluation.context_length=32",
        "evaluation.num_bootstrap=50",
        "device=cpu",
        "backend=quanto",
        "dtype=int8,int2",
    ]
    shell.rows(*words)
    (group,) = compared(shell, "sweep=latest")
    rows = {r["name"]: r for r in group["rows"]}
    assert {"reference", "floor_bf16", "quanto int8", "quanto int2"} <= set(rows)
    assert rows["quanto int2"]["verdict"] == "worse"
    headline = PROTOCOLS[protocol].HEADLINE[0]
    assert group["metric"] == headline
    tracked = shell.tracked()
    for name in ("quanto int8", "quanto int2"):
        assert rows[name]["metrics"][headline]["value"] == tracked[name]["metrics"][f"quality/{headline}"]
    code, out, err = shell("compare", "sweep=latest")
    assert code == 0, err
    assert f"verdict on {headline}" in out
    page = next((shell.folder / "outputs" / "reports").glob("*.html")).read_text()
    assert "quanto int2" in page


# -- a live server


@pytest.mark.slow
def test_a_sweep_on_a_live_server_is_compared_and_gets_its_page(template, tmp_path, closed_port):
    """Runs are read through the server alone, and the page is an artifact of the sweep's run."""
    folder = tmp_path / "my work"
    with live_server(closed_port, tmp_path):
        uri = f"http://127.0.0.1:{closed_port}"
        sweep = make_sweep(folder, template, open_store(tracking_at(uri), tmp_path))
        shell = Shell(folder)
        typed = f"tracking.uri={uri}"
        (group,) = compared(shell, "sweep=latest", typed)
        assert group["front"] == ["int4 a", "int8 a"]
        page = folder / "outputs" / "reports" / f"small grid-{sweep.parent[:8]}.html"
        assert artifact(sweep.store, sweep.parent, f"reports/{page.name}") == page.read_bytes()
        code, _, err = shell("compare", "sweep=nothing", typed)
        assert (code, err.count("\n")) == (2, 1)
        assert f"try sweep={sweep.parent} (small grid)" in err
        code, out, err = shell("compare", "experiment=quantlab", typed, "--csv", "rows.csv")
        assert code == 0, err
        assert "int4 c" in (folder / "rows.csv").read_text()
        add_run(sweep, "other", errors(1e-4, 9), backend="gguf", size=3_000_000, ids=[f"x{i}" for i in range(40)])
        code, _, err = shell("compare", sweep.runs["other"], sweep.runs["int4 a"], typed)
        assert code == 2
        assert "have no sample in common" in err
        for words in (["compare", "sweep=latest"], ["backend=quanto", "dtype=int8", "sweep.dry_run=true"]):
            shell(*words, typed, "tracking.experiment=nobody")
        assert "nobody" not in ServerReader(sweep.store).experiments(), "who only reads makes nothing"


# -- sweeps that did not reach their end


def test_a_job_that_changes_hands_remembers_its_sweeps(base, template):
    sweep = make_sweep(base.parent / "handed over", template)
    run_id, reader = (
        sweep.runs["int8 a"],
        DatabaseReader(sweep.folder / "outputs" / "mlflow.db", f"sqlite:///{sweep.folder}/outputs/mlflow.db"),
    )
    first = sweep.parent
    for parent in ("second", "second", "third", first, "fourth"):
        adopt(sweep.store, run_id, parent)
    tags = get_run(sweep.store, run_id)["tags"]
    assert tags["mlflow.parentRunId"] == "fourth"
    assert set(tags[FORMER_PARENTS].split()) == {first, "second", "third"}
    (run,) = reader.by_id([run_id])
    for name in (first, "second", "third", "fourth"):
        parent = replace(run, run_id=name, artifact_uri=str(base / "none"))
        for each in (reader, ServerReader(sweep.store)):
            found = [r.run_id for r in children(each, parent)]
            assert run_id in found
            assert len(found) == len(set(found))


@pytest.mark.parametrize("content", [None, "{}"])
def test_a_run_whose_samples_are_gone_is_compared_by_what_it_logged(template, tmp_path, content):
    sweep = make_sweep(tmp_path / "mine", template)
    [file] = (sweep.folder / "outputs" / "mlartifacts").glob(f"{sweep.runs['int8 a']}/artifacts/samples.json")
    file.unlink()
    if content is not None:
        file.write_text(content)
    shell = Shell(sweep.folder)
    (group,) = compared(shell, "sweep=latest")
    assert "int8 a" in {row["name"] for row in group["rows"] if row.get("verdict")}
    code, _, err = shell("compare", "sweep=latest", "metric=judge_agreement")
    assert code == 2
    assert "sweep=latest: of 'int8 a' there is no judge_agreement of each sample" in err


@pytest.mark.parametrize("way", ["a place", "an id", "a link", "a pipe", "beside it"])
def test_a_page_is_written_beside_the_database_or_nowhere(base, template, tmp_path, way):
    """A store may be another's: its rows and links lead where they want."""
    sweep = make_sweep(tmp_path / "theirs", template)
    database, mine = sweep.folder / "outputs" / "mlflow.db", tmp_path / "mine"
    (mine / "artifacts").mkdir(parents=True)
    reader = DatabaseReader(database, f"sqlite:///{database}")
    [run] = reader.by_id([sweep.parent])
    own = database.parent / "mlartifacts" / run.run_id / "artifacts"
    if way == "a place":
        shutil.rmtree(own, ignore_errors=True)
        run = replace(run, artifact_uri=mine.as_uri())
    elif way == "an id":
        own.parent.mkdir(parents=True, exist_ok=True)
        run = replace(run, run_id="../../../mine")
    elif way == "a link":
        own.mkdir(parents=True, exist_ok=True)
        (own / "reports").symlink_to(mine)
    elif way == "a pipe":
        own.mkdir(parents=True, exist_ok=True)
        os.mkfifo(own / "recipe.yaml")
        assert reader.read_artifact(run, "recipe.yaml") is None, "it would be waited for without end"
    (tmp_path / "page.html").write_text("x")
    assert reader.add_artifact(run, tmp_path / "page.html", "reports") is (way in ("beside it", "a pipe"))
    assert [file for file in mine.rglob("*") if file.is_file()] == []


def test_a_server_names_no_folder_of_this_machine_for_the_page(base, template, tmp_path):
    sweep = make_sweep(tmp_path / "theirs", template)
    reader = ServerReader(sweep.store)  # whose artifacts are in files
    [run] = reader.by_id([sweep.parent])
    assert run.artifact_uri.startswith("file:")
    (tmp_path / "page.html").write_text("x")
    assert not reader.add_artifact(run, tmp_path / "page.html", "reports")
    assert list(sweep.folder.rglob("page.html")) == []


HANG = """
import pathlib, time
from quantlab.backends import gguf
gguf.quantize = lambda *_, **__: (pathlib.Path("hanging").touch(), time.sleep(600))
"""


@pytest.mark.slow
def test_a_killed_sweep_keeps_its_jobs_in_its_comparison(shell, tmp_path):
    words = [*WORDS, "backend=quanto,gguf"]
    (tmp_path / "fault").mkdir()
    (tmp_path / "fault" / "sitecustomize.py").write_text(HANG)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path / 'fault'}"}
    sweep = subprocess.Popen([sys.executable, "-m", "quantlab", *words, "-q"], env=env, cwd=shell.folder)
    try:
        while not (shell.folder / "hanging").exists():
            assert sweep.poll() is None
    finally:
        sweep.send_signal(signal.SIGKILL)
        sweep.wait()
    killed = shell.tracked("RUNNING")["sweep"]["run_id"]
    shell.rows(*words)
    (group,) = compared(shell, f"sweep={killed}")
    assert [r["name"] for r in group["rows"]] == ["quanto int8"]
    (group,) = compared(shell, "sweep=latest")
    assert {r["name"] for r in group["rows"]} == {"quanto int8", "gguf q8_0"}


# -- the judge


@pytest.mark.slow
def test_another_judge_is_another_measure(shell):
    """The same weights beside another judge: neither resumed from, nor in one column with, the first."""
    from safetensors.torch import load_file, save_file

    from quantlab.modules.layers import state_digest

    words = [*WORDS, "backend=quanto", "dtype=int8,int4"]
    first = shell.rows(*words)
    [folder] = [f for f in (shell.folder / "outputs" / "cache" / "models").iterdir() if f.is_dir()]
    other = shutil.copytree(folder, shell.folder / "other")
    state = load_file(other / "judge.safetensors")
    state["head.bias"] += 0.5
    save_file(state, other / "judge.safetensors", metadata={"weights_sha256": state_digest(state)})
    second = shell.rows(*words, f"model.path={other}")
    assert [r["resumed"] for r in second.values()] == [False, False]
    tags = [get_run(shell.store, rows["quanto int8"]["run_id"])["tags"] for rows in (first, second)]
    assert tags[0]["quantlab.weights_sha256"] == tags[1]["quantlab.weights_sha256"]
    assert tags[0]["quantlab.judge_sha256"] != tags[1]["quantlab.judge_sha256"] == state_digest(state)
    code, _, err = shell("compare", first["quanto int8"]["run_id"], second["quanto int4"]["run_id"])
    assert code == 2
    assert "not comparable" in err
    assert len(compared(shell, "experiment=quantlab")) == 2

    shutil.rmtree(other)
    code, out, err = shell("reproduce", second["quanto int4"]["run_id"], "--json")
    assert code == 0, err
    assert json.loads(out)["verdict"] == "identical"
    assert not [c for c in json.loads(out)["changes"] if "judge" in c["what"]]
