"""What calibration data did not show: layers that never ran or saw zeros alone, channels that were silent.

Of a silent channel data say nothing, and algorithms that scale channels by their inputs would scale it by almost
nothing or almost infinity: whatever it holds later is blown up or rounded away. One rule for all: its factor is 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from quantlab.errors import ConfigError
from quantlab.vocabulary.amounts import some_of

if TYPE_CHECKING:
    from torch import Tensor


def never_ran(names: Iterable[str]) -> ConfigError:
    """The error for layers that no calibration data reached."""
    return ConfigError(
        f"calibration: {some_of(names)} never ran on the calibration data; exclude it with "
        "modules_to_not_convert, or give data that reaches it"
    )


def only_zeros(names: Iterable[str]) -> ConfigError:
    """The error for layers whose inputs were all zero, which say as little."""
    return ConfigError(
        f"calibration: {some_of(names)} got nothing but zeros on the calibration data; exclude it with "
        "modules_to_not_convert, or give data that reaches it"
    )


def with_silent_channels(factors: Tensor, is_silent: Tensor) -> Tensor:
    """Positive factors (in_features,) with 1 for the silent channels, and the geometric mean of the others at 1.

    Factors count relative to each other: a common one goes into the scales. So a silent channel is scaled like an
    average one. Where no channel is silent, or all are, ``factors`` stay as they are.
    """
    import torch

    if not bool(is_silent.any()) or bool(is_silent.all()):
        return factors
    mean = factors[~is_silent].double().log().mean().exp()
    return torch.where(is_silent, torch.ones_like(factors), (factors / mean).to(factors.dtype))
