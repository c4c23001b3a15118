"""What a pipeline does on the way, heard and not rebuilt: its scheduler's steps, its draws, its components' dtypes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from quantlab.modules.compute_dtype import component_dtype
from quantlab.modules.trees import replaced

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Told = Callable[["Tensor", "Tensor"], object]
"""Told (what the model predicted, the sample after the step), as the scheduler has them."""


@contextmanager
def heard_steps(scheduler: object | None, told: Told) -> Iterator[None]:
    """While open, ``told`` follows each step of ``scheduler``, and of no copy that a pipeline makes of it.

    The scheduler is of a subclass of its class meanwhile: a copy steps by itself, and signatures stay what they are.
    """
    own: Any = type(scheduler)
    if not hasattr(own, "step"):
        yield
        return

    @functools.wraps(own.step)
    def step(self: object, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs.get("model_output")
        result = own.step(self, *args, **kwargs)
        after = result[0] if isinstance(result, tuple) else getattr(result, "prev_sample", None)
        if self is scheduler and hasattr(given, "detach") and hasattr(after, "detach"):
            told(given, after)
        return result

    heard: Any = type(own.__name__, (own,), {"step": step, "__module__": own.__module__, "__doc__": own.__doc__})
    watched: Any = scheduler
    watched.__class__ = heard
    try:
        yield
    finally:
        watched.__class__ = own


@contextmanager
def full_precision_draws() -> Iterator[None]:
    """While open, 16-bit noise of a generator on the CPU is drawn in float32 and rounded.

    torch draws other numbers for other dtypes; so a sample's noise is the same in whatever dtype a candidate runs.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class Draws(TorchFunctionMode):
        def __torch_function__(
            self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> object:
            given = kwargs or {}
            dtype = given.get("dtype") or torch.get_default_dtype()
            generator = given.get("generator")
            if func is torch.randn and generator is not None and dtype in (torch.float16, torch.bfloat16):
                return func(*args, **{**given, "dtype": torch.float32}).to(dtype)
            return func(*args, **given)

    with Draws():
        yield


@contextmanager
def in_their_dtypes(
    modules: Mapping[str, torch.nn.Module], originals: Mapping[str, torch.nn.Module], default: str
) -> Iterator[None]:
    """While open, a component that computes in another dtype than the one it stands for is given and gives that one's.

    Inputs are cast but scalars and vectors (timesteps, guidance scales), which models cast themselves after embedding
    them. ``originals`` are the components as the pipeline was loaded with them.
    """
    handles = []
    for name, module in modules.items():
        inside, outside = component_dtype(module, default), component_dtype(originals[name], default)
        if module is originals[name] or inside == outside:
            continue
        handles += [
            module.register_forward_pre_hook(_inputs_cast(outside, inside), with_kwargs=True),
            module.register_forward_hook(_outputs_cast(inside, outside)),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _inputs_cast(source: torch.dtype, target: torch.dtype) -> Callable[..., Any]:
    cast = _cast(source, target, least_ndim=2)

    def before(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return replaced(args, cast), replaced(kwargs, cast)

    return before


def _outputs_cast(source: torch.dtype, target: torch.dtype) -> Callable[..., Any]:
    cast = _cast(source, target, least_ndim=0)

    def after(_: object, __: tuple[Any, ...], output: Any) -> Any:
        if not hasattr(output, "to_tuple"):
            return replaced(output, cast)
        for name in list(output):  # of the output classes of Diffusers and transformers
            output[name] = replaced(output[name], cast)
        return output

    return after


def _cast(source: torch.dtype, target: torch.dtype, least_ndim: int) -> Callable[[Any], Tensor | None]:
    import torch

    def cast(value: object) -> Tensor | None:
        if isinstance(value, torch.Tensor):
            return value.to(target) if value.dtype == source and value.ndim >= least_ndim else value
        return None

    return cast
