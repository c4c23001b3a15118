"""16-bit arithmetic on processors that have none, as what it means.

Where a CPU multiplies no bfloat16 (or float16) numbers, torch does it one by one, far slower than in float32.
The same product is the operands as they are (16 bits), multiplied and summed in float32, and the result rounded to 16
bits: what native arithmetic does, up to the order of its sums.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

num_emulated = 0
"""Products computed so in this process; a job that raised it says so in its row."""


def lacking(device: str = "cpu") -> tuple[torch.dtype, ...]:
    """The 16-bit dtypes that ``device`` cannot multiply by itself; none on a GPU."""
    import torch

    if device != "cpu":
        return ()
    has = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return tuple(dtype for dtype, there in has.items() if not there)


@contextmanager
def emulated_products(dtypes: Sequence[torch.dtype]) -> Iterator[None]:
    """While open, products and convolutions of plain tensors of ``dtypes`` are computed in float32 and rounded.

    Tensor subclasses are left to their libraries.
    """
    if not dtypes:
        yield
        return
    with _mode(tuple(dtypes)):
        yield


def _mode(dtypes: tuple[torch.dtype, ...]) -> Any:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    plain = (torch.Tensor, torch.nn.Parameter)
    products = _products()

    def widened(value: Any) -> Any:
        is_lacking = isinstance(value, torch.Tensor) and value.dtype in dtypes
        return value.float() if is_lacking else value

    def own_autocast() -> Any:
        """The autocast in which a library's operator was called: torch switches it off below a mode, and what the
        operator itself calls would be another product than without the mode."""
        with torch.overrides.enable_reentrant_dispatch():  # as it was where the operator was called
            is_open = torch.is_autocast_enabled("cpu")
        return torch.autocast("cpu", torch.get_autocast_dtype("cpu")) if is_open else nullcontext()

    class InFloat32(TorchDispatchMode):  # type: ignore[no-untyped-call]
        supports_higher_order_operators = True  # flex_attention is refused below a mode that does not say so

        @classmethod
        def is_infra_mode(cls) -> bool:
            """So that torch.compile compiles below it, which it else leaves alone without a word; what it compiles has
            kernels of its own."""
            return True

        def __torch_dispatch__(
            self,
            func: Callable[..., Any],
            types: Sequence[type],
            args: Sequence[Any] = (),
            kwargs: Mapping[str, Any] | None = None,
        ) -> Any:
            named = dict(kwargs or {})
            if func in products:
                tensors = [a for a in args if isinstance(a, torch.Tensor)]
                dtype = tensors[0].dtype
                if dtype in dtypes and all(type(t) in plain and t.device.type == "cpu" for t in tensors):
                    global num_emulated
                    num_emulated += 1
                    return func(*map(widened, args), **named).to(dtype)
            is_librarys = isinstance(func, torch._ops.OpOverload) and func.namespace != "aten"
            with own_autocast() if is_librarys else nullcontext():
                return func(*args, **named)

    return InFloat32()  # type: ignore[no-untyped-call]


@functools.cache
def _products() -> frozenset[Any]:
    import torch

    aten = torch.ops.aten
    return frozenset(
        {
            aten.mm.default,
            aten.addmm.default,
            aten.bmm.default,
            aten.baddbmm.default,
            aten.mv.default,
            aten.addmv.default,
            aten.dot.default,
            aten.linear.default,
            aten.matmul.default,
            aten.convolution.default,
        }
    )
