"""What several test files share: making MLflow's tables or training a model takes seconds, a copy nothing."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from quantlab.cli import main
from quantlab.experiment import DigitsModelConfig, TrackingConfig
from quantlab.tracking import Store, find_runs, open_store

TINY = {"num_train_steps": 20, "num_layers": 1}
"""Overrides of ``model.*`` for the digits model that the session trains once: 256 wide, so that every format fits."""


# -- tracking stores


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with its tables and no experiment of ours."""
    folder = tmp_path_factory.mktemp("template")
    open_store(TrackingConfig(uri="sqlite:///template.db", experiment="only in the template"), folder)
    return folder / "template.db"


@pytest.fixture
def base(template: Path, tmp_path: Path) -> Path:
    """A folder with a space in its name and a fresh store under the default address."""
    base = tmp_path / "my work"
    (base / "outputs" / "runs").mkdir(parents=True)
    shutil.copyfile(template, base / "outputs" / "mlflow.db")
    return base


@pytest.fixture
def store(base: Path) -> Store:
    return open_store(TrackingConfig(), base)


@pytest.fixture
def runs(base: Path) -> Path:
    return base / "outputs" / "runs"


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
    return port


@pytest.fixture
def mute_port() -> Iterator[int]:
    """A socket that accepts and never answers."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen(8)
        yield s.getsockname()[1]


# -- whole runs


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with the tiny digits model and its judge."""
    from quantlab.models import digits_dit

    cache = tmp_path_factory.mktemp("trained")
    digits_dit.load(DigitsModelConfig(**TINY), "cpu", cache)
    return cache


@dataclass
class Shell:
    """The command line in a folder of its own."""

    folder: Path
    capsys: pytest.CaptureFixture[str]

    def __call__(self, *words: str) -> tuple[int, str, str]:
        """Run ``quantlab WORDS``; exit code, stdout, stderr."""
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(words))
        out, err = self.capsys.readouterr()
        return int(ended.value.code or 0), out, err

    def rows(self, *words: str) -> dict[str, dict[str, Any]]:
        """The result rows of a request that succeeds, by name."""
        code, out, err = self(*words, "--json")
        assert code == 0, err
        return {row["name"]: row for row in json.loads(out)}

    @property
    def store(self) -> Store:
        return open_store(TrackingConfig(), self.folder)

    def tracked(self, status: str | None = "FINISHED") -> dict[str, dict[str, Any]]:
        """The runs in the store by name, the newest of each."""
        return {run["name"]: run for run in reversed(find_runs(self.store, status=status))}


@pytest.fixture
def shell(base: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    """``quantlab`` in a fresh folder that has a store and the tiny digits model."""
    shutil.copytree(trained, base / "outputs" / "cache")
    monkeypatch.chdir(base)
    monkeypatch.delenv("QUANTLAB_TRACEBACK", raising=False)
    return Shell(base, capsys)


@pytest.fixture
def digits_words() -> Callable[..., list[str]]:
    """Overrides that make a run on the tiny digits model last a second."""

    def words(*more: str) -> list[str]:
        return [*(f"model.{k}={v}" for k, v in TINY.items()), "evaluation=quick", "evaluation.num_inference_steps=2",
                "evaluation.num_bootstrap=50", "evaluation.num_teacher_forced=2", *more]

    return words
