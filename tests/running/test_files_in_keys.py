"""Whatever file a number was made of is in the key by which its row is found again, wherever it lies."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from quantlab.planning.plan import plan
from quantlab.running.known import Known, request_digest
from quantlab.running.resume import _file_digests, _libraries, content_key
from quantlab.vocabulary.files import files_below
from quantlab.vocabulary.schema import (
    CalibrationConfig,
    DatasetConfig,
    EvaluationConfig,
    ExperimentConfig,
    LauncherConfig,
    ModelConfig,
)


def picture(file, value):
    Image.fromarray(np.full((8, 8, 3), value, dtype=np.uint8)).save(file)


def make(folder, kind):
    """A data set of a kind below ``folder``: its path, and the files that it is made of."""
    folder.mkdir()
    if kind == "prompts":
        (folder / "a.txt").write_text("a fox\n")
        return folder / "a.txt", [folder / "a.txt"]
    if kind == "image_prompts":
        for name in ("a.png", "a.mask.png", "a.control.png"):
            picture(folder / name, 9)
        (folder / "a.txt").write_text("a fox")
        return folder, sorted(folder.iterdir())
    (folder / "in").mkdir()
    files = [folder / "in" / name for name in ("a.png", "b.png")]
    lines = [{"image": "in/a.png", "mask": "in/b.png"}]
    if kind == "pairs":
        files, lines = [folder / "in" / "a.wav"], [{"audio": "in/a.wav", "target": "a fox"}]
    for file in files:
        picture(file.with_suffix(".png"), 9)
        file.with_suffix(".png").rename(file)
    (folder / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "lines.jsonl", [folder / "lines.jsonl", *files]


KINDS = {"prompts": "prompts", "image_prompts": "image_prompts", "pictures": "image_prompts", "pairs": "pairs"}


def changed(file):
    """The file gets another content."""
    content = file.read_bytes()
    if file.suffix == ".png":
        picture(file, 10)
    else:
        file.write_bytes(content.replace(b"fox", b"dog") if b"fox" in content else content + b" ")
    assert file.read_bytes() != content


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_calibration_data_that_changed_is_another_job(tmp_path, kind):
    path, files = make(tmp_path / "data", kind)
    calibration = CalibrationConfig(source=KINDS[kind], path=str(path))
    job = SimpleNamespace(schemes={}, needs_data=True, config=SimpleNamespace(calibration=calibration))
    seen = [_file_digests(job)]
    for file in files:
        changed(file)
        seen.append(_file_digests(job))
        assert seen[-1] not in seen[:-1], file


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_evaluation_data_that_changed_is_another_request(tmp_path, kind):
    path, files = make(tmp_path / "data", kind)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    model = ModelConfig(family="diffusers", path=str(tmp_path / "model"))
    config = ExperimentConfig(
        model=model,
        dataset=DatasetConfig(name=KINDS[kind], path=str(path)),
        evaluation=EvaluationConfig(),
        launcher=LauncherConfig(),
        device="cpu",
    )
    seen = [request_digest(config, tmp_path / "cache")]
    assert seen[0] is not None
    for file in [*files, tmp_path / "model" / "config.json"]:
        changed(file)
        seen.append(request_digest(config, tmp_path / "cache"))
        assert seen[-1] not in seen[:-1], file


def test_folders_that_are_links_are_looked_into(tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "weights").write_text("w")
    model = tmp_path / "model"
    (model / "own").mkdir(parents=True)
    (model / "own" / "weights").write_text("w")
    (model / "linked").symlink_to(tmp_path / "shared")
    (model / "own" / "round").symlink_to(model)
    (model / "gone").symlink_to(tmp_path / "nowhere")
    assert files_below(model) == [model / "linked" / "weights", model / "own" / "weights"]
    assert files_below(model / "own" / "weights") == [model / "own" / "weights"]


def test_whatever_may_load_a_checkpoint_of_others_is_in_its_key():
    job = SimpleNamespace(config=SimpleNamespace(checkpoint="elsewhere"), backends=())
    assert {"gptqmodel", "compressed-tensors", "torchao"} <= set(_libraries(job))


def test_where_a_file_lies_is_no_part_of_a_key(tmp_path, monkeypatch):
    """The same calibration text, and the same importance matrix, under another path: nothing runs again."""
    known = Known(
        protocol="language", dtype="float32", reference_key="r", judge_sha256="", default=("model",), made={},
        classes={"model": "LlamaForCausalLM"}, left_out=(), is_brought=False, tags={},
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "text.txt").write_text("some text\n")
        (tmp_path / folder / "my.imatrix").write_bytes(b"matrix")
    words = ["model=causal_lm", "model.path=m", "backend=gguf", "dtype=q4_0", "algorithm=imatrix", "calibration=text"]

    def keys(word):
        found = [plan([*words, word.replace("a/", f"{where}/")]).jobs[0] for where in ("a", tmp_path / "a", "b")]
        return [content_key(known, job, tmp_path) for job in found]

    for word in ("calibration.path=a/text.txt", "quantization.imatrix_file=a/my.imatrix"):
        before = keys(word)
        assert len(set(before)) == 1, word
        (tmp_path / word.rpartition("=")[2]).write_text("another")
        after = keys(word)
        assert after[0] == after[1] != after[2] == before[2], word
