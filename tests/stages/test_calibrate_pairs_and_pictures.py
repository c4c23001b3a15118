"""Models that write and models that see, calibrated on pairs and pictures of their own, which the evaluation never sees."""

from __future__ import annotations

import json
import shutil

import pytest

from quantlab.datasets import pairs as pairs_set
from quantlab.datasets.calibration import calibration_inputs
from quantlab.errors import ConfigError
from quantlab.models import seq2seq
from quantlab.vocabulary.schema import CalibrationConfig, DatasetConfig, EvaluationConfig, ModelConfig
from tests.models.test_auto import FOLDERS, RUN, pairs, pictures, processor
from tests.models.test_whole_model import T5, saved
from tests.support.tiny_text_models import OTHER

ALGORITHMS = {
    "modelopt": ["backend=modelopt", "dtype=int4", "group_size=32", "algorithm=awq_lite"],
    "modelopt smoothquant": ["backend=modelopt", "dtype=int8", "activation_dtype=int8", "algorithm=smoothquant"],
    "torchao": ["backend=torchao", "dtype=int8", "activation_dtype=int8", "algorithm=smoothquant"],
    "torchao awq": ["backend=torchao", "dtype=int8", "algorithm=awq"],
    "quanto": ["backend=quanto", "dtype=int8", "activation_dtype=int8"],
    "gguf": ["backend=gguf", "dtype=q4_1", "algorithm=imatrix"],
}
NAMES = ("T5ForConditionalGeneration", "ViTForImageClassification", "WhisperForConditionalGeneration")
SOME = {("modelopt", NAMES[0]), ("torchao", NAMES[1])}


def data(name, folder, shell):
    """The words of an evaluation and of a calibration on halves of one set."""
    if name.startswith("ViT"):
        processor(folder, name)
        whole = sorted(pictures(shell.folder / "pictures", 8).iterdir())
        for half in ("mine", "theirs"):
            (shell.folder / half).mkdir()
        for i, file in enumerate(whole):
            shutil.copy(file, shell.folder / ("mine", "theirs")[i % 2] / file.name)
        return ["dataset.path=mine", "calibration.path=theirs"]
    if name.startswith("Whisper"):
        processor(folder, name)
    mine, theirs = write_halves(shell.folder, name)
    return ["dataset=pairs", f"dataset.path={mine.name}", "calibration=pairs", f"calibration.path={theirs.name}"]


def write_halves(folder, name):
    """Four pairs for the evaluation, and four of another text for calibration."""
    lines = [json.loads(line) for line in pairs(folder, name).read_text().splitlines()]
    words = OTHER.splitlines()
    for i, line in enumerate(lines[4:]):
        line |= {"target": words[i]} | ({} if "audio" in line else {"source": words[20 + i]})
    files = folder / "mine.jsonl", folder / "theirs.jsonl"
    for file, rows in zip(files, (lines[:4], lines[4:]), strict=True):
        file.write_text("\n".join(map(json.dumps, rows)))
    return files


@pytest.mark.parametrize(
    ("method", "name"),
    [(m, n) if (m, n) in SOME else pytest.param(m, n, marks=pytest.mark.slow) for m in ALGORITHMS for n in NAMES],
)
def test_calibration_by_the_familys_own_data(method, name, shell):
    _, config_name, sizes = FOLDERS[name]
    folder = saved(shell.folder / "model", name, config_name, **sizes)
    words = [*data(name, folder, shell), *RUN, "calibration.num_samples=4", "calibration.batch_size=2"]
    context = [] if name.startswith("ViT") else ["evaluation.context_length=32", "calibration.context_length=32"]
    rows = shell.rows("model=auto", f"model.path={folder}", *words, *context, *ALGORITHMS[method], "sweep.floors=false")
    [row] = [r for n, r in rows.items() if n not in ("reference", "floor_bf16", "floor_batch")]
    assert row["status"] == "FINISHED", row["error"]
    assert row["metrics"]["calibration/num_samples"] == 4
    assert row["metrics"]["quantization/coverage"] > 0.2


@pytest.mark.parametrize("what", ["source", "target", "nothing"])
def test_what_the_evaluation_reads_or_writes_is_refused(what, tmp_path):
    folder = saved(tmp_path / "model", "T5ForConditionalGeneration", "T5Config", **T5)
    model = seq2seq.load(ModelConfig(path=str(folder)), "cpu", tmp_path)
    mine, theirs = write_halves(tmp_path, "T5")
    lines = [json.loads(line) for line in theirs.read_text().splitlines()]
    lines[0] |= {"source": lines[0]["source"] * 3, "target": lines[0]["target"] * 3}  # the others are padded otherwise
    lines[1] |= {what: json.loads(mine.read_text().splitlines()[0])[what]} if what != "nothing" else {}
    theirs.write_text("\n".join(map(json.dumps, lines)))
    evaluation = EvaluationConfig(num_samples=4, context_length=256)
    seen = pairs_set.load(DatasetConfig(path=str(mine)), evaluation, model)
    asked = CalibrationConfig(source="pairs", path=str(theirs), num_samples=4, batch_size=2, context_length=256)
    if what == "nothing":
        assert calibration_inputs(asked, evaluation, model, seen).num_samples == 4
        return
    with pytest.raises(ConfigError, match=r"^calibration.source=pairs: .* would flatter"):
        calibration_inputs(asked, evaluation, model, seen)
