"""What a pipeline does on the way, heard and not rebuilt: its scheduler's steps, its draws, its components' dtypes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from quantlab.modules.compute_dtype import component_dtype, torch_dtype
from quantlab.modules.residence import METHODS
from quantlab.modules.trees import replaced
from quantlab.vocabulary.dtypes import dtype_name

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Told = Callable[["Tensor", "Tensor"], object]
"""Told (what the model predicted, the sample after the step), as the scheduler has them."""
_INHERITED = object()


@contextmanager
def heard_steps(scheduler: object | None, told: Told) -> Iterator[None]:
    """While open, ``told`` follows each step of ``scheduler``, and of no copy that a pipeline makes of it.

    Its class steps through us meanwhile and is no other: pipelines ask for it by ``type(scheduler) != ...``.
    """
    import torch

    own: Any = type(scheduler)
    if not hasattr(own, "step"):
        yield
        return

    inner = own.step

    @functools.wraps(inner)
    def step(self: object, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs.get("model_output")
        result = inner(self, *args, **kwargs)
        after = result[0] if isinstance(result, tuple) else getattr(result, "prev_sample", None)
        if self is scheduler and isinstance(given, torch.Tensor) and isinstance(after, torch.Tensor):
            told(given, after)
        return result

    with _attribute(own, "step", step):
        yield


@contextmanager
def _attribute(own: object, name: str, value: object) -> Iterator[None]:
    """While open, ``value`` is what a class or a module has by ``name``; afterwards its own, or what it inherits."""
    before = vars(own).get(name, _INHERITED)
    setattr(own, name, value)
    try:
        yield
    finally:
        if before is _INHERITED:
            delattr(own, name)
        else:
            setattr(own, name, before)


_MADE = ("randn", "rand", "randn_like", "rand_like", "normal", "multinomial")
_FILLED = ("normal_", "uniform_", "exponential_", "log_normal_", "cauchy_")
"""Draws of torch and of its tensors whose numbers depend on the dtype that they are drawn in."""


@contextmanager
def paired_draws(reference: Sequence[Sequence[str]]) -> Iterator[list[list[str]]]:
    """While open, what is drawn at random is drawn in the dtypes that the reference drew in, and cast to what is asked.

    torch draws other numbers for other dtypes. Told and given is a list of dtypes for the draws without a generator,
    then one for each generator, in the order in which they first draw. ``reference``: empty for the reference itself,
    which draws as Diffusers does, so that a seed gives Diffusers' own image.
    """
    import torch

    of: dict[object, tuple[list[str], Sequence[str]]] = {None: ([], reference[0] if reference else ())}

    def paired(generator: object, asked: torch.dtype) -> torch.dtype:
        """The dtype of the next draw."""
        theirs = reference[min(len(of), len(reference) - 1)] if reference else ()
        drawn, known = of.setdefault(generator, ([], theirs))
        dtype = torch_dtype(known[len(drawn)]) if len(drawn) < len(known) else asked
        drawn.append(dtype_name(dtype))
        return dtype

    def making(own: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
        @functools.wraps(own)
        def draw(*args: Any, **kwargs: Any) -> Tensor:
            given = () if name in ("randn", "rand") else (*args, *kwargs.values())
            like = next((t.dtype for t in given if isinstance(t, torch.Tensor)), torch.get_default_dtype())
            asked = kwargs.get("dtype") or like
            dtype = paired(kwargs.get("generator"), asked)
            if name == "multinomial":  # positions, drawn by weights of a dtype
                return own(*replaced(args, _cast(asked, dtype, 0)), **replaced(kwargs, _cast(asked, dtype, 0)))
            if name == "normal" and like != dtype:
                args, kwargs = replaced(args, _cast(like, dtype, 0)), replaced(kwargs, _cast(like, dtype, 0))
            takes_dtype = name != "normal" or not any(isinstance(t, torch.Tensor) for t in given)
            return own(*args, **{**kwargs, **({"dtype": dtype} if takes_dtype else {})}).to(asked)

        return draw

    def filling(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(own)
        def draw(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            dtype = paired(kwargs.get("generator"), tensor.dtype)
            if dtype == tensor.dtype:
                return own(tensor, *args, **kwargs)
            # of the same strides, by which torch chooses how it draws
            like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=tensor.device)
            return tensor.copy_(own(like, *args, **kwargs))

        return draw

    told: list[list[str]] = []
    with ExitStack() as heard:
        # a mode that hears every call would slow each of the denoiser's down
        for name in _MADE:
            heard.enter_context(_attribute(torch, name, making(getattr(torch, name), name)))
        for name in _FILLED:
            heard.enter_context(_attribute(torch.Tensor, name, filling(getattr(torch.Tensor, name))))
        yield told
    told.extend(drawn for drawn, _ in of.values())


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """While open, Python and NumPy draw what belongs to ``seed``, whoever drew before; then go on as if nothing was."""
    import random

    import numpy as np

    python, numbers = random.getstate(), np.random.get_state()  # noqa: NPY002  the state that pipelines draw from
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)  # noqa: NPY002


@contextmanager
def in_their_dtypes(
    modules: Mapping[str, torch.nn.Module], originals: Mapping[str, torch.nn.Module], default: str
) -> Iterator[None]:
    """While open, a component that computes in another dtype than the one it stands for is given and gives that one's.

    ``originals`` are the components as the pipeline was loaded with them. See :func:`cast_call`. A pipeline that asks
    for its ``dtype`` is told that one's as well: it is what noise is drawn in. An autoencoder, which pipelines widen
    by what it says, says its own, and is given what it then computes in.
    """
    changed: list[tuple[Any, dict[str, Any]]] = []
    with ExitStack() as said:
        for name, module in modules.items():
            inside, outside = component_dtype(module, default), component_dtype(originals[name], default)
            if module is not originals[name] and inside != outside:
                called = [method for method in ("forward", *METHODS) if callable(getattr(module, method, None))]
                changed.append((module, {method: vars(module).get(method) for method in called}))
                within: list[None] = []
                for method in called:
                    vars(module)[method] = _between(getattr(module, method), module, outside, default, within)
                if isinstance(getattr(type(module), "dtype", None), property) and not hasattr(module, "decode"):
                    said.enter_context(_attribute(type(module), "dtype", _outside(module, outside, within)))
        try:
            yield
        finally:
            for module, before in changed:
                for method, value in before.items():
                    del vars(module)[method]
                    if value is not None:
                        vars(module)[method] = value


def _outside(module: Any, outside: torch.dtype, within: Sequence[None]) -> property:
    """A ``dtype`` that is ``outside`` for ``module``, except ``within`` its forward, and for others their own."""
    own: Any = type(module).dtype

    def dtype(self: Any) -> torch.dtype:
        said: torch.dtype = own.fget(self)
        return outside if self is module and not within else said

    return property(dtype)


def _between(
    own: Callable[..., Any], module: torch.nn.Module, outside: torch.dtype, default: str, within: list[None]
) -> Callable[..., Any]:
    import torch

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        inside = component_dtype(module, default)  # now: its pipeline may have widened it meanwhile
        within.append(None)
        try:
            output = cast_call(own, args, kwargs, outside, inside)
        finally:
            within.pop()
        plain = _cast(inside, outside, least_ndim=0)

        def back(value: object) -> Any:
            if isinstance(
                getattr(value, "parameters", None), torch.Tensor
            ):  # a distribution, as of a picture's latents
                vars(value).update(replaced(vars(value), plain))
                return value
            return plain(value)

        if not hasattr(output, "to_tuple"):
            return replaced(output, back)
        for name in list(output):  # of the output classes of Diffusers and transformers
            output[name] = replaced(output[name], back)
        return output

    return forward


def cast_call(
    function: Callable[..., Any], args: Any, kwargs: Mapping[str, Any], source: torch.dtype, target: torch.dtype
) -> Any:
    """What ``function`` returns, its inputs of dtype ``source`` cast to ``target``: of a call by another dtype's rules.

    Scalars and vectors (timesteps, guidance scales) stay as they are, for models cast them themselves after embedding
    them, unless the function fails on that: some take the dtype of what they compute from their timesteps.
    """
    for least in (2, 0):
        cast = _cast(source, target, least)
        try:
            return function(*replaced(args, cast), **replaced(kwargs, cast))
        except RuntimeError as error:
            if least == 0 or source == target or "dtype" not in str(error):
                raise
    raise AssertionError("a call returns or raises")


def _cast(source: torch.dtype, target: torch.dtype, least_ndim: int) -> Callable[[Any], Tensor | None]:
    import torch

    def cast(value: object) -> Tensor | None:
        if isinstance(value, torch.Tensor):
            return value.to(target) if value.dtype == source and value.ndim >= least_ndim else value
        return None

    return cast
