"""Pictures of the user's own, as a model's processor makes them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from quantlab.datasets import images
from quantlab.errors import ConfigError
from quantlab.vocabulary.schema import DatasetConfig, EvaluationConfig


@pytest.mark.parametrize("shape", [(1, 4, 3, 8, 8), (16, 12)], ids=["frames of one video", "parts of pictures"])
def test_a_processor_that_makes_something_else_than_a_row_a_picture_is_refused(shape, tmp_path):
    for i in range(4):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    model = SimpleNamespace(parts={"processor": lambda **_: {"pixel_values": torch.zeros(shape)}})
    with pytest.raises(ConfigError, match=rf"^dataset.path=.*: of 4 pictures .* makes {shape[0]} inputs"):
        images.load(DatasetConfig(path=str(tmp_path)), EvaluationConfig(num_samples=4), model)
