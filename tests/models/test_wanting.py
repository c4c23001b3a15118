"""A pipeline that lacks a package names it as it is installed, whenever and however Diffusers says so."""

from __future__ import annotations

import functools
import importlib.util
import sys

import diffusers
import pytest

from quantlab.errors import MissingPackage, ModelError
from quantlab.models import pipeline_call
from quantlab.models.diffusers_pipeline import load, look
from quantlab.models.wanting import wanting
from quantlab.vocabulary.schema import EvaluationConfig, ModelConfig
from tests.support.tiny_images import flux

SOURCE = """
def is_torchvision_available(): return False
if is_torchvision_available():
    from torchvision import transforms
    from .processor import Processor
if is_torchvision_available() and True:
    import cv2
def use(name): return eval(name)
def resize(): return transforms
def process(): return Processor
def look(): return cv2
def broken(): return nothing
"""


@pytest.fixture
def guarded(tmp_path):
    (tmp_path / "guarded.py").write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("guarded", tmp_path / "guarded.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["guarded"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["guarded"]


@pytest.mark.parametrize(
    ("name", "package"), [("resize", "torchvision"), ("process", "torchvision"), ("look", "opencv-python")]
)
def test_a_name_that_a_package_would_have_brought(guarded, name, package):
    """As Cosmos' ``transforms``: a package of that name is another one."""
    told = rf"^model=a: B needs the package {package}, which is not installed; pip install {package}\b"
    with pytest.raises(MissingPackage, match=told), pipeline_call._told_as_ours("a", "B", ["prompt"], 1):
        getattr(guarded, name)()


def test_a_name_that_no_package_brings_is_no_package(guarded):
    with pytest.raises(NameError, match="nothing"), pipeline_call._told_as_ours("a", "B", ["prompt"], 1):
        guarded.broken()


@pytest.mark.parametrize(
    ("text", "name", "package"),
    [
        ("\nC requires the OpenCV library. You can install it with pip: `pip\ninstall opencv-python`\n", None, "opencv-python"),
        ("`cosmos_guardrail` is not installed. Please install it: `pip install cosmos_guardrail`.", None, "cosmos_guardrail"),
        ("No module named 'cv2.data'", "cv2.data", "opencv-python"),
    ],
)  # fmt: skip
def test_what_an_import_says(text, name, package):
    kind = ImportError if name is None else ModuleNotFoundError
    told = wanting("model.path=x", "B", kind(text, name=name))
    assert str(told) == f"model.path=x: B needs the package {package}, which is not installed; pip install {package}"


def test_a_package_that_is_there_and_too_old_is_not_called_missing():
    error = ImportError("cannot import name 'T' from 'transformers.models'", name="transformers.models")
    told = wanting("model=a", "B", error)
    assert type(told) is ModelError
    assert str(told).startswith("model=a: B needs what the installed transformers does not have (cannot import name")
    assert "(no reason)" in str(wanting("model=a", "B", ImportError("no reason")))


@pytest.mark.parametrize(
    ("error", "package"),
    [(ImportError("You can install it with pip: `pip install opencv-python`"), "opencv-python"), (None, "torchvision")],
)
def test_one_that_cannot_be_made_is_refused_before_its_weights(error, package, guarded, tmp_path, monkeypatch):
    """As ConsisID, OmniGen and Cosmos: their constructors want what is not there."""
    flux().save_pretrained(tmp_path)

    @functools.wraps(diffusers.FluxPipeline.__init__)
    def init(self, **parts):
        if error is not None:
            raise error
        guarded.process()

    monkeypatch.setattr(diffusers.FluxPipeline, "__init__", init)
    config = ModelConfig(family="diffusers", path=str(tmp_path))
    told = rf"^model\.path=.*: FluxPipeline needs the package {package}, which is not installed; pip install {package}"
    with pytest.raises(MissingPackage, match=told):
        look(config, EvaluationConfig(height=32, width=32))
    with pytest.raises(MissingPackage, match=told):
        load(config, "cpu", tmp_path / "cache")
