"""Checkpoints by a Hub id: what is fetched of a repository, and that it is scored like a folder."""

from __future__ import annotations

import shutil

import pytest

from quantlab.errors import ModelError
from quantlab.models.foreign import sources_of
from quantlab.stages.foreign import load_candidate
from tests.support.hub import local_hub
from tests.support.tiny_text_models import load_llama


@pytest.fixture
def hub(foreign, tmp_path, monkeypatch):
    """Two repositories, one with files that are not to be fetched; (files that were fetched, the model)."""
    folder = shutil.copytree(foreign / "torchao_int8", tmp_path / "repository")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "modeling.py").write_text("raise SystemExit('it was run')")
    (tmp_path / "blocks").mkdir()
    shutil.copyfile(foreign / "q8_0.gguf", tmp_path / "blocks" / "q8_0.gguf")
    (tmp_path / "blocks" / "q2.gguf").write_bytes(b"another")
    model = load_llama(foreign / "llama", tmp_path)
    repositories = {"some/llama-int8": folder, "some/llama-gguf": tmp_path / "blocks"}
    with local_hub(repositories, tmp_path / "hub", monkeypatch) as fetched:
        yield fetched, model


def rows(found):
    return [(r.name, r.dtype, r.group_size, r.weight_bytes, r.weight_rel_error) for r in found.quantization.layers]


def test_a_repository_is_fetched_without_pickles_and_code(hub, foreign, tmp_path):
    fetched, model = hub
    found = load_candidate("some/llama-int8", model, ["model"], {}, tmp_path)
    assert rows(found) == rows(load_candidate(str(foreign / "torchao_int8"), model, ["model"], {}, tmp_path))
    assert {"some/llama-int8/config.json", "some/llama-int8/model.safetensors"} <= set(fetched)
    assert not [name for name in fetched if name.endswith((".bin", ".py"))]
    before = list(fetched)
    load_candidate("some/llama-int8", model, ["model"], {}, tmp_path)
    assert not [name for name in fetched[len(before) :] if name.endswith(".safetensors")]  # once


def test_one_file_of_a_repository(hub, foreign, tmp_path):
    fetched, model = hub
    found = load_candidate("some/llama-gguf/q8_0.gguf", model, ["model"], {}, tmp_path)
    assert rows(found) == rows(load_candidate(str(foreign / "q8_0.gguf"), model, ["model"], {}, tmp_path))
    assert set(fetched) == {"some/llama-gguf/q8_0.gguf"}


@pytest.mark.parametrize("name", ["nobody/nothing", "some/llama-gguf/none.gguf", "some/llama-gguf"])
def test_what_a_hub_has_not(hub, name):
    with pytest.raises(ModelError, match=rf"^checkpoint={name}: "):
        sources_of(name, ["model"], hub[1].components)
