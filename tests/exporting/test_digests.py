"""A byte of an export that is another than when it was checked is noticed, wherever an export is read."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
from diffusers import DiTTransformer2DModel

import quantlab
from quantlab.errors import ModelError
from quantlab.exporting.folder import MANIFEST
from quantlab.exporting.push import push
from quantlab.models.exported import check_digests
from quantlab.models.foreign import load_part

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def written(exported):
    """The export's folder."""
    return exported.folder / "mine"


@pytest.fixture
def export(written, tmp_path):
    return shutil.copytree(written, tmp_path / "mine")


def flip(file, at=-100):
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def test_load_notices_one_bit_of_the_weights(export):
    quantlab.load(export)
    flip(export / WEIGHTS)
    with pytest.raises(ModelError, match=f"^path=.*: {WEIGHTS} is not as it was exported.*; copy or download") as said:
        quantlab.load(export)
    assert MANIFEST in str(said.value)


def test_load_notices_a_changed_configuration_and_takes_one_that_was_changed_on_purpose(export):
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps({**config, "norm_eps": 0.5}))
    with pytest.raises(ModelError, match=r"^path=.*: config\.json is not as it was exported"):
        quantlab.load(export)
    manifest = json.loads((export / MANIFEST).read_text())
    del manifest["sha256"]["config.json"]
    (export / MANIFEST).write_text(json.dumps(manifest))
    assert quantlab.load(export).config.norm_eps == 0.5


def test_an_export_without_digests_is_loaded_as_before(export):
    manifest = json.loads((export / MANIFEST).read_text())
    del manifest["sha256"]
    (export / MANIFEST).write_text(json.dumps(manifest))
    flip(export / WEIGHTS)
    quantlab.load(export)


def test_the_card_may_be_edited_and_other_files_put_beside(export):
    (export / "README.md").write_text("mine")
    (export / "notes.txt").write_text("mine")
    quantlab.load(export)


def test_a_damaged_export_is_not_uploaded(export):
    flip(export / WEIGHTS)
    with pytest.raises(ModelError, match=f"^push: {WEIGHTS} is not as it was exported"):
        push(export, "me/it")


def test_a_damaged_export_is_no_checkpoint(export):
    flip(export / WEIGHTS)
    own = DiTTransformer2DModel.from_config(json.loads((export / "config.json").read_text()))
    model = SimpleNamespace(components={"net": own}, device="cpu", dtype="float32")
    with pytest.raises(ModelError, match=f"^checkpoint=mine: {WEIGHTS} is not as it was exported"):
        load_part("checkpoint=mine", export, "net", model)


@pytest.mark.parametrize("place", ["", "net", "net/model.gguf"])
def test_parts_and_files_of_an_export_are_checked_as_well(tmp_path, place):
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "model.gguf").write_bytes(b"x")
    (tmp_path / "other.bin").write_bytes(b"x")
    wrong = "0" * 64
    (tmp_path / MANIFEST).write_text(json.dumps({"format": 1, "sha256": {"net/model.gguf": wrong, "other.bin": wrong}}))
    with pytest.raises(ModelError, match="^key: net/model.gguf") as said:
        check_digests("key", tmp_path / place)
    assert ("other.bin" in str(said.value)) == (place == "")


@pytest.mark.parametrize("content", ["", "[]", '{"sha256": 3}', '{"sha256": {"../x": 3}}', "\xff{"])
def test_a_manifest_that_says_no_digests_is_for_its_reader_to_judge(tmp_path, content):
    (tmp_path / "x").write_text("x")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / MANIFEST).write_bytes(content.encode("latin-1"))
    check_digests("key", tmp_path / "in")
