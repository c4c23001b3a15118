"""The denoiser's calls: recorded while the reference samples, replayed on a candidate (teacher forcing).

A call is a dictionary of tensors and plain values, which :mod:`quantlab.modules.kept` stores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Required, TypedDict

from quantlab.errors import ConfigError, MetricUndefined
from quantlab.modules.compute_dtype import component_dtype, torch_dtype
from quantlab.modules.stepping import cast_call
from quantlab.modules.trees import replaced
from quantlab.vocabulary.dtypes import dtype_name

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Progress = Callable[[int, int], object]
"""Told (done, total) after each part of a piece of work."""


class NotKept(ConfigError):
    """A call is given what is neither a tensor nor plain data (a mask that is a function, a cache): it cannot be stored
    and replayed, though the module runs."""


class Call(TypedDict, total=False):
    """One forward call of a module."""

    args: Required[Sequence[Any]]
    kwargs: Required[Mapping[str, Any]]
    dtype: Required[str]
    """What the recorded component computed in."""
    output: Tensor
    """The first tensor of what it returned, on the CPU."""
    velocity: Tensor
    """What the sampler stepped along, on the CPU, float32 (n, ...); of the first call of a step, where it is known."""
    component: str
    """Which denoiser was called, where a model has several."""
    step: int
    """Denoising step; 0 for models without. Whoever records adds it, and which samples the call belongs to."""
    start: int
    stop: int
    processors: Mapping[str, str]
    """Part -> class of the attention that a pipeline gave it for this call alone; "" for one that has a state."""


@contextmanager
def recorded_calls(
    denoiser: torch.nn.Module,
    key: str = "evaluation.num_teacher_forced",
    way_out: str = "set evaluation.num_teacher_forced=0 to do without the metrics of single steps",
) -> Iterator[list[Call]]:
    """While open, every forward call of ``denoiser`` is appended to the list that is yielded, tensors on the CPU.

    Inputs are copied before the call (a denoiser may write into them). A tensor that equals the last call's is stored
    once: prompt embeddings do not change from step to step. Raises NotKept for an input that is not plain data:
    its message begins with ``key`` and ends with ``way_out``.
    """
    calls: list[Call] = []
    pending: list[Call] = []
    dtype = dtype_name(component_dtype(denoiser))
    own = _processors(denoiser)

    def before(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        last_args, last_kwargs = (calls[-1]["args"], calls[-1]["kwargs"]) if calls else (None, None)
        try:
            given, named = _stored(list(args), last_args), _stored(kwargs, last_kwargs)
        except TypeError as error:
            raise NotKept(
                f"{key}: {type(denoiser).__name__} takes {error}, which cannot be stored; {way_out}"
            ) from error
        pending.append({"args": given, "kwargs": named, "dtype": dtype})
        changed = {path: made for path, made in _processors(denoiser).items() if made is not own.get(path)}
        if changed:
            pending[-1]["processors"] = {path: _named(made) for path, made in changed.items()}

    def after(_: torch.nn.Module, __: tuple[Any, ...], ___: dict[str, Any], output: Any) -> None:
        calls.append({**pending.pop(), "output": _first_tensor(output).detach().to("cpu", copy=True)})

    handles = [
        denoiser.register_forward_pre_hook(before, with_kwargs=True),
        denoiser.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def replay(module: torch.nn.Module, call: Call, device: str, default_dtype: str = "float32") -> Any:
    """What ``module`` returns on a recorded call's inputs, without gradients.

    Inputs that the recorded module got in its own compute dtype are cast to this one's, see
    :func:`~quantlab.modules.stepping.cast_call`.
    """
    import torch

    source, target = torch_dtype(call["dtype"]), component_dtype(module, default_dtype)

    def placed(value: object) -> Tensor | None:
        # A copy where nothing changes: the record must survive a module that writes into its inputs.
        return value.to(device=device, copy=True) if isinstance(value, torch.Tensor) else None

    with torch.no_grad(), _attending(module, call.get("processors", {})):
        return cast_call(module, replaced(call["args"], placed), replaced(call["kwargs"], placed), source, target)


def is_replayable(call: Call) -> bool:
    """Whether :func:`replay` does what the recorded module did: not where its attention had a state of that call."""
    return all(call.get("processors", {}).values())


def _processors(module: torch.nn.Module) -> dict[str, Any]:
    """Path -> what computes its attention, of the parts that let it be changed as Diffusers' do."""
    found = {path: getattr(part, "processor", None) for path, part in module.named_modules()}
    return {path: made for path, made in found.items() if type(made).__module__.startswith("diffusers.")}


def _named(processor: object) -> str:
    """The class of a processor that is the same wherever it is made of it; "" for another."""
    from diffusers.models import attention_processor

    made = type(processor)
    is_known = getattr(attention_processor, made.__name__, None) is made
    return made.__name__ if is_known and not vars(processor) else ""


@contextmanager
def _attending(module: torch.nn.Module, processors: Mapping[str, str]) -> Iterator[None]:
    """While open, parts have the attention that a recorded call had; those whose attention had a state, their own."""
    if not any(processors.values()):
        yield
        return
    from diffusers.models import attention_processor

    changed: list[tuple[Any, Any]] = []
    try:
        for path, name in processors.items():
            if name:
                part: Any = module.get_submodule(path)
                changed.append((part, part.processor))
                part.processor = getattr(attention_processor, name)()
        yield
    finally:
        for part, processor in changed:
            part.processor = processor


def replayed_output(denoiser: torch.nn.Module, call: Call, device: str, default_dtype: str = "float32") -> Tensor:
    """The denoiser's output on a recorded call's inputs, see :func:`replay`: float32 on the CPU."""
    import torch

    return _first_tensor(replay(denoiser, call, device, default_dtype)).detach().to("cpu", torch.float32)


def per_sample(output: Tensor, num_samples: int) -> Tensor:
    """An output (k * n, ...) as (n, k, d): guidance runs k conditions of the same n samples one after the other.

    Raises MetricUndefined where the output's batch is not a multiple of ``num_samples``.
    """
    if len(output) % num_samples:
        raise MetricUndefined(
            f"step_sqnr_db: the denoiser answers {len(output)} rows for {num_samples} samples, so that a row belongs "
            "to no known sample; set evaluation.batch_size=1, or evaluation.num_teacher_forced=0 to do without"
        )
    conditions = output.reshape(len(output) // num_samples, num_samples, -1)
    return conditions.transpose(0, 1)


def _first_tensor(output: Any) -> Tensor:
    """The prediction in what a denoiser returns: a tensor, a tuple, a Diffusers output, or a list with one a sample.

    A ControlNet's list is of other sizes, one a level of the network: the first.
    """
    import torch

    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, list) and len({one.shape for one in output}) == 1:
        return torch.stack(output)
    return _first_tensor(next(iter(output.values())) if isinstance(output, Mapping) else output[0])


def _stored(value: Any, last: object) -> Any:
    """``value`` with its tensors copied to the CPU; ``last`` is the same place of the previous call."""
    import torch

    if isinstance(value, torch.Tensor):
        copy = value.detach().to("cpu", copy=True)
        same = isinstance(last, torch.Tensor) and last.dtype == copy.dtype and torch.equal(last, copy)
        return last if same else copy
    if isinstance(value, Mapping):
        known = last if isinstance(last, Mapping) else {}
        return {str(k): _stored(v, known.get(str(k))) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        known_items = last if isinstance(last, (list, tuple)) and len(last) == len(value) else [None] * len(value)
        items = [_stored(v, k) for v, k in zip(value, known_items, strict=True)]
        return tuple(items) if isinstance(value, tuple) else items
    if value is None or type(value) in (bool, int, float, str) or isinstance(value, torch.dtype):
        return value
    raise TypeError(f"a {type(value).__name__}")
