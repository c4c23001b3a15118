"""The judge: a small CNN that says which digit a generated image shows, and whose features compare distributions.

It is a measuring instrument of this project for its own small images, not a published network: distances in its
features are named ``frechet_judge`` and never FID.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

from quantlab.models.reading import frozen

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

NUM_EPOCHS = 40
BATCH_SIZE = 64
PEAK_LR = 3e-3
NUM_FEATURES = 64


def build_judge(image_size: int = 8, num_classes: int = 10) -> nn.Sequential:
    """The untrained network: convolutions 1-32-32(stride 2)-64(stride 2), a layer of 64 features, a linear head."""
    from torch import nn

    side = (image_size + 3) // 4  # two convolutions of stride 2
    features = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * side * side, NUM_FEATURES),
        nn.ReLU(),
    )
    return nn.Sequential(OrderedDict(features=features, head=nn.Linear(NUM_FEATURES, num_classes)))


def train_judge(
    images: Tensor,
    labels: Tensor,
    *,
    seed: int,
    num_epochs: int = NUM_EPOCHS,
    progress: Callable[[int, int], object] | None = None,
) -> nn.Sequential:
    """Train a judge on the CPU; the global random state is left as it was.

    Args:
        images: float tensor (n, size, size, 1) in [0, 1].
        labels: int tensor (n,).
        seed: of the initial weights and of the order of the images.
        progress: called as ``progress(epochs done, epochs)``.

    Returns the network in eval mode: AdamW with a one-cycle schedule that peaks at 3e-3.
    """
    import torch

    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        judge = build_judge(images.shape[1], int(labels.max()) + 1).train()
        order = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(judge.parameters(), lr=PEAK_LR)
        num_batches = -(-len(images) // BATCH_SIZE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=num_epochs * num_batches)
        inputs = _network_input(images)
        for epoch in range(num_epochs):
            for batch in torch.split(torch.randperm(len(inputs), generator=order), BATCH_SIZE):
                loss = torch.nn.functional.cross_entropy(judge(inputs[batch]), labels[batch])
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
            if progress is not None:
                progress(epoch + 1, num_epochs)
    return frozen(judge)


def judge_features_and_logits(
    judge: nn.Module, images: Tensor | NDArray[np.floating]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Features (n, 64) and logits (n, classes) of ``images``, floats (n, size, size, 1) from 0 to 1.

    In float64, rounded to float32 at the end: the order of sums, which threads and batches change, leaves no trace.
    """
    import torch

    device = next(judge.parameters()).device
    judge = copy.deepcopy(judge).double()
    with torch.no_grad():
        inputs = _network_input(torch.as_tensor(images, dtype=torch.float64)).to(device)
        features = judge.get_submodule("features")(inputs)
        logits = judge.get_submodule("head")(features)
    return features.float().cpu().numpy(), logits.float().cpu().numpy()


def _network_input(images: Tensor) -> Tensor:
    """(n, size, size, 1) in [0, 1] -> (n, 1, size, size) in [-1, 1]."""
    return images.permute(0, 3, 1, 2) * 2 - 1
