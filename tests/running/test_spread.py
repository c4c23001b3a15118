"""A model that lies on several devices gives the numbers of one that is resident, bit for bit.

On a CPU the devices are its own memory, so that nothing moves; what is moved, and that nothing is computed on two devices
at once, is in ``tests/modules/test_spread.py``.
"""

import re

import pytest
import torch

import quantlab
from quantlab.cli import dispatch
from quantlab.errors import ConfigError
from quantlab.modules.spread import Spread
from quantlab.planning.plan import plan
from quantlab.running.engines.table import open_engine
from quantlab.running.forecast import forecast
from quantlab.running.placement import spread_over
from quantlab.vocabulary.numbers import flat_metrics
from quantlab.vocabulary.schema import MemoryConfig
from tests.support.tiny_pipelines import BUILDERS
from tests.support.tiny_text_models import save_llama_and_texts

SPREAD = ["memory.placement=spread", "memory.devices=2"]
SMALL = ["device=cpu", "evaluation.num_samples=3", "evaluation.num_bootstrap=50", "evaluation.batch_size=2"]
DATA = ["calibration.source=text", "calibration.path=other.txt", "calibration.num_samples=3"]
DATA += ["calibration.batch_size=2", "calibration.context_length=32"]


@pytest.fixture
def text_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_llama_and_texts(tmp_path)
    return [
        *("model=causal_lm", "model.path=model", "dataset=text", "dataset.path=text.txt", *SMALL),
        *("evaluation.context_length=32", "evaluation.floor_batch_size=3", "sweep.force=true"),
    ]


@pytest.fixture
def connected(monkeypatch):
    """The components that lie on several devices, and the devices of each."""
    found, connect = [], Spread.connect

    def noted(self, component, module):
        found.append((component, {*self.map.where[component].values()}))
        return connect(self, component, module)

    monkeypatch.setattr(Spread, "connect", noted)
    return found


def numbers(report):
    return report.quality, report.memory, report.quantization.layers, report.disk_bytes, report.calibration


def rows_of(words, places=((), SPREAD)):
    return [quantlab.run(overrides=[*words, f"output_dir=out{i}", *place]) for i, place in enumerate(places)]


def test_a_language_models_row_is_the_same(text_model, connected):
    words = [*text_model, "backend=quanto", "dtype=int8", "sweep.floors=false"]
    [[resident], [spread]] = rows_of(words)
    assert connected == [("model", {0, 1})] * 2  # the reference, and the files that the candidate is streamed from
    assert numbers(spread) == numbers(resident)
    assert spread.planned == spread.memory
    assert sum(spread.device_bytes) == sum(m.weights_bytes for m in spread.memory.values())
    assert all(spread.device_bytes)
    assert flat_metrics(spread)["memory/device_1/weights_bytes"] == spread.device_bytes[1]
    assert not resident.device_bytes
    [price] = forecast(plan([*words, *SPREAD]))
    assert [share.candidate_bytes for share in price.shares] == [*spread.device_bytes]
    assert [share.parts for share in price.shares] == [
        ("model: model.embed_tokens to model.layers.0",),
        ("model: model.layers.1 to lm_head",),
    ]
    evaluated = next(phase for phase in price.phases["spread"] if phase.name == "evaluate")
    held = [share.reference_bytes + share.candidate_bytes for share in price.shares]
    assert [num - evaluated.activation_bytes for num in evaluated.on_each] == held


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheme",
    [
        ["backend=bitsandbytes", "dtype=nf4"],
        ["backend=bitsandbytes", "dtype=int8"],
        ["backend=torchao", "dtype=int8", "activation_dtype=int8", "algorithm=smoothquant", *DATA],
        ["backend=torchao", "dtype=int4", "group_size=32", "quantization.layer_kinds=[linear,embedding]"],
        ["backend=quanto", "dtype=int8", "activation_dtype=int8", *DATA],
        ["backend=gguf", "dtype=q4_0", "algorithm=imatrix", *DATA],
        ["backend=modelopt", "dtype=int4", "algorithm=awq_lite", *DATA],
        ["backend=none", "dtype=bfloat16"],
    ],
    ids=lambda words: " ".join(word.partition("=")[2] for word in words[:2]),
)
def test_every_backends_rows_are_the_same(text_model, connected, scheme):
    resident, spread = rows_of([*text_model, *scheme])
    assert connected
    assert [(r.name, r.status, r.error) for r in spread] == [(r.name, r.status, r.error) for r in resident]
    assert [(r.quality, r.memory) for r in spread] == [(r.quality, r.memory) for r in resident]
    if spread[-1].quantization is not None:
        assert numbers(spread[-1]) == numbers(resident[-1])


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["model.components=[transformer,text_encoder_2,vae]", "sweep.floors=false"]])
def test_a_pipelines_rows_are_the_same(tmp_path, monkeypatch, connected, more):
    monkeypatch.chdir(tmp_path)
    BUILDERS["flux"](tmp_path / "flux")
    (tmp_path / "prompts.txt").write_text("a red fox\nthe blue cat\ntwo of a kind\n")
    words = [
        *("model=diffusers", "model.path=flux", "dataset.path=prompts.txt", "backend=quanto", "dtype=int8", *SMALL),
        *("evaluation.num_inference_steps=2", "evaluation.height=32", "evaluation.width=32", *more),
        *("evaluation.num_teacher_forced=1", "sweep.force=true"),
    ]
    resident, spread = rows_of(words)
    assert [r.name for r in spread] == [r.name for r in resident]
    assert [(r.quality, r.memory) for r in spread] == [(r.quality, r.memory) for r in resident]
    assert numbers(spread[-1]) == numbers(resident[-1])
    assert {number for _, numbers in connected for number in numbers} == {0, 1}
    assert dict(connected)["vae"] == {0}


@pytest.mark.slow
def test_a_finished_job_is_known_wherever_its_model_lies(text_model):
    words = [word for word in text_model if word != "sweep.force=true"]
    words = ["-m", *words, "backend=quanto", "dtype=int8,int4", "sweep.floors=false"]
    first = quantlab.run(overrides=words[1:])
    again = quantlab.run(overrides=[*words[1:], *SPREAD])
    assert not any(r.is_resumed for r in first)
    assert all(r.is_resumed for r in again)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["memory.devices=2"], r"^memory.devices=2: .* memory.placement=spread"),
        (["memory.placement=group_offload", "memory.devices=2"], r"^memory.devices=2: "),
        (["memory.placement=spread"], r"^memory.placement=spread: device=cpu is one device; .*memory.devices=2"),
        ([*SPREAD, "evaluation.compile=true"], r"^memory.placement=spread: torch.compile .*evaluation.compile=false"),
        ([*SPREAD, "memory.devices=1"], r"^memory.devices=1: "),
    ],
)
def test_what_contradicts_it_is_refused_before_anything_runs(words, told):
    with pytest.raises(ConfigError, match=told):
        plan(["device=cpu", "backend=quanto", "dtype=int8", *words])


def test_a_checkpoint_of_others_is_refused():
    with pytest.raises(ConfigError, match=r"^memory.placement=spread: checkpoint=there is loaded whole"):
        plan(["device=cpu", "checkpoint=there", *SPREAD])


def test_devices_that_are_not_there_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match=r"^memory.placement=spread: this run is on a CPU"):
        spread_over(MemoryConfig(placement="spread"), "cpu")
    names = ["one", "one", "other"]
    monkeypatch.setattr(torch.cuda, "get_device_name", names.__getitem__)
    for num, memory, told in (
        (1, MemoryConfig(), r"^memory.placement=spread: this process sees 1 CUDA device;"),
        (2, MemoryConfig(devices=3), r"^memory.devices=3: this process sees 2 CUDA devices;"),
        (3, MemoryConfig(), r"^memory.placement=spread: the devices are one, one, other"),
    ):
        monkeypatch.setattr(torch.cuda, "device_count", lambda num=num: num)
        with pytest.raises(ConfigError, match=told):
            spread_over(memory, "cuda")
    over = spread_over(MemoryConfig(devices=2, device_gib=2), "cuda")
    assert (over.devices, over.budget) == (("cuda:0", "cuda:1"), 2**31)


def test_a_budget_that_is_too_small_is_refused_by_what_it_must_hold(text_model):
    words = [*text_model, "backend=quanto", "dtype=int8", "sweep.floors=false", *SPREAD]
    with pytest.raises(
        ConfigError, match=r"^memory.device_gib=1e-05: model.layers.0 of model lies on one device or no"
    ):
        quantlab.run(overrides=[*words, "memory.device_gib=0.00001"])


def test_a_plan_says_what_lies_where_and_whether_it_fits(text_model, capsys):
    words = ["plan", *text_model, "backend=quanto", "dtype=int8", "memory.placement=spread"]
    assert dispatch([*words, "memory.devices=3", "memory.device_gib=1"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"2 .*model: .*lm_head .* yes", told), told
    assert "fits 1 GiB on the device: spread" in told
    assert dispatch([*words, "memory.devices=3", "memory.device_gib=0.00001"]) == 0
    assert "does not fit" in capsys.readouterr().out


def test_a_plan_for_a_node_with_gpus_asks_how_many(text_model):
    words = [*text_model, "backend=quanto", "dtype=int8", "memory.placement=spread", "device=auto"]
    with pytest.raises(ConfigError, match=r"^memory.placement=spread: this machine has \d CUDA .*memory.devices=2"):
        forecast(plan(words))


def test_each_worker_of_a_pool_sees_the_gpus_of_one_model(monkeypatch, tmp_path):
    monkeypatch.setattr("quantlab.running.engines.table.visible_gpus", lambda: ["0", "1", "2", "3", "4"])

    def seen(*words):
        config = plan(["backend=quanto", "dtype=int8", "launcher=pool", *words]).jobs[0].config
        return open_engine(config, tmp_path)._gpus

    assert seen() == ["0", "1", "2", "3", "4"]
    assert seen("memory.placement=spread") == ["0,1,2,3,4"]
    assert seen("memory.placement=spread", "memory.devices=2") == ["0,1", "2,3"]
    assert seen("memory.placement=spread", "memory.devices=8") == ["0,1,2,3,4"]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["text", "pipeline"])
def test_on_gpus_the_rows_are_those_of_one(text_model, tmp_path, kind):
    if torch.cuda.device_count() < 2:
        pytest.skip("it takes two CUDA devices")
    words = [word for word in text_model if word != "device=cpu"]
    if kind == "pipeline":
        BUILDERS["flux"](tmp_path / "flux")
        (tmp_path / "prompts.txt").write_text("a red fox\nthe blue cat\ntwo of a kind\n")
        words = ["model=diffusers", "model.path=flux", "dataset.path=prompts.txt", *SMALL[1:], "sweep.force=true"]
        words += ["evaluation.num_inference_steps=2", "evaluation.height=32", "evaluation.width=32"]
    for scheme in (["backend=bitsandbytes", "dtype=nf4"], ["backend=quanto", "dtype=int8"]):
        resident, spread = rows_of([*words, *scheme, "device=cuda"])
        assert [(r.name, r.quality, r.memory) for r in spread] == [(r.name, r.quality, r.memory) for r in resident]
        assert len(spread[-1].device_bytes) == 2
        (evaluated,) = (stage for stage in spread[-1].stages if stage.name == "evaluate")
        assert [peak > 0 for _, peak in evaluated.by_device] == [True, True]
