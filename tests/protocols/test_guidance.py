"""What the sampler steps along: guidance is undone by least squares, whatever a pipeline's order, scale and layout."""

from __future__ import annotations

import copy
import inspect

import numpy as np
import pytest
import torch

from quantlab.errors import MetricUndefined
from quantlab.models import digits_dit
from quantlab.models.judge import build_judge, judge_features_and_logits
from quantlab.protocols.guidance import combined, guidance_weights, guided, recorded_velocities

PREDICTIONS = torch.randn(4, 2, 300, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("weights", [(1 - 3.5, 3.5), (3.5, 1 - 3.5), (0.3, 0.7), (-4.0, 3.0), (0.0, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_of_guidance_are_found(weights, dtype):
    a, b = PREDICTIONS.to(dtype).unbind(1)
    velocity = (weights[0] * a + weights[1] * b).float()
    found = guidance_weights(PREDICTIONS.to(dtype).float(), velocity)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    np.testing.assert_allclose(found, np.tile(weights, (4, 1)), atol=tolerance)


def test_rescaling_by_sample_and_equal_predictions():
    scale = torch.tensor([1.0, 0.7, 2.0, 1.1])[:, None]
    u, c = PREDICTIONS.unbind(1)
    velocity = scale * (u + 5 * (c - u))
    np.testing.assert_allclose(combined(PREDICTIONS, guidance_weights(PREDICTIONS, velocity)), velocity, atol=1e-4)
    same = torch.stack([u, u], dim=1)
    np.testing.assert_allclose(combined(same, guidance_weights(same, u)), u, atol=1e-5)
    three = torch.randn(4, 3, 300)
    velocity = three[:, 0] + 2 * (three[:, 1] - three[:, 2])
    np.testing.assert_allclose(combined(three, guidance_weights(three, velocity)), velocity, atol=1e-4)


@pytest.mark.parametrize("velocity", [PREDICTIONS.prod(1), None, torch.randn(4, 150)])
def test_what_is_no_weighted_sum_is_undefined(velocity):
    with pytest.raises(MetricUndefined, match=r"^step_sqnr_db: .*no weighted sum.*guidance_scale=1$"):
        guidance_weights(PREDICTIONS, velocity)
    assert guidance_weights(PREDICTIONS[:, :1], None).tolist() == [[1.0]] * 4


def test_a_norm_for_each_token_is_undone_token_by_token():
    """As Qwen-Image and its like guide: u + s (c - u), each token with the norm that c has there."""
    u, c = torch.randn(2, 3, 5, 64, generator=torch.Generator().manual_seed(1))
    mixed = u + 4 * (c - u)
    velocity = (mixed * c.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True)).flatten(1)
    predictions = torch.stack([c.flatten(1), u.flatten(1)], dim=1)
    with pytest.raises(MetricUndefined):
        guidance_weights(predictions, velocity)
    candidate, reference = guided(1.5 * predictions, predictions, velocity, width=64)
    np.testing.assert_allclose(reference, velocity, atol=1e-4)
    np.testing.assert_allclose(candidate, 1.5 * velocity, atol=1e-4)
    with pytest.raises(MetricUndefined):
        guided(predictions, predictions, velocity, width=5)


def test_a_velocity_of_another_size_is_undefined():
    with pytest.raises(MetricUndefined):
        guided(PREDICTIONS, PREDICTIONS, torch.randn(4, 151), width=20)  # whole tokens of the predictions, not of it


def test_what_is_rescaled_as_the_image_predicted_has_a_share_of_the_sample_in_it():
    """As LTX-2 guides: predictions become images, x - sigma v, their sum is rescaled, and becomes a velocity again."""
    x, error = torch.randn(2, 4, 1, 300, generator=torch.Generator().manual_seed(2)).unbind()
    u, c = PREDICTIONS.unbind(1)
    sigma, scale = 0.6, torch.tensor([0.9, 0.8, 1.0, 0.85])[:, None]
    image = scale * (x[:, 0] - sigma * (u + 4 * (c - u)))
    velocity = (x[:, 0] - image) / sigma
    candidate = PREDICTIONS + 0.01 * error
    with pytest.raises(MetricUndefined):
        guided(candidate, PREDICTIONS, velocity, width=5)
    found, reference = guided(candidate, PREDICTIONS, velocity, width=5, sample=x)
    np.testing.assert_allclose(reference, velocity, atol=1e-4)
    np.testing.assert_allclose(found - reference, scale * 0.01 * error[:, 0], atol=1e-4)


def test_a_sample_that_has_no_part_in_it_is_left_out():
    """Also one that is nearly a prediction, as noise is at first, of predictions that 16 bits round."""
    a, b = PREDICTIONS.unbind(1)
    velocity = (2 * a - b).bfloat16().float()
    beside = (a + 0.001 * b)[:, None]
    for sample in (beside, torch.zeros_like(beside), beside[..., :7]):
        candidate, reference = guided(1.1 * PREDICTIONS, PREDICTIONS, velocity, width=5, sample=sample)
        np.testing.assert_allclose(candidate, 1.1 * reference, rtol=1e-5, atol=1e-6)


def test_a_scheduler_is_as_before_afterwards():
    from diffusers import DDIMScheduler

    scheduler = digits_dit.sampling_scheduler()
    own = inspect.signature(scheduler.step)
    with recorded_velocities(scheduler) as seen:
        assert inspect.signature(scheduler.step) == own  # pipelines look for eta
        scheduler.set_timesteps(2)
        x = torch.randn(1, 1, 8, 8)
        scheduler.step(model_output=x, timestep=scheduler.timesteps[0], sample=x)
        scheduler.step(2 * x, scheduler.timesteps[1], x)
    assert [torch.equal(a, b) for a, b in zip(seen, (x, 2 * x), strict=True)] == [True, True]
    assert "step" not in vars(scheduler)
    assert type(scheduler) is DDIMScheduler


def test_a_copy_of_a_scheduler_steps_by_itself_and_is_not_heard():
    """Pipelines that make two things at once copy their scheduler for the second."""
    scheduler, x = digits_dit.sampling_scheduler(), torch.randn(1, 1, 8, 8)
    scheduler.set_timesteps(2)
    with recorded_velocities(scheduler) as seen:
        other = copy.deepcopy(scheduler)
        other.set_timesteps(4)
        other.step(x, other.timesteps[0], x)
        assert seen == []
        scheduler.step(x, scheduler.timesteps[0], x)
    assert len(seen) == 1
    assert scheduler.num_inference_steps == 2
    with recorded_velocities(None) as seen:
        assert seen == []


# -- the judge


def test_what_the_judge_sees_does_not_depend_on_threads_or_batches():
    torch.manual_seed(0)
    judge = build_judge(8).eval()
    images = torch.rand(400, 8, 8, 1)
    was, found = torch.get_num_threads(), []
    try:
        for num_threads, size in ((1, 400), (2, 400), (4, 400), (3, 37), (1, 1)):
            torch.set_num_threads(num_threads)
            parts = [judge_features_and_logits(judge, part) for part in images.split(size)]
            found.append([np.concatenate(column) for column in zip(*parts, strict=True)])
    finally:
        torch.set_num_threads(was)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(a, b)
    assert all(part.dtype == np.float32 for part in found[0])
    assert next(judge.parameters()).dtype == torch.float32
