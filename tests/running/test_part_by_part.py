"""A pipeline whose parts come and go gives the numbers of one that is resident, bit for bit."""

import pytest

import quantlab
from quantlab.errors import ConfigError
from quantlab.modules.residence import Residence
from quantlab.planning.plan import plan
from quantlab.running.forecast import forecast
from tests.support.tiny_pipelines import BUILDERS
from tests.support.tiny_text_models import TEXT, save_llama

PROMPTS = "a red fox\nthe blue cat\ntwo of a kind\n"


@pytest.fixture
def words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    return [
        *("model=diffusers", "dataset.path=prompts.txt", "device=cpu", "evaluation.num_samples=3"),
        *("evaluation.num_inference_steps=2", "evaluation.height=32", "evaluation.width=32"),
        *("evaluation.num_teacher_forced=1", "evaluation.num_bootstrap=50", "evaluation.batch_size=2"),
        *("backend=quanto", "dtype=int8", "sweep.force=true"),
    ]


def numbers(report):
    return report.quality, report.memory, report.quantization.layers, report.disk_bytes


@pytest.fixture
def watched(monkeypatch):
    """What was here whenever a part was brought; and which."""
    seen = []
    bring = Residence.bring

    def brought(self, name):
        is_new = name not in self.here
        bring(self, name)
        if is_new:
            seen.append((name, frozenset(self.here)))

    monkeypatch.setattr(Residence, "bring", brought)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flux", "sd3", "sdxl"])
def test_a_pipelines_row_is_the_same(kind, words, tmp_path, watched):
    folder = BUILDERS[kind](tmp_path / kind)
    asked = [*words, f"model.path={folder}"]
    resident = quantlab.run(overrides=[*asked, "sweep.floors=false", "output_dir=one"])[-1]
    alone = quantlab.run(overrides=[*asked, "sweep.floors=false", "output_dir=two", "memory.placement=alone"])[-1]
    assert numbers(alone) == numbers(resident)
    assert alone.planned == alone.memory
    assert all(len(here) == 1 for _, here in watched)
    denoiser = "unet" if kind == "sdxl" else "transformer"
    encoders = [name for name, _ in watched if name.startswith("text_encoder")]
    assert {"text_encoder", "vae", denoiser} <= {name for name, _ in watched}
    later = len(encoders)
    again = quantlab.run(overrides=[*asked, "sweep.floors=false", "output_dir=two", "memory.placement=alone"])[-1]
    assert numbers(again) == numbers(resident)
    assert len([name for name, _ in watched if name.startswith("text_encoder")]) == later  # prompts are on the disk


@pytest.mark.slow
def test_floors_calibrated_schemes_and_measured_encoders_are_the_same(words, tmp_path, watched):
    folder = BUILDERS["flux"](tmp_path / "flux")
    for more in (
        ["model.components=[transformer,text_encoder_2]"],
        [
            "activation_dtype=int8",
            "calibration.num_samples=2",
            "calibration.batch_size=1",
            "calibration=prompt_trajectories",
        ],
    ):
        asked = [*words, f"model.path={folder}", *more]
        resident = quantlab.run(overrides=[*asked, "output_dir=one"])
        alone = quantlab.run(overrides=[*asked, "output_dir=two", "memory.placement=alone"])
        assert [r.name for r in alone] == [r.name for r in resident]
        assert [(r.quality, r.memory) for r in alone] == [(r.quality, r.memory) for r in resident]
        assert numbers(alone[-1]) == numbers(resident[-1])


@pytest.mark.slow
def test_a_component_that_stays_as_it_is_is_counted(words, tmp_path):
    folder = BUILDERS["flux"](tmp_path / "flux")
    schemes = ["components.transformer={backend: quanto, dtype: int8}", "components.text_encoder={backend: none}"]
    asked = [*words[:-3], "sweep.force=true", f"model.path={folder}", *schemes, "sweep.floors=false"]
    resident = quantlab.run(overrides=[*asked, "output_dir=one"])[-1]
    alone = quantlab.run(overrides=[*asked, "output_dir=two", "memory.placement=alone"])[-1]
    assert set(alone.memory) == {"transformer", "text_encoder"}
    assert numbers(alone) == numbers(resident)


def test_a_model_of_one_part_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    save_llama(tmp_path / "model", hidden_size=64, intermediate_size=128)
    with pytest.raises(ConfigError, match="^memory.placement=alone: .* pass memory.placement=streamed"):
        quantlab.run(
            overrides=[
                *("model=causal_lm", f"model.path={tmp_path / 'model'}", "dataset=text", "dataset.path=text.txt"),
                *("evaluation.context_length=32", "device=cpu", "evaluation.num_samples=3", "backend=quanto"),
                *("dtype=int8", "memory.placement=alone"),
            ]
        )


@pytest.mark.slow
def test_a_pipeline_larger_than_the_budget_goes_part_by_part(words, tmp_path, watched):
    folder = BUILDERS["flux"](tmp_path / "flux")
    asked = [*words, f"model.path={folder}", "sweep.floors=false"]
    quantlab.run(overrides=[*asked, "memory.device_gib=1"])
    assert not watched
    phases = forecast(plan([*asked, "memory.device_gib=1"]))[0].phases["alone"]
    small = f"memory.device_gib={max(row.device_bytes for row in phases) / 2**30!r}"
    quantlab.run(overrides=[*asked, small])
    assert {name for name, _ in watched} == {"transformer", "vae"}  # prompts are on the disk
    quantlab.run(overrides=[*asked, small, "output_dir=two"])
    assert {name for name, _ in watched} >= {"text_encoder", "transformer", "vae"}
