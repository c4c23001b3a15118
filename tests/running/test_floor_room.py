"""Floors that memory would not hold are left out by a run, and named by its plan: the same ones at each budget."""

from dataclasses import replace

import pytest
import torch

import quantlab
from quantlab.models.outline import Outline
from quantlab.planning.plan import plan
from quantlab.running.choice import most_on_device
from quantlab.running.forecast import book_of, forecast, phases_of_floors
from quantlab.running.phases import activations
from quantlab.running.placement import available, load_placed
from quantlab.running.room import floors_without_room
from quantlab.stages.evaluate import plain_attention
from quantlab.vocabulary.amounts import GIB
from quantlab.vocabulary.schema import EvaluationConfig
from tests.support.allocated import Allocated
from tests.support.tiers import default_of
from tests.support.tiny_pipelines import BUILDERS
from tests.support.tiny_text_models import save_llama_and_texts

FLOORS = ["floor_batch", "floor_attention", "floor_fp32"]
SMALL = ["device=cpu", "model.dtype=bfloat16", "evaluation.num_samples=3", "evaluation.num_bootstrap=50"]
SMALL += ["backend=bitsandbytes", "dtype=nf4"]


def language(folder):
    save_llama_and_texts(folder)
    return [
        *("model=causal_lm", "model.path=model", "dataset=text", "dataset.path=text.txt", *SMALL),
        *("evaluation.context_length=32", "evaluation.batch_size=2", "evaluation.floor_batch_size=3"),
    ]


def pipeline(folder):
    BUILDERS["flux"](folder / "flux")
    (folder / "prompts.txt").write_text("a red fox\nthe blue cat\ntwo of a kind\n")
    return [
        *("model=diffusers", "model.path=flux", "dataset.path=prompts.txt", *SMALL, "evaluation.batch_size=1"),
        *("evaluation.num_inference_steps=2", "evaluation.height=32", "evaluation.width=32"),
        *("evaluation.num_teacher_forced=1", "evaluation.floor_batch_size=2"),
    ]


@pytest.fixture(params=default_of([language, pipeline], language), ids=["language", "pipeline"])
def words(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return request.param(tmp_path)


def within(num_bytes):
    return f"memory.device_gib={num_bytes / GIB!r}"


def left_by_a_run(words, cache):
    """By the run's own look at the model that it has loaded."""
    jobs = plan(words).jobs
    config = jobs[0].config
    model, where = load_placed(config, "cpu", cache, lambda *_: None, jobs)
    model = replace(model, device="cpu")
    return floors_without_room(model, config, jobs, available(model, config.memory), where)


def thresholds(words):
    [job] = plan([*words, within(GIB)]).jobs
    floors = phases_of_floors(book_of(job.config), job.config)
    assert list(floors) == FLOORS
    return {most_on_device(rows) - less for each in floors.values() for rows in each.values() for less in (0, 1)}


def test_a_plan_and_a_run_leave_out_the_same(words, tmp_path):
    """At the bytes that each floor needs in each placement, and one below."""
    [job] = plan([*words, within(GIB)]).jobs
    floors = phases_of_floors(book_of(job.config), job.config)
    assert list(floors) == FLOORS
    seen = set()
    for budget in {
        most_on_device(rows) - less for each in floors.values() for rows in each.values() for less in (0, 1)
    }:
        [price] = forecast(plan([*words, within(budget)]))
        if price.fits:
            assert left_by_a_run([*words, within(budget)], tmp_path / "cache") == price.left_out, budget
            seen.add((price.placement, tuple(price.left_out)))
    assert {len(names) for _, names in seen} >= {0, 1, 2}
    assert len({placement for placement, _ in seen}) > 1


def test_a_run_without_a_floor_has_the_others_and_says_so(words, capsys):
    every = [(n, forecast(plan([*words, within(n)]))[0]) for n in sorted(thresholds(words))]
    num, price = next((n, price) for n, price in every if price.fits and 0 < len(price.left_out) < len(FLOORS))
    budget = within(num)
    assert price.data()["floors_left_out"] == price.left_out
    rows = {row.name for row in quantlab.run(overrides=[*words, budget])}
    assert {*FLOORS} & rows == {*FLOORS} - {*price.left_out} != {*FLOORS}
    said = " ".join(capsys.readouterr().err.split())
    for name, told in price.left_out.items():
        assert told in said
        assert told.startswith(f"{name}: left out, as ")
        assert told.endswith("; verdicts use the other floors")


def test_where_none_is_left_that_is_said(words):
    smallest = min(most_on_device(rows) for rows in forecast(plan([*words, within(GIB)]))[0].phases.values())
    [price] = forecast(plan([*words, within(smallest)]))
    told = [*price.left_out.values()]
    assert [line.endswith("; no floor is left to judge by") for line in told] == [len(told) == len(FLOORS)] * len(told)
    assert forecast(plan([*words, within(smallest), "sweep.floors=false"]))[0].left_out == {}


def test_no_placement_is_advised_that_the_job_cannot_have(tmp_path, monkeypatch):
    """What is calibrated wants the whole model."""
    monkeypatch.chdir(tmp_path)
    plain = language(tmp_path)
    calibrated = ["backend=modelopt", "dtype=int4", "algorithm=awq_lite", "calibration.num_evidence_calls=0"]
    [_, most] = sorted(thresholds(plain))[-2:]
    budget = within(most - 1)
    [told] = forecast(plan([*plain, budget]))[0].left_out.values()
    assert "; memory.placement=group_offload has room for it; " in told
    [told] = forecast(plan([*[w for w in plain if not w.startswith(("backend", "dtype"))], *calibrated, budget]))[
        0
    ].left_out.values()
    assert "memory.placement" not in told


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_plain_attention_are_what_torch_allocates(dtype):
    from transformers import LlamaConfig, LlamaModel

    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 8}
    module = LlamaModel(LlamaConfig(**sizes, vocab_size=64)).to(dtype).eval()
    ids = torch.arange(768)[None] % 64
    outline = Outline(components={"model": module}, quantized=("model",), dtype=str(dtype).removeprefix("torch."))
    settings = EvaluationConfig(batch_size=1, context_length=768)
    planned = activations(outline, settings, True).running - activations(outline, settings).running
    with torch.no_grad(), plain_attention():
        module(input_ids=ids)
        with Allocated() as allocated:
            module(input_ids=ids)
    assert 0.8 * planned < allocated.peak_bytes < 1.2 * planned
