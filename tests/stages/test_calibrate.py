"""The calibrate stage: which data, what a run leaves of it, and what it refuses."""

import json
import math

import pytest
import torch
from torch import nn

import quantlab
from quantlab.datasets import prompts
from quantlab.datasets.calibration import calibration_inputs, sampling_settings
from quantlab.datasets.table import CALIBRATION_SETS
from quantlab.errors import ConfigError, is_out_of_memory
from quantlab.vocabulary.schema import CalibrationConfig, EvaluationConfig
from tests.support.calibration import recorded_set
from tests.support.shell import digits_words
from tests.support.tables import BACKENDS

WORDS = digits_words("backend=gguf", "dtype=q4_k")
FAST = ["calibration.num_samples=10", "calibration.batch_size=5", "calibration.num_inference_steps=2"]


# -- the set


def digits(shell, *words):
    from quantlab.datasets.table import DATASETS
    from quantlab.models.table import FAMILIES

    config = quantlab.compose([*WORDS, *FAST, *words]).jobs[0].config
    model = FAMILIES[config.model.family].load(config.model, "cpu", shell.folder / "outputs" / "cache", None)
    return config, model, DATASETS[config.dataset.name].load(config.dataset, config.evaluation, model)


def test_trajectories_are_recorded_once_with_their_steps_and_guidance(shell):
    config, model, seen = digits(shell)
    cache = shell.folder / "outputs" / "cache"
    ticks = []
    first = recorded_set(
        model, ["transformer"], config.calibration, config.evaluation, seen, cache, lambda i, n: ticks.append((i, n))
    )
    assert ticks[-1] == (4, 4), "two batches of two steps"
    calls = first.calls["transformer"]
    assert [c["step"] for c in calls] == [0, 1, 0, 1]
    assert calls[0]["args"][0].shape[0] == 10, "five samples, with and without their class"
    again = recorded_set(model, ["transformer"], config.calibration, config.evaluation, seen, cache, pytest.fail)
    assert again.sha256 == first.sha256
    config.calibration.num_inference_steps = 3  # other steps than the evaluation's
    other = recorded_set(model, ["transformer"], config.calibration, config.evaluation, seen, cache)
    assert other.sha256 != first.sha256
    assert len(other.calls["transformer"]) == 6


def test_a_set_that_was_cut_off_is_recorded_again(shell):
    config, model, seen = digits(shell)
    arguments = (model, ["transformer"], config.calibration, config.evaluation, seen, shell.folder)
    first = recorded_set(*arguments)
    (done,) = shell.folder.glob("calibration/*/set.json")
    done.unlink()
    assert recorded_set(*arguments).sha256 == first.sha256


@pytest.mark.parametrize(
    ("num_samples", "asked", "expected"), [(40, 20, 20), (41, 20, 14), (9, 8, 5), (10, 4, 4), (3, 8, 3), (5, 1, 1)]
)
def test_no_last_batch_is_a_fraction_of_the_others(num_samples, asked, expected):
    """An algorithm that averages over calls would count its samples so much more."""
    config = CalibrationConfig(num_samples=num_samples, batch_size=asked)
    assert sampling_settings(config, EvaluationConfig()).batch_size == expected


def test_lack_of_memory_halves_the_batch_and_says_so(shell, monkeypatch, capsys):
    config, model, seen = digits(shell)
    sample, sizes = model.sample, []

    def scarce(loaded, noise, *rest):
        sizes.append(len(noise))
        if len(noise) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sample(loaded, noise, *rest)

    found = recorded_set(
        model.__class__(**{**vars(model), "sample": scarce}),
        ["transformer"],
        config.calibration,
        config.evaluation,
        seen,
        shell.folder,
    )
    assert found.batch_size == 2
    assert sizes == [5, 2, 2, 2, 2, 2]
    assert "calibration.batch_size=2 instead of 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("x"), True),
        (ValueError("x"), False),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes"), True),
    ],
)
def test_what_counts_as_lack_of_memory(error, expected):
    wrapped = ConfigError("algorithm=awq_lite: the library failed")
    wrapped.__cause__ = error
    assert is_out_of_memory(error) == is_out_of_memory(wrapped) == expected


def test_the_shipped_sets_share_no_prompt_and_no_document():
    from quantlab.datasets.wiki_extracts import calibration_half, evaluation_half

    assert not set(prompts.read_prompts()) & set(prompts.read_prompts(str(prompts.CALIBRATION)))
    items = list(range(11))
    assert not set(calibration_half(items)) & set(evaluation_half(items))


def test_a_sample_of_the_evaluation_is_refused(shell):
    config, model, seen = digits(shell)
    asked = CalibrationConfig(source="digits_classes", num_samples=10, seed=config.dataset.seed)
    told = r"^calibration.source=digits_classes: it shares noise with the evaluation \(10 of 10\)"
    with pytest.raises(ConfigError, match=told):
        calibration_inputs(asked, config.evaluation, model, seen)


def test_messages_name_the_keys_of_calibration(shell):
    config, model, seen = digits(shell)
    with pytest.raises(ConfigError, match=r"^calibration.num_samples=7: digits_classes has 10 classes"):
        calibration_inputs(CalibrationConfig(num_samples=7), config.evaluation, model, seen)
    with pytest.raises(ConfigError, match=r"^calibration.path=null: calibration.source=text needs a file|^calibration"):
        calibration_inputs(CalibrationConfig(source="text"), EvaluationConfig(), model, seen)


BAD = {
    "calibration.source=wiki_extract": r"calibration.source=wiki_extract: there are .*did you mean wiki_extracts\?",
    "calibration.num_samples=0": r"calibration.num_samples=0: a whole number from 1 to",
    "calibration.batch_size=-1": r"calibration.batch_size=-1: a whole number from 1 to",
    "calibration.num_inference_steps=0": r"calibration.num_inference_steps=0: a whole number from 1 to",
    "calibration.num_evidence_calls=-1": r"calibration.num_evidence_calls=-1: a whole number from 0 to",
    "calibration.seed=0": r"calibration.seed=0: this is the noise of the evaluation \(dataset.seed\)",
    "calibration.num_sample=3": r"calibration.num_sample.*did you mean.*num_samples",
}


@pytest.mark.parametrize("word", BAD)
def test_bad_settings_are_refused_before_anything_is_loaded(word):
    with pytest.raises(ConfigError, match=BAD[word]):
        quantlab.compose([*WORDS, "algorithm=imatrix", word])


def test_a_scheme_without_data_does_not_read_the_calibration_node():
    assert quantlab.compose([*WORDS, "calibration.seed=0"]).jobs


@pytest.mark.parametrize("source", CALIBRATION_SETS)
def test_every_source_is_an_option_of_the_group(source):
    from quantlab.planning.places import conf_dir

    texts = [p.read_text() for p in (conf_dir() / "calibration").glob("*.yaml")]
    assert any(f"source: {source}\n" in text for text in texts)


# -- a run


def test_a_calibrated_run_leaves_its_evidence(shell):
    rows = shell.rows(*WORDS, *FAST, "algorithm=max,imatrix", "-m", "sweep.floors=false")
    assert set(rows) == {"gguf q4_k", "gguf q4_k imatrix"}
    runs = shell.tracked()
    plain, run = runs["gguf q4_k"], runs["gguf q4_k imatrix"]
    assert plain["tags"]["quantlab.calibration_sha256"] == "none: this scheme needs no data"
    assert len(run["tags"]["quantlab.calibration_sha256"]) == 64
    assert "perf/calibrate_s" not in plain["metrics"]
    metrics = run["metrics"]
    assert (metrics["calibration/num_samples"], metrics["calibration/batch_size"]) == (10, 5)
    assert metrics["calibration/num_calls"] == 4
    assert metrics["perf/calibrate_s"] > 0
    assert metrics["calibration/output_sqnr_db_after_mean"] > metrics["calibration/output_sqnr_db_before_mean"]
    assert metrics["calibration/weight_sqnr_db_after_mean"] < metrics["calibration/weight_sqnr_db_before_mean"], (
        "the weights that matter are kept at the others' cost"
    )
    (folder,) = (shell.folder / "outputs" / "runs").glob("*imatrix*")
    table = json.loads((folder / "calibration_layers.json").read_text())
    every = json.loads((folder / "layers.json").read_text())
    layers = [row for row in every["data"] if row[every["columns"].index("status")] == "quantized"]
    assert len(table["data"]) == len(layers)
    heat = json.loads((folder / "calibration_steps.json").read_text())
    assert heat["columns"] == ["0", "1"]
    assert len(heat["values"]) == len(heat["rows"]) == len(layers)
    assert (folder / "figures" / "calibration_layers_by_step.png").stat().st_size > 1000
    assert (folder / "calibration" / "transformer" / "imatrix.gguf").is_file()


@pytest.mark.slow
def test_other_calibration_data_is_another_job(shell):
    words = [*WORDS, *FAST, "algorithm=imatrix,max", "-m", "sweep.floors=false"]
    shell.rows(*words)
    again = shell.rows(*words, "calibration.seed=5")
    assert {n: r["resumed"] for n, r in again.items()} == {"gguf q4_k imatrix": False, "gguf q4_k": True}


# -- from Python


def test_python_needs_the_data_and_takes_it():
    net = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 256))
    config = BACKENDS["gguf"].Config(gguf_type="q4_0", algorithm="imatrix")
    with pytest.raises(ConfigError, match=r"^calibration: gguf q4_0 imatrix needs data; pass calibration="):
        quantlab.quantize(net, config)
    batch = torch.randn(8, 256)
    _, report = quantlab.quantize(net, config, calibration=[batch])
    assert {r.dtype for r in report.layers} == {"q4_0"}
    other = torch.randn(3, 256)
    for same in (batch, batch.clone(), torch.cat([other, batch[2:3]]), batch.double().flip(0), batch[4:]):
        with pytest.raises(ConfigError, match=r"^calibration: \d of its \d+ different samples are samples of inputs"):
            quantlab.evaluate(net, [config], [batch], calibration=[other, same])
    rows = quantlab.evaluate(net, [config], [torch.randn(12, 256)], calibration=[batch], num_bootstrap=50)
    assert rows[-1].name == "gguf q4_0 imatrix"


@pytest.mark.parametrize(
    ("calibration", "message"),
    [(None, "needs data; pass calibration="), ([], "at least one batch"), ([torch.full((2, 256), math.nan)], "NaN")],
)
def test_python_refuses_bad_data_before_the_module_runs(calibration, message, monkeypatch):
    net = nn.Sequential(nn.Linear(256, 64))
    monkeypatch.setattr(net, "forward", lambda x: pytest.fail("it ran"))
    plain, config = (BACKENDS["gguf"].Config(gguf_type="q4_0", algorithm=a) for a in ("max", "imatrix"))
    with pytest.raises(ConfigError, match=f"^calibration: .*{message}"):
        quantlab.evaluate(net, [plain, config], [torch.randn(2, 256)], calibration=calibration)


def test_the_list_of_algorithms_says_which_need_data():
    from quantlab.planning.listing import ALGORITHMS, LISTS
    from tests.support.tables import CAPABILITIES

    rows = {(r["backend"], r["algorithm"]): r for r in LISTS["algorithms"]()}
    assert set(ALGORITHMS) == {a for found in CAPABILITIES.values() for row in found.values() for a in row.algorithms}
    need = {pair: row["needs data"] for pair, row in rows.items()}
    assert need["gguf", "imatrix"] == need["torchao", "awq"] == need["modelopt", "svdquant"] == "yes"
    assert need["gguf", "max"] == need["bitsandbytes", "max"] == need["torchao", "hqq"] == "no"
    assert need["quanto", "max"] == need["modelopt", "max"] == "for static activations"
    assert need["torchao", "gptq"] == "yes, and CUDA"
    assert rows["gguf", "imatrix"]["dtypes"] == "q5_0 q5_1 q4_0 q4_1 iq4_nl q6_k q5_k q4_k q3_k q2_k iq4_xs"
    assert rows["modelopt", "smoothquant"]["dtypes"] == "int8"
