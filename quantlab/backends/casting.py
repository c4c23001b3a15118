"""A layer that computes in another dtype than the model around it."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from quantlab.errors import ConfigError
from quantlab.vocabulary.dtypes import COMPUTE_DTYPES, dtype_name

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def wanted_dtype(layer: nn.Linear, compute_dtype: str | torch.dtype | None, backend: str) -> torch.dtype:
    """The torch dtype that ``layer`` shall compute in; None and ``auto`` mean the dtype of its weight.

    Raises ConfigError for a name that is not one of float32, bfloat16, float16.
    """
    import torch

    if compute_dtype is None or dtype_name(compute_dtype) == "auto":
        return layer.weight.dtype
    name = dtype_name(compute_dtype)
    if name not in COMPUTE_DTYPES:
        raise ConfigError(f"compute_dtype={name}: {backend} computes in {', '.join(COMPUTE_DTYPES)}; choose one")
    return getattr(torch, name)


def cast_around(layer: nn.Module, inside: torch.dtype, outside: torch.dtype) -> None:
    """Let ``layer`` see its input in the dtype ``inside`` and give its output in ``outside``; nothing where equal.

    Hooks that are on the layer see both in ``outside``, as they did.
    """
    if inside != outside:
        layer.register_forward_pre_hook(functools.partial(_cast_input, inside), with_kwargs=True)
        layer.register_forward_hook(functools.partial(_cast_output, outside), prepend=True)


def by_place(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A pre-hook for libraries whose own see no named arguments: ``layer(input=x)`` becomes ``layer(x)``."""
    return (args, kwargs) if args else ((kwargs["input"],), {})


def _cast_input(
    dtype: torch.dtype, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (args[0].to(dtype), *args[1:]), kwargs
    return args, {**kwargs, "input": kwargs["input"].to(dtype)}


def _cast_output(dtype: torch.dtype, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.to(dtype)
