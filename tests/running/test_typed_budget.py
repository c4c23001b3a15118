"""``memory.device_gib`` that is typed is kept: a candidate whose weights alone are more is refused, beside the others."""

import pytest

import quantlab
from quantlab.planning.plan import plan
from quantlab.running.choice import refusal
from quantlab.running.forecast import forecast
from quantlab.running.outlined import refused_by_shape
from quantlab.running.sweep import run_plan
from quantlab.vocabulary.amounts import GIB
from quantlab.vocabulary.prices import Phase
from quantlab.vocabulary.schema import MemoryConfig
from tests.support.tiny_pipelines import BUILDERS
from tests.support.tiny_text_models import TEXT, save_llama

SMALL = ["device=cpu", "evaluation.num_samples=3", "evaluation.num_bootstrap=50", "sweep.floors=false", "tracking=none"]
NO_ROOM = "no placement has room"


def language(folder):
    (folder / "text.txt").write_text(TEXT)
    save_llama(folder / "model", hidden_size=64, intermediate_size=128, num_hidden_layers=8)
    return [
        *("model=causal_lm", "model.path=model", "dataset=text", "dataset.path=text.txt", *SMALL),
        *("evaluation.context_length=32", "quantization.layer_kinds=[linear,embedding]"),
        "quantization.replace_default_exclusions=true",
    ]


def pipeline(folder):
    BUILDERS["flux"](folder / "flux")
    (folder / "prompts.txt").write_text("a red fox\nthe blue cat\ntwo of a kind\n")
    return [
        *("model=diffusers", "model.path=flux", "dataset.path=prompts.txt", *SMALL),
        *("evaluation.num_inference_steps=2", "evaluation.height=32", "evaluation.width=32"),
        *("evaluation.num_teacher_forced=0", "model.components=[transformer,text_encoder,text_encoder_2]"),
    ]


@pytest.fixture(params=[language, pytest.param(pipeline, marks=pytest.mark.slow)], ids=["language", "pipeline"])
def words(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return [*request.param(tmp_path), "backend=quanto"]


def within(num_bytes):
    return f"memory.device_gib={num_bytes / GIB!r}"


def least_weights(words):
    """Bytes that a candidate computes with, without activations, in the placement that takes least."""
    [price] = forecast(plan([*words, within(2**10)]))
    computing = [[row for row in rows if row.name in ("reference", "evaluate")] for rows in price.phases.values()]
    return min(max(row.device_bytes - row.activation_bytes for row in rows) for rows in computing)


def test_a_candidate_without_room_is_a_failed_row_and_its_dry_run_says_so(words):
    int2, int8 = (least_weights([*words, f"dtype={dtype}"]) for dtype in ("int2", "int8"))
    assert int2 <= int8
    for budget in (int8 - 1, int8):
        expected = ["FINISHED" if needed <= budget else "FAILED" for needed in (int8, int2)]
        asked = [*words, "dtype=int8,int2", within(budget)]
        refused = refused_by_shape(plan(asked, multirun=True).jobs, is_far=False)
        every = run_plan(plan(asked, multirun=True))
        rows = [row for row in every if row.params["quantization"]["backend"] != "none"]
        assert [row.status for row in rows] == expected
        assert [row.name for row in rows if row.status == "FAILED"] == list(refused)
        for row in rows[: len(refused)]:
            assert row.error == str(refused[row.name])
            assert str(refused[row.name]).startswith(f"memory.device_gib={budget / GIB:g}: {NO_ROOM}: ")
            assert row.error.endswith(", which is tried")


def test_a_deep_language_model_shows_both(language_words):
    int2, int8 = (least_weights([*language_words, f"dtype={dtype}"]) for dtype in ("int2", "int8"))
    assert int2 < int8


def test_a_placement_that_is_typed_is_tried(language_words):
    row = quantlab.run(overrides=[*language_words, within(2**20), "memory.placement=resident"])[-1]
    assert (row.status, row.params["quantization"]["dtype"]) == ("FINISHED", "int8")


@pytest.fixture
def language_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return [*language(tmp_path), "backend=quanto", "dtype=int8"]


def test_estimates_refuse_nothing():
    rows = (
        Phase(name="reference", device_bytes=3 * GIB, host_bytes=0, activation_bytes=2 * GIB),
        Phase(name="quantize", device_bytes=9 * GIB, host_bytes=0, activation_bytes=0),
        Phase(name="evaluate", device_bytes=8 * GIB, host_bytes=0, activation_bytes=6 * GIB),
    )
    assert refusal({"resident": rows}, MemoryConfig(device_gib=2.0)) == ""
    assert refusal({"resident": rows}, MemoryConfig()) == ""
    told = refusal({"resident": rows}, MemoryConfig(device_gib=1.5))
    assert told.startswith(
        f"memory.device_gib=1.5: {NO_ROOM}: resident, the only one that it can have, needs 2.000 GiB "
    )
    assert "for weights alone (evaluate); give it more" in told
