"""Where a model lies is chosen by the phases of its plan: a plan and a run come to the same."""

import pytest

import quantlab
from quantlab.errors import ConfigError
from quantlab.planning.plan import plan
from quantlab.running import placement, room
from quantlab.running.choice import first_fitting, least, most_on_device, together
from quantlab.running.forecast import forecast
from quantlab.running.placement import in_typed_words, load_placed, source_for
from quantlab.running.sweep import run_plan
from quantlab.running.workbench import chosen
from quantlab.vocabulary.amounts import GIB
from quantlab.vocabulary.prices import Phase
from tests.support.tiny_pipelines import BUILDERS
from tests.support.tiny_text_models import save_llama_and_texts

SMALL = ["device=cpu", "evaluation.num_samples=3", "evaluation.num_bootstrap=50", "sweep.floors=false"]
IMATRIX = ["backend=gguf", "dtype=q4_0", "algorithm=imatrix", "calibration.source=text", "calibration.path=other.txt"]
STATIC = ["backend=quanto", "dtype=int8", "activation_dtype=int8", *IMATRIX[3:]]
CALIBRATION = ["calibration.num_samples=3", "calibration.batch_size=2", "calibration.context_length=32"]


@pytest.fixture
def language(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_llama_and_texts(tmp_path)
    return [
        *("model=causal_lm", "model.path=model", "dataset=text", "dataset.path=text.txt", *SMALL, *CALIBRATION),
        *("evaluation.context_length=32", "evaluation.batch_size=2", "evaluation.floor_batch_size=3"),
    ]


@pytest.fixture
def pipeline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    BUILDERS["flux"](tmp_path / "flux")
    (tmp_path / "prompts.txt").write_text("a red fox\nthe blue cat\ntwo of a kind\n")
    return [
        *("model=diffusers", "model.path=flux", "dataset.path=prompts.txt", *SMALL, "evaluation.batch_size=2"),
        *("evaluation.num_inference_steps=2", "evaluation.height=32", "evaluation.width=32"),
        *("evaluation.num_teacher_forced=1",),
    ]


def within(num_bytes):
    return f"memory.device_gib={num_bytes / GIB!r}"


def priced(*words):
    return forecast(plan(list(words)))


def taken(cache, *words):
    """The placement of each job of a run on this CPU."""
    jobs = plan(list(words)).jobs
    model, where = load_placed(jobs[0].config, "cpu", cache, lambda *_: None, jobs)
    if where:
        return [where] * len(jobs)
    return ["streamed" if source_for(model, job, chosen(model, job)) else "resident" for job in jobs]


def thresholds(*words):
    """The budgets at which a placement begins to fit, and what is just too little for it."""
    [small] = priced(*words, within(2**20))
    needed = {most_on_device(rows) for rows in small.phases.values()}
    return [min(needed) // 2, *(budget for most in sorted(needed) for budget in (most - 1, most))]


@pytest.mark.parametrize(
    "scheme",
    [["backend=bitsandbytes", "dtype=nf4"], ["backend=none", "dtype=bfloat16"], IMATRIX, STATIC],
    ids=["nf4", "cast", "imatrix", "static"],
)
def test_a_language_models_run_takes_what_its_plan_says(language, tmp_path, scheme):
    seen = set()
    for budget in thresholds(*language, *scheme):
        words = [*language, *scheme, within(budget)]
        [price] = priced(*words)
        [where] = taken(tmp_path / "cache", *words)
        expected = price.placement or least(price.phases)
        assert where == ("resident" if scheme[0] == "backend=none" and expected == "streamed" else expected)
        assert "by itself" not in price.advice
        seen.add(where)
    assert (
        seen
        == {
            "nf4": {"resident", "streamed", "group_offload"},
            "bfloat16": {"resident", "group_offload"},
            "q4_0": {"resident", "group_offload"},
            "int8": {"resident"},
        }[scheme[1].removeprefix("dtype=")]
    )


@pytest.mark.parametrize("more", [[], ["model.components=[transformer,text_encoder_2]"]])
def test_a_pipelines_run_takes_what_its_plan_says(pipeline, tmp_path, more):
    scheme, seen = ["backend=quanto", "dtype=int8", *more], set()
    for budget in thresholds(*pipeline, *scheme):
        words = [*pipeline, *scheme, within(budget)]
        [price] = priced(*words)
        [where] = taken(tmp_path / "cache", *words)
        assert where == (price.placement or least(price.phases))
        seen.add(where)
    assert seen >= {"resident", "alone"}


def test_jobs_that_share_a_model_have_one_placement_with_room_for_each(language, tmp_path):
    """Of two jobs the one that needs more decides; its plan says so of the other."""
    words = [*language, "backend=quanto", "quantization.layer_kinds=[linear,embedding]"]
    words += ["quantization.replace_default_exclusions=true"]
    [int8] = priced(*words, "dtype=int8", within(GIB))
    [int2] = priced(*words, "dtype=int2", within(GIB))
    needed = [most_on_device(price.phases["streamed"]) for price in (int2, int8)]
    assert needed[0] < needed[1]
    jobs = [plan([*words, f"dtype={dtype}", within(needed[0])]).jobs[0] for dtype in ("int2", "int8")]
    of_both = load_placed(jobs[0].config, "cpu", tmp_path / "cache", lambda *_: None, jobs)[1]
    of_one = load_placed(jobs[0].config, "cpu", tmp_path / "cache", lambda *_: None, jobs[:1])[1]
    assert (of_both, of_one) == ("group_offload", "")
    both = forecast(plan([*words, "dtype=int2,int8", within(needed[0]), "sweep.dry_run=true"], multirun=True))
    assert [price.placement for price in both] == ["group_offload", "group_offload"]
    assert "by itself streamed" in both[0].advice
    assert not both[1].advice


def phase(num_bytes, active=0):
    return [Phase(name="evaluate", device_bytes=num_bytes, host_bytes=0, activation_bytes=active)]


def test_what_has_room_nowhere_does_not_decide_for_the_others():
    budget = {"device_bytes": 10}
    fits_in_groups = {"resident": phase(30), "streamed": phase(20), "group_offload": phase(5)}
    wants_it_whole = {"resident": phase(30)}
    assert together([fits_in_groups, wants_it_whole], budget) == ("group_offload",)
    assert together([wants_it_whole], budget) == ("resident", "streamed")
    assert together([fits_in_groups, wants_it_whole], {"device_bytes": 4}) == ("resident", "streamed")
    assert together([fits_in_groups], {"device_bytes": 4}) == ("group_offload",)
    assert together([fits_in_groups, {"resident": phase(9)}], budget) == ("resident", "streamed")


def test_of_equal_needs_that_of_fewer_weights_is_least():
    assert least({"alone": phase(9, 1), "group_offload": phase(9, 5)}) == "group_offload"
    assert first_fitting({"alone": phase(9), "group_offload": phase(8)}, {"device_bytes": 8}) == "group_offload"


def test_a_model_with_plenty_of_room_is_not_priced(language, tmp_path, monkeypatch):
    for name in ("phases_of_each", "phases_of_floors"):
        monkeypatch.setattr(room, name, lambda *_: pytest.fail("it was priced"))
    assert taken(tmp_path / "cache", *language, "backend=quanto", "dtype=int8", within(GIB)) == ["resident"]


def row_of(*words):
    return quantlab.run(overrides=list(words))[-1]


def numbers(report):
    return report.quality, report.memory, report.quantization.layers, report.disk_bytes


def test_a_row_is_the_same_whatever_the_budget_chooses(language, capsys):
    """And is found again: a placement is no part of what a job is known by."""
    words = [*language, "backend=bitsandbytes", "dtype=nf4"]
    phases = priced(*words, within(GIB))[0].phases
    rows = [
        row_of(*words, within(most_on_device(rows)), f"output_dir={name}", "sweep.force=true")
        for name, rows in phases.items()
    ]
    said = " ".join(capsys.readouterr().err.split())
    assert "streamed from its files, as resident needs" in said
    assert "run group by group, as nothing before it has room" in said
    assert [numbers(row) for row in rows[1:]] == [numbers(rows[0])] * 2


def test_what_needs_the_whole_model_is_refused_where_it_runs_in_groups(language):
    """It would change the model that the others are compared with while it measures it."""
    words = [*language, *STATIC]
    small = priced(*language, "backend=quanto", "dtype=int8", within(GIB))[0].phases["group_offload"]
    recipe = ["activation_dtype=none,int8", "sweep.force=true", within(most_on_device(small))]
    rows = run_plan(plan([w for w in words if not w.startswith("activation")] + recipe, multirun=True))
    assert [row.status for row in rows] == ["FINISHED", "FAILED"]
    assert rows[1].error.removeprefix("ConfigError: ").startswith("memory.device_gib=")
    assert "group_offload: quanto wants the whole model while it measures activation_dtype=int8; pass" in rows[1].error
    assert rows[1].error.endswith("or activation_dtype=none, or give it more")


@pytest.mark.slow
def test_what_has_no_room_and_no_files_is_refused_by_the_key_that_was_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["model=digits_dit", "model.num_train_steps=1", "model.train_batch_size=8", "evaluation=quick", *SMALL]
    words += ["evaluation.num_samples=10", "backend=quanto", "dtype=int8", "memory.device_gib=0.021"]
    told = r"^memory.device_gib=0.021: a copy of .* no room beside .*; give it more, or pass memory.placement=resident$"
    with pytest.raises(ConfigError, match=told):
        quantlab.run(overrides=words)


def test_a_message_of_a_placement_that_was_not_typed_begins_with_the_budget(language, tmp_path):
    """Its files are gone since, of which it would be streamed."""
    words = [*language, "backend=quanto", "dtype=int8"]
    phases = priced(*words, within(GIB))[0].phases
    budget = within(most_on_device(phases["streamed"]))
    [job] = plan([*words, budget]).jobs
    model, _ = load_placed(job.config, "cpu", tmp_path / "cache", lambda *_: None, [job])
    (tmp_path / "model" / "model.safetensors").unlink()
    told = r"^memory.device_gib=\S+: chosen by it, streamed: .*, or give it more$"
    with pytest.raises(ConfigError, match=told), in_typed_words(job.config.memory):
        source_for(model, job, chosen(model, job))("model")


def test_what_wants_a_model_whole_that_has_no_room_whole_is_refused(language):
    [price] = priced(*language, *STATIC, within(GIB))
    budget = sum(part.original_bytes for part in price.components) - 1
    told = r"^memory.device_gib=\S+: no placement has room: resident, the only one that it can have, needs .*; give it more, "
    with pytest.raises(ConfigError, match=told):
        row_of(*language, *STATIC, within(budget), "sweep.force=true")


def test_what_wants_a_model_whole_is_refused_where_a_gpu_has_no_room_for_it(language, monkeypatch):
    """Nobody types a budget: it is what the GPU has free."""
    [price] = priced(*language, *STATIC, within(GIB))
    budget = {"device_bytes": sum(part.original_bytes for part in price.components) - 1}
    monkeypatch.setattr(placement, "budget_of", lambda settings, device: dict(budget))
    told = r"^memory.device_gib=null: chosen by it, group_offload: quanto wants the whole model .*, or give it more$"
    with pytest.raises(ConfigError, match=told):
        row_of(*language, *STATIC, "sweep.force=true")


def test_a_floor_that_the_budget_does_not_hold_is_left_out(language, capsys):
    words = [word for word in language if word != "sweep.floors=false"] + ["model.dtype=bfloat16"]
    words += ["backend=quanto", "dtype=int8", "sweep.force=true"]
    most = most_on_device(priced(*words, within(GIB))[0].phases["streamed"])
    rows = {row.name for row in quantlab.run(overrides=[*words, within(most)])}
    assert "floor_batch" in rows and "floor_fp32" not in rows  # noqa: PT018
    said = " ".join(capsys.readouterr().err.split())
    assert "floor_fp32: left out, as resident needs" in said
    assert "floor_fp32" in {row.name for row in quantlab.run(overrides=[*words, within(GIB)])}
