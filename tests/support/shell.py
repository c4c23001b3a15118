"""The command line as a function, in a folder of its own, on a model that is small enough to run in a second."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from quantlab.cli import main
from quantlab.tracking import Store, find_runs, open_store
from quantlab.vocabulary.schema import TrackingConfig

TINY = {"num_train_steps": 20, "train_batch_size": 16, "num_layers": 1}
"""Overrides of ``model.*`` for the digits model that the session trains once: 256 wide, so that every format fits."""


@dataclass(frozen=True)
class Shell:
    """The command line in a folder of its own."""

    folder: Path

    def __call__(self, *words: str) -> tuple[int, str, str]:
        """Run ``quantlab WORDS`` there; exit code, stdout, stderr."""
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.chdir(self.folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as ended,
        ):
            main(list(words))
        return int(ended.value.code or 0), out.getvalue(), err.getvalue()

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


def make_shell(folder: Path, template: Path, trained: Path) -> Shell:
    """``quantlab`` in a fresh folder that has a store and the tiny digits model."""
    (folder / "outputs").mkdir(parents=True)
    shutil.copyfile(template, folder / "outputs" / "mlflow.db")
    shutil.copytree(trained, folder / "outputs" / "cache")
    return Shell(folder)


def digits_words(*more: str) -> list[str]:
    """Overrides that make a run on the tiny digits model last a second."""
    return [
        *(f"model.{k}={v}" for k, v in TINY.items()),
        "evaluation=quick",
        "evaluation.num_inference_steps=2",
        "evaluation.num_bootstrap=50",
        "evaluation.num_teacher_forced=2",
        *more,
    ]


def pipeline_words(device: str, *more: str) -> list[str]:
    """Overrides that make a run on a tiny pipeline short, with calibration data that are there already."""
    return [
        f"device={device}",
        "evaluation.num_samples=4",
        "evaluation.num_inference_steps=2",
        "evaluation.num_teacher_forced=1",
        "evaluation.num_bootstrap=50",
        "evaluation.height=32",
        "evaluation.width=32",
        "calibration.num_samples=4",
        "calibration.batch_size=2",
        "sweep.floors=false",
        *more,
    ]


def text_words(device: str, *more: str) -> list[str]:
    """The same for a tiny model of text, whose calibration text is a file."""
    return [
        f"device={device}",
        "evaluation.num_samples=6",
        "evaluation.batch_size=2",
        "evaluation.context_length=32",
        "evaluation.num_bootstrap=50",
        "calibration=text",
        "calibration.num_samples=8",
        "calibration.context_length=32",
        "sweep.floors=false",
        *more,
    ]
