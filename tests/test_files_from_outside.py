"""Files of the user's with sizes that lie, ends that are missing and bytes that are no text: refused in words, at once."""

from __future__ import annotations

import io
import json
import struct
import time
import zipfile
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.io import wavfile

import quantlab
from quantlab.backends.gguf.header import check_header
from quantlab.backends.gguf.imatrix import InputSquares, read_imatrix, write_imatrix
from quantlab.backends.gguf.storage import _read
from quantlab.backends.stored import from_pretrained_config
from quantlab.datasets.pairs import _sound
from quantlab.datasets.prompts import MAX_PROMPT_CHARS, read_prompts
from quantlab.datasets.text import read_text
from quantlab.errors import ConfigError, ModelError, QuantlabError
from quantlab.modules.kept import Damaged, read_tree, write_tree
from quantlab.planning.plan import plan
from quantlab.planning.recipe import read_recipe
from quantlab.tracking.pictures import read_samples
from quantlab.vocabulary import files

VALUES = (0, 1, -1, 2**31, 2**63)


def raised_quickly(call, kinds):
    began = time.process_time()
    try:
        call()
    except kinds as error:
        assert time.process_time() - began < 2
        return str(error)
    assert time.process_time() - began < 2
    return ""


@pytest.fixture
def imatrix(tmp_path):
    squares = InputSquares(sums=np.ones((1, 32), np.float32), counts=np.array([7], np.float32))
    return write_imatrix(tmp_path / "imatrix.gguf", {"blocks.0.to_q": squares, "blocks.1.to_q": squares})


def packed(value, size):
    return (value % 2 ** (8 * size)).to_bytes(size, "little")


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("size", [4, 8])
def test_every_field_of_a_gguf_header_may_lie(imatrix, value, size):
    """Not only the fields: any place of the header."""
    good = imatrix.read_bytes()
    assert read_imatrix(imatrix)
    for at in range(0, good.index(b"in_sum2") + 40, 2):
        imatrix.write_bytes(good[:at] + packed(value, size) + good[at + size :])
        raised_quickly(lambda: read_imatrix(imatrix), ConfigError)
        raised_quickly(lambda: _read(imatrix), ModelError)


def test_49_bytes_that_claim_eight_billion_items(tmp_path):
    key = b"imatrix.datasets"
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key
    header += struct.pack("<IIQ", 9, 0, 2**33)
    file = tmp_path / "imatrix.gguf"
    file.write_bytes(header)
    message = raised_quickly(lambda: read_imatrix(file), ConfigError)
    assert "8589934592 items of an array do not fit" in message
    assert message.startswith(f"quantization.imatrix_file={file}: ")
    nested = header[:-12] + struct.pack("<IQ", 9, 1) * 6 + struct.pack("<IQ", 0, 1) + b"\0"
    file.write_bytes(nested)
    assert "a value of type 9" in raised_quickly(lambda: read_imatrix(file), ConfigError)


def test_a_gguf_file_of_endless_layers(tmp_path):
    """Lists of that length would be made of it before any tensor is looked at."""
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_block_count(10**9)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    said = raised_quickly(lambda: quantlab.load(tmp_path / "a.gguf"), ModelError)
    assert "llama.block_count is 1000000000, and no model has so many layers" in said


@pytest.mark.parametrize("cut", [0, 3, 4, 20, 50, -40])
def test_a_gguf_file_that_ends_early(imatrix, cut):
    imatrix.write_bytes(imatrix.read_bytes()[:cut])
    assert raised_quickly(lambda: read_imatrix(imatrix), ConfigError)


def test_a_header_that_is_right_passes(tmp_path, imatrix):
    check_header(imatrix)
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "cc"])
    writer.add_array("scores", [0.5, 1.5])
    writer.add_tensor("x", np.ones((3, 5), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check_header(tmp_path / "other.gguf")


@pytest.mark.parametrize("value", VALUES)
def test_every_field_of_an_older_importance_matrix_may_lie(tmp_path, value):
    name = b"blk.0.attn_q.weight"
    good = struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii", 3, 4) + struct.pack("<4f", 1, 2, 3, 4)
    file = tmp_path / "imatrix.dat"
    file.write_bytes(good)
    assert list(read_imatrix(file)) == ["blk.0.attn_q"]
    for at in range(0, len(good) - 3):
        file.write_bytes(good[:at] + packed(value, 4) + good[at + 4 :])
        raised_quickly(lambda: read_imatrix(file), ConfigError)


@pytest.mark.parametrize("value", VALUES)
def test_every_field_of_a_kept_file_may_lie(tmp_path, value):
    file = tmp_path / "kept.safetensors"
    write_tree({"x": torch.ones(4)}, file)
    good = file.read_bytes()
    for at in range(0, 40):
        file.write_bytes(good[:at] + packed(value, 8) + good[at + 8 :])
        raised_quickly(lambda: read_tree(file), Damaged)
    save_file({"x": torch.ones(4)}, file)
    assert raised_quickly(lambda: read_tree(file), Damaged)


def npz(shape, num_bytes):
    """An array of ``shape`` as its header says, and so many bytes of it."""
    header, made, ids = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    np.save(ids, np.array(["a"]))
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as members:
        members.writestr("sample_ids.npy", ids.getvalue())
        with members.open("images.npy", "w", force_zip64=True) as file:
            file.write(header.getvalue())
            for _ in range(num_bytes >> 20):
                file.write(bytes(1 << 20))
    return made.getvalue()


def test_arrays_of_a_run_that_would_fill_the_memory(monkeypatch):
    assert read_samples(npz((1, 3, 512, 512, 1), 3 << 18)) is None  # cut off
    assert read_samples(npz((1, 3, 2**25, 2**25, 1), 0)) is None  # 3 PiB, says the header
    shape = (1, 3, 1024, 1024, 1)
    assert read_samples(npz(shape, 3 << 20))[0].shape == shape
    monkeypatch.setattr("quantlab.tracking.pictures._ALWAYS_UNPACKED", 1 << 20)
    assert read_samples(npz(shape, 3 << 20)) is None


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("size", [2, 4])
def test_every_field_of_a_wav_header_may_lie(tmp_path, recwarn, value, size):
    file = tmp_path / "a.wav"
    wavfile.write(file, 16_000, np.arange(64, dtype=np.int16))
    good = file.read_bytes()
    hearing = SimpleNamespace(name="a", parts={"processor": SimpleNamespace(sampling_rate=16_000)})
    for at in range(44):
        file.write_bytes(good[:at] + packed(value, size) + good[at + size :])
        said = raised_quickly(lambda: _sound(tmp_path, "a.wav", "dataset.path=x", hearing), ConfigError)
        assert not said or said.startswith("dataset.path=x: ")
    assert not recwarn.list


TEXTS = {
    "NUL bytes": (b"a\0b", "not text (a NUL byte at 1)"),
    "not UTF-8": (b"\xff\xfe\x00", "NUL byte"),
    "Latin-1": ("größe".encode("latin-1"), "not UTF-8 text"),
}


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("reader", ["prompts", "text", "recipe", "json"])
def test_what_is_no_text_is_refused_with_its_key_and_a_way_out(tmp_path, kind, reader):
    content, told = TEXTS[kind]
    file = tmp_path / "file.yaml"
    file.write_bytes(content)
    with pytest.raises(QuantlabError) as error:
        read(reader, file)
    assert told in str(error.value)
    assert "; give " in str(error.value)


def read(reader, file):
    if reader == "prompts":
        return read_prompts(str(file))
    if reader == "text":
        return read_text(str(file))
    return read_recipe(file, file.name) if reader == "recipe" else from_pretrained_config(str(file))


@pytest.mark.parametrize("reader", ["prompts", "text", "recipe", "json"])
def test_a_file_larger_than_anyone_means_is_not_read(tmp_path, monkeypatch, reader):
    monkeypatch.setattr(files, "MAX_TEXT_BYTES", 3 * files.MIB)
    file = tmp_path / "file.yaml"
    with file.open("wb") as sparse:
        sparse.truncate(300 * files.MIB)
    message = raised_quickly(lambda: read(reader, file), QuantlabError)
    assert "the file has 300 MiB and at most" in message


@pytest.mark.parametrize("reader", ["prompts", "text", "recipe", "json"])
def test_folders_and_files_that_are_not_there(tmp_path, reader):
    with pytest.raises(QuantlabError, match="no such file"):
        read(reader, tmp_path / "missing.yaml")
    if reader != "json":  # a folder may hold a config.json
        with pytest.raises(QuantlabError, match="is a folder"):
            read(reader, tmp_path)


def test_a_prompt_of_one_endless_line_is_refused(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n" + "x" * (MAX_PROMPT_CHARS + 1))
    with pytest.raises(ConfigError, match=r"prompt 2 has 10001 characters and at most 10000 are taken; give"):
        read_prompts(str(file))


def test_json_that_is_nested_without_end(tmp_path):
    file = tmp_path / "config.json"
    file.write_text("[" * 200_000)
    assert "nested too deep" in raised_quickly(lambda: from_pretrained_config(str(file)), ConfigError)
    file.write_text(json.dumps([1]))
    assert raised_quickly(lambda: from_pretrained_config(str(file)), ConfigError)


ALIASES = ["a0: &a [x, x, x, x, x, x, x, x, x, x]"]
ALIASES += [f"a{i}: &{'abcdefghi'[i]} [{', '.join(['*' + 'abcdefghi'[i - 1]] * 10)}]" for i in range(1, 9)]
REFERENCES = ["a0: xxxxxxxxxx", *(f"a{i}: {f'${{model.call.a{i - 1}}}' * 10}" for i in range(1, 10))]
GROWING = {
    "aliases": ALIASES,
    "an entry of the defaults list": [*ALIASES, "defaults: [*i]"],
    "a choice of the defaults list": [*ALIASES, "defaults: [{override /backend: *i}]"],
    "references": ["model:", "  call:", *(f"    {line}" for line in REFERENCES)],
    "references in references": [f"name: '{'${' * 3000}name{'}' * 3000}'"],
    "digits": [f"evaluation: {{num_samples: 0x{'f' * 6000}}}"],
    "digits of a name": [f"name: 0x{'f' * 6000}"],
}


@pytest.mark.parametrize("way", GROWING)
def test_yaml_that_grows_when_it_is_read(tmp_path, way):
    file = tmp_path / "bomb.yaml"
    file.write_text("\n".join(["# @package _global_", *GROWING[way]]) + "\n")
    told = raised_quickly(lambda: plan([f"recipe={file}", "backend=quanto"]), ConfigError)
    assert told.startswith(f"recipe={file}")
