"""The denoiser's calls: recorded while the reference samples, replayed on a candidate (teacher forcing).

A call is a dictionary of tensors and plain values that ``torch.save`` stores and ``torch.load(weights_only=True)``
reads: ``args`` and ``kwargs`` as the denoiser got them, ``output`` (its first tensor), ``dtype`` of the component that
was recorded. The caller adds ``step``, and which samples the call belongs to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from quantlab.errors import ConfigError, MetricUndefined
from quantlab.modules.compute_dtype import component_dtype
from quantlab.vocabulary.dtypes import dtype_name


@contextmanager
def recorded_calls(
    denoiser: Any,
    key: str = "evaluation.num_teacher_forced",
    way_out: str = "set evaluation.num_teacher_forced=0 to do without the metrics of single steps",
) -> Iterator[list[dict[str, Any]]]:
    """While open, every forward call of ``denoiser`` is appended to the list that is yielded, tensors on the CPU.

    Inputs are copied before the call (a denoiser may write into them). A tensor that equals the last call's is stored
    once: prompt embeddings do not change from step to step. Raises ConfigError for an input that is not plain data:
    its message begins with ``key`` and ends with ``way_out``.
    """
    calls: list[dict[str, Any]] = []
    pending: list[dict[str, Any]] = []
    dtype = dtype_name(component_dtype(denoiser))

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        last = calls[-1] if calls else {"args": None, "kwargs": None}
        try:
            given = {"args": _stored(list(args), last["args"]), "kwargs": _stored(kwargs, last["kwargs"])}
        except TypeError as error:
            raise ConfigError(
                f"{key}: {type(denoiser).__name__} takes {error}, which cannot be stored; {way_out}"
            ) from error
        pending.append({**given, "dtype": dtype})

    def after(_: Any, __: tuple[Any, ...], ___: dict[str, Any], output: Any) -> None:
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


def replay(module: Any, call: Mapping[str, Any], device: str, default_dtype: str = "float32") -> Any:
    """What ``module`` returns on a recorded call's inputs, without gradients.

    Inputs that the recorded module got in its own compute dtype are cast to this one's, except scalars and vectors
    (timesteps, guidance scales), which models cast themselves after embedding them.
    """
    import torch

    source, target = getattr(torch, call["dtype"]), component_dtype(module, default_dtype)

    def placed(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            cast = value.dtype == source and value.ndim > 1
            # A copy where nothing changes: the record must survive a module that writes into its inputs.
            return value.to(device=device, dtype=target if cast else value.dtype, copy=True)
        if isinstance(value, Mapping):
            return {k: placed(v) for k, v in value.items()}
        return type(value)(placed(v) for v in value) if isinstance(value, (list, tuple)) else value

    with torch.no_grad():
        return module(*placed(call["args"]), **placed(call["kwargs"]))


def replayed_output(denoiser: Any, call: Mapping[str, Any], device: str, default_dtype: str = "float32") -> Any:
    """The denoiser's output on a recorded call's inputs, see :func:`replay`: float32 on the CPU."""
    import torch

    return _first_tensor(replay(denoiser, call, device, default_dtype)).detach().to("cpu", torch.float32)


def per_sample(output: Any, num_samples: int) -> Any:
    """An output (k * n, ...) as (n, d): guidance runs k conditions of the same n samples one after the other.

    Raises MetricUndefined where the output's batch is not a multiple of ``num_samples``.
    """
    if len(output) % num_samples:
        raise MetricUndefined(
            f"step_sqnr_db: the denoiser answers {len(output)} rows for {num_samples} samples, so that a row belongs "
            "to no known sample; set evaluation.batch_size=1, or evaluation.num_teacher_forced=0 to do without"
        )
    conditions = output.reshape(len(output) // num_samples, num_samples, -1)
    return conditions.transpose(0, 1).reshape(num_samples, -1)


def _first_tensor(output: Any) -> Any:
    """The prediction in what a denoiser returns: a tensor, a tuple, a Diffusers output, or a list with one a sample."""
    import torch

    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, list):
        return torch.stack(output)
    return _first_tensor(next(iter(output.values())) if isinstance(output, Mapping) else output[0])


def _stored(value: Any, last: Any) -> Any:
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
