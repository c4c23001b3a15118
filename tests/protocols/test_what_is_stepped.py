"""Of what a denoiser predicts its sampler steps a part, in an order of its own: step_sqnr_db is of that part."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantlab.errors import MetricUndefined
from quantlab.protocols.teacher_forced import _pair

MADE = torch.Generator().manual_seed(0)
GUIDED = 3.0


def predicted(*shape):
    return torch.randn(2, *shape, generator=MADE)


def whole(prediction):
    return prediction


def first_half_of_the_channels(prediction):
    """The other half are variances."""
    return prediction[:, : prediction.shape[1] // 2]


def first_tokens(prediction):
    """The others are those of a picture that was given."""
    return prediction[:, :5]


def last_tokens(prediction):
    """The others are those of a prompt."""
    return prediction[:, -5:]


def all_frames_but_the_first(prediction):
    """It is the picture that the video starts from."""
    return prediction[:, :, 1:]


def all_frames_but_the_first_channels_last(prediction):
    return prediction[:, 1:]


def tokens_as_a_video(prediction):
    return prediction.transpose(1, 2).unflatten(2, (3, 2, 4))[:, :, 1:]


@pytest.mark.parametrize(
    ("shape", "part"),
    [
        ((4, 6, 5), whole),
        ((8, 6, 5), first_half_of_the_channels),
        ((9, 6), first_tokens),
        ((9, 6), last_tokens),
        ((4, 3, 2, 5), all_frames_but_the_first),
        ((3, 2, 5, 4), all_frames_but_the_first_channels_last),
        ((24, 6), tokens_as_a_video),
    ],
)
def test_the_error_is_that_of_what_is_stepped(shape, part):
    u, c, wrong_u, wrong_c = (predicted(*shape) for _ in range(4))
    recorded, answered = torch.cat([u, c]), torch.cat([u + 0.1 * wrong_u, c + 0.1 * wrong_c])
    call = {"args": [], "kwargs": {}, "output": recorded, "start": 0, "stop": 2, "velocity": part(u + GUIDED * (c - u))}
    candidate, reference = _pair([(call, answered)])
    expected = part(0.1 * (wrong_u + GUIDED * (wrong_c - wrong_u)))
    for found, wanted in ((candidate - reference, expected), (reference, call["velocity"])):
        np.testing.assert_allclose(found.norm(dim=1), wanted.flatten(1).norm(dim=1), rtol=1e-4)


def test_denoisers_that_predict_other_lengths_are_put_together():
    """As Ideogram 4: with a prompt it stands before the image, the denoiser for none knows the image alone."""
    with_prompt, without = predicted(9, 6), predicted(5, 6)
    velocity = -(GUIDED * with_prompt[:, 4:] + (1 - GUIDED) * without)
    shared = {"args": [], "kwargs": {}, "start": 0, "stop": 2}
    calls = [{**shared, "output": with_prompt, "velocity": velocity}, {**shared, "output": without}]
    candidate, reference = _pair([(call, 1.1 * call["output"]) for call in calls])
    np.testing.assert_allclose(reference, velocity.flatten(1), atol=1e-5)
    np.testing.assert_allclose(candidate, 1.1 * reference, rtol=1e-4, atol=1e-5)
    del calls[0]["velocity"]
    with pytest.raises(MetricUndefined, match="no weighted sum"):
        _pair([(call, call["output"]) for call in calls])
