"""A backend in another version than its capability rows were probed on says so, once, and in the run."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from torch import nn

import quantlab
from quantlab.backends import table
from quantlab.tracking import provenance
from tests.support.shell import digits_words

VERSION = metadata.version


@pytest.fixture
def another_quanto(monkeypatch):
    def version(name):
        return "0.3.0" if name == "optimum-quanto" else VERSION(name)

    monkeypatch.setattr(metadata, "version", version)
    forget()
    yield
    forget()


def forget():
    """What this process read of versions: later tests would meet another quanto, and their processes would not."""
    provenance._READ.clear()
    for cached in (table.unprobed, table.warn_unprobed):
        cached.cache_clear()


def test_the_versions_are_those_of_the_extras():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    for name, offer in table.offers().items():
        for package, version in offer.probed.items():
            assert f"{package}=={version}" in extras[name]


@pytest.mark.parametrize("installed", ["0.2.7", "0.2.7+cpu"])
def test_a_build_of_the_same_version_is_the_same(monkeypatch, installed):
    monkeypatch.setattr(metadata, "version", lambda name: installed)
    table.unprobed.cache_clear()
    assert table.unprobed("quanto") == ""
    table.unprobed.cache_clear()


def test_python_is_told_once(another_quanto, capsys):
    for _ in range(2):
        quantlab.quantize(nn.Sequential(nn.Linear(32, 32)), quantlab.QuantoConfig("int8"))
    said = capsys.readouterr().err
    assert re.findall(r"backend=quanto: optimum-quanto 0.3.0 \(probed: 0.2.7\)", said) == [
        "backend=quanto: optimum-quanto 0.3.0 (probed: 0.2.7)"
    ]
    assert "warning" in said
    quantlab.quantize(nn.Sequential(nn.Linear(32, 32)), quantlab.TorchAoConfig("int8wo"))
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_the_run_says_it(another_quanto, shell):
    shell.rows(*digits_words("backend=quanto", "dtype=int8"))
    runs = shell.tracked()
    assert runs["quanto int8"]["tags"]["quantlab.unprobed"] == "optimum-quanto 0.3.0 (probed: 0.2.7)"
    shell.rows(*digits_words("backend=torchao", "dtype=int8"))
    assert "quantlab.unprobed" not in shell.tracked()["torchao int8"]["tags"]
