"""The noise levels that weight the velocity error, against what each of Diffusers' samplers makes of an error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from quantlab.protocols.teacher_forced import integration_levels

ERROR = 1e-3
LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def sampler(name: str, config: dict[str, Any]) -> Any:
    import diffusers

    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(8)
    return scheduler


def sampled(
    name: str, config: dict[str, Any], wrong: int | None = None, begin: int = 0, end: int | None = None
) -> tuple[Any, Any, int]:
    """The final latent of given predictions, of which one step's is off by ERROR; the scheduler and its steps."""
    import torch

    scheduler, draw = sampler(name, config), torch.Generator().manual_seed(0)
    if begin:
        scheduler.set_begin_index(begin)
    x = torch.randn(1, 4, 8, 8, generator=draw).double() * float(getattr(scheduler, "init_noise_sigma", 1))
    for k, t in enumerate(scheduler.timesteps[begin:end]):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        predicted = torch.randn(x.shape, generator=draw).double() + (ERROR if k == wrong else 0.0)
        x = scheduler.step(predicted, t, x).prev_sample.double()
    return x, scheduler, k + 1


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DDIMScheduler", {**LATENT, "clip_sample": False}),
        ("DDIMScheduler", {**LATENT, "clip_sample": False, "prediction_type": "v_prediction"}),
        ("EulerDiscreteScheduler", LATENT),
        ("DPMSolverMultistepScheduler", LATENT),
        ("DPMSolverMultistepScheduler", {**FLOW, "flow_shift": 3}),
        ("UniPCMultistepScheduler", {**FLOW, "flow_shift": 3}),
        ("HeunDiscreteScheduler", LATENT),  # asks twice a step
        ("PNDMScheduler", {**LATENT, "skip_prk_steps": True}),  # asks twice in its first
        ("EDMEulerScheduler", {}),  # what is predicted is neither the noise nor a velocity of it
        ("EDMEulerScheduler", {"prediction_type": "v_prediction", "sigma_data": 1.5}),
        ("EDMDPMSolverMultistepScheduler", {}),
    ],
)
def test_levels_tell_what_a_sampler_makes_of_an_error(name, config):
    right, scheduler, num_steps = sampled(name, config)
    levels = integration_levels(scheduler, num_steps)
    effects = [float((sampled(name, config, wrong=k)[0] - right).mean()) / ERROR for k in range(num_steps)]
    assert np.diff(levels).all()
    ratio = float(np.square(effects).sum() / (np.diff(levels) ** 2).sum())
    assert 0.4 < ratio < 2.5  # to first order: eight steps are coarse, and some samplers extrapolate


@pytest.mark.parametrize(("begin", "end"), [(4, None), (0, 5)])
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("EulerDiscreteScheduler", LATENT),
        ("DPMSolverMultistepScheduler", LATENT),
        ("HeunDiscreteScheduler", LATENT),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ],
)
def test_levels_of_a_part_of_the_steps_are_those_of_this_part(name, config, begin, end):
    """As from a picture with a strength, or up to SDXL's denoising_end."""
    part = {"begin": begin, "end": end}
    right, scheduler, num_steps = sampled(name, config, **part)
    levels = integration_levels(scheduler, num_steps)
    assert num_steps < len(scheduler.timesteps)
    assert len(levels) == num_steps + 1
    effects = [float((sampled(name, config, k, **part)[0] - right).mean()) / ERROR for k in range(num_steps)]
    assert 0.3 < float(np.square(effects).sum() / (np.diff(levels) ** 2).sum()) < 2.5


@pytest.mark.parametrize("name", ["KDPM2DiscreteScheduler", "DDIMScheduler"])
def test_a_part_of_which_nothing_is_said_has_no_levels(name):
    """Whose levels are not one a step, or which do not count their steps."""
    scheduler = sampled(name, {**LATENT, **({"clip_sample": False} if name == "DDIMScheduler" else {})}, end=5)[1]
    assert integration_levels(scheduler, 5) is None


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
        ("DDPMScheduler", {"clip_sample": False, "thresholding": True}),
        ("DDIMScheduler", {}),
        ("UnCLIPScheduler", {}),
    ],
)
def test_samplers_that_cut_off_what_they_make_of_noise_have_no_levels(name, config):
    """UnCLIP's first weight was 4e8, of an error of which nothing is left."""
    scheduler = sampler(name, config)
    assert integration_levels(scheduler, len(scheduler.timesteps)) is None
    if name != "UnCLIPScheduler":
        velocity = sampler(name, {**config, "prediction_type": "v_prediction"})  # an angle, none is large
        assert integration_levels(velocity, len(velocity.timesteps)).max() <= np.pi / 2


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("LCMScheduler", LATENT),
        ("TCDScheduler", LATENT),
        ("CMStochasticIterativeScheduler", {}),
        ("FlowMatchLCMScheduler", {}),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
        ("SASolverScheduler", LATENT),
        ("DDIMInverseScheduler", {}),
    ],
)
def test_samplers_that_noise_anew_have_weights_of_their_own_or_end_in_noise_have_no_levels(name, config):
    """SA-Solver's last latent had a seventh of the expected squared error, or three times it; inversion a hundredth."""
    scheduler = sampler(name, config)
    assert integration_levels(scheduler, len(scheduler.timesteps)) is None
