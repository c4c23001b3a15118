"""Kept trees: they come back as they were, and what is not what was written is told apart."""

from __future__ import annotations

import json

import pytest
import torch

from quantlab.modules.kept import Damaged, read_json, read_tree, set_aside, write_json, write_tree

SHARED = torch.randn(3, 4).to(torch.bfloat16)
TREE = {
    "latents": torch.randn(2, 3).t(),
    "calls": [{"args": (SHARED, 1, None), "kwargs": {"deep": [SHARED], "dtype": torch.float16, "x.y": True}}],
    "empty": torch.zeros(0, 4),
    "numbers": torch.arange(3),
    "scalar": torch.tensor(2.5),
    "text": "a | b",
    "classes": {0: [1, 2], 7: ()},
}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b and type(a) is type(b)


def test_a_tree_comes_back_as_it_was(tmp_path):
    file = tmp_path / "tree.safetensors"
    write_tree(TREE, file)
    found = read_tree(file)
    assert same(found, TREE)
    assert found["calls"][0]["args"][0] is found["calls"][0]["kwargs"]["deep"][0], "written once"
    assert [f.name for f in tmp_path.iterdir()] == [file.name]
    write_tree(SHARED, file)
    assert same(read_tree(file), SHARED)


def test_one_value_that_was_expanded_is_kept(tmp_path):
    """A timestep of a batch of one, as pipelines make it: its stride is 0."""
    file = tmp_path / "tree.safetensors"
    timestep = torch.tensor(999).expand(1)
    assert timestep.stride() == (0,)
    write_tree([timestep, torch.ones(1, 3)[:, :1].expand(1, 1)], file)
    found = read_tree(file)
    assert found[0].tolist() == [999]
    assert found[1].tolist() == [[1.0]]


def test_any_changed_byte_is_seen(tmp_path):
    file = tmp_path / "tree.safetensors"
    write_tree({"x": torch.randn(40), "y": [1, 2.5, "three"]}, file)
    good = file.read_bytes()
    for at in range(0, len(good), 7):
        file.write_bytes(good[:at] + bytes([good[at] ^ 0x41]) + good[at + 1 :])
        try:
            found = read_tree(file)
        except Damaged:
            continue
        assert found["y"] == [1, 2.5, "three"], at  # a byte of the header's padding
        write_tree(found, file)
        assert len(file.read_bytes()) == len(good)


@pytest.mark.parametrize("size", [0, 4, 8, 100, -1])
def test_a_file_that_ends_early_or_is_of_another_kind_is_damaged(tmp_path, size):
    file = tmp_path / "tree.safetensors"
    write_tree(TREE, file)
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(Damaged):
        read_tree(file)
    torch.save(TREE["latents"], file)
    with pytest.raises(Damaged):
        read_tree(file)


def test_a_good_file_of_others_is_damaged_too(tmp_path):
    from safetensors.torch import save_file

    file = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(3)}, file)
    with pytest.raises(Damaged, match=r"quantlab\.tree"):
        read_tree(file)


def test_what_is_not_data_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(TypeError, match=r"^calls\.0: a function is not data"):
        write_tree({"calls": [lambda: 1]}, tmp_path / "tree.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change", [lambda t: t[:-3], lambda t: t.replace("0.5", "0.6"), lambda t: "{}", lambda t: "[1]"]
)
def test_json_that_was_changed_is_damaged(tmp_path, change):
    file = tmp_path / "row.json"
    write_json({"value": 0.5, "n": 20}, file)
    assert read_json(file) == {"value": 0.5, "n": 20}
    file.write_text(change(file.read_text()))
    with pytest.raises(Damaged):
        read_json(file)
    file.write_text(json.dumps({"value": 0.5}))
    with pytest.raises(Damaged):
        read_json(file)


def test_damaged_files_and_folders_are_set_aside_with_a_word(tmp_path, capsys):
    for path in (tmp_path / "a.json", tmp_path / "folder"):
        for _ in range(2):
            path.mkdir() if path.name == "folder" else path.write_text("{")
            set_aside(path, Damaged("it ends early"))
            assert not path.exists(), "a damaged set that stays in its place is read the next time"
        assert (tmp_path / f"{path.name}.damaged").exists()
    assert "damaged (it ends early); it is made again" in " ".join(capsys.readouterr().err.split())
