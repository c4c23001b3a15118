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


def sampled(name: str, config: dict[str, Any], wrong: int | None = None) -> tuple[Any, Any, int]:
    """The final latent of given predictions, of which one step's is off by ERROR; the scheduler and its steps."""
    import torch

    scheduler, draw = sampler(name, config), torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 8, 8, generator=draw).double() * float(scheduler.init_noise_sigma)
    for k, t in enumerate(scheduler.timesteps):
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


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("LCMScheduler", LATENT),
        ("TCDScheduler", LATENT),
        ("CMStochasticIterativeScheduler", {}),
        ("FlowMatchLCMScheduler", {}),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    ],
)
def test_samplers_that_go_to_the_end_and_noise_anew_have_no_levels(name, config):
    scheduler = sampler(name, config)
    assert integration_levels(scheduler, len(scheduler.timesteps)) is None


@pytest.mark.parametrize(("name", "config"), [("SASolverScheduler", LATENT), ("DDIMInverseScheduler", {})])
def test_samplers_with_weights_of_their_own_or_that_end_in_noise_have_no_levels(name, config):
    """SA-Solver's last latent had a seventh of the expected squared error, or three times it; inversion a hundredth."""
    scheduler = sampler(name, config)
    assert integration_levels(scheduler, len(scheduler.timesteps)) is None
