"""What the sampler steps along: guidance is undone by least squares, whatever a pipeline's order, scale and layout."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from quantlab.errors import MetricUndefined
from quantlab.models import digits_dit
from quantlab.models.judge import build_judge, judge_features_and_logits
from quantlab.protocols.guidance import combined, guidance_weights, recorded_velocities

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


def test_a_scheduler_is_as_before_afterwards():
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
